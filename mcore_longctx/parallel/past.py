"""Attention of a few new tokens over many past ones that lie on the ranks of a context-parallel group.

The queries are the same on every rank; the past keys and values are not: each rank keeps some rows and never sends them. A rank attends
to its own rows, and one all-gather of (out, lse) a layer, n * t * (d + 1) numbers of a rank, merges what the ranks found in float32
(float64 for float64). What the new tokens see of each other is computed on every rank: their keys are there anyway.

A single query over millions of keys would keep one multiprocessor busy. So the query heads of a group become rows of one head, which
is exact where nothing is masked and repeats no key, and stretches of the keys become samples of a batch whose results are merged.
The same is done in the decoding kernels of flash attention (Flash-Decoding, 2023).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.kernels.attention import KERNEL_NAMES, AttentionKernel, accumulator_dtype, attention_kernel
from mcore_longctx.parallel.collectives import all_gather

__all__ = ["KeysAndValues", "past_attention"]

KeysAndValues = tuple[Tensor, Tensor]
"""Rows of keys and values, each [rows, b, g, d]."""

# cuDNN builds a plan for every new number of keys, and here it is new with every token
_KERNELS = tuple(name for name in KERNEL_NAMES if name != "cudnn")
_KEYS_AT_ONCE = 2**17  # bounds what a kernel makes for itself, and stays below its 32-bit indices
_BLOCKS = 512  # thread blocks that fill the largest GPU several times
_QUERIES_OF_BLOCK = 64


def past_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[KeysAndValues, ...],
    group: dist.ProcessGroup,
    scale: float,
    kernels: tuple[str, ...] = (),
) -> Tensor:
    """Attention of new tokens over all past tokens and, causally, over each other.

    Args:
        query: [b, n, t, d], the same on every rank of the group.
        key: [b, g, t, d], the same on every rank.
        value: as key.
        past: rows that this rank keeps, all of them before every query; each past token is kept by one rank. None is fine.
        group: the context-parallel group; every rank of it must call.
        scale: softmax scale.
        kernels: names of the attention kernels to choose among; empty: all but cuDNN.

    Returns:
        [b, n, t, d] in the dtype of query, the same on every rank up to the last bits of their kernels.
    """
    kernel = attention_kernel(query, kernels or _KERNELS)
    dtype = accumulator_dtype(query.dtype)
    own = [part for rows in past for part in _parts_of_rows(query, *rows, kernel, scale)]
    outs, lses = [out.to(dtype) for out, _ in own], [lse.to(dtype) for _, lse in own]
    if group.size() > 1:
        outs, lses = _of_all_ranks(query, outs, lses, group)
    among_new = kernel.forward(query, key, value, causal=True, scale=scale)
    return _merged([*outs, among_new[0].to(dtype)], [*lses, among_new[1].to(dtype)])[0].to(query.dtype)


def _parts_of_rows(
    query: Tensor, key: Tensor, value: Tensor, kernel: AttentionKernel, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of the queries over all rows of key and value [rows, b, g, d]; one entry per stretch of bounded length."""
    heads, groups, queries = query.size(1), key.size(2), query.size(2)
    folded = query.unflatten(1, (groups, -1)).flatten(2, 3)  # [b, g, n/g * t, d]
    blocks = query.size(0) * groups * -(-folded.size(2) // _QUERIES_OF_BLOCK)
    piece = _KEYS_AT_ONCE // max(1, _BLOCKS // blocks)
    parts = []
    for keys, values in zip(key.split(_KEYS_AT_ONCE), value.split(_KEYS_AT_ONCE), strict=True):
        whole = keys.size(0) // piece * piece
        for rows, pieces in ((slice(0, whole), whole // piece), (slice(whole, None), 1)):
            if keys[rows].size(0):
                out, lse = _over_pieces(folded, keys[rows], values[rows], pieces, kernel, scale)
                out, lse = out.unflatten(2, (-1, queries)), lse.unflatten(2, (-1, queries))
                parts.append(
                    (out.reshape(*query.shape[:1], heads, *out.shape[3:]), lse.reshape(*query.shape[:1], heads, queries))
                )
    return parts


def _over_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: int, kernel: AttentionKernel, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention without a mask, the rows of the keys cut in equal pieces that are samples of one batch."""
    batch = query.size(0)
    keys, values = (
        rows.unflatten(0, (pieces, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [pieces * b, g, rows, d], a view for b = 1
        for rows in (key, value)
    )
    out, lse = kernel.forward(query.repeat(pieces, 1, 1, 1), keys, values, causal=False, scale=scale)
    if pieces == 1:
        return out, lse
    dtype = accumulator_dtype(query.dtype)
    return _merged_stack(out.to(dtype).unflatten(0, (pieces, batch)), lse.to(dtype).unflatten(0, (pieces, batch)))


def _of_all_ranks(
    query: Tensor, outs: list[Tensor], lses: list[Tensor], group: dist.ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """What each rank found over its own rows: one entry per rank, in the order of the ranks."""
    dtype = accumulator_dtype(query.dtype)
    message = torch.zeros((*query.shape[:3], query.size(3) + 1), dtype=dtype, device=query.device)
    message[..., -1] = -torch.inf  # a rank without a row adds nothing
    if outs:
        message[..., :-1], message[..., -1] = _merged(outs, lses)
    gathered = all_gather(message, group)
    return list(gathered[..., :-1].unbind()), list(gathered[..., -1].unbind())


def _merged(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _merged_stack(torch.stack(outs), torch.stack(lses))


def _merged_stack(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over disjoint keys, [parts, b, n, t, d] and [parts, b, n, t], as one: out = sum of exp(lse - total) * out."""
    total = torch.logsumexp(lse, 0)
    weights = (lse - total).exp_().unsqueeze(-1)
    return (out * weights).sum(0), total
