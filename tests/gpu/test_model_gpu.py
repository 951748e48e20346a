"""On one CUDA device: the kernels against float64 matrix products, the model against transformers. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_longctx.kernels.attention import (
    AttentionKernel,
    CudnnKernel,
    EfficientKernel,
    FlashKernel,
    MathKernel,
    choose_kernel,
    merge,
)
from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling
from tests.model.llama import SHAPE, build, hf_llama, megatron_names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SCALE = 0.2
KERNELS: list[tuple[AttentionKernel, torch.dtype, float]] = [
    (CudnnKernel(), torch.bfloat16, 0.1),
    (CudnnKernel(), torch.float16, 0.02),
    (FlashKernel(), torch.bfloat16, 0.1),
    (FlashKernel(), torch.float16, 0.02),
    (EfficientKernel(), torch.float32, 2e-4),
    (EfficientKernel(), torch.bfloat16, 0.1),
    (MathKernel(), torch.float64, 1e-11),
]
CUDA_SHAPE = replace(SHAPE, num_layers=2, hidden_size=256, num_attention_heads=8, num_query_groups=2, kv_channels=64)
LLAMA3 = RopeScaling(type="llama3", head_dim=64, rope_theta=500_000.0, factor=8, original_max_position_embeddings=64)
YARN = RopeScaling(type="yarn", head_dim=64, rope_theta=500_000.0, factor=8, original_max_position_embeddings=64)


@pytest.fixture(scope="module")
def _one_device() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    init_process_groups(Parallel(), seed=0)
    yield
    destroy_process_groups()


def usable(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    capability = torch.cuda.get_device_capability()
    if isinstance(kernel, CudnnKernel) and (capability < (8, 0) or not torch.backends.cudnn.is_available()):
        pytest.skip(f"cuDNN attention needs compute capability 8.0, this device has {capability}")
    if dtype is torch.bfloat16 and capability < (8, 0):
        pytest.skip(f"bf16 needs compute capability 8.0, this device has {capability}")


def tensors(groups: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """As Megatron gives them: [s, b, heads, d] permuted, so not contiguous."""
    generator = torch.Generator().manual_seed(groups)
    shapes = ((queries, 8), (keys, groups), (keys, groups), (queries, 8))
    made = [torch.randn(rows, 2, heads, 64, generator=generator, dtype=torch.float64) for rows, heads in shapes]
    return [tensor.to("cuda", dtype).permute(1, 2, 0, 3) for tensor in made]


def in_float64(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, causal: bool) -> list[Tensor]:
    wide = [tensor.double() for tensor in (query, key, value)]
    out, lse = MathKernel().forward(*wide, causal=causal, scale=SCALE)
    return [out, lse, *MathKernel().backward(grad_out.double(), *wide, out, lse, causal=causal, scale=SCALE)]


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(256, 256, True), (256, 512, False), (512, 256, False), (96, 96, True)])
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), KERNELS, ids=lambda value: getattr(value, "name", str(value)))
def test_kernel_equals_float64_in_both_directions(
    kernel: AttentionKernel, dtype: torch.dtype, tolerance: float, queries: int, keys: int, causal: bool, groups: int
) -> None:
    usable(kernel, dtype)
    query, key, value, grad_out = tensors(groups, queries, keys, dtype)
    out, lse = kernel.forward(query, key, value, causal=causal, scale=SCALE)
    gradients = kernel.backward(grad_out, query, key, value, out, lse, causal=causal, scale=SCALE)
    assert lse.shape == query.shape[:3]
    expected = in_float64(query, key, value, grad_out, causal)
    for name, found, wanted in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), expected, strict=True):
        assert found.shape == wanted.shape, name
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), KERNELS, ids=lambda value: getattr(value, "name", str(value)))
def test_the_steps_of_a_ring_merge_to_attention_over_all_keys(
    kernel: AttentionKernel, dtype: torch.dtype, tolerance: float
) -> None:
    """The three kinds of ring step on one device: own keys causally, half of the keys, half of the queries."""
    usable(kernel, dtype)
    query, key, value, grad_out = tensors(2, 256, 256, dtype)
    expected = in_float64(query, key, value, grad_out, True)
    half, calls = 128, []
    calls.append((slice(0, half), slice(0, half), True))
    calls.append((slice(half, None), slice(0, half), False))
    calls.append((slice(half, None), slice(half, None), True))
    out = torch.zeros_like(query, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    lse = torch.full(query.shape[:3], -math.inf, dtype=out.dtype, device="cuda")
    for rows, columns, causal in calls:
        part = kernel.forward(query[:, :, rows], key[:, :, columns], value[:, :, columns], causal=causal, scale=SCALE)
        merge(out[:, :, rows], lse[:, :, rows], *part)
    gradients = [torch.zeros_like(tensor, dtype=out.dtype) for tensor in (query, key, value)]
    for rows, columns, causal in calls:
        parts = kernel.backward(
            grad_out[:, :, rows],
            query[:, :, rows],
            key[:, :, columns],
            value[:, :, columns],
            out.to(dtype)[:, :, rows],
            lse[:, :, rows],
            causal=causal,
            scale=SCALE,
        )
        for gradient, part, where in zip(gradients, parts, (rows, columns, columns), strict=True):
            gradient[:, :, where] += part
    for name, found, wanted in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), expected, strict=True):
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_the_rule_chooses_a_kernel_that_can_do_it() -> None:
    device = torch.device("cuda", 0)
    is_hopper = torch.cuda.get_device_capability(0) >= (9, 0)
    assert choose_kernel(device, torch.bfloat16, 128).name == ("cudnn" if is_hopper else "flash")
    assert choose_kernel(device, torch.bfloat16, 256).name == "flash"
    assert choose_kernel(device, torch.float32, 128).name == "efficient"
    assert choose_kernel(device, torch.float64, 64).name == "math"


@pytest.mark.usefixtures("_one_device")
@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=lambda rope: rope.type)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 0.1)])
def test_loss_and_gradients_equal_transformers_in_float32(precision: Any, tolerance: float, rope: RopeScaling) -> None:
    hf = hf_llama(CUDA_SHAPE, rope).cuda()
    model = build(
        Parallel(),
        megatron_names(dict(hf.state_dict()), CUDA_SHAPE),
        shape=CUDA_SHAPE,
        rope=rope,
        precision=precision,
        seq_length=512,
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    ids = torch.randint(CUDA_SHAPE.vocab_size, (2, 512), generator=torch.Generator().manual_seed(2)).cuda()
    positions, labels = torch.arange(512, device="cuda").expand(2, -1), ids.roll(-1, 1)
    loss = model(ids, positions, labels=labels).mean()
    loss.backward()
    expected = torch.nn.functional.cross_entropy(hf(ids).logits.transpose(1, 2), labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    gradients = megatron_names({name: parameter.grad for name, parameter in hf.named_parameters()}, CUDA_SHAPE)
    for name, parameter in model.named_parameters():
        wanted, found = gradients[name], parameter.grad[: len(gradients[name])].float()
        error = (found - wanted).norm() / wanted.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.usefixtures("_one_device")
def test_logits_at_rows_equal_transformers_also_far_out() -> None:
    hf = hf_llama(CUDA_SHAPE, LLAMA3).cuda()
    model = build(Parallel(), megatron_names(dict(hf.state_dict()), CUDA_SHAPE), shape=CUDA_SHAPE, rope=LLAMA3, seq_length=512)
    ids = torch.randint(CUDA_SHAPE.vocab_size, (1, 512), generator=torch.Generator().manual_seed(3)).cuda()
    rows = torch.tensor([0, 17, 511], device="cuda")
    for start in (0, 1_000_000):
        positions = torch.arange(start, start + 512, device="cuda")[None]
        with torch.no_grad():
            wanted = hf(ids, position_ids=positions).logits[0, rows]
        found = model.logits_at(ids, positions, rows)
        assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 2e-4
