"""The ruler-like tasks: averages by length, every task in a grid, answers by depth, and what others publish beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from mcore_longctx.report import plots
from mcore_longctx.report.counts import (
    Average,
    Count,
    compare,
    p_value,
    percent_interval,
    ruler_averages,
    ruler_counts,
    ruler_effective_length,
    ruler_scorings,
    ruler_tasks,
)
from mcore_longctx.report.run_folder import Column, RunFolder
from mcore_longctx.report.sections.grid import grid, grid_lengths, legend
from mcore_longctx.report.style import short_count
from mcore_longctx.tasks.statistics import RULER_THRESHOLD

__all__ = ["ruler_section"]

DEPTHS = 5  # parts of the text, for answers that stand in one place


def ruler_section(folder: RunFolder) -> dict[str, Any] | None:
    """None without rows."""
    columns = [column for column in folder.columns if column.ruler]
    if not columns:
        return None
    tasks = ruler_tasks([column.ruler for column in columns])
    averages = {column.name: ruler_averages(column.ruler, tasks) for column in columns}
    lengths = sorted({length for found in averages.values() for length in found})
    every = [row for column in columns for row in column.ruler.values()]
    scorings = ruler_scorings([column.ruler for column in columns])
    samples = [average.samples for found in averages.values() for average in found.values()]
    return {
        "columns": [
            (plots.ruler_label(folder, column), _table_row(columns[0], column, averages[column.name], lengths))
            for column in columns
        ],
        "lengths": [(length, short_count(length)) for length in lengths],
        "base": plots.ruler_label(folder, columns[0]),
        "threshold": 100 * RULER_THRESHOLD,
        "tasks": len(tasks),
        "samples": (min(low for low, _ in samples), max(high for _, high in samples)),
        "scoring": scorings,
        "unique_share": min((float(row["unique_share"]) for row in every if row.get("unique_share") is not None), default=None),
        "by_length": plots.ruler_by_length(folder),
        "by_task": plots.ruler_by_task(folder),
        "grids": [_task_grid(folder, column, tasks, lengths) for column in columns],
        "depths": [found for column in columns if (found := _depth_grid(folder, column)) is not None],
        "legend": legend(),
        "published": published_lines(),
    }


def _table_row(base: Column, column: Column, averages: Mapping[int, Average], lengths: list[int]) -> dict[str, Any]:
    cells: list[dict[str, Any] | None] = []
    for length in lengths:
        average = averages.get(length)
        if average is None:
            cells.append(None)
            continue
        changed = compare(base.ruler, column.ruler, length) if column is not base else None
        cells.append(
            {
                "mean": f"{100 * average.interval.mean:.1f}",
                "interval": percent_interval(average.interval),
                "count": str(average.count),
                "above": "sure"
                if average.interval.low > RULER_THRESHOLD
                else "mean"
                if average.interval.mean > RULER_THRESHOLD
                else "",
                "tasks": None if average.is_whole else average.tasks,
                "changed": changed,
                "p": p_value(changed.p) if changed is not None else "",
            }
        )
    effective = ruler_effective_length(averages)
    names = {
        name: "none" if length is None else f"{length:,}" for name, length in (("mean", effective.mean), ("sure", effective.sure))
    }
    return {"cells": cells, "effective": names}


def _task_grid(folder: RunFolder, column: Column, tasks: list[str], lengths: list[int]) -> dict[str, Any]:
    counts = {(length, task): count for (task, length), count in ruler_counts(column.ruler).items()}
    return grid(plots.ruler_label(folder, column), {task: task for task in tasks}, lengths, counts) | {
        "lengths": grid_lengths(folder, column, lengths)
    }


def _depth_grid(folder: RunFolder, column: Column) -> dict[str, Any] | None:
    """Score by where the answer stands, over the samples whose answer stands in one place."""
    scores: dict[tuple[int, int], list[float]] = {}
    for (_, length, _), row in column.ruler.items():
        if len(row.get("depths") or ()) == 1:
            part = min(int(float(row["depths"][0]) * DEPTHS), DEPTHS - 1)
            scores.setdefault((length, part), []).append(float(row["score"]))
    if not scores:
        return None
    lengths = sorted({length for length, _ in scores})
    titles = {part: f"{100 * part // DEPTHS}–{100 * (part + 1) // DEPTHS} %" for part in range(DEPTHS)}
    counts = {key: Count.of_scores(values) for key, values in scores.items()}
    return grid(plots.ruler_label(folder, column), titles, lengths, counts) | {"lengths": grid_lengths(folder, column, lengths)}


def published_lines() -> dict[str, Any]:
    """Published RULER averages: rows by length, and averages over lengths, which are no point of any curve."""
    text = (resources.files("mcore_longctx.report") / "reference_lines.json").read_text(encoding="utf-8")
    lines = json.loads(text)
    sources: Mapping[str, Any] = lines["sources"]
    lengths = sorted({int(length) for line in lines["by_length"] for length in line["scores"]})
    rows = [
        (line["model"], [line["scores"].get(str(length)) for length in lengths], sources[line["source"]])
        for line in lines["by_length"]
    ]
    return {
        "lengths": [short_count(length) for length in lengths],
        "rows": rows,
        "averages": [(line, sources[line["source"]]) for line in lines["averages_over_lengths"]],
        "sources": sources,
    }
