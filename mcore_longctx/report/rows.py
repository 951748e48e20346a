"""Lines of the evaluation's files, checked: what is damaged or belongs elsewhere is one clear line, not a wrong figure on the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mcore_longctx.errors import ConfigError

__all__ = [
    "LOSS",
    "METRICS",
    "NEEDLE",
    "RULER",
    "RULER_LIKE",
    "SHORT_CONTEXT",
    "SHORT_SUITE",
    "Row",
    "RowKind",
    "check_identity",
    "read_rows",
]

Row = Mapping[str, Any]
Key = TypeVar("Key")

RULER_LIKE = "ruler-like"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LARGEST = 2**63 - 1
_FIX = "remove the file and measure again"


class _Wrong(Exception):
    """What is wrong with a line, in words."""


@dataclass(frozen=True)
class RowKind:
    """What the lines of a file must hold.

    Attributes:
        name: of the file, without its suffix.
        tasks: what `task` may say in it, where it says something; none: anything.
        check: looks at one row.
    """

    name: str
    tasks: tuple[str, ...]
    check: Callable[[Row], None]


def read_rows(path: Path, kind: RowKind, key: Callable[[Row], Key]) -> dict[Key, Row]:
    """Rows by key; none where there is no file. A last line without newline is still being written, or was cut off, and is left out.

    Raises:
        ConfigError: a line that is damaged, of another task, or measured with another model, rope or seed than the first.
    """
    if not path.is_file():
        return {}
    rows: dict[Key, Row] = {}
    first: Row = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise _Wrong("not a JSON object")
            if kind.tasks and row.get("task", kind.tasks[0]) not in kind.tasks:
                raise _Wrong(f"a row of task {_short(row['task'])} among those of {kind.name}")
            kind.check(row)
            first = first or row
            _same_identity(first, row, "the first line")
            if row.get("protocol") == RULER_LIKE:
                _same_scoring(first, row)
            rows[key(row)] = row
        except _Wrong as error:
            raise ConfigError(f"damaged line: {error}", where=f"{path}:{number}", fix=_FIX) from None
        except (ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"damaged line: {_short(str(error))}", where=f"{path}:{number}", fix=_FIX) from None
    return rows


def check_identity(files: Mapping[Path, Mapping[Any, Row]]) -> None:
    """Files of one column must be of one model, rope and seed.

    Raises:
        ConfigError: they are not.
    """
    first: tuple[Path, Row] | None = None
    for path, rows in files.items():
        for row in list(rows.values())[:1]:
            try:
                if first is not None:
                    _same_identity(first[1], row, first[0].name)
            except _Wrong as error:
                raise ConfigError(
                    str(error), where=path, fix="remove the file that is not of this column and measure again"
                ) from None
            first = first or (path, row)


def _same_identity(first: Row, row: Row, where: str) -> None:
    for name in ("model", "rope", "seed"):
        if name in first and name in row and first[name] != row[name]:
            raise _Wrong(f"{name} {_short(row[name])}, but {_short(first[name])} in {where}")


def _same_scoring(first: Row, row: Row) -> None:
    """Scores of two ways in one file would be averaged: they are no scores of one thing."""
    old, new = (one.get("scoring", "teacher_forced") for one in (first, row))
    if old != new:
        raise _Wrong(f"scoring {_short(new)}, but {_short(old)} in the first line")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _number(row: Row, name: str, low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> None:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Wrong(f"no number {name!r}" if value is None else f"{name!r} is {_short(value)}, expected a number")
    if (finite and not math.isfinite(value)) or not (low <= value <= high or (math.isnan(value) and not finite)):
        raise _Wrong(f"{name!r} is {value}, expected {low:g} to {high:g}" if low > -math.inf else f"{name!r} is {value}")


def _whole(row: Row, name: str, low: int = 0, high: float = math.inf) -> None:
    _number(row, name, low, high)
    if not isinstance(row[name], int):
        raise _Wrong(f"{name!r} is {row[name]}, expected a whole number")
    if abs(row[name]) > _LARGEST:
        raise _Wrong(f"{name!r} is beyond 64 bits")


def _of_type(row: Row, name: str, kind: type, words: str) -> None:
    if not isinstance(row.get(name), kind):
        raise _Wrong(f"no {name!r}" if row.get(name) is None else f"{name!r} is {_short(row[name])}, expected {words}")


def _right_or_wrong(row: Row) -> None:
    _of_type(row, "correct", bool, "true or false")


def _plain_task(row: Row) -> None:
    _of_type(row, "task", str, "a text")
    if _PLAIN_NAME.fullmatch(row["task"]) is None:
        raise _Wrong(f"task {_short(row['task'])}, expected a name of letters, digits, '_', '.' and '-'")


def _optional(row: Row) -> None:
    """What the page shows of a row where it is there."""
    if row.get("length") is not None:
        _whole(row, "length", 1)
    if row.get("depth") is not None:
        _number(row, "depth", 0, 1)
    if row.get("unique_share") is not None:
        _number(row, "unique_share", 0, 1)
    for name in ("depths", "options"):
        if row.get(name) is not None:
            _of_type(row, name, list, "a list")
    for depth in row.get("depths") or ():
        _number({"depths": depth}, "depths", 0, 1)
    if row.get("scoring") is not None:
        _of_type(row, "scoring", str, "a text")
    _text_hash(row)


def _needle(row: Row) -> None:
    _optional(row)
    _whole(row, "length", 1)
    _number(row, "depth", 0, 1)
    _whole(row, "index")
    _whole(row, "seed", -(1 << 63))
    _right_or_wrong(row)
    if "score" in row:
        _number(row, "score", finite=False)
    if row.get("kind", "passkey") not in ("passkey", "sentence"):
        raise _Wrong(f"kind {_short(row['kind'])}, expected 'passkey' or 'sentence'")
    if not isinstance(row.get("shared", False), bool):
        raise _Wrong(f"'shared' is {_short(row['shared'])}, expected true or false")


def _ruler(row: Row) -> None:
    _plain_task(row)
    _optional(row)
    if row.get("protocol") != RULER_LIKE:  # published RULER has other prompts and texts: never in one table with ours
        raise _Wrong(f"protocol {_short(row.get('protocol'))}, expected {RULER_LIKE!r}")
    _whole(row, "length", 1)
    _whole(row, "index")
    _whole(row, "seed", -(1 << 63))
    _number(row, "score", 0, 1)
    _right_or_wrong(row)
    if row["correct"] != (row["score"] == 1):
        raise _Wrong(f"'correct' is {row['correct']} at a score of {row['score']}".lower())


def _window(row: Row) -> None:
    _whole(row, "index")
    _whole(row, "length", 1)
    _whole(row, "start")
    _text_hash(row)


def _text_hash(row: Row) -> None:
    if row.get("text") is not None:
        _of_type(row, "text", str, "the digits of a hash")


def _loss(row: Row) -> None:
    _window(row)
    for name in ("edges", "counts", "sums"):
        _of_type(row, name, list, "a list")
        for value in row[name]:
            if name == "sums":
                _number({name: value}, name, 0, finite=False)
            else:
                _whole({name: value}, name)
    if not len(row["edges"]) - 1 == len(row["counts"]) == len(row["sums"]) or row["edges"] != sorted(set(row["edges"])):
        raise _Wrong("edges, counts and sums do not belong together")


def _short_context(row: Row) -> None:
    _window(row)
    _whole(row, "count", 1)
    _number(row, "sum", 0, finite=False)


def _short_suite(row: Row) -> None:
    _plain_task(row)
    _optional(row)
    _whole(row, "index")
    _whole(row, "seed", -(1 << 63))
    _right_or_wrong(row)


def _metrics(row: Row) -> None:
    _whole(row, "step")
    for name in ("loss", "lr", "grad_norm"):
        _number(row, name, finite=False)
    for name in ("tokens_per_second", "memory_bytes", "seconds"):
        if row.get(name) is not None:
            _number(row, name, 0)


NEEDLE = RowKind("needle", ("needle", "needles_shared"), _needle)
RULER = RowKind("ruler", (), _ruler)
LOSS = RowKind("loss_by_position", ("loss_by_position",), _loss)
SHORT_CONTEXT = RowKind("short_context", ("short_context",), _short_context)
SHORT_SUITE = RowKind("short_suite", (), _short_suite)
METRICS = RowKind("metrics", (), _metrics)
