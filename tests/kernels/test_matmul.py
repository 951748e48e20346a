"""Products that are wider than their operands, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcore_longctx.kernels.matmul import matmul_into

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# largest error over the largest entry; a result rounded to bfloat16 would be off by 2e-3
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6}


def operands(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((80, 64), (64, 48)))
    return left.to(device, dtype), right.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_product_into_a_wider_tensor(device: str, dtype: torch.dtype, add: bool, strided: bool) -> None:
    left, right = operands(dtype, device)
    if strided:
        left, right = left.t().contiguous().t(), right.t().contiguous().t()
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    whole = torch.full((100, 48), 7.0 if add else float("nan"), dtype=wide, device=device)
    out = whole[:80]
    assert matmul_into(out, left, right, add=add).data_ptr() == out.data_ptr()
    expected = left.double() @ right.double() + (7 if add else 0)
    assert (out.double() - expected).abs().max() / expected.abs().max() < TOLERANCE[dtype]
    untouched = whole[80:]
    assert (untouched == 7).all() if add else untouched.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_many_small_products_add_up_as_one_large_product(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(64 * 64, 32, generator=generator).to(device, torch.bfloat16)
    right = torch.randn(64 * 64, 16, generator=generator).to(device, torch.bfloat16)
    total = torch.zeros(32, 16, device=device)
    for rows in range(0, 64 * 64, 64):
        matmul_into(total, left[rows : rows + 64].t(), right[rows : rows + 64], add=True)
    expected = left.double().t() @ right.double()
    assert (total.double() - expected).abs().max() / expected.abs().max() < 2e-6
