"""Attention over tensors of 2^31 elements and more, by kernels that index with 32 bits.

Flash-attention 2 fails above 2^31 elements and will not be changed (Dao-AILab/flash-attention#767); others were mended one by one.
Heads do not see each other, so a call is split over samples and groups of heads, each copied to a dense tensor of its own: exact in
every bit. Query heads that share one key head are split only where a single group is still too large; the gradients of its key and
value are then sums over the parts, in the accumulator dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.interface import AttentionKernel, Gradients, OutAndLse, accumulator_dtype

__all__ = ["INDEX_LIMIT", "HeadSplit"]

INDEX_LIMIT = 2**31  # elements that a 32-bit index reaches


class HeadSplit:
    """A kernel that is never handed a tensor of `limit` elements or more.

    Raises:
        LayoutError: one head of one sample alone reaches the limit.
    """

    def __init__(self, kernel: AttentionKernel, limit: int = INDEX_LIMIT) -> None:
        self.kernel, self.limit, self.name = kernel, limit, kernel.name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        if self._fits(query, key, value):
            return self.kernel.forward(query, key, value, causal=causal, scale=scale)
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=accumulator_dtype(query.dtype), device=query.device)
        for sample, heads, groups in self._parts(query, key):
            part = self.kernel.forward(
                _dense(query, sample, heads),
                _dense(key, sample, groups),
                _dense(value, sample, groups),
                causal=causal,
                scale=scale,
            )
            out[sample, heads], lse[sample, heads] = part
        return out, lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        if self._fits(query, key, value):
            return self.kernel.backward(grad_out, query, key, value, out, lse, causal=causal, scale=scale)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        sums: list[Tensor] = []  # of a group whose query heads are split
        for sample, heads, groups in self._parts(query, key):
            grad_query[sample, heads], *parts = self.kernel.backward(
                _dense(grad_out, sample, heads),
                _dense(query, sample, heads),
                _dense(key, sample, groups),
                _dense(value, sample, groups),
                _dense(out, sample, heads),
                _dense(lse, sample, heads),
                causal=causal,
                scale=scale,
            )
            if _is_first_of_its_groups(query, key, heads):
                sums = parts
            else:
                dtype = accumulator_dtype(key.dtype)
                sums = [total.to(dtype) + part.to(dtype) for total, part in zip(sums, parts, strict=True)]
            grad_key[sample, groups], grad_value[sample, groups] = sums
        return grad_query, grad_key, grad_value

    def _fits(self, *tensors: Tensor) -> bool:
        return all(_extent(tensor) < self.limit for tensor in tensors)

    def _parts(self, query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """(samples, query heads, key heads) of each call, as many heads as fit."""
        (samples, heads, rows, width), (_, groups, keys, _) = query.shape, key.shape
        per_group = heads // groups
        at_once = (self.limit - 1) // (max(per_group * rows, keys) * width)  # groups in one call
        queries_at_once = (self.limit - 1) // (rows * width)  # query heads of one group in one call
        if queries_at_once < 1 or keys * width >= self.limit:
            raise LayoutError(
                f"attention over {max(rows, keys):,} rows of {width}: one head reaches the {self.limit:,} elements that kernel"
                f" {self.name} can index",
                fix="use more context-parallel ranks, p2p rather than a2a or all_gather",
            )
        for sample in range(samples):
            for group in range(0, groups, max(at_once, 1)):
                group_end = min(group + max(at_once, 1), groups)
                step = per_group * (group_end - group) if at_once else queries_at_once
                for head in range(group * per_group, group_end * per_group, step):
                    head_end = min(head + step, group_end * per_group)
                    yield slice(sample, sample + 1), slice(head, head_end), slice(group, group_end)


def _extent(tensor: Tensor) -> int:
    """Elements between the first and the last one: what an index into a tensor with gaps must reach."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _dense(tensor: Tensor, sample: slice, heads: slice) -> Tensor:
    """Some heads, with rows one after the other and nothing between them."""
    return tensor[sample, heads].transpose(1, 2).contiguous().transpose(1, 2)


def _is_first_of_its_groups(query: Tensor, key: Tensor, heads: slice) -> bool:
    return int(heads.start) % (query.size(1) // key.size(1)) == 0
