"""Llama 2, 3, 3.1 and 3.2, and whatever calls itself `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.dense_decoder import DENSE_DECODER
from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import flag, read_sizes, refuse_sliding_window
from mcore_longctx.families.shape import ModelShape

__all__ = ["LLAMA"]


def _read(config: Mapping[str, Any], where: object) -> ModelShape:
    """`attention_bias` stands for biases of q, k, v and o, `mlp_bias` for gate, up and down; Megatron has all of them or none.

    A `sliding_window` leaves the masks alone, but transformers' cache drops what lies before it (4.57 and 5.23).
    """
    refuse_sliding_window(config, where)
    attention, mlp = (flag(config, where, name) for name in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        there, missing = ("attention_bias", "mlp_bias") if attention else ("mlp_bias", "attention_bias")
        raise ConfigError(
            f"{there} without {missing}: Megatron has no matching layer", where=where, fix="see docs/families.md, biases"
        )
    return read_sizes(config, where, family="llama", add_bias_linear=attention)


LLAMA = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), DENSE_DECODER, _read)
