"""Mistral: Llama's tensors; heads may be of another size than hidden_size / heads (Nemo: 128 at 5,120 / 32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.families.dense_decoder import ATTENTION, EMBEDDING, MLP, OUTPUT
from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import read_sizes, refuse_sliding_window
from mcore_longctx.families.shape import ModelShape

__all__ = ["MISTRAL"]


def _read(config: Mapping[str, Any], where: object) -> ModelShape:
    """The window of the first 7B is refused, not dropped: with it a layer sees 4,096 tokens, without it all of them."""
    refuse_sliding_window(config, where, default=4096)
    return read_sizes(config, where, family="mistral")


MISTRAL = Family("mistral", ("MistralForCausalLM",), EMBEDDING + ATTENTION + MLP + OUTPUT, _read)
