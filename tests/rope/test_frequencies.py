"""Inverse frequencies: golden values, identities between the types, and laws that hold for every setting."""

import doctest
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mcore_longctx.rope.frequencies as formulas
from mcore_longctx.rope import RopeScaling

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())["ropes"]
ULP = 2.0**-52
LLAMA3 = {"head_dim": 128, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}


def frequencies_of(name: str) -> tuple[formulas.FloatArray, float]:
    return RopeScaling(**GOLDEN[name]["rope"]).frequencies(65536 if name == "T4c" else None)


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_rounded_to_float32_have_the_golden_hash(name: str) -> None:
    inv_freq, attention_factor = frequencies_of(name)
    assert inv_freq.dtype == np.float64
    assert inv_freq.shape == (GOLDEN[name]["rope"]["head_dim"] // 2,)
    assert hashlib.sha256(inv_freq.astype("<f4").tobytes()).hexdigest() == GOLDEN[name]["sha256"]
    assert attention_factor == pytest.approx(GOLDEN[name]["attention_factor"], rel=ULP)


@pytest.mark.parametrize("name", [name for name in GOLDEN if "selected" in GOLDEN[name]])
def test_selected_frequencies_agree_to_the_last_digits(name: str) -> None:
    inv_freq, _ = frequencies_of(name)
    for index, value in GOLDEN[name]["selected"].items():
        # the stored values were computed with numpy's pow: a few units in the last place
        assert inv_freq[int(index)] == pytest.approx(value, rel=4 * ULP), f"pair {index}"


def test_yarn_as_published_is_llama3_bit_for_bit_apart_from_the_temperature() -> None:
    published, temperature = RopeScaling(type="yarn", ramp="rotations", alpha=1, beta=4, factor=512, **LLAMA3).frequencies()
    llama3, one = RopeScaling(type="llama3", low_freq_factor=1, high_freq_factor=4, factor=512, **LLAMA3).frequencies()
    assert published.tobytes() == llama3.tobytes()
    assert (temperature, one) == (pytest.approx(0.1 * math.log(512) + 1), 1.0)


def test_library_yarn_with_the_same_bounds_is_another_rope() -> None:
    published = frequencies_of("T2d")[0]
    library = frequencies_of("T3d")[0]
    ratio = np.maximum(library / published, published / library)
    assert (ratio > 1 + 1e-9).sum() == 6
    assert ratio.max() == pytest.approx(1.89, abs=0.005)


@pytest.mark.parametrize(
    ("bounds", "original", "expected"), [((32, 1), 8192, (18, 35)), ((4, 1), 8192, (28, 35)), ((32, 1), 131072, (31, 49))]
)
def test_correction_range_is_rounded_outward(bounds: tuple[int, int], original: int, expected: tuple[int, int]) -> None:
    fast, slow = bounds
    assert formulas.yarn_correction_range(128, 5e5, original, beta_fast=fast, beta_slow=slow, truncate=True) == expected


def test_correction_range_not_truncated_has_the_exact_bounds() -> None:
    low, high = formulas.yarn_correction_range(128, 5e5, 8192, beta_fast=32, beta_slow=1, truncate=False)
    assert (low, high) == (pytest.approx(18.0811, abs=5e-5), pytest.approx(34.9841, abs=5e-5))
    # by definition: the pair at index `high` turns once over the original window
    assert 8192 * 5e5 ** (-2 * high / 128) / (2 * math.pi) == pytest.approx(1.0, rel=1e-12)


def test_linear_divides_every_frequency() -> None:
    plain = formulas.plain_frequencies(128, 5e5)
    assert np.array_equal(formulas.linear_frequencies(128, 5e5, 8.0), plain / 8.0)


@pytest.mark.parametrize("factor", [2.0, 8.0, 128.0, 512.0])
def test_ntk_divides_the_slowest_pair_by_exactly_the_factor_and_keeps_the_fastest(factor: float) -> None:
    plain, ntk = formulas.plain_frequencies(128, 5e5), formulas.ntk_frequencies(128, 5e5, factor)
    assert ntk[0] == 1.0
    assert ntk[-1] == pytest.approx(plain[-1] / factor, rel=1e-14)


def test_ntk_bases_are_the_known_ones() -> None:
    known = {8.0: 4134231.132, 128.0: 69123823.289, 256.0: 139777091.972, 512.0: 282646915.501}
    assert {factor: formulas.ntk_base(128, 5e5, factor) for factor in known} == pytest.approx(known, abs=6e-4)


def test_dynamic_is_plain_up_to_the_trained_length_and_static_ntk_beyond() -> None:
    plain = formulas.plain_frequencies(64, 1e4)
    assert np.array_equal(formulas.dynamic_frequencies(64, 1e4, 4.0, 2048, 100), plain)
    assert np.array_equal(formulas.dynamic_frequencies(64, 1e4, 4.0, 2048, 2048), plain)
    beyond = formulas.dynamic_frequencies(64, 1e4, 4.0, 2048, 8192)  # grows by 4 x 4 - 3
    assert np.array_equal(beyond, formulas.ntk_frequencies(64, 1e4, 13.0))


def test_plain_frequencies_agree_with_the_power_function_of_numpy() -> None:
    for head_dim in (32, 80, 96, 128):
        for base in (1e4, 5e5, 3580165449.0):
            exponents = np.arange(0, head_dim, 2) / head_dim
            # the rounding of the exponent counts ln(base) times
            np.testing.assert_allclose(formulas.plain_frequencies(head_dim, base), base**-exponents, rtol=16 * ULP)


def test_a_caller_that_changes_its_frequencies_changes_nobody_elses() -> None:
    formulas.plain_frequencies(64, 1e4)[:] = 0.0
    assert formulas.plain_frequencies(64, 1e4)[0] == 1.0


@pytest.mark.parametrize(
    ("factor", "attention_factor", "mscale", "all_dim", "expected"),
    [
        (8.0, None, None, None, 1.20794),
        (512.0, None, None, None, 1.62383),
        (1.0, None, None, None, 1.0),
        (512.0, 1.1, None, None, 1.1),
        (40.0, None, 0.707, 0.707, 1.0),
        (128.0, None, 1.0, 0.5, 1.19524),
        (128.0, None, 0.5152482288889155, None, 1.48520),  # half a pair does not count
    ],
)
def test_attention_factor(
    factor: float, attention_factor: float | None, mscale: float | None, all_dim: float | None, expected: float
) -> None:
    assert formulas.attention_factor_of_yarn(factor, attention_factor, mscale, all_dim) == pytest.approx(expected, abs=5e-6)


@st.composite
def ropes_with_a_ramp(draw: st.DrawFn) -> RopeScaling:
    low = draw(st.floats(0.5, 8.0))
    high = low * draw(st.floats(1.5, 32.0))
    bounds: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"type": "llama3", "low_freq_factor": low, "high_freq_factor": high},
                {"type": "yarn", "ramp": "rotations", "alpha": low, "beta": high},
                {"type": "yarn", "beta_slow": low, "beta_fast": high, "truncate": True},
                {"type": "yarn", "beta_slow": low, "beta_fast": high, "truncate": False},
            ]
        )
    )
    return RopeScaling(
        head_dim=2 * draw(st.integers(8, 128)),
        rope_theta=draw(st.floats(1e4, 1e9)),
        factor=draw(st.floats(1.0, 512.0)),
        original_max_position_embeddings=draw(st.integers(512, 131072)),
        **bounds,
    )


@given(ropes_with_a_ramp())
def test_a_ramp_keeps_every_frequency_between_all_and_its_share(rope: RopeScaling) -> None:
    plain, scaled = formulas.plain_frequencies(rope.head_dim, rope.rope_theta), rope.frequencies()[0]
    assert (scaled <= plain * (1 + 2 * ULP)).all()
    assert (scaled >= plain / rope.factor * (1 - 2 * ULP)).all()
    assert (scaled[1:] <= scaled[:-1] * (1 + 2 * ULP)).all(), "a slower pair became faster than its neighbour"
    share = rope.share_kept()
    assert np.array_equal(scaled[share == 1.0], plain[share == 1.0])
    assert np.array_equal(scaled[share == 0.0], (plain / rope.factor)[share == 0.0])


@given(ropes_with_a_ramp())
def test_factor_one_is_plain_rope(rope: RopeScaling) -> None:
    inv_freq, attention_factor = RopeScaling.from_dict(rope.as_dict() | {"factor": 1.0}).frequencies()
    np.testing.assert_allclose(inv_freq, formulas.plain_frequencies(rope.head_dim, rope.rope_theta), rtol=2 * ULP)
    assert attention_factor == 1.0


@pytest.mark.parametrize("kind", ["linear", "ntk"])
def test_factor_one_is_plain_rope_without_a_ramp_too(kind: Any) -> None:
    inv_freq, _ = RopeScaling(type=kind, head_dim=128, rope_theta=5e5, factor=1).frequencies()
    assert np.array_equal(inv_freq, formulas.plain_frequencies(128, 5e5))


@given(st.floats(0.5, 8.0), st.floats(1.5, 32.0), st.floats(1.0, 512.0), st.integers(512, 131072))
def test_llama3_is_yarn_as_published_for_all_bounds(low: float, ratio: float, factor: float, original: int) -> None:
    common: dict[str, Any] = {
        "head_dim": 128,
        "rope_theta": 5e5,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    llama3 = RopeScaling(type="llama3", low_freq_factor=low, high_freq_factor=low * ratio, **common)
    published = RopeScaling(type="yarn", ramp="rotations", alpha=low, beta=low * ratio, **common)
    assert llama3.frequencies()[0].tobytes() == published.frequencies()[0].tobytes()


def test_examples_in_the_docstrings_are_true() -> None:
    import mcore_longctx.rope.scaling as scaling

    for module in (formulas, scaling):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
