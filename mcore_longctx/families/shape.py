"""The sizes of a Llama-family model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mcore_longctx.errors import LayoutError

__all__ = ["ModelShape"]

VOCAB_MULTIPLE = 128  # Megatron-LM's make_vocab_size_divisible_by


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder: all that is needed to build or convert it, without its rope.

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
    family: str = "llama"  # whose table its tensors follow: a model_type
    add_qkv_bias: bool = False  # q, k and v alone
    add_bias_linear: bool = False  # q, k, v, o, gate, up and down: Megatron has all of them or none
    qk_layernorm: bool = False  # RMSNorm over the head dimension of queries and keys, before the rope

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelShape:
        """The inverse of `as_dict`. Cards of before there were families lack the later fields, and are Llamas without biases.

        Raises:
            TypeError: not a mapping, an unknown or missing field, or a value of the wrong type.
            ValueError: a size that is not positive.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        for name, value in dict(values).items():
            wanted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kinds.get(name, "bool")]
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise TypeError(f"{name} is {value!r}")
            if kinds.get(name) == "int" and int(value) <= 0:
                raise ValueError(f"{name} is {value}")
        return cls(**values)
