"""Pictures of the report, as SVG that needs no network, and the needle picture of the README as PNG.

Colours are Okabe and Ito's, told apart by colour-blind readers; lines differ in dashes and markers too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mcore_longctx.report.results import Count, by_cell, loss_bins, needle_counts, paired
from mcore_longctx.report.run_folder import Row, RunFolder
from mcore_longctx.tasks.statistics import mean_interval

__all__ = ["cell_colour", "change_by_position", "loss_by_position", "needle_png", "scientific", "short_count", "training_curves"]

COLOURS = ("#767676", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("-", (0, (5, 2)), "-", (0, (1, 1.2)), (0, (6, 2, 1, 2)), "-")
MARKERS = ("o", "s", "D", "^", "v", "P")
MISSED, HALF, FOUND = (213, 94, 0), (245, 235, 205), (0, 114, 178)
INK, FAINT = "#222222", "#DDDDDD"
WIDTH, HEIGHT = 5.0, 3.1  # inches: half of a page, still readable when a telephone shrinks it

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "svg.hashsalt": "mcore-longctx",  # the same data gives the same bytes
}


def short_count(tokens: int) -> str:
    """A length for an axis: 512, 4K, 1M.

    >>> short_count(4096), short_count(1 << 20), short_count(1000)
    ('4K', '1M', '1,000')
    """
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size:,}{unit}"
    return f"{tokens:,}"


def scientific(value: float) -> str:
    """A learning rate: 2e-4, 7.5e-5.

    >>> scientific(2e-4), scientific(7.5e-5)
    ('2e-4', '7.5e-5')
    """
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def cell_colour(count: Count) -> tuple[str, str]:
    """Background and text colour of a needle cell: hue by rate, strength by certainty, the same in every grid."""
    rate = count.rate
    low, high, share = (MISSED, HALF, 2 * rate) if rate < 0.5 else (HALF, FOUND, 2 * rate - 1)
    pure = [a + (b - a) * share for a, b in zip(low, high, strict=True)]
    strength = 0.15 + 0.85 * count.certainty
    mixed = [round(255 + (value - 255) * strength) for value in pure]
    luminance = sum(weight * _linear(value) for weight, value in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))
    text = "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"  # whichever contrasts more
    return "#{:02x}{:02x}{:02x}".format(*mixed), text


def _linear(value: int) -> float:
    share = value / 255
    return float(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)


def loss_by_position(folder: RunFolder) -> str | None:
    """Mean loss per bin and column with its interval over windows; SVG as a data URI, None without data."""
    with _figure() as figure:
        axes = figure.subplots()
        drawn = False
        for i, column in enumerate(folder.columns):
            bins = loss_bins(column)
            if not bins:
                continue
            drawn = True
            x = [_middle(one) for one in bins]
            found = [mean_interval(list(windows.values())) for windows in bins.values()]
            axes.plot(x, [f.mean for f in found], label=column.label, **_line(i))
            if all(f.count > 1 for f in found):
                axes.fill_between(x, [f.low for f in found], [f.high for f in found], color=_colour(i), alpha=0.10, linewidth=0)
        if not drawn:
            return None
        axes.set_title("Loss by position")
        axes.set_ylabel("nats per token")
        _position_axis(axes, folder)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2.6)
        return _svg(figure)


def change_by_position(folder: RunFolder) -> str | None:
    """Paired difference of each column to the base, per bin, with intervals; SVG as a data URI, None without data."""
    base = next((column for column in folder.columns if column.name == "before"), None)
    if base is None:
        return None
    before = loss_bins(base)
    with _figure() as figure:
        axes = figure.subplots()
        drawn = False
        for i, column in enumerate(folder.columns):
            after = loss_bins(column)
            changes = {one: paired(before[one], after[one]) for one in before if one in after}
            points = {one: change for one, change in changes.items() if change is not None}
            if column is base or not points:
                continue
            drawn = True
            x = [_middle(one) * 1.03**i for one in points]  # beside each other, so that bars do not hide bars
            heights = [change.mean for change in points.values()]
            axes.errorbar(
                x, heights, yerr=[c.half_width for c in points.values()], capsize=2, elinewidth=1, label=column.label, **_line(i)
            )
        if not drawn:
            return None
        axes.axhline(0, color="#555555", linewidth=0.8)
        axes.set_title("Change from the base, window by window")
        axes.set_ylabel("nats per token")
        _position_axis(axes, folder)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2.6)
        return _svg(figure)


def training_curves(stage: str, rows: Sequence[Row]) -> str:
    """Loss of a stage with its learning rate below; SVG as a data URI."""
    with _figure(height=HEIGHT + 0.4) as figure:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        steps = [int(row["step"]) for row in rows]
        marker = {"marker": "o", "markersize": 2.5} if len(steps) < 80 else {}
        loss.plot(steps, [row["loss"] for row in rows], color=COLOURS[2], linewidth=1.4, **marker)
        loss.set_title(f"Training loss, stage {stage}")
        loss.set_ylabel("nats per token")
        rate.plot(steps, [row["lr"] for row in rows], color=COLOURS[1], linewidth=1.4)
        rate.set_ylabel("lr")
        rate.set_ylim(bottom=0)
        highest = max(float(row["lr"]) for row in rows)
        rate.set_yticks([0, highest], ["0", scientific(highest)])
        rate.set_xlabel("step")
        rate.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        return _svg(figure)


def needle_png(folder: RunFolder, path: Path) -> Path | None:
    """Write the needle grids of all columns side by side as PNG; None without needle results."""
    columns = [column for column in folder.columns if column.needle]
    if not columns:
        return None
    grids = [needle_counts(column, by_cell) for column in columns]
    lengths = sorted({length for grid in grids for length, _ in grid})
    depths = sorted({depth for grid in grids for _, depth in grid})
    with _figure(width=0.9 + len(columns) * (0.35 + 0.62 * len(lengths)), height=1.1 + 0.36 * len(depths)) as figure:
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, column, grid in zip(panels, columns, grids, strict=True):
            _draw_grid(axes, grid, lengths, depths)
            axes.set_title(column.label)
            for length, dashes in ((folder.original_length, (0, (3, 2))), (folder.trained_length, "-")):
                if length in lengths[:-1] and not (length == folder.trained_length and column.name in ("before", "scaled")):
                    axes.axvline(lengths.index(length) + 0.5, color=INK, linewidth=1.2, linestyle=dashes)
        panels[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        panels[0].set_ylabel("depth of the key")
        note = "tokens of context; in each cell: keys found / asked"
        if folder.original_length in lengths[:-1]:
            note += "; dashed: the base model's own length"
        figure.supxlabel(note, fontsize=9.5)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    return path


def _draw_grid(axes: Any, grid: Mapping[tuple[int, float], Count], lengths: Sequence[int], depths: Sequence[float]) -> None:
    for (length, depth), count in grid.items():
        background, ink = cell_colour(count)
        x, y = lengths.index(length), depths.index(depth)
        axes.add_patch(mpl.patches.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=background, linewidth=0))
        axes.text(x, y, str(count), color=ink, ha="center", va="center", fontsize=8.5)
    axes.set_xlim(-0.55, len(lengths) - 0.45)
    axes.set_ylim(len(depths) - 0.45, -0.55)
    axes.set_xticks(range(len(lengths)), [short_count(length) for length in lengths])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _middle(one: tuple[int, int]) -> float:
    first, end = one
    return float((max(first, end / 2) * end) ** 0.5)  # geometric; the first bin begins at 0


def _position_axis(axes: Any, folder: RunFolder) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))
    axes.set_xlabel("position in the text, tokens")
    if folder.original_length is not None:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.12 * (high - low))  # room for the words above the lines
        axes.axvline(folder.original_length, color="#555555", linewidth=0.9, linestyle=(0, (3, 2)))
        axes.annotate(
            "base's own length",
            (folder.original_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color="#555555",
        )


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _line(i: int) -> dict[str, Any]:
    return {
        "color": _colour(i),
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.5,
    }


@contextmanager
def _figure(width: float = WIDTH, height: float = HEIGHT) -> Iterator[Figure]:
    """A figure in the report's style. No pyplot: nothing global, no window, no backend to choose."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()
