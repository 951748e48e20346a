"""Qwen2 and Qwen2.5: biases of q, k and v, which config.json does not mention, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.families.dense_decoder import ATTENTION, ATTENTION_BIASES, EMBEDDING, MLP, OUTPUT
from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import read_sizes, refuse_if
from mcore_longctx.families.shape import ModelShape

__all__ = ["QWEN2"]


def _read(config: Mapping[str, Any], where: object) -> ModelShape:
    """A `sliding_window` that `use_sliding_window` has not switched on means nothing and is carried."""
    refuse_if(
        config, where, "use_sliding_window", "attention here sees every token before it", "set it to false to train without"
    )
    return read_sizes(config, where, family="qwen2", add_qkv_bias=True)


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), EMBEDDING + ATTENTION + ATTENTION_BIASES + MLP + OUTPUT, _read)
