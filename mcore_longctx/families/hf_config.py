"""Sizes out of a config.json, checked; what a dense decoder of Megatron cannot express is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.shape import ModelShape

__all__ = ["read_sizes", "refuse_unless"]


def refuse_unless(config: Mapping[str, Any], where: object, **wanted: object) -> None:
    """Raise ConfigError for a key that is there with another value than the wanted one."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{key} is {config[key]!r}, only {value!r} is supported", where=where)


def read_sizes(
    config: Mapping[str, Any],
    where: object,
    *,
    add_qkv_bias: bool = False,
    add_bias_linear: bool = False,
    qk_layernorm: bool = False,
) -> ModelShape:
    """The sizes that all families spell alike.

    Raises:
        ConfigError: a missing or impossible size, or a feature that a dense decoder of Megatron cannot express.
    """
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not 1; partly rotated heads are not supported", where=where)
    if config.get("quantization_config"):
        raise ConfigError("quantization_config: quantised weights cannot be converted", where=where, fix="use the bf16 model")

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{key} is {value!r}, expected a positive whole number", where=where)
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    epsilon = config.get("rms_norm_eps", 1e-6)  # transformers' default
    if not isinstance(epsilon, float | int) or isinstance(epsilon, bool) or epsilon < 0:
        raise ConfigError(f"rms_norm_eps is {epsilon!r}, expected a number", where=where)
    shape = ModelShape(
        family=str(config["model_type"]),
        num_layers=size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=size("num_key_value_heads", heads),
        kv_channels=size("head_dim", hidden // heads),
        vocab_size=size("vocab_size"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        layernorm_epsilon=float(epsilon),
        add_qkv_bias=add_qkv_bias,
        add_bias_linear=add_bias_linear,
        qk_layernorm=qk_layernorm,
    )
    if heads % shape.num_query_groups:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shape.num_query_groups}", where=where
        )
    return shape
