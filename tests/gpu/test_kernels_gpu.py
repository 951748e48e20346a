"""On one CUDA device: every attention kernel that can be used there, against float64 matrix products.

Kernels that need another device or a package that is not installed are skipped, with the reason of the rule that chooses kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.kernels.attention import KERNEL_NAMES, AttentionKernel, MathKernel, choose_kernel, merge
from mcore_longctx.kernels.head_split import HeadSplit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SCALE = 0.2
# largest error in units of the largest entry; a kernel's own dtypes only
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 2e-4, torch.float64: 1e-11}
OF_KERNEL = {
    "flash4": (torch.bfloat16, torch.float16),
    "flash3": (torch.bfloat16, torch.float16),
    "cudnn": (torch.bfloat16, torch.float16),
    "flash": (torch.bfloat16, torch.float16),
    "efficient": (torch.float32, torch.bfloat16),
    "math": (torch.float64,),
}
CASES = [(name, dtype) for name, dtypes in OF_KERNEL.items() for dtype in dtypes]


def usable(name: str, dtype: torch.dtype, head_dim: int = 64) -> AttentionKernel:
    """The kernel, or skip with the reason why it cannot be used here."""
    try:
        return choose_kernel(torch.device("cuda", 0), dtype, head_dim, (name,))
    except ConfigError as error:
        pytest.skip(error.what)


def tensors(groups: int, queries: int, keys: int, dtype: torch.dtype, head_dim: int = 64) -> list[Tensor]:
    """As Megatron gives them: [s, b, heads, d] permuted, so not contiguous."""
    generator = torch.Generator().manual_seed(groups)
    shapes = ((queries, 8), (keys, groups), (keys, groups), (queries, 8))
    made = [torch.randn(rows, 2, heads, head_dim, generator=generator, dtype=torch.float64) for rows, heads in shapes]
    return [tensor.to("cuda", dtype).permute(1, 2, 0, 3) for tensor in made]


def in_float64(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, causal: bool) -> list[Tensor]:
    wide = [tensor.double() for tensor in (query, key, value)]
    out, lse = MathKernel().forward(*wide, causal=causal, scale=SCALE)
    return [out, lse, *MathKernel().backward(grad_out.double(), *wide, out, lse, causal=causal, scale=SCALE)]


def check(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert a.shape == b.shape, name
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_the_rule_knows_every_kernel_that_is_tested_here() -> None:
    assert {*OF_KERNEL, "cpu_flash"} == set(KERNEL_NAMES)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(256, 256, True), (256, 512, False), (512, 256, False), (96, 96, True), (193, 71, False)]
)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_kernel_equals_float64_in_both_directions(
    name: str, dtype: torch.dtype, queries: int, keys: int, causal: bool, groups: int, head_dim: int
) -> None:
    kernel = usable(name, dtype, head_dim)
    query, key, value, grad_out = tensors(groups, queries, keys, dtype, head_dim)
    out, lse = kernel.forward(query, key, value, causal=causal, scale=SCALE)
    gradients = kernel.backward(grad_out, query, key, value, out, lse, causal=causal, scale=SCALE)
    assert lse.shape == query.shape[:3]
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    check([out, lse, *gradients], in_float64(query, key, value, grad_out, causal), TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_steps_of_a_ring_merge_to_attention_over_all_keys(name: str, dtype: torch.dtype) -> None:
    """Three kinds of step on one device: own keys causally, keys of others for some queries, and the backward of each part."""
    kernel = usable(name, dtype)
    query, key, value, grad_out = tensors(2, 256, 256, dtype)
    half = 128
    calls = [
        (slice(0, half), slice(0, half), True),
        (slice(half, None), slice(0, half), False),
        (slice(half, None), slice(half, None), True),
    ]
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
    check([out, lse, *gradients], in_float64(query, key, value, grad_out, True), TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[0] != "math"])
def test_a_call_that_is_split_over_heads_gives_the_same(name: str, dtype: torch.dtype, groups: int) -> None:
    kernel = usable(name, dtype)
    assert isinstance(kernel, HeadSplit)
    query, key, value, grad_out = tensors(groups, 256, 256, dtype)
    expected = in_float64(query, key, value, grad_out, True)
    # as if 32-bit indices ended behind two heads: parts of groups, and sums of their keys' gradients
    split = HeadSplit(kernel.kernel, limit=2 * 256 * 64 + 1)
    out, lse = split.forward(query, key, value, causal=True, scale=SCALE)
    gradients = split.backward(grad_out, query, key, value, out, lse, causal=True, scale=SCALE)
    check([out, lse, *gradients], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["flash4", "flash3", "cudnn", "flash"])
@pytest.mark.parametrize("more_rows", [-1, 0, 1])
def test_queries_of_two_to_the_31_elements(name: str, more_rows: int) -> None:
    """32 heads of 128 over 2^19 rows, and one row less and more: at the last rows, against float64."""
    kernel = usable(name, torch.bfloat16, 128)
    rows, heads = 2**19 + more_rows, 32
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(count: int) -> Tensor:
        made = torch.randn(rows, 1, count, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        return made.permute(1, 2, 0, 3)

    query, key, value, grad_out = random(heads), random(1), random(1), random(heads)
    # gradients at the last rows and keys alone: only these queries carry any
    last = slice(rows - 64, rows)
    keep = torch.zeros(rows, device="cuda", dtype=torch.bfloat16)
    keep[last] = 1
    grad_out.mul_(keep[:, None])
    out, lse = kernel.forward(query, key, value, causal=True, scale=SCALE)
    grad_query, grad_key, grad_value = kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=SCALE)
    for head in (0, heads // 2, heads - 1):
        q, k, v = query[0, head, last].double(), key[0, 0].double(), value[0, 0].double()
        hidden = torch.arange(rows, device="cuda")[None] > torch.arange(rows - 64, rows, device="cuda")[:, None]
        scores = (q @ k.t() * SCALE).masked_fill(hidden, -math.inf)
        expected_lse = scores.logsumexp(-1)
        probabilities = (scores - expected_lse[:, None]).exp()
        expected = probabilities @ v
        assert ((lse[0, head, last] - expected_lse).abs() < 0.05).all(), head
        assert (out[0, head, last].double() - expected).abs().max() < 0.03 * expected.abs().max(), head
        of_out = grad_out[0, head, last].double()
        of_scores = probabilities * (of_out @ v.t() - (of_out * expected).sum(-1, keepdim=True)) * SCALE
        wanted = of_scores @ k
        assert (grad_query[0, head, last].double() - wanted).abs().max() < 0.05 * wanted.abs().max(), head
    assert not grad_query[0, :, :1024].any()
    for gradient in (grad_key, grad_value):
        assert gradient.isfinite().all()
        assert gradient[0, 0, last].any()


def test_the_rule_chooses_by_device_and_dtype() -> None:
    device = torch.device("cuda", 0)
    half = choose_kernel(device, torch.bfloat16, 128).name
    capability = torch.cuda.get_device_capability(0)
    assert half in {(10, 0): ("flash4", "cudnn"), (9, 0): ("flash3", "cudnn")}.get(
        (min(capability[0], 10), 0), ("flash", "efficient")
    )
    assert choose_kernel(device, torch.float32, 128).name == "efficient"
    assert choose_kernel(device, torch.float64, 64).name == "math"
