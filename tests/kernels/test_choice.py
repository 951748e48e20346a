"""Which kernel is chosen where, what is said about it, and the adapters of packages that are not here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.kernels import attention, torch_attention
from mcore_longctx.kernels.attention import CpuFlashKernel, CudnnKernel, MathKernel, kernel_and_reason
from mcore_longctx.kernels.flash_attention import Flash3Kernel, Flash4Kernel, PackageKernel
from mcore_longctx.kernels.head_split import HeadSplit
from mcore_longctx.kernels.torch_attention import EfficientKernel, FlashKernel

SCALE = 0.3
CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend: which capability, which packages are installed, which of them compute wrongly."""

    def pretend(capability: tuple[int, int], installed: tuple[str, ...] = (), wrong: tuple[str, ...] = ()) -> torch.device:
        kernel_and_reason.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(PackageKernel, "is_installed", classmethod(lambda kind: kind.name in installed))
        monkeypatch.setattr(attention, "_fails_on", lambda kernel, *rest: "is wrong" if kernel.name in wrong else None)
        return torch.device("cuda", 0)

    yield pretend
    kernel_and_reason.cache_clear()


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "name"),
    [
        ((9, 0), (), BF16, 128, "cudnn"),
        ((9, 0), ("flash3", "flash4"), BF16, 128, "flash3"),
        ((9, 0), ("flash3",), BF16, 256, "flash3"),
        ((9, 0), (), BF16, 192, "flash"),
        ((9, 0), ("flash3",), BF16, 100, "efficient"),
        ((10, 0), ("flash3", "flash4"), torch.float16, 128, "flash4"),
        ((10, 0), ("flash3",), BF16, 128, "cudnn"),
        ((8, 0), ("flash3",), BF16, 128, "flash"),
        ((7, 5), (), torch.float16, 128, "efficient"),
        ((9, 0), ("flash3",), FP32, 128, "efficient"),
        ((9, 0), ("flash3",), FP64, 128, "math"),
    ],
)
def test_the_first_kernel_of_the_table_that_can_is_chosen(
    device: Any, capability: tuple[int, int], installed: tuple[str, ...], dtype: torch.dtype, head_dim: int, name: str
) -> None:
    kernel, reason = kernel_and_reason(device(capability, installed), dtype, head_dim)
    assert kernel.name == name
    assert isinstance(kernel, HeadSplit)
    assert reason.startswith(f"kernel {name} for {str(dtype)[6:]} heads of {head_dim} on Test GPU (")


def test_the_log_says_why_not_the_others(device: Any) -> None:
    assert kernel_and_reason(device((9, 0)), BF16, 128)[1] == (
        "kernel cudnn for bfloat16 heads of 128 on Test GPU (cpu_flash: for the CPU; flash4: needs compute capability 10.0; "
        "flash3: not installed, build it from the folder hopper/ of Dao-AILab/flash-attention)"
    )
    kernel, reason = kernel_and_reason(device((9, 0), ("flash3",), ("flash3",)), BF16, 128)
    assert kernel.name == "cudnn"
    assert "flash3: is wrong" in reason


def test_a_kernel_that_is_asked_for_and_not_there_is_one_line(device: Any) -> None:
    cases = {
        (
            "flash3",
        ): "attention kernel 'flash3' cannot be used for bfloat16 heads of 128 on Test GPU (flash3: not installed, build it"
        " from the folder hopper/ of Dao-AILab/flash-attention); let the rule choose one",
        ("nccl",): "attention kernel 'nccl' is not known; use one of cpu_flash, flash4, flash3, cudnn, flash, efficient, math",
    }
    for wanted, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            kernel_and_reason(device((9, 0)), BF16, 128, wanted)
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match="'cudnn' cannot be used for float32 heads of 16 on cpu"):
        kernel_and_reason(CPU, FP32, 16, ("cudnn",))
    assert kernel_and_reason(device((9, 0)), BF16, 128, ("flash3", "flash"))[0].name == "flash"


def test_on_a_cpu_nothing_is_wrapped() -> None:
    kernel, reason = kernel_and_reason(CPU, BF16, 16)
    assert isinstance(kernel, CpuFlashKernel)
    assert reason == "kernel cpu_flash for bfloat16 heads of 16 on cpu"


def test_cudnn_is_not_asked_for_a_single_key() -> None:
    """Documents of one token; torch: "cudnn SDPA does not support key/value sequence length 1"."""
    shapes = ((1, 8, 5, 16), (1, 2, 1, 16), (1, 2, 1, 16), (1, 8, 5, 16))
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    out, lse = CudnnKernel().forward(query, key, value, causal=False, scale=SCALE)
    gradients = CudnnKernel().backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    expected = CpuFlashKernel().backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(gradients, expected, strict=True))


class Broken(CpuFlashKernel):
    """What released versions of flash-attention 4 did on some devices."""

    def forward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*tensors, causal=causal, scale=scale)
        return torch.zeros_like(out), lse


class Raising(CpuFlashKernel):
    def forward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        raise TypeError("unexpected keyword argument 'causal'\nand more")


def test_an_installed_kernel_is_checked_before_it_is_used() -> None:
    for dtype in (torch.float16, BF16):
        assert attention._fails_on(CpuFlashKernel(), CPU, dtype, 64) is None
        assert attention._fails_on(MathKernel(), CPU, dtype, 64) is None
    assert attention._fails_on(Broken(), CPU, BF16, 64) == "its out is wrong here by 1.0e+00 of the largest entry"
    assert attention._fails_on(Raising(), CPU, BF16, 64) == "fails here with TypeError: unexpected keyword argument 'causal'"


def rows_first(*tensors: Tensor) -> list[Tensor]:
    assert all(tensor.stride(-1) == 1 for tensor in tensors)
    return [tensor.transpose(1, 2) for tensor in tensors]


def flash3_forward(q: Tensor, k: Tensor, v: Tensor, k_new: None = None, *, softmax_scale: float, causal: bool) -> Any:
    out, lse = MathKernel().forward(*rows_first(q, k, v), causal=causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, torch.empty(0), torch.empty(0)


def flash3_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    sequed_q: None,
    sequed_k: None,
    max_seqlen_q: None,
    max_seqlen_k: None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    is_causal: bool = False,  # `causal` before 2025-10
    window_size_left: int = -1,
) -> Tensor:
    assert (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k) == (None,) * 6
    assert softmax_lse.is_contiguous()
    gradients = MathKernel().backward(*rows_first(dout, q, k, v, out), softmax_lse, causal=is_causal, scale=softmax_scale)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        assert target.is_contiguous()
        target.copy_(gradient.transpose(1, 2))
    return softmax_lse


def flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, qv: None = None, *, softmax_scale: float, causal: bool, return_lse: bool = False
) -> Any:
    assert return_lse
    return flash3_forward(q, k, v, softmax_scale=softmax_scale, causal=causal)


def flash4_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: float, causal: bool
) -> Any:
    gradients = MathKernel().backward(*rows_first(dout, q, k, v, out), lse, causal=causal, scale=softmax_scale)
    return tuple(gradient.transpose(1, 2).contiguous() for gradient in gradients)


@pytest.mark.parametrize(
    ("kernel", "functions"),
    [
        (Flash3Kernel(), {"_flash_attn_forward": flash3_forward, "_flash_attn_backward": flash3_backward}),
        (Flash4Kernel(), {"_flash_attn_fwd": flash4_forward, "_flash_attn_bwd": flash4_backward}),
    ],
    ids=["flash3", "flash4"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_an_adapter_hands_over_what_the_package_takes(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, functions: dict[str, Any], causal: bool
) -> None:
    """Functions with the packages' signatures, computed by matrix products: arguments, layouts and results are in their places."""
    module = ModuleType(kernel.module)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, kernel.module, module)
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 1, 8, 16), (20, 1, 2, 16), (20, 1, 2, 16), (20, 1, 8, 16))
    query, key, value, grad_out = (torch.randn(shape, generator=generator).permute(1, 2, 0, 3) for shape in shapes)
    out, lse = MathKernel().forward(query, key, value, causal=causal, scale=SCALE)
    expected = (out, lse, *MathKernel().backward(grad_out, query, key, value, out, lse, causal=causal, scale=SCALE))
    out, lse = kernel.forward(query, key, value, causal=causal, scale=SCALE)
    found = (out, lse, *kernel.backward(grad_out, query, key, value, out, lse, causal=causal, scale=SCALE))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-6


def test_packages_are_not_installed_here_and_not_imported() -> None:
    assert not Flash3Kernel.is_installed()
    assert not Flash4Kernel.is_installed()
    assert "flash_attn_interface" not in sys.modules


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        (CudnnKernel(), "_scaled_dot_product_cudnn_attention_backward"),
        (FlashKernel(), "_scaled_dot_product_flash_attention_backward"),
        (EfficientKernel(), "_scaled_dot_product_efficient_attention_backward"),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_goes_to_cuda_kernels_by_rows_and_for_one_sample_uncopied(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, operator: str, batch: int
) -> None:
    received: list[Any] = []
    monkeypatch.setattr(
        torch_attention, "aten", SimpleNamespace(**{operator: lambda *args, **scale: received.extend(args) or args[1:5]})
    )
    # a chunk of the rows, as Megatron and the rings lay them: [s, b, heads, d]
    query, key, value, out, grad_out = (
        torch.randn(256, batch, heads, 8).permute(1, 2, 0, 3)[:, :, 128:] for heads in (4, 4, 4, 4, 4)
    )
    lse = torch.randn(batch, 4, 256)[:, :, 128:]
    kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=SCALE)
    assert torch.equal(received[0], grad_out)
    assert received[0].transpose(1, 2).is_contiguous()
    assert (received[0].data_ptr() == grad_out.data_ptr()) == (batch == 1)
    stats = received[6 if kernel.name == "efficient" else 5]
    assert stats.is_contiguous()
    assert torch.equal(stats.flatten(), lse.flatten())


def test_cudnn_takes_the_lse_in_the_shape_in_which_it_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.empty(1, 4, 128, 64, dtype=BF16, device="meta")
    given = torch.ops.aten._scaled_dot_product_cudnn_attention(query, query, query, None, True, 0.0, True, False, scale=SCALE)[1]
    received: list[Any] = []
    operator = {"_scaled_dot_product_cudnn_attention_backward": lambda *args, **scale: received.extend(args) or args[1:4]}
    monkeypatch.setattr(torch_attention, "aten", SimpleNamespace(**operator))
    CudnnKernel().backward(query, query, query, query, query, given.reshape(1, 4, 128), causal=True, scale=SCALE)
    assert received[5].shape == given.shape


def test_a_single_query_never_reaches_cudnn() -> None:
    """Its backward refuses one; here there is no cuDNN at all."""
    generator = torch.Generator().manual_seed(5)
    query, grad_out = (torch.randn(1, 4, 1, 16, generator=generator) for _ in "qg")
    key, value = (torch.randn(1, 2, 7, 16, generator=generator) for _ in "kv")
    out, lse = CudnnKernel().forward(query, key, value, causal=False, scale=SCALE)
    found = CudnnKernel().backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    expected = CpuFlashKernel().backward(grad_out, query, key, value, out, lse, causal=False, scale=SCALE)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(("queries", "keys", "name"), [(192, 256, "cudnn"), (256, 192, "flash"), (192, 192, "flash")])
def test_keys_that_do_not_fill_the_last_tile_take_flash_attention(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, name: str
) -> None:
    called: list[str] = []

    class Operators:
        def __getattr__(self, operator: str) -> Any:
            called.append(operator)
            return lambda query, *rest, **scale: (query, torch.zeros(1, 2, queries), query)

    monkeypatch.setattr(torch_attention, "aten", Operators())
    query, key = (torch.randn(1, 2, rows, 8) for rows in (queries, keys))
    out, lse = CudnnKernel().forward(query, key, key, causal=False, scale=SCALE)
    CudnnKernel().backward(out, query, key, key, out, lse, causal=False, scale=SCALE)
    assert called == [f"_scaled_dot_product_{name}_attention", f"_scaled_dot_product_{name}_attention_backward"]
