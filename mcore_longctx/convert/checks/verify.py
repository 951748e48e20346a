"""Two checkpoints of either format compared tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.convert.copying.cast import widen
from mcore_longctx.convert.disk import io_errors
from mcore_longctx.convert.views import CheckpointView, open_checkpoint
from mcore_longctx.convert.views.rows import BAND_BYTES, TensorRows
from mcore_longctx.recipe import CARD

__all__ = ["Report", "TensorDifference", "compare"]

_SHOWN = 20  # differing tensors that the text names


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs: in shape, in element type, or in `count` of its elements (`max_abs`, `max_rel` over all)."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    count: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    first_row: int | None = None

    def describe(self) -> str:
        """One line."""
        if self.shapes[0] != self.shapes[1]:
            return f"{self.name}: shape {list(self.shapes[0])} and {list(self.shapes[1])}"
        dtype = f"dtype {self.dtypes[0]} and {self.dtypes[1]}, " if self.dtypes[0] != self.dtypes[1] else ""
        if not self.count:
            return f"{self.name}: {dtype}values equal"
        return (
            f"{self.name}: {dtype}{self.count:,} of {int(np.prod(self.shapes[0])):,} elements differ, first in row {self.first_row:,}; "
            f"max abs {self.max_abs:.3g}, max rel {self.max_rel:.3g}"
        )


@dataclass(frozen=True)
class Report:
    """What a comparison found. `equal` is the verdict: same names, shapes, types, bytes, sizes and rope."""

    first: Path
    second: Path
    compared: int
    compared_bytes: int
    differences: tuple[TensorDifference, ...] = ()
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    ropes: tuple[tuple[str, str], tuple[str, str]] = (("", ""), ("", ""))
    cards: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def rope_differs(self) -> bool:
        """Whether the two ropes turn queries and keys differently."""
        return self.ropes[0][1] != self.ropes[1][1]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.differences or self.only_first or self.only_second or self.sizes or self.cards or self.rope_differs)

    def text(self) -> str:
        """For people: the verdict last."""
        lines = [f"A  {self.first}", f"B  {self.second}"]
        lines += [f"rope {side}  {words} [{print_[:12]}]" for side, (words, print_) in zip("AB", self.ropes, strict=True)]
        lines += [f"note: {note}" for note in self.notes]
        problems = ["the ropes differ"] if self.rope_differs else []
        problems += [*self.cards, *self.sizes]
        for side, names in (("A", self.only_first), ("B", self.only_second)):
            problems += [f"only in {side}: {name}" for name in names[:_SHOWN]] + _more(len(names))
        problems += [difference.describe() for difference in self.differences[:_SHOWN]] + _more(len(self.differences))
        lines += [f"differs: {problem}" for problem in problems]
        verdict = "equal" if self.equal else "DIFFERENT"
        return "\n".join([*lines, f"{verdict}: {self.compared:,} tensors compared, {self.compared_bytes:,} bytes"])

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "equal": self.equal,
            "a": str(self.first),
            "b": str(self.second),
            "tensors": self.compared,
            "bytes": self.compared_bytes,
            "rope_equal": not self.rope_differs,
            "ropes": [{"words": words, "fingerprint": fingerprint} for words, fingerprint in self.ropes],
            "only_a": list(self.only_first),
            "only_b": list(self.only_second),
            "other": [*self.cards, *self.sizes],
            "differences": [
                {
                    "name": difference.name,
                    "shapes": [list(shape) for shape in difference.shapes],
                    "dtypes": list(difference.dtypes),
                    "elements": difference.count,
                    "max_abs": _json_number(difference.max_abs),
                    "max_rel": _json_number(difference.max_rel),
                }
                for difference in self.differences
            ],
            "notes": list(self.notes),
        }


@io_errors()
def compare(first: Path, second: Path) -> Report:
    """Compare two folders, each Hugging Face or torch_dist: tensors, sizes, ropes.

    Bytes are compared first; only where they differ are the numbers decoded. Vocabulary padding and optimizer state do not
    take part. Memory is constant.

    Raises:
        CheckpointError: a folder is missing or damaged.
        ConfigError: a config.json asks for something that is not supported.
        ConversionError: a folder holds other tensors than its config.json says.
    """
    views = open_checkpoint(first), open_checkpoint(second)
    a, b = (view.tensors for view in views)
    common = [name for name in a if name in b]
    found = (_compare_tensor(name, a[name], b[name]) for name in common)
    return Report(
        first,
        second,
        len(common),
        sum(a[name].nbytes for name in common),
        tuple(difference for difference in found if difference is not None),
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        _compare_sizes(*views),
        ((views[0].rope.describe(), views[0].rope.fingerprint()), (views[1].rope.describe(), views[1].rope.fingerprint())),
        tuple(problem for view in views for problem in _check_card(view)),
        tuple(note for view in views for note in _notes(view)),
    )


def _compare_tensor(name: str, a: TensorRows, b: TensorRows) -> TensorDifference | None:
    shapes, dtypes = (a.shape, b.shape), (a.dtype.name, b.dtype.name)
    if a.shape != b.shape:
        return TensorDifference(name, shapes, dtypes)
    count, max_abs, max_rel, first_row = 0, 0.0, 0.0, None
    step = max(1, BAND_BYTES // max(a.row_bytes, b.row_bytes, 1))
    for row in range(0, a.rows, step):
        rows = min(step, a.rows - row)
        band, other = a.read(row, rows), b.read(row, rows)
        if a.dtype == b.dtype and band == other:
            continue
        differing, worst_abs, worst_rel, index = _compare_values(band, other, a, b)
        if differing and first_row is None:
            first_row = row + index // a.columns
        count, max_abs, max_rel = count + differing, _larger(max_abs, worst_abs), _larger(max_rel, worst_rel)
    if not count and a.dtype == b.dtype:
        return None
    return TensorDifference(name, shapes, dtypes, count, max_abs, max_rel, first_row)


def _compare_values(band: bytearray, other: bytearray, a: TensorRows, b: TensorRows) -> tuple[int, float, float, int]:
    """(elements that differ, largest absolute and relative difference, index of the first)."""
    x, y = widen(band, a.dtype), widen(other, b.dtype)
    if a.dtype == b.dtype:  # in bits: 0.0 and -0.0 are two, a NaN equals itself
        size = a.dtype.itemsize
        differs = np.any(
            np.frombuffer(band, np.uint8).reshape(-1, size) != np.frombuffer(other, np.uint8).reshape(-1, size), axis=1
        )
    else:
        differs = (x != y) & ~(np.isnan(x) & np.isnan(y))
    if not differs.any():
        return 0, 0.0, 0.0, 0
    x, y = x[differs], y[differs]
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(x - y)
        scale = np.maximum(np.abs(x), np.abs(y))
        relative = np.divide(distance, scale, out=np.zeros_like(distance), where=scale != 0)
    return int(differs.sum()), float(distance.max()), float(relative.max()), int(np.argmax(differs))


def _larger(first: float, second: float) -> float:
    return second if np.isnan(second) or second > first else first  # NaN, once seen, stays


def _compare_sizes(first: CheckpointView, second: CheckpointView) -> tuple[str, ...]:
    a, b = first.shape.as_dict(), second.shape.as_dict()
    return tuple(f"{key}: {a[key]} and {b[key]}" for key in a if a[key] != b[key])


def _check_card(view: CheckpointView) -> list[str]:
    if view.card is None or view.format != "hf" or view.card.rope.fingerprint() == view.rope.fingerprint():
        return []
    return [f"{view.folder}: config.json has {view.rope.describe()}, {CARD} says {view.card.rope.describe()}"]


def _notes(view: CheckpointView) -> list[str]:
    notes = []
    for key, rows in view.padding.items():
        if any(any(band) for _, band in rows.bands()):
            notes.append(f"{view.folder}: {key} has {rows.rows:,} rows of vocabulary padding, not zero (trained); not compared")
    if view.dropped:
        notes.append(
            f"{view.folder}: {len(view.dropped):,} tensors beside the weights are not compared (first: {view.dropped[0]})"
        )
    return notes


def _more(number: int) -> list[str]:
    return [f"... and {number - _SHOWN:,} more"] if number > _SHOWN else []


def _json_number(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)
