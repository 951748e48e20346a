"""A config.json that a user gives for a checkpoint, checked against what the checkpoint's own program wrote beside its weights.

Megatron-LM stores all of its flags in the common state (`args`). Weights of another model mostly differ in shape, but nothing in a
tensor shows its rope, its norm's epsilon or its number of heads.

Source: megatron-core 0.19.2 `training/arguments.py`, `models/gpt/gpt_model.py` (constants of the llama3 rope).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mcore_longctx.errors import ConversionError
from mcore_longctx.families import ModelShape
from mcore_longctx.rope import RopeScaling
from mcore_longctx.rope.frequencies import temperature

__all__ = ["check_padding", "check_saved_settings"]

# Megatron's flag -> field of ModelShape
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "norm_epsilon": "layernorm_epsilon",
    "layernorm_epsilon": "layernorm_epsilon",
    "add_bias_linear": "add_bias_linear",
    "qk_layernorm": "qk_layernorm",
}
# what the model of a table has; a checkpoint with another value holds another model
_FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "num_experts": None,
    "multi_latent_attention": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "window_size": None,
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,
    "qk_l2_norm": False,
    "apply_residual_connection_post_layernorm": False,
}
_LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Megatron's constants
_LARGEST_UNIT = 1 << 14  # rows; 128 x TP 128


def check_saved_settings(common: Mapping[str, Any] | None, shape: ModelShape, rope: RopeScaling, config: Path) -> list[str]:
    """Compare the flags in a common state with the model that a config.json describes.

    Returns:
        What could not be checked, in words.

    Raises:
        ConversionError: a difference, by name.
    """
    args = None if common is None else common.get("args")
    if not isinstance(args, Mapping):
        return ["the checkpoint does not say which model and rope it was trained with; both were taken from the config"]
    for flag, wanted in _FIXED.items():
        if args.get(flag) is not None and args[flag] != wanted:
            _refuse(flag, args[flag], config, f"only {wanted!r} is supported")
    for flag, field in _SIZES.items():
        if args.get(flag) is not None and args[flag] != getattr(shape, field):
            _refuse(flag, args[flag], config, f"says {getattr(shape, field)}")
    heads, groups = args.get("num_attention_heads"), args.get("num_query_groups")
    groups = groups if args.get("group_query_attention", True) and groups is not None else heads
    if groups is not None and groups != shape.num_query_groups:
        _refuse("num_query_groups", groups, config, f"says {shape.num_query_groups}")
    biased = bool(args.get("add_qkv_bias")) or bool(args.get("add_bias_linear"))
    if "add_qkv_bias" in args and biased != (shape.add_qkv_bias or shape.add_bias_linear):
        _refuse("add_qkv_bias", biased, config, f"says {shape.add_qkv_bias}")
    if "untie_embeddings_and_output_weights" in args:
        tied = not args["untie_embeddings_and_output_weights"]
        if tied != shape.tie_word_embeddings:
            _refuse("tied embeddings", tied, config, f"says tie_word_embeddings {shape.tie_word_embeddings}")
    return _check_rope(args, shape, rope, config)


def _refuse(name: str, found: object, config: Path, what: str) -> NoReturn:
    trained = f"the checkpoint was trained with {name} {str(found)[:80]}"
    if what.startswith("only"):
        raise ConversionError(f"{trained}, {what}", where=config)
    raise ConversionError(f"{trained}, this config {what}", where=config, fix="use the config.json of this checkpoint")


def _check_rope(args: Mapping[str, Any], shape: ModelShape, rope: RopeScaling, config: Path) -> list[str]:
    if args.get("longctx_rope") is not None:
        return [
            f"the rope was given as a file when it was trained ({str(args['longctx_rope'])[:80]}); the config's was not checked"
        ]
    kind = args.get("position_embedding_type")
    if kind is None:
        return ["the checkpoint does not say which rope it was trained with; it was taken from the config"]
    if kind not in ("rope", "yarn"):
        _refuse("position_embedding_type", kind, config, "only rope and yarn are supported")
    base = args.get("rotary_base")
    if isinstance(base, int | float) and float(base) != rope.rope_theta:
        _refuse("rotary_base", f"{base:,}", config, f"says rope_theta {rope.rope_theta:,.15g}")
    try:
        trained = _trained_rope(args, shape, rope)
        differs = trained.fingerprint() != rope.fingerprint()
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(f"the rope flags of the checkpoint make no sense: {str(error)[:200]}", where=config) from None
    if differs:
        raise ConversionError(
            f"the checkpoint was trained with the rope {trained.describe()}, this config says {rope.describe()}",
            where=config,
            fix="use the config.json of this checkpoint, then change the rope with --rope",
        )
    return []


def _trained_rope(args: Mapping[str, Any], shape: ModelShape, rope: RopeScaling) -> RopeScaling:
    """The rope that Megatron-LM's flags make. Raises ValueError for settings that no rope has."""

    def flag(name: str, default: Any) -> Any:
        value = args.get(name)
        return default if value is None else value

    values: dict[str, Any] = {"type": "none"}
    if args.get("position_embedding_type") == "yarn":
        factor = float(flag("rotary_scaling_factor", 1.0))
        mscale, all_dim = (temperature(factor, float(flag(name, 1.0 - i))) for i, name in enumerate(("mscale", "mscale_all_dim")))
        values = {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": flag("yarn_original_max_position_embeddings", 4096),
            "beta_fast": float(flag("yarn_beta_fast", 32.0)),
            "beta_slow": float(flag("yarn_beta_slow", 1.0)),
            "truncate": bool(flag("yarn_correction_range_round_to_int", True)),
            "attention_factor": mscale / all_dim,
        }
    elif args.get("use_rope_scaling"):
        values = {"type": "llama3", "factor": float(flag("rope_scaling_factor", 8.0)), **_LLAMA3}
    elif args.get("rotary_seq_len_interpolation_factor") not in (None, 1, 1.0):
        values = {"type": "linear", "factor": float(args["rotary_seq_len_interpolation_factor"])}
    base = args.get("rotary_base")
    theta = float(base) if isinstance(base, int | float) else rope.rope_theta
    return RopeScaling(head_dim=shape.kv_channels, rope_theta=theta, **values)


def check_padding(rows: int, shape: ModelShape, common: Mapping[str, Any] | None, where: str) -> None:
    """Refuse a vocabulary that the config's, padded as Megatron pads it, does not give.

    megatron-core itself drops surplus rows and fills missing ones with zeros when it loads, without a word.

    Raises:
        ConversionError: fewer rows than entries, or more than padding explains.
    """
    args = (common or {}).get("args")
    args = args if isinstance(args, Mapping) else {}
    multiple, tp = args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size")
    if type(multiple) is int and type(tp) is int and 0 < multiple * tp <= 1 << 32:
        units = [1, multiple * tp]
    else:
        splits = [tp for tp in range(1, shape.num_attention_heads + 1) if shape.num_attention_heads % tp == 0][:64]
        powers = [1 << power for power in range(_LARGEST_UNIT.bit_length())]
        units = [power * tp for power in powers for tp in splits if power * tp <= _LARGEST_UNIT]
    if rows >= shape.vocab_size and any(rows % unit == 0 and rows - shape.vocab_size < unit for unit in units):
        return
    raise ConversionError(
        f"{rows:,} rows of vocabulary, the config's vocab_size {shape.vocab_size:,} is not padded to that",
        where=where,
        fix="use the config.json of this model",
    )
