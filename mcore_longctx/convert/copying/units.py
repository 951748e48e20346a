"""A plan cut into units of work, and what tells one plan from another.

Units are a function of the plan alone: a unit keeps its number whoever does it, on however many machines, before or after a
restart.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_longctx import __version__
from mcore_longctx.convert.plans.plan import Blend, Fill, Plan
from mcore_longctx.convert.views import TensorRows

__all__ = ["Part", "Unit", "cut", "difference", "facts_of"]

UNIT_BYTES = 64 << 20  # small enough to keep workers equally busy, large enough that a journal stays short
MOST_UNITS = 4096  # so that neither the journal nor the queue of the workers grows with the model
FORMAT = 1  # of journals


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [first, first + rows) of a fill, counted from the first row of the fill."""

    fill: Fill
    first: int
    rows: int

    @property
    def offset(self) -> int:
        """Of the first byte in the target file."""
        return self.fill.offset + self.first * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Size of one row in the target file."""
        return self.fill.columns * self.fill.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Size in the target file."""
        return self.rows * self.row_bytes


Unit = tuple[Part, ...]


def cut(plan: Plan) -> list[Unit]:
    """The fills of `plan` in their order as units of about UNIT_BYTES: large ones are split by rows, small ones joined."""
    wanted = max(UNIT_BYTES, sum(fill.bytes for fill in plan.fills) // MOST_UNITS)
    units: list[Unit] = []
    unit: list[Part] = []
    room = wanted
    for fill in plan.fills:
        first = 0
        while first < fill.rows:
            row_bytes = max(1, fill.columns * fill.dtype.itemsize)
            rows = min(fill.rows - first, max(1, room // row_bytes))
            unit.append(Part(fill, first, rows))
            first += rows
            room -= rows * row_bytes
            if room < row_bytes:
                units.append(tuple(unit))
                unit, room = [], wanted
    if unit:
        units.append(tuple(unit))
    return units


def facts_of(plan: Plan) -> dict[str, Any]:
    """What a journal begins with: the hash of the plan, and enough to say what is different where another plan has another."""
    return {
        "journal": FORMAT,
        "version": __version__,
        "plan": _hash(plan),
        "kind": plan.kind,
        "settings": json.loads(json.dumps(dict(plan.settings))),  # as the journal gives it back: lists, not tuples
        "sources": [[os.fspath(file.path.absolute()), file.bytes, file.mtime_ns] for file in plan.sources],
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing in which two plans differ, in words; None where they are the same."""
    if (old["plan"], old["journal"]) == (new["plan"], new["journal"]):
        return None
    if old["kind"] != new["kind"]:
        return f"it was {old['kind']}, now {new['kind']}"
    setting = _changed_setting(old["settings"], new["settings"], "")
    if setting is not None:
        return setting
    before, now = ({path: state for path, *state in facts["sources"]} for facts in (old, new))
    for path in (*now, *before):
        if path not in before or path not in now:
            return f"{path} was {'not ' if path not in before else ''}among its inputs"
        if before[path] != now[path]:
            return f"{path} changed"
    if old["version"] != new["version"]:
        return f"it was made by version {old['version']}"
    return "its units of work are others"


def _changed_setting(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> str | None:
    """The first setting that has another value, by the name of its innermost key: `config.rope_theta was 500000.0, now 10000.0`."""
    for name in dict.fromkeys((*new, *old)):
        before, now = (settings.get(name) for settings in (old, new))
        if isinstance(before, dict) and isinstance(now, dict):
            inner = _changed_setting(before, now, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif before != now:
            was, is_now = _short(before), _short(now)
            return f"{prefix}{name} changed" if was == is_now else f"{prefix}{name} was {was}, now {is_now}"
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hash(plan: Plan) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for line in _lines(plan):
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _lines(plan: Plan) -> Iterator[str]:
    """All that decides the output's bytes, as text."""
    yield repr((FORMAT, UNIT_BYTES, MOST_UNITS, plan.kind, sorted(plan.settings.items())))
    numbers = {os.fspath(file.path): i for i, file in enumerate(plan.sources)}
    for file in plan.sources:
        yield repr((os.fspath(file.path.absolute()), file.bytes, file.mtime_ns))
    for target in plan.files:
        yield repr((target.name, target.bytes))
    for fill in plan.fills:
        parts = fill.source.parts if isinstance(fill.source, Blend) else ((fill.source, 1.0),)
        scales = (fill.scales.file, fill.scales.offset) if fill.scales is not None else None
        box = (fill.file, fill.offset, fill.row, fill.rows, fill.column, fill.columns)
        yield repr((*box, fill.dtype.name, fill.name, scales))
        for tensor, weight in parts:
            yield repr((weight, tensor.dtype.name, tensor.rows, tensor.columns, list(_pieces(tensor, numbers))))


def _pieces(tensor: TensorRows, numbers: dict[str, int]) -> Iterator[tuple[Any, ...]]:
    for piece in tensor.pieces:
        file = None if piece.file is None else numbers.get(os.fspath(piece.file), os.fspath(piece.file))
        yield piece.row, piece.rows, piece.column, piece.columns, file, piece.offset
