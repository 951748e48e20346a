"""Causal attention with gathered keys and values (`all_gather`): each rank collects all keys, then attends on its own.

One collective a pass instead of c hops, at the price of memory for the keys and values of the whole sequence. Right where keys are
few or short (many query groups per key, evaluation), or where the ring's steps would be too small to hide their hops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.attention import accumulator_dtype, attention_kernel, merge
from mcore_longctx.layout import zigzag_chunks
from mcore_longctx.parallel.collectives import all_gather, reduce_scatter

__all__ = ["all_gather_backward", "all_gather_forward"]


def all_gather_forward(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the whole sequence; arguments and results as in `ring.ring_forward`."""
    kernel, dtype = attention_kernel(query), accumulator_dtype(query.dtype)
    keys, values = _gather(key, value, group)
    out = torch.zeros_like(query, dtype=dtype)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    for rows, columns, causal in _parts(query, group):
        part = kernel.forward(query[:, :, rows], keys[:, :, columns], values[:, :, columns], causal=causal, scale=scale)
        merge(out[:, :, rows], lse[:, :, rows], *part)
    return out.to(query.dtype), lse


def all_gather_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    group: dist.ProcessGroup,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Keys and values are gathered again: keeping them would cost c times as much memory."""
    kernel, dtype = attention_kernel(query), accumulator_dtype(query.dtype)
    keys, values = _gather(key, value, group)
    grad_query = torch.zeros_like(query, dtype=dtype)
    grad_keys = torch.zeros_like(keys, dtype=dtype)
    grad_values = torch.zeros_like(values, dtype=dtype)
    for rows, columns, causal in _parts(query, group):
        part_query, part_key, part_value = kernel.backward(
            grad_out[:, :, rows],
            query[:, :, rows],
            keys[:, :, columns],
            values[:, :, columns],
            out[:, :, rows],
            lse[:, :, rows],
            causal=causal,
            scale=scale,
        )
        grad_query[:, :, rows] += part_query
        grad_keys[:, :, columns] += part_key
        grad_values[:, :, columns] += part_value
    grad_key, grad_value = _reduce_scatter(grad_keys, grad_values, group)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _parts(query: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[slice, slice, bool]]:
    """(rows of query, keys, causal) of each kernel call: for each of the two chunks all earlier keys, then its own block.

    Two calls, because kernels differ in how they place a causal mask on a rectangle (CPU: top left, CUDA flash: bottom right).
    """
    chunk = query.size(2) // 2
    for start, index in zip((0, chunk), zigzag_chunks(group.size(), group.rank()), strict=True):
        rows = slice(start, start + chunk)
        if index:
            yield rows, slice(0, index * chunk), False
        yield rows, slice(index * chunk, (index + 1) * chunk), True


def _gather(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence in natural order, [b, g, s, d] each."""
    size, rows = group.size(), key.size(2)
    if rows % 2:
        raise LayoutError(f"this context-parallel rank holds {rows:,} tokens, which is not two equal chunks")
    gathered = all_gather(torch.stack((key, value)), group)  # [c, 2, b, g, s/c, d]
    chunks: list[Tensor] = [gathered[0]] * (2 * size)
    for rank in range(size):
        early, late = zigzag_chunks(size, rank)
        chunks[early], chunks[late] = gathered[rank].chunk(2, dim=3)
    keys, values = torch.cat(chunks, dim=3).unbind()
    return keys, values


def _reduce_scatter(grad_keys: Tensor, grad_values: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sum the gradients of all ranks and keep this rank's two chunks."""
    size = group.size()
    chunks = torch.stack((grad_keys, grad_values)).chunk(2 * size, dim=3)
    by_rank = torch.stack([torch.cat([chunks[index] for index in zigzag_chunks(size, rank)], dim=3) for rank in range(size)])
    grad_key, grad_value = reduce_scatter(by_rank, group).unbind()
    return grad_key, grad_value
