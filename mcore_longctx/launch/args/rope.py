"""The recipe's rope in Megatron's rope flags, or why it cannot be said with them.

What Megatron's flags can say (0.19.2, megatron/training/arguments.py and argument_utils.py):

    rope    --rotary-base, a whole number; --rotary-seq-len-interpolation-factor, a whole number
    llama3  the factor, over 8,192 tokens, between 1 and 4 turns: everything but the factor is written into Megatron
    yarn    all settings of the ramp over the pair index; the temperature as t(mscale) / t(mscale_all_dim)
"""

from __future__ import annotations

import json
import math
from dataclasses import fields

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.args.flags import Flag, flag
from mcore_longctx.recipe import RopeSection
from mcore_longctx.rope import RopeScaling, read_hf_rope, write_hf_rope

__all__ = ["LLAMA3", "ROPE_KEYS", "rope_as_json", "rope_flags", "why_no_rope_flags", "yarn_temperature"]

# all fields together make the rope, which is what the flags say; phase_dtype is how it is computed
ROPE_KEYS = (
    "stage.rope",
    *(f"rope.{field.name}" for field in fields(RopeSection) if field.name not in ("phase_dtype", "max_position_embeddings")),
)

LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What Megatron takes for Llama 3's scaling whatever is asked for (`RotaryEmbedding._apply_scaling`); only the factor is a flag."""


def rope_flags(rope: RopeScaling) -> list[Flag]:
    """Megatron's flags for a rope for which `why_no_rope_flags` is empty."""
    base = flag("--rotary-base", rope.rope_theta, keys=ROPE_KEYS)
    if rope.type == "yarn":
        mscale, all_dim = yarn_temperature(rope)
        rounds = "--yarn-correction-range-round-to-int" if rope.truncate else "--no-yarn-correction-range-round-to-int"
        return [
            flag("--position-embedding-type", "yarn", keys=ROPE_KEYS),
            base,
            flag("--rotary-scaling-factor", rope.factor, keys=ROPE_KEYS),
            flag("--yarn-original-max-position-embeddings", rope.original_length, keys=ROPE_KEYS),
            flag("--yarn-beta-fast", rope.beta_fast, keys=ROPE_KEYS),
            flag("--yarn-beta-slow", rope.beta_slow, keys=ROPE_KEYS),
            flag(rounds, keys=ROPE_KEYS),
            flag("--mscale", mscale, keys=ROPE_KEYS),
            flag("--mscale-all-dim", all_dim, keys=ROPE_KEYS),
        ]
    flags = [flag("--position-embedding-type", "rope", keys=ROPE_KEYS), base]
    if rope.type == "llama3":
        flags += [flag("--use-rope-scaling", keys=ROPE_KEYS), flag("--rope-scaling-factor", rope.factor, keys=ROPE_KEYS)]
    elif rope.type == "linear":
        flags.append(flag("--rotary-seq-len-interpolation-factor", rope.factor, keys=ROPE_KEYS))
    return flags


def why_no_rope_flags(rope: RopeScaling) -> str:
    """Why Megatron's flags cannot say this rope; empty if they can."""
    if not rope.rope_theta.is_integer():
        return f"--rotary-base takes whole numbers, the base is {rope.rope_theta!r}"
    if rope.type == "llama3":
        other = [f"{name} {getattr(rope, name):g}" for name, value in LLAMA3.items() if getattr(rope, name) != value]
        return f"Llama 3's scaling is written into Megatron with other values than {', '.join(other)}" if other else ""
    if rope.type == "linear" and not rope.factor.is_integer():
        return f"--rotary-seq-len-interpolation-factor takes whole numbers, the factor is {rope.factor!r}"
    if rope.type == "yarn" and rope.ramp == "rotations":
        return "Megatron's YaRN has its ramp over the pair index, this one over rotations"
    if rope.type == "yarn" and rope.factor == 1.0:
        return "YaRN without a factor scales nothing, and Megatron takes it for a mistake"
    return f"Megatron has no flag for rope type {rope.type}" if rope.type in ("ntk", "dynamic", "bands", "longrope") else ""


def yarn_temperature(rope: RopeScaling) -> tuple[float, float]:
    """(mscale, mscale_all_dim) that give the attention factor a of a yarn rope by Megatron's rule: a = t(mscale) / t(all_dim).

    t(m) = 0.1 m ln(factor) + 1. For a factor that is given as a number, mscale is solved from it.

    >>> rope = RopeScaling(type="yarn", head_dim=128, rope_theta=5e5, factor=512, original_max_position_embeddings=8192)
    >>> yarn_temperature(rope)
    (1.0, 0.0)
    """
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return rope.mscale, rope.mscale_all_dim
    if rope.attention_factor is None:
        return 1.0, 0.0
    return (rope.attention_factor - 1.0) / (0.1 * math.log(rope.factor)), 0.0


def rope_as_json(rope: RopeScaling, *, where: object) -> str:
    """The rope as the text of a Hugging Face config.json, in one line.

    Raises:
        ConfigError: no config.json can hold it.
    """
    values = {"head_dim": rope.head_dim, **write_hf_rope(rope)}
    del values["rope_parameters"]  # the same again, for transformers 5
    text = json.dumps(values, separators=(",", ":"))
    if read_hf_rope(json.loads(text)).fingerprint() != rope.fingerprint():
        raise ConfigError("this rope cannot be written down as a config.json", where=where, fix="use mcore-longctx train")
    return text
