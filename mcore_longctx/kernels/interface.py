"""The interface of attention kernels, and what they share.

With (out, lse) a query's attention over any set of keys can be computed in parts and merged (`merge`), and the backward of each
part is exact when it is given the merged out and lse. Every exchange pattern of context parallelism rests on these two facts.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["AttentionKernel", "Gradients", "OutAndLse", "accumulator_dtype", "expand_groups", "merge", "sum_groups"]

OutAndLse: TypeAlias = tuple[Tensor, Tensor]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]


class AttentionKernel(Protocol):
    """Forward and direct backward of softmax(scale * q k^T) v.

    query, out [b, n, s_q, d]; key, value [b, g, s_k, d] with n a multiple of g (grouped queries are not expanded by the caller);
    lse [b, n, s_q], natural logarithm, float32 (float64 for float64 inputs). Any strides. `causal` needs s_q = s_k.
    """

    name: str

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """Return out (dtype of query) and lse."""

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """Gradients of query, key and value. `out` and `lse` may come from more keys than the ones given here."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results and gradients are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add attention over more keys to (`out`, `lse`), in place.

    `out` [b, n, s, d] and `lse` [b, n, s] are in the accumulator dtype; slices of larger tensors are fine.
    """
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).add_(part_out * (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


def expand_groups(tensor: Tensor, groups: int) -> Tensor:
    """Repeat each key or value head `groups` times: [b, g, s, d] -> [b, g * groups, s, d]."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def sum_groups(grad: Tensor, groups: int) -> Tensor:
    """Sum the gradients of repeated heads: [b, g * groups, s, d] -> [b, g, s, d], in the accumulator dtype."""
    if groups == 1:
        return grad
    return grad.unflatten(1, (-1, groups)).sum(2, dtype=accumulator_dtype(grad.dtype)).to(grad.dtype)
