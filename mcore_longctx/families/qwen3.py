"""Qwen3 (dense): an RMSNorm over each head of q and k before the rope, no biases, `head_dim` on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.dense_decoder import ATTENTION, EMBEDDING, HEAD_NORMS, MLP, OUTPUT
from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import read_sizes, refuse_if
from mcore_longctx.families.shape import ModelShape

__all__ = ["QWEN3"]


def _read(config: Mapping[str, Any], where: object) -> ModelShape:
    """Megatron's bias of the output projection comes with biases in the MLP, which Qwen3 has not."""
    refuse_if(config, where, "attention_bias", "Megatron has no matching layer", "see docs/families.md, biases")
    refuse_if(
        config, where, "use_sliding_window", "attention here sees every token before it", "set it to false to train without"
    )
    if config.get("head_dim") is None:  # transformers takes 128, whatever the other sizes are
        raise ConfigError("head_dim is missing", where=where, fix="write it down: programs guess it differently")
    return read_sizes(config, where, family="qwen3", qk_layernorm=True)


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), EMBEDDING + ATTENTION + HEAD_NORMS + MLP + OUTPUT, _read)
