"""RMSNorm against transformers' and against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mcore_longctx.model import norm as norm_module
from mcore_longctx.model.norm import RMSNorm


def norm_and_input(dtype: torch.dtype) -> tuple[RMSNorm, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 64, 1e-5)
    norm.weight.data.copy_(torch.rand(64, generator=generator) + 0.5)
    return norm, (torch.randn(5, 2, 64, generator=generator) * 3).to(dtype)


def test_it_equals_transformers_norm_in_float32() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, x = norm_and_input(torch.float32)
    theirs = LlamaRMSNorm(64, 1e-5)
    theirs.weight.data.copy_(ours.weight)
    assert (ours(x) - theirs(x)).abs().max() < 1e-6


def test_in_bf16_the_result_is_rounded_once() -> None:
    norm, x = norm_and_input(torch.bfloat16)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    found = norm(x)
    assert found.dtype is torch.bfloat16
    assert ((found.double() - exact).abs() / exact.abs()).max() < 2**-8


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_its_weight_tells_megatron_whether_gradients_are_summed_over_tensor_parallel_ranks(sequence_parallel: bool) -> None:
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence_parallel), hidden_size=8, eps=1e-5)
    assert norm.weight.sequence_parallel is sequence_parallel


def test_above_the_elements_that_a_kernel_can_index_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, x = norm_and_input(torch.float64)
    sizes: list[int] = []
    rms_norm = F.rms_norm

    def small_kernel(part: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(part.numel())
        return rms_norm(part, *args)

    monkeypatch.setattr(F, "rms_norm", small_kernel)
    results = []
    for limit in (2**32, 2 * 2 * 64 + 1):  # two rows of five
        monkeypatch.setattr(norm_module, "_WRAPS_AT", limit)
        leaf = x.clone().requires_grad_()
        whole.weight.grad = None
        out = whole(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad, whole.weight.grad))
    assert sizes == [640, 256, 256, 128]
    for one, parts in zip(*results, strict=True):
        assert torch.allclose(one, parts, rtol=1e-12, atol=0)
