"""Numbers of one element type as another: rounded to nearest even, NaN kept, nothing overflows in silence."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mcore_longctx.convert.disk import OpenFiles
from mcore_longctx.convert.plans.plan import Blend
from mcore_longctx.convert.views import TensorRows
from mcore_longctx.errors import ConversionError
from mcore_longctx.formats.dtypes import DType

__all__ = ["numbers", "stored", "widen"]

_NUMPY = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
Numbers = np.ndarray[Any, np.dtype[Any]]
Box = tuple[int, int, int, int]  # row, rows, column, columns


def widen(data: bytes | bytearray, dtype: DType) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers in `data` (little-endian elements of one of WEIGHT_DTYPES) as float64, exactly."""
    return np.frombuffer(data, _NUMPY[dtype.name]).astype(np.float64)


def numbers(source: TensorRows | Blend, box: Box, files: OpenFiles, *, name: str) -> Numbers:
    """The elements of a box, as float32 (exactly; float64 stays what it is), or the weighted sum of several tensors.

    Returns:
        [rows x columns], row-major. A sum is made in float32, part after part, in the order of the parts.

    Raises:
        ConversionError: a sum that is not finite where all its parts are: a number or a weight too large for float32.
    """
    if isinstance(source, TensorRows):
        return _read(source, box, files)
    total = np.zeros(box[1] * box[3], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below: nothing later could tell it from an infinite source
        for tensor, weight in source.parts:
            total += _read(tensor, box, files).astype(np.float32) * np.float32(weight)
    lost = ~np.isfinite(total)
    if lost.any():
        for tensor, _ in source.parts:
            lost &= np.isfinite(_read(tensor, box, files))
    if lost.any():
        raise ConversionError(
            f"{int(lost.sum()):,} of {total.size:,} sums looked at are too large for float32, though all numbers in them are finite",
            where=name,
            fix="choose smaller weights",
        )
    return total


def _read(source: TensorRows, box: Box, files: OpenFiles) -> Numbers:
    found = np.frombuffer(source.read_box(*box, files), _NUMPY[source.dtype.name])
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return found if found.dtype.itemsize > 4 else found.astype(np.float32, copy=False)


def stored(values: Numbers, dtype: DType, *, name: str) -> memoryview:
    """`values` as the bytes of `dtype`.

    Raises:
        ConversionError: finite numbers beyond the largest of `dtype`, which would become infinite.
    """
    wanted = _NUMPY[dtype.name]
    source = _odd_float32(values) if values.dtype.itemsize > 4 and wanted.kind == "V" else values
    with np.errstate(over="ignore", invalid="ignore"):  # counted below; NaN stays NaN
        rounded = source.astype(wanted)
    if np.isinf(rounded).any():
        lost = int((np.isinf(rounded) & np.isfinite(values)).sum())
        if lost:
            raise ConversionError(
                f"{lost:,} of {values.size:,} numbers looked at are too large for {dtype.name} (up to {_largest(values):.6g})",
                where=name,
                fix="choose bf16 or fp32",
            )
    return rounded.view(np.uint8).data


def _largest(values: Numbers) -> float:
    return float(np.abs(values[np.isfinite(values)]).max())


def _odd_float32(values: Numbers) -> Numbers:
    """float64 as float32 whose last bit says whether anything was lost, so that rounding once more rounds right.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd" (2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = values.astype(np.float32)
    down = np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
    bits = down.view(np.uint32)
    inexact = (down != values) & np.isfinite(values)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)
