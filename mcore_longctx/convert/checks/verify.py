"""Two checkpoints of either format compared tensor by tensor."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_longctx.convert.checks.quantised import QuantisedTensor, is_quantised, open_quantised, relative_rms, with_scales
from mcore_longctx.convert.disk import OpenFiles, io_errors, read_into
from mcore_longctx.convert.quantization import MAX_RELATIVE_RMS
from mcore_longctx.convert.views import BAND_BYTES, CheckpointView, TensorRows, locate_checkpoint, open_checkpoint
from mcore_longctx.errors import ConfigError
from mcore_longctx.formats.dcp_read import is_torch_dist
from mcore_longctx.formats.dtypes import WEIGHT_DTYPES
from mcore_longctx.recipe import CARD

__all__ = ["Report", "TensorDifference", "compare"]

_SHOWN = 20  # differing tensors that the text names


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs: in shape, in element type, or in `count` of its elements (`max_abs`, `max_rel` over all).

    `first` is the index of the first element that differs, (row,) or (row, column).
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    count: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    first: tuple[int, ...] | None = None

    def describe(self) -> str:
        """One line."""
        if self.shapes[0] != self.shapes[1]:
            return f"{self.name}: shape {list(self.shapes[0])} and {list(self.shapes[1])}"
        dtype = f"dtype {self.dtypes[0]} and {self.dtypes[1]}, " if self.dtypes[0] != self.dtypes[1] else ""
        if not self.count:
            return f"{self.name}: {dtype}values equal"
        return (
            f"{self.name}: {dtype}{self.count:,} of {math.prod(self.shapes[0]):,} elements differ, first at {list(self.first or ())}; "
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
    quantised: tuple[QuantisedTensor, ...] = ()

    @property
    def too_far(self) -> tuple[QuantisedTensor, ...]:
        """FP8 weights that are further from the other side than rounding to FP8 takes them."""
        return tuple(tensor for tensor in self.quantised if not tensor.relative_rms <= MAX_RELATIVE_RMS)  # NaN is too far

    @property
    def rope_differs(self) -> bool:
        """Whether the two ropes turn queries and keys differently."""
        return self.ropes[0][1] != self.ropes[1][1]

    @property
    def equal(self) -> bool:
        """Whether nothing differs; of FP8 weights, by more than rounding."""
        found = self.differences or self.only_first or self.only_second or self.sizes or self.cards or self.too_far
        return not (found or self.rope_differs)

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
        too_far = [
            f"{tensor.name}: FP8, relative RMS {tensor.relative_rms:.3g}, more than {MAX_RELATIVE_RMS}" for tensor in self.too_far
        ]
        problems += too_far[:_SHOWN] + _more(len(too_far))
        lines += [f"differs: {problem}" for problem in problems]
        verdict = "equal" if self.equal else "DIFFERENT"
        if self.quantised:
            worst = max(self.quantised, key=lambda tensor: (math.isnan(tensor.relative_rms), tensor.relative_rms))
            lines.append(f"FP8: {len(self.quantised):,} tensors, largest relative RMS {worst.relative_rms:.4g} ({worst.name})")
            verdict += " but for rounding to FP8" if self.equal else ""
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
                    "first": None if difference.first is None else list(difference.first),
                    "max_abs": _json_number(difference.max_abs),
                    "max_rel": _json_number(difference.max_rel),
                }
                for difference in self.differences
            ],
            "quantised": [{"name": tensor.name, "relative_rms": _json_number(tensor.relative_rms)} for tensor in self.quantised],
            "notes": list(self.notes),
        }


@io_errors()
def compare(first: Path, second: Path, *, config: Path | None = None) -> Report:
    """Compare two folders, each Hugging Face or torch_dist: tensors, sizes, ropes, lengths.

    Bytes are compared first; only where they differ are the numbers decoded, and of different element types the numbers are
    compared. Vocabulary padding and optimizer state do not take part. FP8 weights with their scales are compared with those of an
    ordinary checkpoint by relative RMS, up to what rounding explains; with other FP8 weights byte by byte. Memory is constant.

    Args:
        first: folder.
        second: another.
        config: config.json of the model, or its folder, for a torch_dist folder that brings none.

    Raises:
        CheckpointError: a folder is missing or damaged.
        ConfigError: a config.json asks for something that is not supported.
        ConversionError: a folder holds other tensors than its config.json says.
    """
    if config is not None and all(_brings_config(folder) for folder in (first, second)):
        raise ConfigError("both folders bring their own config.json", where="--config", fix="leave it out")
    (one, its_scales), (other, other_scales) = _open(first, config), _open(second, config)
    if its_scales and other_scales:
        one, other, its_scales, other_scales = with_scales(one, its_scales), with_scales(other, other_scales), {}, {}
    a, b = one.tensors, other.tensors
    common = [name for name in a if name in b]
    scales = its_scales or other_scales
    comparable = [name for name in common if name in scales and a[name].shape == b[name].shape]
    files = OpenFiles(os.O_RDONLY)
    try:
        found = [_compare_tensor(name, a[name], b[name], files) for name in common if name not in comparable]
    finally:
        files.close()
    pairs = {name: (a[name], b[name]) if its_scales else (b[name], a[name]) for name in comparable}
    return Report(
        first,
        second,
        len(common),
        sum(a[name].nbytes for name in common),
        tuple(difference for difference in found if difference is not None),
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        _compare_sizes(one, other),
        ((one.rope.describe(), one.rope.fingerprint()), (other.rope.describe(), other.rope.fingerprint())),
        tuple(problem for view in (one, other) for problem in _check_card(view)),
        tuple(note for view in (one, other) for note in _notes(view)) + _compare_ids(one, other),
        tuple(relative_rms(name, weight, scales[name], exact) for name, (weight, exact) in pairs.items()),
    )


def _open(folder: Path, config: Path | None) -> tuple[CheckpointView, dict[str, TensorRows]]:
    """The checkpoint, and the scales of its FP8 weights."""
    if is_quantised(folder):
        return open_quantised(folder)
    return open_checkpoint(folder, config=None if _brings_config(folder) else config), {}


def _brings_config(path: Path) -> bool:
    folder = locate_checkpoint(path)
    return not is_torch_dist(folder) or (folder / CARD).exists()


def _compare_tensor(name: str, a: TensorRows, b: TensorRows, files: OpenFiles) -> TensorDifference | None:
    shapes, dtypes = (a.shape, b.shape), (a.dtype.name, b.dtype.name)
    if a.shape != b.shape:
        return TensorDifference(name, shapes, dtypes)
    count, max_abs, max_rel, first = 0, 0.0, 0.0, None
    step = max(1, BAND_BYTES // max(a.row_bytes, b.row_bytes, 1))
    buffers = bytearray(min(step, a.rows) * a.row_bytes), bytearray(min(step, a.rows) * b.row_bytes)
    for row in range(0, a.rows, step):
        rows = min(step, a.rows - row)
        band, other = _read(a, row, rows, buffers[0], files), _read(b, row, rows, buffers[1], files)
        if a.dtype == b.dtype and band == other:
            continue
        differing, worst_abs, worst_rel, index = _compare_values(band, other, a, b)
        if differing and first is None:
            at = row + index // a.columns, index % a.columns
            first = at[:1] if a.is_vector else at
        count, max_abs, max_rel = count + differing, _larger(max_abs, worst_abs), _larger(max_rel, worst_rel)
    if not count and a.dtype == b.dtype:
        return None
    return TensorDifference(name, shapes, dtypes, count, max_abs, max_rel, first)


def _read(tensor: TensorRows, row: int, rows: int, buffer: bytearray, files: OpenFiles) -> bytearray:
    """Rows [row, row + rows) in `buffer` if they fill it and lie in whole rows, else in memory of their own.

    Memory that is asked for and cleared band by band would cost three times as much as reading and comparing it.
    """
    runs = list(tensor.runs(row, rows, 0, tensor.columns)) if rows * tensor.row_bytes == len(buffer) else []
    if not runs or any(run.file is None or not run.stride == run.width == tensor.row_bytes for run in runs):
        return tensor.read_box(row, rows, 0, tensor.columns, files)
    with memoryview(buffer) as view:
        for run in runs:
            assert run.file is not None
            part = view[run.row * run.width : (run.row + run.rows) * run.width]
            read_into(files.descriptor(run.file), [part], run.offset, run.file)
    return buffer


def _compare_values(band: bytearray, other: bytearray, a: TensorRows, b: TensorRows) -> tuple[int, float, float, int]:
    """(elements that differ, largest absolute and relative difference, index of the first)."""
    import numpy as np

    from mcore_longctx.convert.copying.cast import widen

    if a.dtype == b.dtype:  # in bits: 0.0 and -0.0 are two, a NaN equals itself
        size = a.dtype.itemsize
        differs = np.frombuffer(band, f"<u{size}") != np.frombuffer(other, f"<u{size}")
    if a.dtype.name not in WEIGHT_DTYPES:  # FP8 on both sides: only whether bytes differ says anything without their scales
        return int(differs.sum()), math.nan, math.nan, int(np.argmax(differs))
    x, y = widen(band, a.dtype), widen(other, b.dtype)
    if a.dtype != b.dtype:
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
    return second if math.isnan(second) or second > first else first  # NaN, once seen, stays


def _compare_sizes(first: CheckpointView, second: CheckpointView) -> tuple[str, ...]:
    a, b = ({**view.shape.as_dict(), "length": view.rope.resolved_max_position_embeddings} for view in (first, second))
    return tuple(f"{key}: {a[key]} and {b[key]}" for key in a if a[key] != b[key])


def _compare_ids(first: CheckpointView, second: CheckpointView) -> tuple[str, ...]:
    """Special tokens of config.json that differ: the weights do not, but what is made of them does."""
    pairs = {key: (first.config.get(key), second.config.get(key)) for key in ("bos_token_id", "eos_token_id")}
    return tuple(f"config.json: {key} is {a!r} in A and {b!r} in B" for key, (a, b) in pairs.items() if a != b)


def _check_card(view: CheckpointView) -> list[str]:
    if view.card is None or view.format != "hf" or view.card.rope.fingerprint() == view.rope.fingerprint():
        return []
    return [f"{view.folder}: config.json has {view.rope.describe()}, {CARD} says {view.card.rope.describe()}"]


def _notes(view: CheckpointView) -> list[str]:
    notes = []
    for key, rows in view.padding.items():
        if any(band.count(0) != len(band) for _, band in rows.bands()):
            notes.append(f"{view.folder}: {key} has {rows.rows:,} rows of vocabulary padding, not zero (trained); not compared")
    if view.dropped:
        notes.append(
            f"{view.folder}: {len(view.dropped):,} tensors beside the weights are not compared (first: {view.dropped[0]})"
        )
    return notes


def _more(number: int) -> list[str]:
    return [f"... and {number - _SHOWN:,} more"] if number > _SHOWN else []


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
