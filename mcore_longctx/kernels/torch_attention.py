"""Attention kernels that come with torch: flash on CPU, flash 2, cuDNN and memory-efficient on CUDA, and plain matrix products.

Schemas of torch 2.13. The CUDA kernels are not measured yet: their tests are marked `gpu`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcore_longctx.kernels.interface import Gradients, OutAndLse, accumulator_dtype, expand_groups, sum_groups

__all__ = ["CpuFlashKernel", "CudnnKernel", "EfficientKernel", "FlashKernel", "MathKernel"]

aten = torch.ops.aten

_CUDNN_LSE_TAIL = (1,) if torch.__version__ >= "2.9" else ()  # backward takes the shape that forward gives


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
        tensors = (grad_out, query, key, value, out, lse)  # of any strides: nothing is copied
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, causal, scale=scale)


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
            _dense_rows(grad_out),
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
    """cuDNN's fused attention, bf16 and fp16. Its lse is [b, n, s, 1] (torch before 2.9: [b, n, s]).

    It refuses a single key, and in backward a single query (pytorch/pytorch#138529): these take matrix products. On compute capability
    9.0 its backward gives NaN where the last tile of keys is not full and a lse is far below 0 (pytorch/pytorch#196678,
    NVIDIA/cudnn-frontend#160 and #1072; cuDNN 9.25 at least): key counts that are no multiple of 128 take flash attention 2.
    """

    name = "cudnn"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        if 1 in (query.size(2), key.size(2)):
            return MathKernel().forward(query, key, value, causal=causal, scale=scale)
        if key.size(2) % 128:
            return FlashKernel().forward(query, key, value, causal=causal, scale=scale)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, False, scale=scale)
        return out, lse.reshape(query.shape[:3])

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        if 1 in (query.size(2), key.size(2)):
            return MathKernel().backward(grad_out, query, key, value, out, lse, causal=causal, scale=scale)
        if key.size(2) % 128:
            return FlashKernel().backward(grad_out, query, key, value, out, lse, causal=causal, scale=scale)
        seed, offset = _no_dropout(query.device, torch.int64)
        return aten._scaled_dot_product_cudnn_attention_backward(
            _dense_rows(grad_out),  # always of the same strides: older torch leaves them out of the key of its plans
            query,
            key,
            value,
            out,
            lse.reshape(*lse.shape, *_CUDNN_LSE_TAIL).contiguous(),
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
            query, expand_groups(key, groups), expand_groups(value, groups), None, True, 0.0, causal, scale=scale
        )
        return out, lse[:, :, : query.size(2)].contiguous()

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        groups, rows = query.size(1) // key.size(1), query.size(2)
        seed, offset = _no_dropout(query.device, torch.int64)
        # +inf in the padding: exp(score - inf) = 0, as the forward writes it
        padded = torch.nn.functional.pad(lse, (0, -rows % 32), value=math.inf)
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            _dense_rows(grad_out),
            query,
            expand_groups(key, groups),
            expand_groups(value, groups),
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
        return grad_query, sum_groups(grad_key, groups), sum_groups(grad_value, groups)


class MathKernel:
    """Plain matrix products, O(s^2) memory: the reference that the other kernels are tested against."""

    name = "math"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        dtype, groups = accumulator_dtype(query.dtype), query.size(1) // key.size(1)
        scores = _scores(query, key, causal=causal, scale=scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp_() @ expand_groups(value, groups).to(dtype)
        return out.to(query.dtype), lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        dtype, groups = accumulator_dtype(query.dtype), query.size(1) // key.size(1)
        probabilities = (_scores(query, key, causal=causal, scale=scale) - lse.unsqueeze(-1)).exp_()
        grad_out, out = grad_out.to(dtype), out.to(dtype)
        grad_value = probabilities.transpose(-1, -2) @ grad_out
        grad_probabilities = grad_out @ expand_groups(value, groups).to(dtype).transpose(-1, -2)
        grad_scores = probabilities * (grad_probabilities - (grad_out * out).sum(-1, keepdim=True)) * scale
        grad_query = grad_scores @ expand_groups(key, groups).to(dtype)
        grad_key = grad_scores.transpose(-1, -2) @ query.to(dtype)
        return (
            grad_query.to(query.dtype),
            sum_groups(grad_key, groups).to(key.dtype),
            sum_groups(grad_value, groups).to(value.dtype),
        )


def _scores(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Tensor:
    dtype, groups = accumulator_dtype(query.dtype), query.size(1) // key.size(1)
    scores = query.to(dtype) @ expand_groups(key, groups).to(dtype).transpose(-1, -2) * scale  # [b, n, s_q, s_k]
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -math.inf)
    return scores


def _dense_rows(tensor: Tensor) -> Tensor:
    """[b, n, s, d] that lies in memory as [b, s, n, d], as the kernels want a gradient: for b = 1 a view of what Megatron gives."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _no_dropout(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random state that the schemas ask for; never read at dropout 0."""
    return torch.zeros(2, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)
