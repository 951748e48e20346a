"""The rope in words: one line for logs and reports, what the paper's scaling is, and a warning worth reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mcore_longctx.rope import frequencies as formulas

if TYPE_CHECKING:
    from mcore_longctx.rope.scaling import RopeScaling

__all__ = ["describe", "dropped_scaling", "explain"]


def _number(value: float) -> str:
    """1 for 1.0, 500,000 for 5e5, 4,134,231.132 for 4134231.1318, 0.0025 for 2.5e-3."""
    return f"{value:,.3f}".rstrip("0").rstrip(".") if value >= 1.0 else f"{value:.6g}"


def _pairs(indices: npt.NDArray[np.intp]) -> str:
    first, last = int(indices[0]), int(indices[-1])
    return f"{first}" if first == last else f"{first}-{last}"


def _pair_groups(rope: RopeScaling) -> str:
    """For example `pairs 0-28 kept, 29-34 mixed, 35-63 divided by 512`."""
    share = rope.share_kept()
    groups = []
    for name, member in (
        ("kept", share == 1.0),
        ("mixed", (share > 0.0) & (share < 1.0)),
        (f"divided by {_number(rope.factor)}", share == 0.0),
    ):
        indices = np.flatnonzero(member)
        if len(indices):  # shares fall with the pair index, so each group is one range
            groups.append(f"{_pairs(indices)} {name}")
    return "pairs " + ", ".join(groups)


def _band_groups(rope: RopeScaling) -> str:
    """For example `pairs 0-15 kept, 16-39 mixed (0.5 ntk, 0.5 linear), 40-63 as ntk`."""
    factor, groups, first = _number(rope.factor), [], 0
    for band in rope.bands or ():
        meaning = {
            "none": "kept",
            "linear": f"divided by {factor}",
            "ntk": "as ntk",
            "mix": f"mixed ({band.ntk_share:g} ntk, {1 - band.ntk_share:g} linear)" if band.ntk_share is not None else "",
        }
        groups.append(f"{_pairs(np.arange(first, first + band.pairs))} {meaning[band.rule]}")
        first += band.pairs
    return "pairs " + ", ".join(groups)


def _divided_groups(rope: RopeScaling) -> str:
    divisors = np.array(rope.divisors())
    kept = np.flatnonzero(divisors == 1.0)
    text = f"{len(kept)} of {len(divisors)} pairs kept, " if len(kept) else ""
    return f"{text}each pair divided by a number of its own, from {_number(divisors.min())} to {_number(divisors.max())}"


def describe(rope: RopeScaling) -> str:
    """`rope` in words, one line."""
    if rope.type in ("llama3", "yarn"):
        return _describe_ramp(rope)
    base, factor = f"base {_number(rope.rope_theta)}", _number(rope.factor)
    texts = {
        "bands": lambda: f"bands factor {factor}, {base}: {_band_groups(rope)}",
        "longrope": lambda: f"longrope with one list, {base}: {_divided_groups(rope)}",
        "none": lambda: f"none: no scaling, {base}",
        "abf": lambda: f"abf: base changed to {_number(rope.rope_theta)}, no other scaling",
        "linear": lambda: f"linear factor {factor}, {base}: every pair divided by {factor}",
        "ntk": lambda: (
            f"ntk factor {factor}, {base} changed to {_number(formulas.ntk_base(rope.head_dim, rope.rope_theta, rope.factor))}:"
            f" the slowest pair divided by {factor}, faster ones by less"
        ),
        "dynamic": lambda: (
            f"dynamic factor {factor} over a trained length of {rope.max_position_embeddings:,}, {base}:"
            " changes with the sequence, not for training"
        ),
    }
    return texts[rope.type]()


def _describe_ramp(rope: RopeScaling) -> str:
    over, base = f"factor {_number(rope.factor)} over {rope.original_length:,}", f"base {_number(rope.rope_theta)}"
    if rope.type == "llama3":
        low, high = _number(rope.low_freq_factor), _number(rope.high_freq_factor)
        bounds = f"low {low}, high {high}"
        meaning = f"YaRN as published with alpha {low}, beta {high}, without temperature"
    elif rope.ramp == "rotations":
        bounds = f"alpha {_number(rope.alpha)}, beta {_number(rope.beta)}"
        meaning = f"as published, ramp over rotations, attention factor {rope.frequencies()[1]:.6g}"
    else:
        bounds = f"beta_fast {_number(rope.beta_fast)}, beta_slow {_number(rope.beta_slow)}"
        bounds += "" if rope.truncate else ", not truncated"
        meaning = f"as libraries compute it, ramp over the pair index, attention factor {rope.frequencies()[1]:.6g}"
    return f"{rope.type} {over} ({bounds}), {base}: {meaning}; {_pair_groups(rope)}"


def explain(rope: RopeScaling) -> str:
    """`rope` in words and, for llama3 and yarn, how it relates to the UltraLong paper's "YaRN, alpha 1, beta 4"; one to four lines.

    Says why the presets are of type llama3, how far the type yarn is from it, and how to train that other reading.
    """
    lines = [describe(rope)]
    if rope.type == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        lines += [*_paper_scaling(rope, low, high), _rival_override(low, high)]
    elif rope.type == "yarn":
        lines += _paper_scaling(rope, 1.0, 4.0)  # the paper's bounds
    return "\n".join(lines)


def _rival_override(low: float, high: float) -> str:
    return f"To train that other reading, temperature included: rope.type=yarn rope.beta_fast={_number(high)} rope.beta_slow={_number(low)}"


def _paper_scaling(rope: RopeScaling, low: float, high: float) -> list[str]:
    d, base, s, original = rope.head_dim, rope.rope_theta, rope.factor, rope.original_length
    as_published = formulas.llama3_frequencies(d, base, s, original, low_freq_factor=low, high_freq_factor=high)

    def difference(beta_fast: float, beta_slow: float) -> str:
        try:
            yarn = formulas.yarn_frequencies(d, base, s, original, beta_fast=beta_fast, beta_slow=beta_slow, truncate=True)
        except ValueError:
            return "it has no ramp over so short an original length"
        ratio = np.maximum(yarn / as_published, as_published / yarn)
        return f"{int((ratio > 1.0 + 1e-9).sum())} of {d // 2} frequencies differ, by up to {ratio.max():.2f} times"

    alpha, beta, factor = _number(low), _number(high), _number(s)
    return [
        f'"YaRN, alpha {alpha}, beta {beta}, s {factor}" as published (and so in the UltraLong paper) is the rope type llama3 with'
        f" low_freq_factor {alpha}, high_freq_factor {beta}, factor {factor} over {original:,}: both ramps are linear in rotations and"
        f" the inverse frequencies are the same bits. Only YaRN's temperature (cos and sin times {formulas.temperature(s):.6g}) is left"
        " out: a llama3 config cannot carry one.",
        f"The type that libraries call yarn has a ramp linear in the pair index: with beta_fast {beta}, beta_slow {alpha},"
        f" {difference(high, low)}; with the usual 32 and 1, {difference(32.0, 1.0)}.",
    ]


def dropped_scaling(model_rope: RopeScaling, rope: RopeScaling) -> str | None:
    """A warning where `rope` makes pairs turn faster than the model that it extends was trained with, else None.

    Extending only slows pairs down. Pairs that get faster mean that the model's own scaling is replaced instead of continued, for
    example yarn with factor 32 over 131,072 on Llama 3.1, whose own rope is llama3 with factor 8 over 8,192.

    Raises:
        ConfigError: `rope` is `dynamic`.
    """
    own = model_rope.frequencies(model_rope.max_position_embeddings)[0]
    faster = np.flatnonzero(rope.frequencies()[0] > own * (1.0 + 1e-9))
    if not len(faster):
        return None
    hint = ""
    if model_rope.type in ("llama3", "yarn"):
        hint = f"; count factor from original_max_position_embeddings {model_rope.original_length:,}, as the model does"
    return (
        f"{len(faster)} pairs ({_pairs(faster)}) turn faster than in the model's own rope ({describe(model_rope)}): scalings replace each other,"
        f" they do not add up{hint}"
    )
