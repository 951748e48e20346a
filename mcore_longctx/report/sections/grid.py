"""Coloured grids with counts: hue by rate, strength by certainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mcore_longctx.report.counts import Count, percent_interval
from mcore_longctx.report.plots import last_before
from mcore_longctx.report.run_folder import Column, RunFolder
from mcore_longctx.report.style import cell_colour, short_count

__all__ = ["grid", "grid_lengths", "legend"]


def grid(label: str, titles: Mapping[Any, str], lengths: Sequence[int], counts: Mapping[Any, Count]) -> dict[str, Any]:
    """One grid: a row for each of `titles` (key -> words), a column for each length; `counts` by (length, key)."""
    rows = [(title, [_cell(counts.get((length, key))) for length in lengths]) for key, title in titles.items()]
    return {"label": label, "rows": rows}


def grid_lengths(folder: RunFolder, column: Column | None, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Heads of the columns, and after which of them the lines for the original and the trained length stand.

    The line for the trained length is not drawn for a `column` that was not trained.
    """
    original = last_before(folder.original_length, lengths)
    trained = last_before(folder.trained_length, lengths) if column is None or column.is_trained else None
    marks = {length: "trained" for length in [trained] if length is not None} | {
        length: "original" for length in [original] if length is not None
    }
    return [{"length": length, "short": short_count(length), "mark": marks.get(length, "")} for length in lengths]


def _cell(count: Count | None) -> dict[str, str]:
    if count is None:
        return {"text": "–", "title": "not measured", "style": ""}
    background, ink = cell_colour(count)
    return {"text": str(count), "title": percent_interval(count), "style": f"background:{background};color:{ink}"}


def legend() -> dict[str, Any]:
    """Swatches of rates (of a thousand samples) and of certainties (all right)."""
    rates = [(f"{100 * rate:.0f} %", cell_colour(Count(round(rate * 1000), 1000))) for rate in (0, 0.25, 0.5, 0.75, 1)]
    return {
        "rates": rates,
        "certainty": [(str(count), cell_colour(count)) for count in (Count(1, 1), Count(5, 5), Count(20, 20))],
    }
