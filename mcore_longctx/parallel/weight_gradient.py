"""The gradient of one weight, summed over pieces of the tokens in float32 and handed to autograd.

Where Megatron's DistributedDataParallel has given the weight a gradient buffer (`main_grad`), the sum goes straight into it, as in
Megatron's own fused weight gradient (core/tensor_parallel/layers.py of 0.16.1 and 0.19.2):

    weight.main_grad                  added to
    weight.grad_added_to_main_grad    set: DDP's hook then leaves the returned gradient alone
    weight.zero_out_wgrad             is the weight used elsewhere in the graph too (tied embeddings)? The hook then adds what
                                      autograd has summed, so the returned gradient must be zeros; else its content is never read
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mcore_longctx.kernels.attention import accumulator_dtype
from mcore_longctx.kernels.matmul import matmul_into

__all__ = ["WeightGradient"]


class WeightGradient:
    """Sum of left.T @ right over pieces. Nothing is held but one buffer of the weight's shape, and none where `main_grad` serves.

    Args:
        weight: [n, k], the parameter itself: its attributes are read and set.
        into_main_grad: add to `main_grad` while summing. False where the sum may still be thrown away or multiplied.
    """

    def __init__(self, weight: Tensor, *, into_main_grad: bool = True) -> None:
        self.weight = weight
        dtype = accumulator_dtype(weight.dtype)
        self.main_grad = _main_grad(weight)
        self.in_place = into_main_grad and self.main_grad is not None and self.main_grad.dtype is dtype
        if self.in_place:
            assert self.main_grad is not None
            self.sum = self.main_grad
        else:
            self.sum = torch.empty_like(weight, dtype=dtype)
        self.is_empty = not self.in_place

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left.T @ right: left [tokens, n], right [tokens, k], both in the weight's dtype."""
        matmul_into(self.sum, left.t(), right, add=not self.is_empty)
        self.is_empty = False

    def finish(self, factor: Tensor | None = None) -> Tensor:
        """What `backward` returns for the weight: the sum (times `factor`, a scalar), or a stand-in if it is in `main_grad`.

        Call it once: the sum is multiplied in place.
        """
        assert factor is None or not self.in_place
        if self.is_empty:
            self.sum.zero_()
        if self.main_grad is None:
            return (self.sum if factor is None else self.sum.mul_(factor)).to(self.weight.dtype)
        if not self.in_place:
            self.main_grad.add_(self.sum if factor is None else self.sum.mul_(factor))
        parameter: Any = self.weight
        parameter.grad_added_to_main_grad = True
        # DDP wants a gradient to be there with overlap_grad_reduce; it is freed by its hook
        if getattr(parameter, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)


def _main_grad(weight: Tensor) -> Tensor | None:
    """The buffer of Megatron's DDP. Its FSDP keeps one too, but fills it in its own way."""
    if not hasattr(weight, "grad_added_to_main_grad") or hasattr(weight, "__fsdp_param__"):
        return None
    return getattr(weight, "main_grad", None)
