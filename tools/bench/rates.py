"""What the machine can do at best, measured in the same run: an attention kernel alone, and a matrix product alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from formulas import PEAK_FLOPS, KernelRate
from harness import Case, measure
from in_process import KernelMeter, watch

from mcore_longctx.errors import ConfigError
from mcore_longctx.families import ModelShape
from mcore_longctx.kernels.attention import KERNEL_NAMES, kernel_and_reason
from mcore_longctx.megatron_compat import training_device

__all__ = ["kernel_rate", "peak_flops", "usable_kernels"]


def kernel_rate(shape: ModelShape, tokens: int, dtype: torch.dtype, kernel: str = "") -> KernelRate | str:
    """Rates of a causal call over `tokens`, in a process of its own; what went wrong, in words, where there are none."""
    calls = 5 if torch.cuda.is_available() else 2
    found = measure(Case(_KernelAlone, (shape, tokens, dtype, kernel)), count_bytes=False, warmup=1, calls=calls)
    return found.error or found.facts["rate"]


def usable_kernels(dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Every kernel that can be used here and is meant for speed: its name, and what the rule says about it."""
    usable: dict[str, str] = {}
    for name in KERNEL_NAMES:
        try:
            usable[name] = kernel_and_reason(training_device(), dtype, head_dim, (name,))[1]
        except ConfigError:
            continue
    return {name: reason for name, reason in usable.items() if name not in ("efficient", "math")}


def peak_flops() -> tuple[float, str]:
    """FLOP/s to hold a rate against, and what they are: the data sheet's on a GPU, a float32 matrix product's on a CPU core."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for word, peak in sorted(PEAK_FLOPS.items(), key=lambda item: -len(item[0])):
            if word in name:
                return peak, f"{peak / 1e12:.0f} TFLOP/s, dense bf16 of {word}"
        raise SystemExit(f"no peak rate is known for {name}: add it to formulas.PEAK_FLOPS")
    rate = measure(Case(_Gemm), count_bytes=False, calls=1).facts["rate"]
    return rate, f"{rate / 1e9:.0f} GFLOP/s, a float32 matrix product of 2048 x 2048 x 2048 on one core in this run"


class _KernelAlone:
    def __init__(self, shape: ModelShape, tokens: int, dtype: torch.dtype, kernel: str) -> None:
        wanted = (kernel,) if kernel else ()
        self.kernel, _ = kernel_and_reason(training_device(), dtype, shape.kv_channels, wanted)
        watch(self.kernel)
        heads, groups = shape.num_attention_heads, shape.num_query_groups
        self.inputs = [
            torch.randn(tokens, 1, count, shape.kv_channels, device=training_device(), dtype=dtype).permute(1, 2, 0, 3)
            for count in (heads, groups, groups, heads)
        ]
        self.rates: list[tuple[float, float]] = []

    def step(self) -> None:
        query, key, value, grad_out = self.inputs
        scale = query.size(-1) ** -0.5
        with KernelMeter() as meter:
            out, lse = self.kernel.forward(query, key, value, causal=True, scale=scale)
            self.kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=scale)
        self.rates.append((meter.rate("forward"), meter.rate("backward")))

    def facts(self) -> dict[str, Any]:
        best = [max(rates) for rates in zip(*self.rates, strict=True)]
        return {"rate": KernelRate(*best)}


class _Gemm:
    def __init__(self) -> None:
        self.matrix, self.rate = torch.randn(2048, 2048), 0.0

    def step(self) -> None:
        for _ in range(20):  # the best one: a busy machine slows some of them
            began = time.process_time()
            _ = self.matrix @ self.matrix
            self.rate = max(self.rate, 2 * 2048**3 / (time.process_time() - began))

    def facts(self) -> dict[str, float]:
        return {"rate": self.rate}
