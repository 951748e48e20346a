"""`comparison.html` and `comparison.json`: methods beside each other, one picture and one table for each measure. No network needed."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcore_longctx.manifest import versions, write_atomic
from mcore_longctx.report.comparison import Comparison, Figure, Measure
from mcore_longctx.report.style import INK, colour, figure_in_style, svg
from mcore_longctx.report.templating import environment

__all__ = ["COMPARISON", "write_comparison"]

COMPARISON = "comparison.html"


def write_comparison(comparison: Comparison, folder: Path, *, title: str, evaluation: str) -> Path:
    """Write both files into `folder`, each whole or not at all. Returns the path of the page.

    Args:
        comparison: what is shown.
        folder: where.
        title: of the page.
        evaluation: what was measured, in a sentence.
    """
    facts = {"title": title, "evaluation": evaluation, **comparison.as_dict(), "versions": versions()}
    write_atomic(folder / "comparison.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            title=title,
            evaluation=evaluation,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            arms=comparison.arms,
            measures=[(measure, _picture(comparison, measure), _rows(comparison, measure)) for measure in comparison.measures],
            versions=versions(),
        )
    )
    path = folder / COMPARISON
    write_atomic(path, page)
    return path


def _rows(comparison: Comparison, measure: Measure) -> list[dict[str, Any]]:
    arms = [(arm.name, comparison.figures.get((arm.name, measure.name))) for arm in comparison.arms]
    if measure.name in comparison.base:
        arms.insert(0, ("base, not trained", comparison.base[measure.name]))
    return [{"name": name, "missing": True} if figure is None else _row(name, measure, figure) for name, figure in arms]


def _row(name: str, measure: Measure, figure: Figure) -> dict[str, Any]:
    scale, digits = (100, 1) if measure.kind == "rate" else (1, 3)
    difference = ""
    if figure.difference is not None:
        ends = _ends(figure.difference_low, figure.difference_high, scale, f"+.{digits}f")
        difference = f"{scale * figure.difference:+.{digits}f} ({ends})"
    return {
        "name": name,
        "count": "" if figure.right is None else f"{figure.right:,.10g}/{figure.all:,}",
        "mean": f"{scale * figure.mean:.{digits}f}",
        "interval": _ends(figure.low, figure.high, scale, f".{digits}f"),
        "runs": ", ".join(f"{scale * value:.{digits}f}" for value in figure.runs.values()),
        "difference": difference,
        "differs": figure.differs,
    }


def _ends(low: float | None, high: float | None, scale: float, form: str) -> str:
    if low is None or high is None or not math.isfinite(high - low):
        return "one run"
    return f"{scale * low:{form}} to {scale * high:{form}}"


def _picture(comparison: Comparison, measure: Measure) -> str:
    """A line for each method: the runs as small dots, their mean as a large one, the interval as a bar; SVG as a data URI."""
    scale = 100 if measure.kind == "rate" else 1
    arms = comparison.arms
    with figure_in_style(width=7.0, height=0.9 + 0.32 * len(arms)) as figure:
        axes = figure.subplots()
        for y, arm in enumerate(arms):
            found = comparison.figures.get((arm.name, measure.name))
            if found is None:
                continue
            low, high = scale * found.low, scale * found.high
            shade = INK if y == 0 else colour(2)
            if math.isfinite(high - low):
                axes.plot([low, high], [y, y], color=shade, linewidth=1.6, solid_capstyle="butt")
            runs = [scale * value for value in found.runs.values()]
            axes.plot(runs, [y] * len(runs), "o", color=shade, markersize=3, alpha=0.45, markeredgewidth=0)
            axes.plot([scale * found.mean], [y], "o", color=shade, markersize=6)
        reference = comparison.figures.get((arms[0].name, measure.name))
        if reference is not None:
            axes.axvline(scale * reference.mean, color="#AAAAAA", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        if measure.kind == "rate":
            axes.set_xlim(-2, 102)
        axes.set_xlabel("% right" if measure.kind == "rate" else "nats per token, lower is better")
        return svg(figure)
