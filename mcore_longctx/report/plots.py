"""Pictures of the report, as SVG that needs no network, and the needle picture of the README as PNG.

Colours are Okabe and Ito's, told apart by colour-blind readers; lines differ in dashes and markers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mcore_longctx.report.counts import (
    Average,
    Count,
    by_cell,
    needle_counts,
    ruler_averages,
    ruler_counts,
    ruler_scorings,
    ruler_tasks,
)
from mcore_longctx.report.losses import loss_bins, loss_law, middle, paired, windows_note
from mcore_longctx.report.rows import Row
from mcore_longctx.report.run_folder import Column, RunFolder
from mcore_longctx.report.style import (
    COLOURS,
    HEIGHT,
    INK,
    cell_colour,
    colour,
    darker,
    figure_in_style,
    line,
    scientific,
    short_count,
    svg,
)
from mcore_longctx.tasks.statistics import RULER_THRESHOLD, mean_interval

__all__ = [
    "change_by_position",
    "last_before",
    "loss_by_position",
    "needle_png",
    "ruler_by_length",
    "ruler_by_task",
    "ruler_label",
    "training_curves",
]


def loss_by_position(folder: RunFolder) -> str | None:
    """Mean loss per bin and column with its interval over windows; SVG as a data URI, None without data."""
    with figure_in_style() as figure:
        axes = figure.subplots()
        drawn = False
        for i, column in enumerate(folder.columns):
            bins = loss_bins(column)
            if not bins:
                continue
            drawn = True
            x = [middle(one) for one in bins]
            found = [mean_interval(list(windows.values())) for windows in bins.values()]
            label = column.label + windows_note([other.loss_by_position for other in folder.columns], column.loss_by_position)
            axes.plot(x, [f.mean for f in found], label=label, **line(i))
            if all(f.count > 1 for f in found):
                axes.fill_between(x, [f.low for f in found], [f.high for f in found], color=colour(i), alpha=0.10, linewidth=0)
            law = loss_law(column)
            if law is not None:
                axes.plot(x[1:], [law(position) for position in x[1:]], color=colour(i), linewidth=0.9, linestyle=(0, (1, 1)))
        if not drawn:
            return None
        axes.set_title("Loss by position")
        axes.set_ylabel("nats per token")
        _position_axis(axes, folder)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2.6)
        return svg(figure)


def change_by_position(folder: RunFolder) -> str | None:
    """Paired difference of each column to the base, per bin, with intervals; SVG as a data URI, None without data."""
    base = next((column for column in folder.columns if column.name == "before"), None)
    if base is None:
        return None
    before = loss_bins(base)
    with figure_in_style() as figure:
        axes = figure.subplots()
        drawn = False
        for i, column in enumerate(folder.columns):
            after = loss_bins(column)
            changes = {one: paired(before[one], after[one]) for one in before if one in after}
            points = {one: change for one, change in changes.items() if change is not None}
            if column is base or not points:
                continue
            drawn = True
            x = [middle(one) * 1.03**i for one in points]  # beside each other, so that bars do not hide bars
            heights = [change.mean for change in points.values()]
            axes.errorbar(
                x, heights, yerr=[c.half_width for c in points.values()], capsize=2, elinewidth=1, label=column.label, **line(i)
            )
        if not drawn:
            return None
        axes.axhline(0, color="#555555", linewidth=0.8)
        axes.set_title("Change from the base, window by window")
        axes.set_ylabel("nats per token")
        _position_axis(axes, folder)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2.6)
        return svg(figure)


def training_curves(stage: str, rows: Sequence[Row]) -> str:
    """Loss of a stage with its learning rate below; SVG as a data URI."""
    with figure_in_style(height=HEIGHT + 0.4) as figure:
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
        return svg(figure)


def ruler_label(folder: RunFolder, column: Column) -> str:
    """What a reader calls a column beside other columns' ruler-like scores: with its scoring where they differ in it."""
    if len(ruler_scorings([other.ruler for other in folder.columns])) < 2:
        return column.label
    return f"{column.label} ({', '.join(ruler_scorings([column.ruler]))})"


def ruler_by_length(folder: RunFolder) -> str | None:
    """Macro average of the ruler-like tasks by length, with intervals; SVG as a data URI, None without two lengths."""
    tasks = ruler_tasks([column.ruler for column in folder.columns])
    averages = [ruler_averages(column.ruler, tasks) for column in folder.columns]
    lengths = sorted({length for found in averages for length in found})
    if len(lengths) < 2:
        return None
    with figure_in_style(height=HEIGHT + 0.6) as figure:
        axes = figure.subplots()
        axes.axhline(100 * RULER_THRESHOLD, color="#999999", linewidth=0.9)
        for i, (column, found) in enumerate(zip(folder.columns, averages, strict=True)):
            if found:
                _average_line(axes, i, ruler_label(folder, column), found)
        axes.annotate(
            f"{100 * RULER_THRESHOLD:.1f}",
            (1, 100 * RULER_THRESHOLD),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=8.5,
            color="#555555",
        )
        axes.set_title("Ruler-like average by length")
        axes.set_ylabel("points of 100")
        _length_axis(axes, folder, lengths)
        axes.set_xlabel("tokens of context")
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2.6)
        return svg(figure)


def _average_line(axes: Any, i: int, label: str, found: Mapping[int, Average]) -> None:
    x = [length * 1.04**i for length in found]  # beside each other, so that bars do not hide bars
    means = [100 * average.interval.mean for average in found.values()]
    below = [mean - 100 * average.interval.low for mean, average in zip(means, found.values(), strict=True)]
    above = [100 * average.interval.high - mean for mean, average in zip(means, found.values(), strict=True)]
    axes.errorbar(x, means, yerr=[below, above], capsize=2, elinewidth=1, label=label, **line(i))


def ruler_by_task(folder: RunFolder) -> tuple[int, str] | None:
    """The longest length measured, and each task's score there as bars with intervals; SVG as a data URI, None without rows."""
    columns = [(i, column) for i, column in enumerate(folder.columns) if column.ruler]
    if not columns:
        return None
    tasks = ruler_tasks([column.ruler for _, column in columns])
    longest = max(length for _, column in columns for _, length, _ in column.ruler)
    thick = 0.8 / len(columns)
    with figure_in_style(height=1.1 + max(0.2, 0.085 * len(columns)) * len(tasks)) as figure:
        axes = figure.subplots()
        for place, (i, column) in enumerate(columns):
            counts = ruler_counts(column.ruler)
            here = [(y, counts[task, longest]) for y, task in enumerate(tasks) if (task, longest) in counts]
            rates = [100 * count.rate for _, count in here]
            ends = [[rate - 100 * count.interval[0] for rate, (_, count) in zip(rates, here, strict=True)]]
            ends.append([100 * count.interval[1] - rate for rate, (_, count) in zip(rates, here, strict=True)])
            axes.barh(
                [y + (place + 0.5) * thick - 0.4 for y, _ in here],
                rates,
                thick * 0.86,
                xerr=ends,
                color=colour(i),
                label=ruler_label(folder, column),
                error_kw={"elinewidth": 0.8, "ecolor": darker(colour(i))},
            )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.45, -0.55)
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_title(f"Ruler-like tasks at {short_count(longest)}")
        axes.set_xlabel("points of 100")
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=1.4)
        return longest, svg(figure)


def needle_png(folder: RunFolder, path: Path) -> Path | None:
    """Write the needle grids of all columns side by side as PNG; None without needle results."""
    columns = [column for column in folder.columns if folder.needles(column)]
    if not columns:
        return None
    grids = [needle_counts(folder.needles(column), by_cell) for column in columns]
    lengths = sorted({length for grid in grids for length, _ in grid})
    depths = sorted({depth for grid in grids for _, depth in grid})
    size = {"width": 0.9 + len(columns) * max(2.2, 0.35 + 0.62 * len(lengths)), "height": 1.1 + 0.36 * len(depths)}
    with figure_in_style(**size) as figure:
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        original = last_before(folder.original_length, lengths)
        for axes, column, grid in zip(panels, columns, grids, strict=True):
            _draw_grid(axes, grid, lengths, depths)
            axes.set_title(column.label)
            trained = last_before(folder.trained_length, lengths) if column.is_trained else None
            for length, dashes in ((original, (0, (3, 2))), (trained, "-")):
                if length is not None:
                    axes.axvline(lengths.index(length) + 0.5, color=INK, linewidth=1.2, linestyle=dashes)
        panels[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        panels[0].set_ylabel("depth of the key")
        note = f"tokens of context; in each cell: {folder.needle_kinds[0].plural.replace('pass keys', 'keys')} found / asked"
        if original is not None:
            note += "; dashed: the base model's own length"
        figure.supxlabel(note, fontsize=9.5)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    return path


def last_before(limit: int | None, lengths: Sequence[int]) -> int | None:
    """The length after which a line for `limit` stands in a grid; None where it would stand before or after all of them."""
    inside = [length for length in lengths if limit is not None and length <= limit]
    return inside[-1] if inside and len(inside) < len(lengths) else None


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


def _position_axis(axes: Any, folder: RunFolder) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))
    axes.set_xlabel("position in the text, tokens")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.14 * (high - low))  # room for the words above the lines
    _mark_lengths(axes, folder)


def _length_axis(axes: Any, folder: RunFolder, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_count(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-3, 114)  # room for the words above the lines
    axes.set_yticks(range(0, 101, 20))
    _mark_lengths(axes, folder)


def _mark_lengths(axes: Any, folder: RunFolder) -> None:
    """Vertical lines at the base's own length (dashed) and the longest trained one, where they lie inside the axis."""
    left, right = axes.get_xlim()
    marks = [(folder.original_length, "base's own length", (0, (3, 2))), (folder.trained_length, "trained", "-")]
    for length, words, dashes in marks:
        if length is None or not left < length < right or (words == "trained" and length == folder.original_length):
            continue
        axes.axvline(length, color="#555555", linewidth=0.9, linestyle=dashes)
        axes.annotate(
            words,
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color="#555555",
        )
    axes.set_xlim(left, right)
