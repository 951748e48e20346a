"""RMSNorm for Megatron layers that works under sequence parallelism (Megatron's WrappedTorchNorm refuses it)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["RMSNorm"]

_WRAPS_AT = 2**32  # elements at which torch's CUDA kernels begin again at the first row (pytorch/pytorch#181555, mended in 2026)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis; computed in float32 inside.

    Under sequence parallelism each rank of the tensor-parallel group sees other tokens: the weight is marked so that
    `finalize_model_grads` sums its gradient over the group. As norm of query and key heads (`hidden_size` is their dimension) it sees
    other heads on each rank, with or without sequence parallelism; Megatron sums those gradients by the name of the module.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]."""
        if x.numel() < _WRAPS_AT:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        parts = x.split((_WRAPS_AT - 1) // (x.numel() // x.size(0)))
        return torch.cat([F.rms_norm(part, (x.size(-1),), self.weight, self.eps) for part in parts])
