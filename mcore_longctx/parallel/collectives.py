"""Collectives under one name for every supported torch (2.13 renamed them and warns about the old names)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "reduce_scatter", "start_all_gather", "start_reduce_scatter"]

# gloo checks shapes where NCCL does not: flat views are the same memory and pass on both
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks of the group, [ranks, *shape]."""
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    _ALL_GATHER(gathered.view(-1), tensor.contiguous().view(-1), group=group)
    return gathered


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of [ranks, *shape] over the group; each rank gets its own [*shape]."""
    own = tensor.new_empty(tensor.shape[1:])
    _REDUCE_SCATTER(own.view(-1), tensor.contiguous().view(-1), group=group)
    return own


def start_all_gather(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """`all_gather` under way: the result [ranks, *shape] may be read after `work.wait()`."""
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    return gathered, _ALL_GATHER(gathered.view(-1), tensor.contiguous().view(-1), group=group, async_op=True)


def start_reduce_scatter(tensor: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`reduce_scatter` of [ranks, *shape] into `own` (contiguous) under way; `tensor` must be left alone until `work.wait()`."""
    return _REDUCE_SCATTER(own.view(-1), tensor.view(-1), group=group, async_op=True)
