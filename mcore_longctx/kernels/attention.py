"""Attention on one device: forward gives the output and its log-sum-exp, backward is called directly with both.

With (out, lse) a query's attention over any set of keys can be computed in parts and merged (`merge`), and the backward of each
part is exact when it is given the merged out and lse. Every exchange pattern of context parallelism rests on these two facts.

Shapes: query, out [b, n, s_q, d]; key, value [b, g, s_k, d] with n a multiple of g (grouped queries are not expanded by the
caller); lse [b, n, s_q], natural logarithm, float32 (float64 for float64 inputs). `causal` needs s_q = s_k.

Which kernel is used where, decided by `choose_kernel` and by nothing else (d: head dimension):

    device                  dtype          d                        kernel        grouped queries
    CPU                     any float      any                      cpu_flash     native
    CUDA, compute >= 9.0    bf16, fp16     <= 128, multiple of 8    cudnn         native
    CUDA                    bf16, fp16     <= 256, multiple of 8    flash         native
    CUDA                    fp32, rest     any                      efficient     keys and values expanded, gradients summed
    CUDA                    fp64           any                      math          O(s^2) memory: for tests

The CUDA kernels are torch's own (schemas of torch 2.13) and are not measured yet: their tests are marked `gpu`.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["AttentionKernel", "MathKernel", "accumulator_dtype", "attention_kernel", "choose_kernel", "merge"]

OutAndLse: TypeAlias = tuple[Tensor, Tensor]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]

aten = torch.ops.aten


class AttentionKernel(Protocol):
    """Forward and direct backward of softmax(scale * q k^T) v."""

    name: str

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """Return out (dtype of query) and lse."""

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """Gradients of query, key and value. `out` and `lse` may come from more keys than the ones given here."""


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """The kernel for a device, dtype and head dimension, by the table above. Its `name` is worth a line in a log."""
    if device.type == "cpu":
        return CpuFlashKernel()
    if dtype is torch.float64:
        return MathKernel()
    if dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0:
        is_hopper = torch.cuda.get_device_capability(device) >= (9, 0)
        if is_hopper and head_dim <= 128 and torch.backends.cudnn.is_available():
            return CudnnKernel()
        if head_dim <= 256:
            return FlashKernel()
    return EfficientKernel()


def attention_kernel(query: Tensor) -> AttentionKernel:
    """`choose_kernel` for a tensor [..., d]."""
    return choose_kernel(query.device, query.dtype, query.size(-1))


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


class CpuFlashKernel:
    """Torch's flash attention for CPUs: grouped queries are native in both directions, float64 to bfloat16."""

    name = "cpu_flash"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        # the kernel walks rows by stride of a dense tensor: slices must be copied
        dense = [tensor.contiguous() for tensor in (grad_out, query, key, value, out, lse)]
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*dense, 0.0, causal, scale=scale)


class FlashKernel:
    """Torch's flash attention 2 for CUDA, bf16 and fp16."""

    name = "flash"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        seed, offset = _no_dropout(query.device, torch.uint64)
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out.contiguous(),
            query,
            key,
            value,
            out,
            lse.contiguous(),
            None,  # cum_seq_q and cum_seq_k: dense, not packed
            None,
            query.size(2),
            key.size(2),
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )


class CudnnKernel:
    """cuDNN's fused attention, bf16 and fp16. Its lse is [b, n, s, 1]."""

    name = "cudnn"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, False, scale=scale)
        return out, lse.reshape(query.shape[:3])

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        seed, offset = _no_dropout(query.device, torch.int64)
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad_out.contiguous(),
            query,
            key,
            value,
            out,
            lse.contiguous().unsqueeze(-1),
            seed,
            offset,
            None,  # attn_bias
            None,  # cum_seq_q and cum_seq_k: dense, not packed
            None,
            query.size(2),
            key.size(2),
            0.0,
            causal,
            scale=scale,
        )


class EfficientKernel:
    """Torch's memory-efficient attention for CUDA, used for fp32. It knows no grouped queries, and pads its lse to 32 rows."""

    name = "efficient"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        groups = query.size(1) // key.size(1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, _expand_groups(key, groups), _expand_groups(value, groups), None, True, 0.0, causal, scale=scale
        )
        return out, lse[:, :, : query.size(2)]

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        groups, rows = query.size(1) // key.size(1), query.size(2)
        seed, offset = _no_dropout(query.device, torch.int64)
        # +inf in the padding: exp(score - inf) = 0, as the forward writes it
        padded = torch.nn.functional.pad(lse, (0, -rows % 32), value=math.inf)
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out.contiguous(),
            query,
            _expand_groups(key, groups),
            _expand_groups(value, groups),
            None,
            out,
            padded,
            seed,
            offset,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
        return grad_query, _sum_groups(grad_key, groups), _sum_groups(grad_value, groups)


class MathKernel:
    """Plain matrix products, O(s^2) memory: the reference that the other kernels are tested against."""

    name = "math"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        dtype, groups = accumulator_dtype(query.dtype), query.size(1) // key.size(1)
        scores = _scores(query, key, causal=causal, scale=scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp_() @ _expand_groups(value, groups).to(dtype)
        return out.to(query.dtype), lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        dtype, groups = accumulator_dtype(query.dtype), query.size(1) // key.size(1)
        probabilities = (_scores(query, key, causal=causal, scale=scale) - lse.unsqueeze(-1)).exp_()
        grad_out, out = grad_out.to(dtype), out.to(dtype)
        grad_value = probabilities.transpose(-1, -2) @ grad_out
        grad_probabilities = grad_out @ _expand_groups(value, groups).to(dtype).transpose(-1, -2)
        grad_scores = probabilities * (grad_probabilities - (grad_out * out).sum(-1, keepdim=True)) * scale
        grad_query = grad_scores @ _expand_groups(key, groups).to(dtype)
        grad_key = grad_scores.transpose(-1, -2) @ query.to(dtype)
        return (
            grad_query.to(query.dtype),
            _sum_groups(grad_key, groups).to(key.dtype),
            _sum_groups(grad_value, groups).to(value.dtype),
        )


def _scores(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Tensor:
    dtype, groups = accumulator_dtype(query.dtype), query.size(1) // key.size(1)
    scores = query.to(dtype) @ _expand_groups(key, groups).to(dtype).transpose(-1, -2) * scale  # [b, n, s_q, s_k]
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -math.inf)
    return scores


def _expand_groups(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return grad
    return grad.unflatten(1, (-1, groups)).sum(2, dtype=accumulator_dtype(grad.dtype)).to(grad.dtype)


def _no_dropout(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random state that the schemas ask for; never read at dropout 0."""
    return torch.zeros(2, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)
