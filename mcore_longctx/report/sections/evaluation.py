"""Loss by position, short-context loss and the short suite."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from mcore_longctx.report import plots
from mcore_longctx.report.counts import Count, compare, p_value, percent_interval, suite_changed, suite_counts
from mcore_longctx.report.losses import loss_bins, loss_law, paired, relative_change, same_windows, short_loss, windows_note
from mcore_longctx.report.run_folder import RunFolder
from mcore_longctx.report.verdict import worst_drop
from mcore_longctx.tasks.statistics import mean_interval

__all__ = ["loss_section", "short_section", "suite_section"]


def loss_section(folder: RunFolder) -> dict[str, Any] | None:
    """None without rows."""
    picture = plots.loss_by_position(folder)
    if picture is None:
        return None
    columns = [column for column in folder.columns if column.loss_by_position]
    bins = {column.name: loss_bins(column) for column in columns}
    windows = [column.loss_by_position for column in columns]
    rows = []
    for one in sorted({one for found in bins.values() for one in found}):
        cells = []
        for column in columns:
            here = bins[column.name].get(one)
            level = mean_interval(list(here.values())) if here else None
            base = bins.get("before", {}).get(one)
            change = paired(base, here) if base and here and column.name != "before" else None
            cells.append((level, change))
        rows.append((one, cells))
    return {
        "picture": picture,
        "change": plots.change_by_position(folder),
        "labels": [column.label + windows_note(windows, own) for column, own in zip(columns, windows, strict=True)],
        "rows": rows,
        "same": same_windows(windows),
        "windows": max(len(column.loss_by_position) for column in columns),
        "has_base": "before" in bins,
        "laws": [(column.label, loss_law(column)) for column in columns],
    }


def short_section(folder: RunFolder) -> dict[str, Any] | None:
    """None without rows."""
    columns = [column for column in folder.columns if column.short_context]
    if not columns:
        return None
    base = short_loss(folder.base) if folder.base is not None else {}
    rows = []
    for column in columns:
        losses = short_loss(column)
        own = column is folder.base
        rows.append(
            (
                column.label,
                mean_interval(list(losses.values())),
                None if own else paired(base, losses),
                None if own else relative_change(base, losses),
            )
        )
    return {
        "rows": rows,
        "same": same_windows([column.short_context for column in columns]),
        "length": max(window.length for column in columns for window in column.short_context),
    }


def suite_section(folder: RunFolder) -> dict[str, Any] | None:
    """None without rows. The last column of the table compares the final model with the base on the same questions."""
    columns = [column for column in folder.columns if column.short_suite]
    if not columns:
        return None
    counts = {column.name: suite_counts(column.short_suite) for column in columns}
    tasks = list(dict.fromkeys(task for found in counts.values() for task in found))
    base, final = folder.base, folder.final
    pair = (base, final) if base is not None and final is not None and base.short_suite and final.short_suite else None
    changes = suite_changed(pair[0].short_suite, pair[1].short_suite) if pair else {}
    rows = [(task, [_cell(counts[column.name].get(task)) for column in columns], _change(changes.get(task))) for task in tasks]
    totals = [_cell(Count(sum(c.right for c in found.values()), sum(c.all for c in found.values()))) for found in counts.values()]
    everything = compare(pair[0].short_suite, pair[1].short_suite) if pair else None
    worst = worst_drop(*pair) if pair else None
    options = [len(row["options"]) for column in columns for row in column.short_suite.values() if row.get("options")]
    return {
        "labels": [column.label for column in columns],
        "rows": [*rows, ("all", totals, _change(everything))],
        "pair": (pair[0].label, pair[1].label) if pair else None,
        "worst": worst.sentence if worst is not None else None,
        "chance": fmean(1 / count for count in options) if options else None,
    }


def _cell(count: Count | None) -> tuple[str, str]:
    return (str(count), percent_interval(count)) if count is not None else ("–", "")


def _change(changed: Any) -> str:
    return f"{changed.won} won, {changed.lost} lost, p = {p_value(changed.p)}" if changed is not None else "–"
