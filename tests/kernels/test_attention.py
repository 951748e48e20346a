"""Attention kernels against float64 matrix products and autograd."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcore_longctx.kernels.attention import CpuFlashKernel, MathKernel, attention_kernel, merge

# largest absolute error at unit-variance inputs; float64 leaves the rounding of the reference itself
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}
HEADS = [(8, 8), (8, 4), (8, 1)]
SCALE = 0.3


def tensors(heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 100 + groups)
    shapes = ((2, heads, queries, 16), (2, groups, keys, 16), (2, groups, keys, 16), (2, heads, queries, 16))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def autograd_reference(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, causal: bool) -> list[Tensor]:
    """out, lse and gradients in float64, gradients by autograd: nothing of the kernels' code."""
    leaves = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    q, k, v = leaves
    groups = q.size(1) // k.size(1)
    scores = SCALE * torch.einsum("bnqd,bnkd->bnqk", q, k.repeat_interleave(groups, 1))
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=torch.float64).triu(1)
    out = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
    gradients = torch.autograd.grad(out, leaves, grad_out.double())
    return [out.detach(), scores.logsumexp(-1).detach(), *gradients]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("kernel", [CpuFlashKernel(), MathKernel()], ids=lambda kernel: kernel.name)
def test_forward_and_direct_backward_equal_autograd_in_float64(kernel, heads, groups, dtype):
    for queries, keys, causal in ((24, 24, True), (24, 40, False), (40, 24, False), (1, 1, True)):
        query, key, value, grad_out = tensors(heads, groups, queries, keys, dtype)
        out, lse = kernel.forward(query, key, value, causal=causal, scale=SCALE)
        gradients = kernel.backward(grad_out, query, key, value, out, lse, causal=causal, scale=SCALE)
        assert out.dtype is dtype
        assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        for found, expected in zip((out, lse, *gradients), autograd_reference(query, key, value, grad_out, causal), strict=True):
            assert found.shape == expected.shape
            assert (found.double() - expected).abs().max() < TOLERANCE[dtype]


def test_a_kernel_takes_the_permuted_and_sliced_tensors_that_megatron_hands_over():
    query, key, value, grad_out = (
        tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)[:, :, 4:20] for tensor in tensors(8, 4, 24, 24, torch.float64)
    )
    assert not query.is_contiguous()
    kernel = attention_kernel(query)
    out, lse = kernel.forward(query, key, value, causal=True, scale=SCALE)
    gradients = kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=SCALE)
    for found, expected in zip((out, lse, *gradients), autograd_reference(query, key, value, grad_out, True), strict=True):
        assert (found - expected).abs().max() < 1e-12


def test_attention_over_parts_of_the_keys_merges_to_attention_over_all_in_any_order():
    query, key, value, grad_out = tensors(8, 4, 24, 40, torch.float64)
    kernel = CpuFlashKernel()
    out, lse, *gradients = autograd_reference(query, key, value, grad_out, False)
    parts = [slice(0, 7), slice(7, 8), slice(8, 40)]
    for order in (parts, parts[::-1]):
        merged = torch.zeros_like(query)
        merged_lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
        for part in order:
            merge(merged, merged_lse, *kernel.forward(query, key[:, :, part], value[:, :, part], causal=False, scale=SCALE))
        assert (merged - out).abs().max() < 1e-12
        assert (merged_lse - lse).abs().max() < 1e-12
    # with the merged out and lse each part's backward is exact
    grad_query = torch.zeros_like(query)
    for part in parts:
        part_query, part_key, part_value = kernel.backward(
            grad_out, query, key[:, :, part], value[:, :, part], out, lse, causal=False, scale=SCALE
        )
        grad_query += part_query
        assert (part_key - gradients[1][:, :, part]).abs().max() < 1e-12
        assert (part_value - gradients[2][:, :, part]).abs().max() < 1e-12
    assert (grad_query - gradients[0]).abs().max() < 1e-12


@settings(max_examples=50, deadline=None)
@given(cuts=st.sets(st.integers(1, 39), min_size=1, max_size=6), seed=st.integers(0, 2**31), order=st.randoms())
def test_any_cut_of_the_keys_in_any_order_merges_to_the_same(cuts: set[int], seed: int, order: random.Random) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 40, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected, expected_lse = MathKernel().forward(query, key, value, causal=False, scale=SCALE)
    edges = [0, *sorted(cuts), 40]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    order.shuffle(parts)
    merged = torch.zeros_like(query)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    for part in parts:
        merge(merged, lse, *CpuFlashKernel().forward(query, key[:, :, part], value[:, :, part], causal=False, scale=SCALE))
    assert (merged - expected).abs().max() < 1e-12
    assert (lse - expected_lse).abs().max() < 1e-12


def test_merging_scores_of_very_different_size_gives_no_nan():
    out, lse = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -math.inf)
    merge(out, lse, torch.ones(1, 1, 2, 4), torch.tensor([[[200.0, -200.0]]]))
    merge(out, lse, torch.full((1, 1, 2, 4), 3.0), torch.tensor([[[-200.0, 200.0]]]))
    assert out[0, 0, :, 0].tolist() == [1.0, 3.0]
    assert lse[0, 0].tolist() == [200.0, 200.0]


def test_cpu_tensors_get_the_cpu_kernel():
    assert all(attention_kernel(torch.zeros(1, dtype=dtype)).name == "cpu_flash" for dtype in TOLERANCE)
