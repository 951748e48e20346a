"""Inverse frequencies of every rope type as pure float64 functions.

Notation: d = `head_dim` (the rotary dimension), i = 0..d/2-1 the pair index, b = `rope_theta`, s = `factor`, L = the original (trained)
length. Plain rope: w_i = b^(-2i/d) radians per token; a type turns w into w'. Every function returns w' as float64 [d/2].

The numbers are the same bits on every machine: powers and logarithms, which differ in the last place between CPUs and mathematics
libraries, are taken with `decimal`; what is left is IEEE addition, multiplication and division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = [
    "FloatArray",
    "abf_frequencies",
    "attention_factor_of_yarn",
    "band_divisor",
    "blend",
    "divided_frequencies",
    "dynamic_frequencies",
    "linear_frequencies",
    "llama3_frequencies",
    "ntk_base",
    "ntk_frequencies",
    "plain_frequencies",
    "share_kept_by_index",
    "share_kept_by_rotations",
    "temperature",
    "yarn_correction_range",
    "yarn_frequencies",
]

FloatArray = npt.NDArray[np.float64]

_DECIMAL = Context(prec=50)


def _power(base: float, exponent: Decimal) -> float:
    """`base ** exponent`, correctly rounded to float64."""
    return float(_DECIMAL.exp(_DECIMAL.multiply(exponent, _DECIMAL.ln(Decimal(base)))))


def _log(value: float) -> float:
    """Natural logarithm, correctly rounded to float64."""
    return float(_DECIMAL.ln(Decimal(value)))


@lru_cache(maxsize=64)
def _plain(head_dim: int, rope_theta: float) -> FloatArray:
    exponents = (_DECIMAL.divide(Decimal(-2 * i), Decimal(head_dim)) for i in range(head_dim // 2))
    inv_freq = np.array([_power(rope_theta, exponent) for exponent in exponents], dtype=np.float64)
    inv_freq.flags.writeable = False  # shared by all callers
    return inv_freq


def plain_frequencies(head_dim: int, rope_theta: float) -> FloatArray:
    """w_i = b^(-2i/d), radians per token.

    >>> plain_frequencies(4, 10_000.0).tolist()
    [1.0, 0.01]

    Source: RoFormer, arXiv 2104.09864 section 3.2.2.
    """
    return _plain(head_dim, float(rope_theta)).copy()


def abf_frequencies(head_dim: int, rope_theta: float) -> FloatArray:
    """Adjusted base frequency: plain rope with another base.

    Source: arXiv 2309.16039 section 2.1 (Llama 2 Long); also ProLong (2410.02660) and Gradient's models.
    """
    return plain_frequencies(head_dim, rope_theta)


def linear_frequencies(head_dim: int, rope_theta: float, factor: float) -> FloatArray:
    """Position interpolation: w' = w / s.

    Source: arXiv 2306.15595; transformers modeling_rope_utils `_compute_linear_scaling_rope_parameters`.
    """
    return plain_frequencies(head_dim, rope_theta) / factor


def ntk_base(head_dim: int, rope_theta: float, factor: float) -> float:
    """The base with which the slowest pair is divided by exactly s: b' = b * s^(d/(d-2)).

    >>> round(ntk_base(128, 500_000.0, 128.0), 3)
    69123823.289

    Source: "NTK-aware" interpolation, arXiv 2309.00071 section 3.1.
    """
    return rope_theta * _power(factor, _DECIMAL.divide(Decimal(head_dim), Decimal(head_dim - 2)))


def ntk_frequencies(head_dim: int, rope_theta: float, factor: float) -> FloatArray:
    """Plain rope with `ntk_base` (static NTK-aware scaling)."""
    return plain_frequencies(head_dim, ntk_base(head_dim, rope_theta, factor))


def band_divisor(head_dim: int, pair: int, factor: float, ntk_share: float) -> float:
    """What pair i is divided by where its frequency is (1 - m) w / s + m w / s^(2i/(d-2)); m = `ntk_share`.

    m 0 is linear scaling: exactly s. m 1 is NTK-aware scaling, from 1 for the fastest pair to exactly s for the slowest.

    >>> [band_divisor(8, pair, 8.0, 1.0) for pair in range(4)], band_divisor(8, 0, 8.0, 0.5)
    ([1.0, 2.0, 4.0, 8.0], 1.7777777777777777)

    Source: GIRAFFE, arXiv 2412.12735, code `mrope_plus_mokey_patch.py` (m is `ntk_factor`; its s for NTK is (target - 1) / (length - 1)).
    """
    s, share = Decimal(factor), Decimal(ntk_share)
    exponent = _DECIMAL.divide(Decimal(2 * pair), Decimal(head_dim - 2))
    ntk = _DECIMAL.exp(_DECIMAL.multiply(exponent, _DECIMAL.ln(s)))
    linear_part = _DECIMAL.divide(_DECIMAL.subtract(Decimal(1), share), s)
    return float(_DECIMAL.divide(Decimal(1), _DECIMAL.add(linear_part, _DECIMAL.divide(share, ntk))))


def divided_frequencies(head_dim: int, rope_theta: float, divisors: Sequence[float]) -> FloatArray:
    """Each pair has a divisor f of its own: w' = w / f, [d/2].

    Source: LongRoPE, arXiv 2402.13753; transformers modeling_rope_utils `_compute_longrope_parameters`.
    """
    return plain_frequencies(head_dim, rope_theta) / np.array(divisors, dtype=np.float64)


def dynamic_frequencies(head_dim: int, rope_theta: float, factor: float, trained_length: int, seq_length: int) -> FloatArray:
    """NTK-aware scaling that grows with the sequence: plain rope with base b * (s n / M - (s - 1))^(d/(d-2)).

    M = `trained_length`, n = max(seq_length, M): up to the trained length this is plain rope.

    Source: transformers modeling_rope_utils `_compute_dynamic_ntk_parameters` (M is its `max_position_embeddings`).
    """
    length = max(seq_length, trained_length)
    return ntk_frequencies(head_dim, rope_theta, factor * length / trained_length - (factor - 1.0))


def share_kept_by_rotations(inv_freq: FloatArray, original_length: int, low: float, high: float) -> FloatArray:
    """Share of its own frequency that each pair keeps, [d/2] in 0..1, linear in rotations over the original window.

    Pairs that turn more than `high` times inside `original_length` positions keep all, pairs that turn less than `low` times nothing.

    Source: arXiv 2309.00071 equations 11-13 (alpha = low, beta = high).
    """
    rotations = original_length * inv_freq / (2 * math.pi)
    return np.clip((rotations - low) / (high - low), 0.0, 1.0)


def _pair_index(rotations: float, head_dim: int, rope_theta: float, original_length: int) -> float:
    """The (real) pair index that makes `rotations` turns over `original_length` positions."""
    return head_dim * _log(original_length / (rotations * 2 * math.pi)) / (2 * _log(rope_theta))


def yarn_correction_range(
    head_dim: int, rope_theta: float, original_length: int, *, beta_fast: float, beta_slow: float, truncate: bool
) -> tuple[float, float]:
    """First and last pair index of the ramp as libraries compute it.

    >>> yarn_correction_range(128, 500_000.0, 8192, beta_fast=32.0, beta_slow=1.0, truncate=True)
    (18.0, 35.0)

    Raises:
        ValueError: the ramp ends before it starts (an original length of a few tokens, or a tiny base).

    Source: transformers modeling_rope_utils `_compute_yarn_parameters`, megatron-core `yarn_rotary_pos_embedding.py`.
    """
    low = _pair_index(beta_fast, head_dim, rope_theta, original_length)
    high = _pair_index(beta_slow, head_dim, rope_theta, original_length)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # head_dim - 1, not head_dim / 2 - 1: the clamp of every library
    low, high = max(float(low), 0.0), min(float(high), head_dim - 1.0)
    if low == high:
        high += 0.001  # as libraries do, against division by zero
    if low > high:
        raise ValueError(
            f"the yarn ramp ends (pair {high:g}) before it starts (pair {low:g}): no pair of base {rope_theta:,.0f} turns between"
            f" {beta_slow:g} and {beta_fast:g} times in {original_length:,} positions"
        )
    return low, high


def share_kept_by_index(
    head_dim: int, rope_theta: float, original_length: int, *, beta_fast: float, beta_slow: float, truncate: bool
) -> FloatArray:
    """Share of its own frequency that each pair keeps, [d/2] in 0..1, linear in the pair index."""
    low, high = yarn_correction_range(
        head_dim, rope_theta, original_length, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate
    )
    return 1.0 - np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)


def blend(inv_freq: FloatArray, factor: float, share_kept: FloatArray) -> FloatArray:
    """Share kept k blends both ends: w k + (w / s) (1 - k), exactly w where k is 1 and exactly w / s where k is 0."""
    return inv_freq / factor * (1.0 - share_kept) + inv_freq * share_kept


def llama3_frequencies(
    head_dim: int, rope_theta: float, factor: float, original_length: int, *, low_freq_factor: float, high_freq_factor: float
) -> FloatArray:
    """Blend of w and w / s with a ramp linear in rotations.

    This is YaRN as published ("NTK-by-parts", alpha = low_freq_factor, beta = high_freq_factor) without its temperature.

    Source: transformers modeling_rope_utils `_compute_llama3_parameters`; megatron-core `RotaryEmbedding._apply_scaling`.
    """
    inv_freq = plain_frequencies(head_dim, rope_theta)
    return blend(inv_freq, factor, share_kept_by_rotations(inv_freq, original_length, low_freq_factor, high_freq_factor))


def yarn_frequencies(
    head_dim: int, rope_theta: float, factor: float, original_length: int, *, beta_fast: float, beta_slow: float, truncate: bool
) -> FloatArray:
    """YaRN as libraries compute it: blend of w and w / s with a ramp linear in the pair index.

    Source: transformers modeling_rope_utils `_compute_yarn_parameters`; megatron-core, vLLM and SGLang agree with it.
    """
    share = share_kept_by_index(
        head_dim, rope_theta, original_length, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate
    )
    return blend(plain_frequencies(head_dim, rope_theta), factor, share)


def temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature as a multiplier of cos and sin: 0.1 m ln s + 1, and 1 for s <= 1. Logits are multiplied by its square.

    >>> round(temperature(512.0), 5)
    1.62383

    Source: arXiv 2309.00071 equation 22 (1 / sqrt(t)); transformers `get_mscale`.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * _log(factor) + 1.0


def attention_factor_of_yarn(
    factor: float, attention_factor: float | None, mscale: float | None, mscale_all_dim: float | None
) -> float:
    """The number that multiplies cos and sin: `attention_factor`, else the mscale pair, else `temperature(factor)`.

    Source: transformers modeling_rope_utils `_compute_yarn_parameters` (its mscale pair counts only if both are above 0).
    """
    if attention_factor is not None:
        return attention_factor
    if mscale and mscale_all_dim:
        return temperature(factor, mscale) / temperature(factor, mscale_all_dim)
    return temperature(factor)
