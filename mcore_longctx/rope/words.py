"""The rope in words: one line for logs and reports, and the paper's scaling explained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mcore_longctx.rope import frequencies as formulas

if TYPE_CHECKING:
    from mcore_longctx.rope.scaling import RopeScaling

__all__ = ["describe"]


def _number(value: float) -> str:
    """1 for 1.0, 500,000 for 5e5, 4,134,231.132 for 4134231.1318."""
    text = f"{value:,.3f}"
    return text.rstrip("0").rstrip(".")


def _pairs(first: int, last: int) -> str:
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
            groups.append(f"{_pairs(int(indices[0]), int(indices[-1]))} {name}")
    return "pairs " + ", ".join(groups)


def describe(rope: RopeScaling) -> str:
    """`rope` in words, one line."""
    base, factor = f"base {_number(rope.rope_theta)}", f"factor {_number(rope.factor)}"
    if rope.type == "none":
        return f"none: no scaling, {base}"
    if rope.type == "abf":
        return f"abf: base changed to {_number(rope.rope_theta)}, no other scaling"
    if rope.type == "linear":
        return f"linear {factor}, {base}: every pair divided by {_number(rope.factor)}"
    if rope.type == "ntk":
        new = formulas.ntk_base(rope.head_dim, rope.rope_theta, rope.factor)
        return f"ntk {factor}, {base} changed to {_number(new)}: only the slowest pair divided by {_number(rope.factor)}"
    if rope.type == "dynamic":
        return f"dynamic {factor} over a trained length of {rope.max_position_embeddings:,}, {base}: changes with the sequence, not for training"
    over = f"{factor} over {rope.original_length:,}"
    if rope.type == "llama3":
        low, high = _number(rope.low_freq_factor), _number(rope.high_freq_factor)
        return (
            f"llama3 {over} (low {low}, high {high}), {base}: YaRN as published with alpha {low}, beta {high}, without temperature; "
            + _pair_groups(rope)
        )
    temperature = f"attention factor {rope.frequencies()[1]:.6g}"
    if rope.ramp == "rotations":
        bounds = f"alpha {_number(rope.alpha)}, beta {_number(rope.beta)}"
        return f"yarn {over} ({bounds}), {base}: as published, ramp over rotations, {temperature}; " + _pair_groups(rope)
    bounds = f"beta_fast {_number(rope.beta_fast)}, beta_slow {_number(rope.beta_slow)}"
    rounded = "" if rope.truncate else ", not truncated"
    return (
        f"yarn {over} ({bounds}{rounded}), {base}: as libraries compute it, ramp over the pair index, {temperature}; "
        + _pair_groups(rope)
    )
