"""FP8 rows against torch's own cast, ml_dtypes, compressed-tensors and plain arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mcore_longctx.convert.copying.fp8 import E4M3_MAX, SMALLEST_SCALE, _round_to_e4m3, quantize_rows
from mcore_longctx.errors import ConversionError


def _as_torch(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bits, scales) as torch computes them, from its own division and its own cast."""
    numbers = torch.from_numpy(rows)
    scales = (numbers.abs().amax(1) / 448).clamp(min=SMALLEST_SCALE)
    quotients = (numbers / scales[:, None]).clamp(-448, 448)
    return quotients.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scales.numpy()


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Numbers of a bf16 matrix with rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 3, rows)[:, None]
    return (torch.randn(rows, columns, generator=generator) * sizes).bfloat16().float().numpy()


@pytest.mark.parametrize("columns", [1, 7, 64, 4096, 100_000])
def test_rows_become_what_torch_makes_of_them(columns):
    rows = _weights(max(3, 200_000 // columns), columns)
    found = quantize_rows(rows, name="w")
    bits, scales = _as_torch(rows)
    assert np.array_equal(found.bits, bits)
    assert np.array_equal(found.scales, scales)


def _every_e4m3_and_its_neighbourhood() -> np.ndarray:
    """All numbers of E4M3, all midpoints between two of them, and the float32 on either side of each, both signs."""
    numbers = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    points = np.concatenate([numbers, (numbers[:-1] + numbers[1:]) / 2]).astype(np.float32)
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    points = np.concatenate([points, up, down, np.float32([2.0**-149, 2.0**-126, 463.9])])
    return np.concatenate([points, -points])


def test_every_number_and_every_tie_is_rounded_to_nearest_even():
    numbers = _every_e4m3_and_its_neighbourhood()[None]
    bits = np.empty(numbers.shape, np.uint8)
    rounded = _round_to_e4m3(numbers, bits)
    assert np.array_equal(bits, numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert np.array_equal(bits, torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    assert np.array_equal(rounded, np.abs(bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)))


def test_every_bfloat16_below_the_limit_is_rounded_as_torch_does():
    numbers = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    numbers = numbers[np.abs(numbers) < 464][None]  # NaN fails the comparison
    bits = np.empty(numbers.shape, np.uint8)
    _round_to_e4m3(numbers, bits)
    assert np.array_equal(bits, torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@example(np.float32([[6.635182e16, 6.633680e16]]))  # its error is 0.1 of a quotient of 448: the rounding shows
@settings(deadline=None)
def test_any_finite_rows_equal_torch_and_their_sums_are_exact(rows):
    found = quantize_rows(rows, name="w")
    bits, scales = _as_torch(rows)
    assert np.array_equal(found.bits, bits)
    assert np.array_equal(found.scales, scales)
    assert (found.scales >= SMALLEST_SCALE).all()
    assert found.amax == float(np.abs(rows).max())
    numbers = found.bits.view(ml_dtypes.float8_e4m3fn).astype(float)
    squared = squared_error = Fraction(0)
    for row, values in enumerate(rows):
        scale = Fraction(float(found.scales[row]))
        for quantised, value in zip(numbers[row], values, strict=True):
            squared += Fraction(float(value)) ** 2
            squared_error += (Fraction(float(quantised)) * scale - Fraction(float(value))) ** 2
    assert math.isclose(found.squared, float(squared), rel_tol=1e-5, abs_tol=1e-80)
    # Each quotient is rounded to a float32, which moves its element's error e by d <= 2^-24 |value|, and e^2 by 2 e d + d^2.
    # Cauchy and Schwarz bound the sum over all elements. The sum itself is one of float32 (1e-5).
    unit = 2.0**-24
    moved = 2 * unit * math.sqrt(float(squared_error) * float(squared)) + unit**2 * float(squared)
    assert math.isclose(found.squared_error, float(squared_error), rel_tol=1e-5, abs_tol=1.01 * moved + 1e-80)


def test_the_largest_of_each_row_becomes_448_and_a_row_of_zeros_stays_zero_with_a_usable_scale():
    rows = _weights(5, 33)
    rows[2] = 0
    found = quantize_rows(rows, name="w")
    largest = np.abs(found.bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)).max(1)
    assert largest.tolist() == [E4M3_MAX, E4M3_MAX, 0, E4M3_MAX, E4M3_MAX]
    assert found.scales[2] == np.finfo(np.float32).tiny
    assert np.isfinite(1 / found.scales).all()


def test_rows_too_small_for_a_normal_scale_keep_what_float32_can_say():
    rows = np.float32([[1e-40, -5e-41, 0.0], [448 * 2.0**-126, 2.0**-126, -(2.0**-135)]])
    found = quantize_rows(rows, name="w")
    assert found.scales.tolist() == [SMALLEST_SCALE, SMALLEST_SCALE]
    assert np.array_equal(found.bits, _as_torch(rows)[0])
    assert found.bits[0, 0] != 0


def test_a_row_does_not_depend_on_its_neighbours_or_on_the_band_it_came_in():
    rows = _weights(41, 3000)
    whole = quantize_rows(rows, name="w")
    for first in range(0, 41, 7):
        band = quantize_rows(rows[first : first + 7], name="w", first_row=first)
        assert np.array_equal(band.bits, whole.bits[first : first + 7])
        assert np.array_equal(band.scales, whole.scales[first : first + 7])
    assert quantize_rows(rows[:0], name="w").bits.shape == (0, 3000)


def test_float64_is_taken_as_the_nearest_float32():
    rows = _weights(7, 50).astype(np.float64) * (1 + 1e-9)
    found, narrow = quantize_rows(rows, name="w"), quantize_rows(rows.astype(np.float32), name="w")
    assert np.array_equal(found.bits, narrow.bits)
    assert found.scales.dtype == np.float32
    assert np.array_equal(found.scales, narrow.scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_tensor_and_row(bad):
    rows = _weights(9, 12)
    rows[4, 11] = bad
    with pytest.raises(ConversionError, match=r"^model\.x\.weight: NaN or infinity in row 104; fp8 needs finite weights"):
        quantize_rows(rows, name="model.x.weight", first_row=100)


def test_the_relative_error_of_random_weights_is_what_three_bits_of_fraction_give():
    found = quantize_rows(_weights(64, 4096), name="w")
    assert 0.02 < math.sqrt(found.squared_error / found.squared) < 0.04


def test_rows_become_what_compressed_tensors_makes_of_them():
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    rows = torch.from_numpy(_weights(300, 500))
    scales, zero_points = calculate_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), args)
    theirs = quantize(rows, scales, zero_points, args, dtype=torch.float8_e4m3fn)
    ours = quantize_rows(rows.numpy(), name="w")
    assert np.array_equal(ours.scales, scales[:, 0].numpy())
    assert np.array_equal(ours.bits, theirs.view(torch.uint8).numpy())
