"""FP8 weights: every output row divided by a scale of its own and rounded to E4M3 (float8_e4m3fn).

A row needs nothing but itself, so a matrix is quantised in bands of rows as it is copied: no calibration, no second pass. The
numbers are those of `torch.Tensor.to(torch.float8_e4m3fn)`, of modelopt's per-channel FP8 and of compressed-tensors' `channel`
strategy, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mcore_longctx.errors import ConversionError

__all__ = ["E4M3_MAX", "SMALLEST_SCALE", "Quantized", "quantize_rows"]

E4M3_MAX = 448.0  # largest finite float8_e4m3fn; it has no infinity
# The smallest normal float32: below it division loses bits, and a GPU may take it for zero. Also the scale of a row of zeros,
# because readers multiply by scales and divide by them: neither 0 nor NaN may be one.
SMALLEST_SCALE = 2.0**-126

_BLOCK = 65_536  # elements at a time: the temporaries of a block stay in a core's cache
_EXPONENT = np.uint32(0x7F80_0000)
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_SMALLEST_NORMAL = np.uint32((127 - 6) << 23)  # of E4M3: 2^-6
_LAST_BIT_OF_E4M3 = np.uint32(20 << 23)  # 23 - 3 bits of a float32's fraction have no place

_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Quantized(NamedTuple):
    """Rows of a matrix in FP8, and what rounding did to them.

    Attributes:
        bits: [r, c] uint8, the bytes of float8_e4m3fn.
        scales: [r] float32, positive and normal; a row is about `bits x scale`.
        squared: sum of the squared elements before.
        squared_error: sum of (scale x quantised - element)^2.
        amax: largest magnitude before.
    """

    bits: _Bytes
    scales: _Floats
    squared: float
    squared_error: float
    amax: float


def quantize_rows(rows: np.ndarray[Any, np.dtype[Any]], *, name: str, first_row: int = 0) -> Quantized:
    """Quantise `rows` [r, c] float32: scale = largest magnitude of the row / 448, rounding to nearest even.

    Nothing saturates: the largest quotient of a row is 448 but for the last bits of a float32, far from the 464 from which on
    E4M3 has no number.

    Args:
        rows: the numbers; they are not changed. float64 is rounded to float32 first.
        name: of the tensor, for the message.
        first_row: which row of the tensor `rows[0]` is, for the message.

    Raises:
        ConversionError: a row with NaN or infinity.

    Source: E4M3 of arXiv 2209.05433; one scale per output row as `strategy: channel` of compressed-tensors.
    """
    rows = rows.astype(np.float32, copy=False)
    count, columns = rows.shape
    amax = np.maximum(rows.max(axis=1), -rows.min(axis=1)) if columns else np.zeros(count, np.float32)  # NaN stays NaN
    finite = np.isfinite(amax)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise ConversionError(
            f"NaN or infinity in row {row:,}", where=name, fix="fp8 needs finite weights; repair the checkpoint"
        )
    scales = np.maximum(amax / np.float32(E4M3_MAX), np.float32(SMALLEST_SCALE))
    bits = np.empty((count, columns), np.uint8)
    squared, squared_error = np.empty(count, np.float32), np.empty(count, np.float32)
    step = max(1, _BLOCK // max(1, columns))
    for first in range(0, count, step):
        block = slice(first, first + step)
        quotients = np.divide(rows[block], scales[block, None], dtype=np.float32)
        rounded = _round_to_e4m3(quotients, bits[block])
        squared[block] = np.einsum("ij,ij->i", quotients, quotients)
        np.absolute(quotients, out=quotients)
        quotients -= rounded
        squared_error[block] = np.einsum("ij,ij->i", quotients, quotients)
    # sums are taken of the quotients, at most 448: the squares of the numbers themselves may be too large for a float32
    square_of_scale = np.square(scales, dtype=np.float64)
    return Quantized(
        bits,
        scales,
        float((square_of_scale * squared).sum()),
        float((square_of_scale * squared_error).sum()),
        float(amax.max(initial=0.0)),
    )


def _round_to_e4m3(numbers: _Floats, bits: _Bytes) -> _Floats:
    """Write `numbers`, magnitudes below 464, to `bits` as E4M3, and return the rounded magnitudes as float32.

    Adding a power of two 20 binary places above a number pushes all but 3 bits of its fraction out of a float32, and the
    addition itself rounds them to nearest even. Below 2^-6 the power stays, so that steps stay 2^-9: E4M3's subnormals. What the
    addition did to the last bits of that power, read as an integer, is the number in steps: with its exponent, the E4M3 bits.
    (ml_dtypes does the same at a fifth of the speed; the tests compare them.)
    """
    whole = numbers.view(np.uint32)
    magnitude = whole & _MAGNITUDE
    power = magnitude & _EXPONENT
    np.maximum(power, _SMALLEST_NORMAL, out=power)
    codes = power - _SMALLEST_NORMAL
    codes >>= np.uint32(20)  # eight steps for each doubling
    power += _LAST_BIT_OF_E4M3
    rounded = magnitude.view(np.float32)
    rounded += power.view(np.float32)
    steps = rounded.view(np.uint32) - power
    codes += steps
    sign = np.right_shift(whole, np.uint32(24), out=steps)
    sign &= np.uint32(0x80)
    codes |= sign
    bits[...] = codes  # below 256: the cast keeps the low byte
    rounded -= power.view(np.float32)
    return rounded
