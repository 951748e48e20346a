"""Attention on one device: which kernel computes it.

Decided by `choose_kernel` and by nothing else, once for a device, dtype and head dimension d. The first of its line that can be used:

    device                dtype          order of choice
    CPU                   any float      cpu_flash, any d
    CUDA, compute 10.x+   bf16, fp16     flash4 (if installed, d <= 128), cudnn (d <= 128), flash (d <= 256), efficient
    CUDA, compute 9.x     bf16, fp16     flash3 (if installed, d <= 256), cudnn (d <= 128), flash (d <= 256), efficient
    CUDA, older           bf16, fp16     flash (compute 8.x, d <= 256), efficient
    CUDA                  fp32           efficient: keys and values of grouped queries are expanded, gradients summed
    CUDA                  fp64           math: O(s^2) memory, for tests

All but efficient take grouped queries as they are. d is a multiple of 8 for the first four. Packs of several documents pass over
cudnn (`mcore_longctx.parallel.exchange`). The order is that of published rates (docs/benchmarks.md): nothing on CUDA is measured yet.
On CUDA every kernel stands behind `HeadSplit`, which keeps it below 2^31 elements.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.kernels.flash_attention import Flash3Kernel, Flash4Kernel, PackageKernel
from mcore_longctx.kernels.head_split import HeadSplit
from mcore_longctx.kernels.interface import AttentionKernel, accumulator_dtype, merge
from mcore_longctx.kernels.torch_attention import CpuFlashKernel, CudnnKernel, EfficientKernel, FlashKernel, MathKernel

__all__ = [
    "KERNEL_NAMES",
    "AttentionKernel",
    "CpuFlashKernel",
    "CudnnKernel",
    "EfficientKernel",
    "FlashKernel",
    "MathKernel",
    "accumulator_dtype",
    "attention_kernel",
    "choose_kernel",
    "kernel_and_reason",
    "merge",
]

_KERNELS: tuple[type[AttentionKernel], ...] = (
    CpuFlashKernel,
    Flash4Kernel,
    Flash3Kernel,
    CudnnKernel,
    FlashKernel,
    EfficientKernel,
    MathKernel,
)
KERNEL_NAMES = tuple(kernel.name for kernel in _KERNELS)  # in the order of choice
_HALF = (torch.bfloat16, torch.float16)


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, wanted: tuple[str, ...] = ()) -> AttentionKernel:
    """The kernel for a device, dtype and head dimension: `kernel_and_reason` without its reason."""
    return kernel_and_reason(device, dtype, head_dim, wanted)[0]


def attention_kernel(query: Tensor, wanted: tuple[str, ...] = ()) -> AttentionKernel:
    """`choose_kernel` for a tensor [..., d]."""
    return choose_kernel(query.device, query.dtype, query.size(-1), wanted)


@lru_cache
def kernel_and_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int, wanted: tuple[str, ...] = ()
) -> tuple[AttentionKernel, str]:
    """The kernel and one line for a log: its name, for what, and why not those that would have come before it.

    Args:
        device: where it computes.
        dtype: of query, key and value.
        head_dim: d.
        wanted: names to choose among; empty: all, by the table of the module.

    Raises:
        ConfigError: an unknown name, or none of those that are wanted can be used.
    """
    unknown = [name for name in wanted if name not in KERNEL_NAMES]
    if unknown:
        raise ConfigError(f"attention kernel {unknown[0]!r} is not known", fix=f"use one of {', '.join(KERNEL_NAMES)}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    purpose = f"for {str(dtype).removeprefix('torch.')} heads of {head_dim} on {name}"
    passed_over: list[str] = []
    for kind in _KERNELS:
        if wanted and kind.name not in wanted:
            continue
        kernel = kind()
        against = _unusable(kind, device.type, capability, dtype, head_dim)
        if against is None and issubclass(kind, PackageKernel):
            against = _fails_on(kernel, device, dtype, head_dim)
        if against is None:
            others = f" ({'; '.join(passed_over)})" if passed_over and device.type == "cuda" else ""
            return (HeadSplit(kernel) if device.type == "cuda" else kernel), f"kernel {kind.name} {purpose}{others}"
        passed_over.append(f"{kind.name}: {against}")
    asked = " and ".join(repr(name) for name in wanted)
    raise ConfigError(
        f"attention kernel {asked} cannot be used {purpose} ({'; '.join(passed_over)})", fix="let the rule choose one"
    )


def _unusable(
    kind: type[AttentionKernel], device_type: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why a kernel cannot be used there; None: it can."""
    if kind is MathKernel:
        return None
    if kind is CpuFlashKernel:
        return None if device_type == "cpu" else "for the CPU"
    if device_type != "cuda":
        return "needs CUDA"
    if kind is EfficientKernel:
        return "not for float64" if dtype is torch.float64 else None
    needs, largest = {
        Flash4Kernel: ((10, 0), 128),
        Flash3Kernel: ((9, 0), 256),
        CudnnKernel: ((9, 0), 128),
        FlashKernel: ((8, 0), 256),
    }[kind]
    if dtype not in _HALF:
        return "for bf16 and fp16"
    if capability < needs:
        return f"needs compute capability {needs[0]}.{needs[1]}"
    if kind is Flash3Kernel and capability >= (10, 0):
        return "for compute capability 9.x"
    if head_dim % 8 or head_dim > largest:
        return f"heads up to {largest} and a multiple of 8"
    if kind is CudnnKernel and not torch.backends.cudnn.is_available():
        return "cuDNN is not there"
    if issubclass(kind, PackageKernel) and not kind.is_installed():
        return f"not installed, {kind.install}"
    return None


def _fails_on(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare an installed package's kernel with matrix products on a small causal case with grouped queries; None: it is right."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(1, heads, 384, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4)
    )
    scale = head_dim**-0.5
    out, lse = MathKernel().forward(query, key, value, causal=True, scale=scale)
    expected = (out, lse, *MathKernel().backward(grad_out, query, key, value, out, lse, causal=True, scale=scale))
    try:
        out, lse = kernel.forward(query, key, value, causal=True, scale=scale)
        found = (out, lse, *kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=scale))
    except Exception as error:  # another package's version may raise anything
        return f"fails here with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        error_of = (a.float() - b.float()).abs().max() / b.float().abs().max()
        if a.shape != b.shape or not error_of < 0.05:
            return f"its {name} is wrong here by {error_of:.1e} of the largest entry"
    return None
