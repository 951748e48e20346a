"""Needles: a grid for each column and kind, and all depths together before and after."""

from __future__ import annotations

from typing import Any

from mcore_longctx.report.counts import by_cell, by_length, compare, needle_counts, p_value, percent_interval
from mcore_longctx.report.run_folder import NeedleKind, RunFolder
from mcore_longctx.report.sections.grid import grid, grid_lengths, legend

__all__ = ["needle_sections"]


def needle_sections(folder: RunFolder) -> list[dict[str, Any]]:
    """One for each kind of needles that was measured."""
    return [_kind(folder, kind) for kind in folder.needle_kinds]


def _kind(folder: RunFolder, kind: NeedleKind) -> dict[str, Any]:
    columns = [column for column in folder.columns if column.needles.get(kind)]
    rows_of = {column.name: column.needles[kind] for column in columns}
    cells = {name: needle_counts(rows, by_cell) for name, rows in rows_of.items()}
    totals = {name: needle_counts(rows, by_length) for name, rows in rows_of.items()}
    lengths = sorted({length for counts in totals.values() for length in counts})
    depths = sorted({depth for counts in cells.values() for _, depth in counts})
    titles = {depth: f"{100 * depth:.0f} %" for depth in depths}
    base = columns[0]
    table = []
    for length in lengths:
        row = []
        for column in columns:
            count = totals[column.name].get(length)
            changed = compare(rows_of[base.name], rows_of[column.name], length) if column is not base else None
            row.append(
                {
                    "count": str(count) if count is not None else "",
                    "interval": percent_interval(count) if count is not None else "",
                    "changed": changed,
                    "p": p_value(changed.p) if changed is not None else "",
                }
            )
        table.append((length, row))
    every = [row for rows in rows_of.values() for row in rows.values()]
    return {
        "kind": kind,
        "grids": [
            grid(column.label, titles, lengths, cells[column.name]) | {"lengths": grid_lengths(folder, column, lengths)}
            for column in columns
        ],
        "original": folder.original_length,
        "trained": folder.trained_length,
        "rows": table,
        "labels": [column.label for column in columns],
        "base": base.label,
        "unique_share": min((float(row["unique_share"]) for row in every if row.get("unique_share") is not None), default=None),
        "legend": legend(),
    }
