"""Causal attention with gathered keys and values (`all_gather`): each rank collects all keys, then attends on its own.

One collective a pass instead of c hops, at the price of memory for the keys and values of the whole sequence. Right where keys are
few or short (many query groups per key, evaluation), or where the ring's steps would be too small to hide their hops. Documents that
lie whole on a rank are not gathered.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.kernels.attention import AttentionKernel, accumulator_dtype, merge
from mcore_longctx.layout.plans import GatherPlan
from mcore_longctx.parallel.collectives import all_gather, reduce_scatter
from mcore_longctx.parallel.local import whole_backward, whole_forward
from mcore_longctx.parallel.rows import as_rows, empty_rows, from_rows, order_on, put_rows, take_rows

__all__ = ["all_gather_backward", "all_gather_forward"]


def all_gather_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: GatherPlan,
    group: dist.ProcessGroup,
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the rows of all ranks; arguments and results as in `ring.ring_forward`."""
    out, lse = whole_forward(query, key, value, plan.whole, kernel, scale)
    if not plan.split_rows:
        return out, lse
    keys, values = (_gathered(tensor, plan, group) for tensor in (key, value))
    dtype = accumulator_dtype(query.dtype)
    for calls in plan.chunks:
        rows = calls[0].queries
        total, total_lse = (
            torch.zeros(out[:, :, rows].shape, dtype=dtype, device=out.device),
            torch.full(lse[:, :, rows].shape, -math.inf, dtype=dtype, device=lse.device),
        )
        for _, columns, causal in calls:
            part = kernel.forward(query[:, :, rows], keys[:, :, columns], values[:, :, columns], causal=causal, scale=scale)
            merge(total, total_lse, *part)
        out[:, :, rows], lse[:, :, rows] = total, total_lse
    return out, lse


def all_gather_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: GatherPlan,
    group: dist.ProcessGroup,
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Keys and values are gathered again: keeping them would cost c times as much memory."""
    grad_query, grad_key, grad_value = whole_backward(grad_out, query, key, value, out, lse, plan.whole, kernel, scale)
    if not plan.split_rows:
        return grad_query, grad_key, grad_value
    keys, values = (_gathered(tensor, plan, group) for tensor in (key, value))
    dtype = accumulator_dtype(query.dtype)
    grad_keys, grad_values = (empty_rows(tensor, dtype=dtype, zero=True) for tensor in (keys, values))
    for calls in plan.chunks:
        rows = calls[0].queries
        total = torch.zeros(query[:, :, rows].shape, dtype=dtype, device=query.device)
        for _, columns, causal in calls:
            of_query, of_keys, of_values = kernel.backward(
                grad_out[:, :, rows],
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                causal=causal,
                scale=scale,
            )
            total += of_query
            grad_keys[:, :, columns] += of_keys
            grad_values[:, :, columns] += of_values
        grad_query[:, :, rows] = total
    del keys, values  # the sums are put into the order of the ranks next, which takes as much memory again
    for gradient, summed in ((grad_key, grad_keys), (grad_value, grad_values)):
        gradient[:, :, : plan.split_rows] = _scattered(summed, plan, group)
    return grad_query, grad_key, grad_value


def _gathered(tensor: Tensor, plan: GatherPlan, group: dist.ProcessGroup) -> Tensor:
    """The travelling rows of all ranks, [b, g, t, d] -> [b, g, c * split rows, d], each document in natural order."""
    gathered = all_gather(as_rows(tensor[:, :, : plan.split_rows]), group).flatten(0, 1)
    return from_rows(take_rows(gathered, order_on(plan, tensor.device)))


def _scattered(gradient: Tensor, plan: GatherPlan, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `_gathered`: sums over all ranks, of which each gets its own rows."""
    rows = as_rows(gradient)
    by_rank = torch.empty_like(rows)
    put_rows(by_rank, order_on(plan, rows.device), rows)
    return from_rows(reduce_scatter(by_rank.unflatten(0, (group.size(), -1)), group))
