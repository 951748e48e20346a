"""Sparse to dense: the smallest weights of every linear layer are 0 and stay 0 for the first steps. A study: it saves no time.

Which weights are held is nowhere stored: those that are exactly 0. That makes a stop, another layout and a resume the same as going on.
Their gradients are cleared before each update; with a gradient, both moments and a weight of 0, AdamW leaves 0, weight decay included.

Source of the idea: arXiv 2304.05511 (sparse pretraining, dense later; level and schedule are not in its abstract), 2303.10464.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core import parallel_state

__all__ = ["drop_smallest", "hold_zeros"]

_LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def drop_smallest(model: Any, sparsity: float) -> tuple[int, int]:
    """Set the smallest `sparsity` of each linear layer's weights to 0, by magnitude; all of those that are as small as the last one.

    A layer's weights are counted over its tensor-parallel ranks, so that another layout drops the same ones. (Queries, keys and values
    are one layer to Megatron, and so are gate and up.) Collective over the tensor-parallel group.

    Returns:
        How many are 0 now, and how many there are, on this rank.
    """
    weights = _linear_weights(model)
    # magnitudes of float32 have the order of their bits: the limit of each layer is found bit by bit, for all layers at once
    bits = [weight.detach().float().abs().view(torch.int32) for weight in weights]
    sizes = _over_ranks(torch.tensor([one.numel() for one in bits]))
    wanted = (sizes.double() * sparsity).long()
    low, high = torch.full_like(sizes, -1), torch.full_like(sizes, 2**31 - 1)  # too few at or below low, enough at or below high
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        below = _over_ranks(torch.stack([(one <= int(limit)).sum().cpu() for one, limit in zip(bits, middle, strict=True)]))
        low, high = torch.where(below < wanted, middle, low), torch.where(below < wanted, high, middle)
    with torch.no_grad():
        for weight, one, limit in zip(weights, bits, high.tolist(), strict=True):
            weight.masked_fill_(one <= limit, 0)
    return int(sum((weight == 0).sum() for weight in weights)), int(sum(weight.numel() for weight in weights))


def hold_zeros(model: Any) -> None:
    """Clear the gradients, reduced and in Megatron's buffers, of all weights of linear layers that are 0."""
    for weight in _linear_weights(model):
        weight.main_grad.masked_fill_(weight.detach() == 0, 0)


def _linear_weights(model: Any) -> list[Any]:
    return [weight for name, weight in model.named_parameters() if name.endswith(_LINEAR)]


def _over_ranks(counts: torch.Tensor) -> torch.Tensor:
    """Sums over the tensor-parallel ranks, int64 on the CPU."""
    group = parallel_state.get_tensor_model_parallel_group()
    counts = counts.to("cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(counts, group=group)
    return counts.cpu()
