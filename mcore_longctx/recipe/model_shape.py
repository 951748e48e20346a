"""The sizes of a Llama-family model, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mcore_longctx.errors import ConfigError, LayoutError

__all__ = ["ModelShape"]

VOCAB_MULTIPLE = 128  # Megatron-LM's make_vocab_size_divisible_by


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense Llama: all that is needed to build or convert it, without its rope.

    `kv_channels` is the head dimension; `num_query_groups` the number of key/value heads.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tie_word_embeddings: bool = False
    layernorm_epsilon: float = 1e-5

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, where: object = "config.json") -> ModelShape:
        """Read the sizes of a `LlamaForCausalLM` config.

        Raises:
            ConfigError: another family, a missing or impossible size, or a feature that a Megatron Llama cannot express.
        """
        if config.get("model_type") != "llama":
            raise ConfigError(
                f"model_type {config.get('model_type')!r} is not supported", where=where, fix="this version converts llama"
            )
        for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if config.get(key, wanted) != wanted:
                raise ConfigError(f"{key} is {config[key]!r}, only {wanted!r} is supported", where=where)
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
        shape = cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=size("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=size("num_key_value_heads", heads),
            kv_channels=size("head_dim", hidden // heads),
            vocab_size=size("vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            layernorm_epsilon=float(epsilon),
        )
        if heads % shape.num_query_groups:
            raise ConfigError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shape.num_query_groups}", where=where
            )
        return shape

    def padded_vocab_size(self, tp_size: int = 1) -> int:
        """Rows of the embedding as Megatron pads it: the next multiple of 128 x TP."""
        multiple = VOCAB_MULTIPLE * tp_size
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self, tp_size: int, pp_size: int, *, where: object = None) -> None:
        """Raise LayoutError unless heads and layers divide by the layout."""
        for name, count in (("num_attention_heads", self.num_attention_heads), ("num_query_groups", self.num_query_groups)):
            if count % tp_size:
                raise LayoutError(
                    f"{name} {count} is not divisible by tensor_model_parallel_size {tp_size}",
                    where=where,
                    fix=f"use one of {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}",
                )
        if self.ffn_hidden_size % tp_size:
            raise LayoutError(
                f"ffn_hidden_size {self.ffn_hidden_size} is not divisible by tensor_model_parallel_size {tp_size}", where=where
            )
        if self.num_layers % pp_size:
            raise LayoutError(
                f"num_layers {self.num_layers} is not divisible by pipeline_model_parallel_size {pp_size}", where=where
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form, as stored in `mcore_longctx.json`."""
        return asdict(self)
