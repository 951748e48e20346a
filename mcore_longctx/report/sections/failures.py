"""A few wrong answers of the final model, task by task: the end of the prompt, what was expected, what came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mcore_longctx.report.counts import Count, ruler_tasks
from mcore_longctx.report.rows import Row
from mcore_longctx.report.run_folder import RunFolder

__all__ = ["failures_section"]

SHOWN = 3  # of each task
TEXT = 400  # characters


def failures_section(folder: RunFolder) -> dict[str, Any] | None:
    """Of the last measured column; None where it missed nothing, or nothing that says what it answered."""
    column = folder.final or (folder.columns[-1] if folder.columns else None)
    if column is None:
        return None
    tasks: dict[str, list[Row]] = {}
    for kind, samples in column.needles.items():
        tasks[f"{kind.plural}, shared haystack" if kind.shared else kind.plural] = [samples[key] for key in sorted(samples)]
    for task in ruler_tasks([column.ruler]):
        tasks[f"ruler-like {task}"] = [row for key, row in sorted(column.ruler.items()) if key[0] == task]
    for (task, _), row in column.short_suite.items():
        tasks.setdefault(f"short suite {task}", []).append(row)
    shown = []
    for task, rows in tasks.items():
        missed = [row for row in rows if not row["correct"] and "got" in row]
        if missed:
            shown.append((task, str(Count(len(missed), len(rows))), [_failure(row) for row in _spread(missed)]))
    return {"label": column.label, "tasks": shown} if shown else None


def _spread(missed: Iterable[Row]) -> list[Row]:
    """The first of each length, then the second of each, shortest length first: what fails at a short length says most."""
    by_length: dict[Any, list[Row]] = {}
    for row in missed:
        by_length.setdefault(row.get("length"), []).append(row)
    turns = max(map(len, by_length.values()))
    return [rows[turn] for turn in range(turns) for rows in by_length.values() if turn < len(rows)][:SHOWN]


def _failure(row: Row) -> Mapping[str, str]:
    depths = row.get("depths") or ([row["depth"]] if row.get("depth") is not None else [])
    length = row.get("length")
    return {
        "length": f"{length:,}" if length is not None else "",
        "depth": ", ".join(f"{100 * float(depth):.0f} %" for depth in depths[:5]) + (" …" if len(depths) > 5 else ""),
        "index": str(row["index"]),
        "prompt": _cut(row.get("prompt_tail", row.get("question", "")), from_end=True),
        "expected": _cut(row.get("expected", "")),
        "got": _cut(row["got"]),
    }


def _cut(value: object, *, from_end: bool = False) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if len(text) <= TEXT:
        return text
    return "…" + text[-TEXT:] if from_end else text[:TEXT] + "…"
