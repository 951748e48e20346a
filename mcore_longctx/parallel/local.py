"""Documents that lie whole on this rank: causal attention of each over itself, nothing moves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcore_longctx.kernels.attention import AttentionKernel, accumulator_dtype
from mcore_longctx.parallel.rows import empty_rows

__all__ = ["whole_backward", "whole_forward"]


def whole_forward(
    query: Tensor, key: Tensor, value: Tensor, whole: tuple[slice, ...], kernel: AttentionKernel, scale: float
) -> tuple[Tensor, Tensor]:
    """Out [b, n, t, d] (0 in all other rows) and lse [b, n, t] (-inf in all other rows) of the row ranges `whole`."""
    if whole == (slice(0, query.size(2)),):
        return kernel.forward(query, key, value, causal=True, scale=scale)
    out = empty_rows(query, zero=True)
    lse = torch.full(query.shape[:3], -math.inf, dtype=accumulator_dtype(query.dtype), device=query.device)
    for rows in whole:
        part = kernel.forward(query[:, :, rows], key[:, :, rows], value[:, :, rows], causal=True, scale=scale)
        out[:, :, rows], lse[:, :, rows] = part
    return out, lse


def whole_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    whole: tuple[slice, ...],
    kernel: AttentionKernel,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; 0 in all rows but `whole`."""
    if whole == (slice(0, query.size(2)),):
        return kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=scale)
    gradients = (empty_rows(query, zero=True), empty_rows(key, zero=True), empty_rows(value, zero=True))
    for rows in whole:
        tensors = (tensor[:, :, rows] for tensor in (grad_out, query, key, value, out, lse))
        for gradient, part in zip(gradients, kernel.backward(*tensors, causal=True, scale=scale), strict=True):
            gradient[:, :, rows] = part
    return gradients
