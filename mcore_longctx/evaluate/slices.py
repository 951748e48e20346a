"""A whole sample, as this context-parallel rank sees it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from torch import Tensor

from mcore_longctx.layout import zigzag_owner, zigzag_positions
from mcore_longctx.megatron_compat import training_device

__all__ = ["from_first_rank", "local_rows", "local_slice", "padded", "sum_over_ranks"]


def padded(tokens: npt.NDArray[np.int64], config: Any) -> npt.NDArray[np.int64]:
    """Tokens of any length with as many behind them as the layout of a TransformerConfig needs.

    They are right of everything real, so causal attention never sees them. What they are is of no meaning.
    """
    cp_size = parallel_state.get_context_parallel_world_size()
    multiple = 2 * cp_size if cp_size > 1 else 1
    if config.sequence_parallel:  # each rank splits its slice over the tensor-parallel group
        multiple = math.lcm(multiple, cp_size * config.tensor_model_parallel_size)
    return np.pad(tokens, (0, -len(tokens) % multiple))


def local_slice(tokens: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Tokens and global positions of this rank's zigzag slice, each int64 [1, s/c] on the model's device. tokens: int64 [s]."""
    positions = zigzag_positions(
        len(tokens), parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    )
    device = training_device()
    return torch.from_numpy(tokens[positions])[None].to(device), torch.from_numpy(positions)[None].to(device)


def local_rows(positions: npt.NDArray[np.int64], seq_length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which of some global positions lie on this rank: their indices in `positions`, and the rows at which they lie here."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    owned = [
        (i, row) for i, p in enumerate(positions) for owner, row in [zigzag_owner(int(p), seq_length, size)] if owner == rank
    ]
    pairs = np.array(owned, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def sum_over_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum of an array over the context-parallel ranks, float64, the same on each."""
    total = torch.from_numpy(values).to(training_device())
    torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return np.asarray(total.cpu().numpy())


def from_first_rank(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The array of the first context-parallel rank, on each: for results that ranks compute alike, up to the last bits."""
    group = parallel_state.get_context_parallel_group()
    shared = torch.from_numpy(values).to(training_device())
    torch.distributed.broadcast(shared, torch.distributed.get_process_group_ranks(group)[0], group=group)
    return np.asarray(shared.cpu().numpy())
