"""Causal attention over a context-parallel ring (`p2p`): keys and values travel, queries stay.

What each step computes is in `mcore_longctx.layout.plans`. The keys of the next step are in flight while a step computes, and the
documents that lie whole on a rank are computed while the first are. Results are merged in float32 (float64 for float64) by their
log-sum-exp into one accumulator. In the backward pass the gradients of keys and values travel one hop behind their keys and arrive
home with one hop more.

Memory beside the arguments and results, whatever the number of ranks: one accumulator of the travelling rows, two buffers of keys and
values for the hops (and two of their gradients in the backward pass), and the results of one step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.kernels.attention import AttentionKernel, accumulator_dtype, merge
from mcore_longctx.layout.plans import RingPlan
from mcore_longctx.parallel.local import whole_backward, whole_forward
from mcore_longctx.parallel.rows import as_rows, empty_rows, from_rows

__all__ = ["ring_backward", "ring_forward"]


def ring_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RingPlan,
    group: dist.ProcessGroup | None,
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the rows of all ranks.

    Args:
        query: [b, n, t, d], the rows of this rank of the ring.
        key: [b, g, t, d].
        value: [b, g, t, d].
        plan: what this rank computes.
        group: the ranks of the ring; None: this rank alone.
        kernel: attention on one device.
        scale: softmax scale.

    Returns:
        out [b, n, t, d] in the dtype of query, lse [b, n, t] float32 (float64 for float64). Rows of padding: 0 and -inf.
    """
    if not plan.steps:
        return whole_forward(query, key, value, plan.whole, kernel, scale)
    assert group is not None
    hops = _KeyHops(key, value, plan, group)
    hops.start(0)
    others = whole_forward(query, key, value, plan.whole, kernel, scale) if plan.split_rows < plan.rows else None
    dtype = accumulator_dtype(query.dtype)
    total = empty_rows(query, rows=plan.split_rows, dtype=dtype, zero=True)
    total_lse = torch.full(total.shape[:3], -math.inf, dtype=dtype, device=query.device)
    for step, calls in enumerate(plan.steps):
        if step:
            hops.start(step)
        for queries, keys, causal in calls:
            part = kernel.forward(query[:, :, queries], hops.key[:, :, keys], hops.value[:, :, keys], causal=causal, scale=scale)
            if step:
                merge(total[:, :, queries], total_lse[:, :, queries], *part)
            else:
                total[:, :, queries], total_lse[:, :, queries] = part
        hops.wait()
    if others is None:
        return total.to(query.dtype), total_lse
    out, lse = others
    out[:, :, : plan.split_rows], lse[:, :, : plan.split_rows] = total, total_lse
    return out, lse


def ring_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: RingPlan,
    group: dist.ProcessGroup | None,
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (arguments as in `ring_forward`, which gave `out` and `lse`). Rows of padding: 0."""
    if not plan.steps:
        return whole_backward(grad_out, query, key, value, out, lse, plan.whole, kernel, scale)
    assert group is not None
    hops = _KeyHops(key, value, plan, group)
    hops.start(0)
    others = None
    if plan.split_rows < plan.rows:
        others = whole_backward(grad_out, query, key, value, out, lse, plan.whole, kernel, scale)
    total = empty_rows(query, rows=plan.split_rows, dtype=accumulator_dtype(query.dtype), zero=True)
    totals = _GradientHops(key, value, plan, group)
    for step, calls in enumerate(plan.steps):
        if step:
            hops.start(step)
        parts = []
        for queries, keys, causal in calls:
            part, *of_keys = kernel.backward(
                grad_out[:, :, queries],
                query[:, :, queries],
                hops.key[:, :, keys],
                hops.value[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                causal=causal,
                scale=scale,
            )
            total[:, :, queries] += part
            parts.append((keys, of_keys))
        totals.wait()  # the sums of these keys come from the rank that had them before
        for keys, (of_key, of_value) in parts:
            totals.key[:, :, keys] += of_key
            totals.value[:, :, keys] += of_value
        totals.start()
        hops.wait()
    totals.wait()
    if others is None:
        return total.to(query.dtype), totals.key.to(key.dtype), totals.value.to(value.dtype)
    for gradient, summed in zip(others, (total, totals.key, totals.value), strict=True):
        gradient[:, :, : plan.split_rows] = summed
    return others


class _Ring:
    """Messages to the next rank of the group, and those that come from the previous one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, rank, size = group, group.rank(), group.size()
        self.next = dist.get_global_rank(group, (rank + 1) % size)
        self.previous = dist.get_global_rank(group, (rank - 1) % size)

    def send(self, sent: list[Tensor], received: list[Tensor], tag: int) -> list[Any]:
        """Start to send and to receive contiguous tensors, which are left alone until the works are waited for."""
        messages = []
        for i, (leaving, arriving) in enumerate(zip(sent, received, strict=True)):
            messages.append(dist.P2POp(dist.isend, leaving, self.next, self.group, tag + i))
            messages.append(dist.P2POp(dist.irecv, arriving, self.previous, self.group, tag + i))
        return dist.batch_isend_irecv(messages)


class _KeyHops:
    """The keys and values of the present step, `key` and `value` [b, g, t, d], while those of the next step arrive."""

    def __init__(self, key: Tensor, value: Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self.ring, self.last = _Ring(group), len(plan.steps) - 1
        self.held = [as_rows(tensor[:, :, : plan.split_rows]) for tensor in (key, value)]
        self.buffers = [[torch.empty_like(tensor) for tensor in self.held] for _ in range(min(self.last, 2))]
        self.works: list[Any] = []
        self.arriving = self.held

    @property
    def key(self) -> Tensor:
        return from_rows(self.held[0])

    @property
    def value(self) -> Tensor:
        return from_rows(self.held[1])

    def start(self, step: int) -> None:
        """Pass on what is held; what is sent in one step is the buffer that is received into in the next but one."""
        if step < self.last:
            self.arriving = self.buffers[step % 2]
            self.works = self.ring.send(self.held, self.arriving, tag=0)

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.held = [], self.arriving


class _GradientHops:
    """Sums of the gradients of the present step's keys and values, `key` and `value` [b, g, t, d]."""

    def __init__(self, key: Tensor, value: Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self.ring, dtype = _Ring(group), accumulator_dtype(key.dtype)
        shapes = [(plan.split_rows, *tensor.shape[:2], tensor.size(3)) for tensor in (key, value)]
        self.held = [torch.zeros(shape, dtype=dtype, device=key.device) for shape in shapes]
        self.other = [torch.empty_like(tensor) for tensor in self.held]
        self.works: list[Any] = []

    @property
    def key(self) -> Tensor:
        return from_rows(self.held[0])

    @property
    def value(self) -> Tensor:
        return from_rows(self.held[1])

    def start(self) -> None:
        self.works = self.ring.send(self.held, self.other, tag=2)

    def wait(self) -> None:
        if self.works:
            for work in self.works:
                work.wait()
            self.works, self.held, self.other = [], self.other, self.held
