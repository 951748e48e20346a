"""Causal attention over a context-parallel ring (`p2p`): keys and values travel, queries stay.

Each rank holds the zigzag chunks r and 2c-1-r of 2c (`mcore_longctx.layout.zigzag`), its early and its late half. In step i it
works on the keys of rank j = r - i:

    j = r   its own: causal over the two halves laid together (they are in order, because r < 2c-1-r)
    j < r   all its queries see the early half of j's keys, and none of the late half
    j > r   the late half of its queries sees all of j's keys

so no step needs a mask, and every step after the first has the same work on every rank. The next keys are in flight while a step
computes. Results are merged in float32 (float64 for float64) by their log-sum-exp. In the backward pass the gradients of keys and
values travel one hop behind their keys and arrive home with one hop more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.attention import accumulator_dtype, attention_kernel, merge

__all__ = ["ring_backward", "ring_forward"]


def ring_forward(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the whole sequence.

    Args:
        query: [b, n, s/c, d], the two zigzag chunks of this rank.
        key: [b, g, s/c, d].
        value: [b, g, s/c, d].
        group: the c ranks of the context-parallel group.
        scale: softmax scale.

    Returns:
        out [b, n, s/c, d] in the dtype of query, lse [b, n, s/c] float32 (float64 for float64).
    """
    half, kernel = _half(query), attention_kernel(query)
    ring = _Ring(group)
    out = lse = torch.empty(0)
    keys_values = torch.stack((key, value))  # one message a hop
    for step in range(ring.size):
        arriving = ring.send(keys_values) if step + 1 < ring.size else None
        k, v = keys_values.unbind()
        owner = (ring.rank - step) % ring.size
        if step == 0:
            out, lse = kernel.forward(query, k, v, causal=True, scale=scale)
            out, lse = out.to(accumulator_dtype(query.dtype)), lse.to(accumulator_dtype(query.dtype))
        elif owner < ring.rank:
            merge(out, lse, *kernel.forward(query, k[:, :, :half], v[:, :, :half], causal=False, scale=scale))
        else:
            late = kernel.forward(query[:, :, half:], k, v, causal=False, scale=scale)
            merge(out[:, :, half:], lse[:, :, half:], *late)
        if arriving is not None:
            keys_values = arriving.wait()
    return out.to(query.dtype), lse


def ring_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    group: dist.ProcessGroup,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (shapes and group as in `ring_forward`, which gave `out` and `lse`)."""
    half, kernel = _half(query), attention_kernel(query)
    ring, dtype = _Ring(group), accumulator_dtype(query.dtype)
    grad_query = torch.zeros_like(query, dtype=dtype)
    grads_sent: _Transfer | None = None
    keys_values = torch.stack((key, value))
    for step in range(ring.size):
        arriving = ring.send(keys_values) if step + 1 < ring.size else None
        k, v = keys_values.unbind()
        owner = (ring.rank - step) % ring.size
        queries = keys = slice(None)
        if step > 0 and owner < ring.rank:
            keys = slice(0, half)
        elif step > 0:
            queries = slice(half, None)
        part_query, part_key, part_value = kernel.backward(
            grad_out[:, :, queries],
            query[:, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, queries],
            lse[:, :, queries],
            causal=step == 0,
            scale=scale,
        )
        grad_query[:, :, queries] += part_query
        if grads_sent is None:
            grad_keys_values = torch.stack((part_key, part_value)).to(dtype)
        else:
            grad_keys_values = grads_sent.wait()
            grad_keys_values[0][:, :, keys] += part_key
            grad_keys_values[1][:, :, keys] += part_value
        grads_sent = ring.send(grad_keys_values, tag=1)
        if arriving is not None:
            keys_values = arriving.wait()
    assert grads_sent is not None
    grad_key, grad_value = grads_sent.wait().unbind()
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Transfer:
    """A message that is on its way to the next rank, and the one that comes from the previous rank."""

    def __init__(self, sent: Tensor, received: Tensor, works: list[Any]) -> None:
        self.sent, self.received, self.works = sent, received, works  # `sent` must live until it has left

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _Ring:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def send(self, tensor: Tensor, tag: int = 0) -> _Transfer:
        """Start to send `tensor` (contiguous, left alone until the transfer is waited for) and to receive its like."""
        received = torch.empty_like(tensor)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, self.next, self.group, tag),
                dist.P2POp(dist.irecv, received, self.previous, self.group, tag),
            ]
        )
        return _Transfer(tensor, received, works)


def _half(query: Tensor) -> int:
    if query.size(2) % 2:
        raise LayoutError(f"this context-parallel rank holds {query.size(2):,} tokens, which is not two equal chunks")
    return query.size(2) // 2
