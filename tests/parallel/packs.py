"""Packs of documents for the tests, their attention by plain matrix products, and what a rank holds of them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.kernels.attention import MathKernel
from mcore_longctx.layout.packed import PackLayout

SCALE = 0.3
WIDTH = 16


def random_tensors(heads: int, groups: int, rows: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of out, [batch, heads, rows, 16]: the same on every rank."""
    generator = torch.Generator().manual_seed(heads * 1000 + groups)
    shapes = [(batch, count, rows, WIDTH) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def reference(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lengths: list[int]) -> list[Tensor]:
    """Out, dq, dk, dv in float64: one matrix-product kernel over each whole document."""
    results = []
    for parts in zip(*(tensor.double().split(lengths, dim=2) for tensor in (grad_out, query, key, value)), strict=True):
        out, lse = MathKernel().forward(*parts[1:], causal=True, scale=SCALE)
        results.append((out, *MathKernel().backward(*parts, out, lse, causal=True, scale=SCALE)))
    return [torch.cat(of_documents, dim=2) for of_documents in zip(*results, strict=True)]


def on_rank(tensor: Tensor, layout: PackLayout, rank: int, padding: float = math.nan) -> Tensor:
    """Rows of a rank of [b, h, tokens, d], with `padding` where there is no token."""
    source = torch.from_numpy(layout.source(rank))
    held = torch.full((*tensor.shape[:2], layout.rows, tensor.size(3)), padding, dtype=tensor.dtype)
    held[:, :, source >= 0] = tensor[:, :, source[source >= 0]]
    return held


def hierarchical_groups(inner: int) -> list[dist.ProcessGroup]:
    """This rank's `inner` neighbours and its strided ranks, in a world that is one context-parallel group."""
    size, rank, mine = dist.get_world_size(), dist.get_rank(), []
    for ranks in [list(range(i, i + inner)) for i in range(0, size, inner)] + [list(range(i, size, inner)) for i in range(inner)]:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine.append(group)
    return mine
