"""Initial weights that are the same for every layout: each parameter is drawn whole by its global name, then cut."""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch
from torch import Tensor

from mcore_longctx.megatron_compat import layer_offset

__all__ = ["fill_with_nan", "global_name", "set_initial_weights", "tensor_parallel_shard"]

_STANDARD_DEVIATION = 0.02  # of every Llama
_EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")


def set_initial_weights(model: Any, vocab_size: int, seed: int) -> None:
    """Draw matrices from N(0, 0.02^2), set norms to 1 and biases to 0. Vocabulary rows that stand for no token are 0, as after conversion.

    With tied embeddings the last pipeline stage's copy gets the embedding's weights.
    """
    tied = model.share_embeddings_and_output_weights
    for name, parameter in model.named_parameters():
        key = global_name(name, model.config)
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        size = list(parameter.shape)
        if _is_split(parameter):
            size[parameter.partition_dim] *= model.config.tensor_model_parallel_size
        drawn = torch.zeros(size)
        rows = vocab_size if key in _EMBEDDINGS else size[0]
        source = _EMBEDDINGS[0] if tied and key in _EMBEDDINGS else key
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {source}".encode()))  # it reads 32 bits
        drawn[:rows] = torch.randn(rows, size[1], generator=generator) * _STANDARD_DEVIATION
        parameter.data.copy_(tensor_parallel_shard(key, drawn, parameter, model.pg_collection.tp))


def fill_with_nan(model: Any) -> None:
    """Make every parameter NaN: whatever is not loaded afterwards shows at once."""
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))


def global_name(name: str, config: Any) -> str:
    """Name of a parameter with its layer counted over all pipeline stages."""
    offset = layer_offset(config)
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + offset), name)


def tensor_parallel_shard(name: str, whole: Tensor, parameter: Tensor, tp_group: Any) -> Tensor:
    """This rank's part of a whole parameter. `linear_fc1` holds gate and up projection, each of which is split."""
    if not _is_split(parameter):
        return whole
    rank, size = tp_group.rank(), tp_group.size()
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size, 0)[rank] for half in whole.chunk(2, 0)])
    return whole.chunk(size, parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def _is_split(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))
