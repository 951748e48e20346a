"""Collectives of tensors under one name for every supported torch (2.13 renamed two and warns about the old names)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "all_to_all", "gather_numbers", "reduce_scatter", "start_all_gather", "start_reduce_scatter"]

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


def all_to_all(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of [ranks, *shape], contiguous, send entry j to rank j; entry i of the result comes from rank i."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received.view(-1), tensor.view(-1), group=group)
    return received


def gather_numbers(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """A few numbers of every rank of the group. Waits for the device."""
    return all_gather(torch.tensor(numbers, dtype=torch.int64, device=device), group).tolist()


def start_all_gather(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """`all_gather` under way: its result may be read after `work.wait()`."""
    gathered = tensor.new_empty((group.size(), *tensor.shape))
    return gathered, _ALL_GATHER(gathered.view(-1), tensor.contiguous().view(-1), group=group, async_op=True)


def start_reduce_scatter(tensor: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`reduce_scatter` into `own` under way: `own` may be read, and `tensor` written, after `work.wait()`. Both are contiguous."""
    return _REDUCE_SCATTER(own.view(-1), tensor.view(-1), group=group, async_op=True)
