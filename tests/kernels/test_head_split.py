"""Tensors of 2^31 elements and more: kernels are never handed one, and the split changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.attention import CpuFlashKernel
from mcore_longctx.kernels.head_split import INDEX_LIMIT, HeadSplit

SCALE = 0.3


class Guarded(CpuFlashKernel):
    """Refuses what a kernel with indices below `limit` could not take."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, 0

    def check(self, tensors: tuple[Tensor, ...]) -> None:
        self.calls += 1
        for tensor in tensors:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            assert last < self.limit

    def forward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        self.check(tensors)
        return super().forward(*tensors, causal=causal, scale=scale)

    def backward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        self.check(tensors)
        return super().backward(*tensors, causal=causal, scale=scale)


def tensors(heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """As Megatron holds them, in rows; two samples, 24 queries, 40 keys, 16 wide."""
    generator = torch.Generator().manual_seed(heads + groups)
    shapes = ((24, 2, heads, 16), (40, 2, groups, 16), (40, 2, groups, 16), (24, 2, heads, 16))
    made = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [tensor.permute(1, 2, 0, 3) for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "limit", "calls"),
    [
        (8, 4, 100_000, 1),  # fits
        (8, 4, 24 * 4 * 16 + 1, 2 * 2),  # two groups at once
        (8, 4, 24 * 4 * 16, 2 * 4),  # one element too many for two groups
        (8, 8, 24 * 3 * 16 + 1, 2 * 8),  # its keys count too: 40 rows against 24
        (8, 2, 40 * 16 + 1, 2 * 8),  # one group is too large: one query head at once
        (8, 1, 24 * 3 * 16 + 1, 2 * 3),  # three query heads at once, the last call has two
    ],
)
def test_heads_are_computed_in_parts_that_fit(heads: int, groups: int, limit: int, calls: int, dtype: torch.dtype) -> None:
    query, key, value, grad_out = tensors(heads, groups, dtype)
    plain, guarded = CpuFlashKernel(), Guarded(limit)
    out, lse = plain.forward(query, key, value, causal=False, scale=SCALE)
    gradients = plain.backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    split = HeadSplit(guarded, limit)
    split_out, split_lse = split.forward(query, key, value, causal=False, scale=SCALE)
    assert guarded.calls == calls
    of_split = split.backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    assert guarded.calls == 2 * calls
    assert split.name == plain.name
    assert torch.equal(split_out, out)
    assert torch.equal(split_lse, lse)
    assert torch.equal(of_split[0], gradients[0])
    whole_groups = limit > heads // groups * 24 * 16
    for found, expected in zip(of_split[1:], gradients[1:], strict=True):
        assert found.dtype is dtype
        # query heads of one group that are computed apart are summed in another order
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        assert torch.equal(found, expected) if whole_groups else (found - expected).abs().max() < tolerance


def test_gaps_between_rows_count() -> None:
    """A slice of a large tensor reaches as far as the tensor itself."""
    query, key, value, _ = tensors(8, 4, torch.float32)
    guarded = Guarded(5_000)
    few = [tensor[:, :2] for tensor in (query, key[:, :1], value[:, :1])]
    assert few[0].numel() < 5_000
    HeadSplit(guarded, 5_000).forward(few[0], few[1][:, :1], few[2][:, :1], causal=False, scale=SCALE)
    assert guarded.calls == 2


def test_values_inside_the_projection_that_made_them_count_with_its_width() -> None:
    """Megatron's values are a slice of q, k and v side by side: they reach further than queries that rope has made dense."""
    query, key, _, grad_out = tensors(8, 4, torch.float32)
    projected = torch.randn(40, 2, 4, 6 * 16, generator=torch.Generator().manual_seed(3))
    value = projected[..., -16:].permute(1, 2, 0, 3)
    limit = 8_000
    assert query.numel() < limit
    assert key.numel() < limit
    plain, guarded = CpuFlashKernel(), Guarded(limit)
    split = HeadSplit(guarded, limit)
    out, lse = split.forward(query, key, value, causal=False, scale=SCALE)
    gradients = split.backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    assert guarded.calls == 4  # each sample, both ways
    expected = plain.forward(query, key, value, causal=False, scale=SCALE)
    assert torch.equal(out, expected[0])
    of_plain = plain.backward(grad_out, query, key, value, *expected, causal=False, scale=SCALE)
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_plain, strict=True))


def test_one_head_that_is_too_large_alone_is_refused() -> None:
    for heads, groups, limit, rows in ((8, 4, 24 * 16, 40), (8, 4, 40 * 16, 40)):
        query, key, value, _ = tensors(heads, groups, torch.float32)
        with pytest.raises(LayoutError) as caught:
            HeadSplit(CpuFlashKernel(), limit).forward(query, key, value, causal=False, scale=SCALE)
        assert str(caught.value) == (
            f"attention over {rows} rows of 16: one head reaches the {limit:,} elements that kernel cpu_flash can index; "
            "use more context-parallel ranks, p2p rather than a2a or all_gather"
        )


def test_the_limit_is_that_of_a_signed_32_bit_index() -> None:
    assert HeadSplit(CpuFlashKernel()).limit == INDEX_LIMIT == torch.iinfo(torch.int32).max + 1
