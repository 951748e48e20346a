"""Published measurements of parts: one attention by itself, one loss layer by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mcore_longctx.plan.calibration import Calibration
from mcore_longctx.plan.hardware import Gpu, find_gpu
from mcore_longctx.plan.measurements import KernelPoint, LossPoint

__all__ = ["PartRow", "part_rows"]

_D = 128  # head dimension of all published kernel points
_BACKWARD = 2.5
# method: (kernel, how it is distributed)
_METHODS = {
    "fa2": ("fa2", ""),
    "fa3": ("fa3", ""),
    "fa4": ("fa4", ""),
    "te_cudnn": ("cudnn", ""),
    "cudnn": ("cudnn", ""),
    "sdpa": ("sdpa", ""),
    "flex": ("flex", ""),
    "zigzag_ring": ("fa2", "ring"),
    "ring_unbalanced": ("fa2", "unbalanced"),
    "all_gather_varlen": ("fa2", "all_gather"),
    "ulysses_fa3": ("fa3", "a2a"),
    "ring_p2p_fa3": ("fa3", "ring"),
    "ring_allgather_fa3": ("fa3", "all_gather"),
}
_LOGITS = {
    "megatron_unfused": 6.0,
    "megatron_native_fused": 10.0,
    "torch": 6.0,
}  # torch alone: logits, log-softmax, gradient in bf16


@dataclass(frozen=True)
class PartRow:
    """One number of a kernel or a loss. `predicted` is None where no formula covers the method."""

    id: str
    what: str
    measured: float
    predicted: float | None
    source: str


def part_rows(
    kernels: Sequence[KernelPoint], losses: Sequence[LossPoint], sources: Mapping[str, str], calibration: Calibration
) -> tuple[PartRow, ...]:
    """All numbers of the points, with a prediction where there is a formula."""
    rows = [row for point in kernels for row in _kernel(point, sources.get(point.src, point.src), calibration)]
    rows += [row for point in losses for row in _loss(point, sources.get(point.src, point.src), calibration)]
    return tuple(rows)


def _kernel(point: KernelPoint, source: str, calibration: Calibration) -> Iterator[PartRow]:
    forward, backward, alone_forward, alone_backward = _attention_seconds(point, calibration)
    flops = _flops(point)
    numbers = (
        ("forward, TFLOP/s", point.fwd_tflops, flops / forward / 1e12 if forward else None),
        ("backward, TFLOP/s", point.bwd_tflops, _BACKWARD * flops / backward / 1e12 if backward else None),
        ("forward, of one call", point.fwd_ratio, alone_forward / forward if forward else None),
        (
            "forward and backward, of one call",
            point.fwdbwd_ratio,
            (alone_forward + alone_backward) / (forward + backward) if forward else None,
        ),
    )
    for what, measured, predicted in numbers:
        if measured is not None:
            yield PartRow(point.id, what, measured, predicted, source)


def _tokens(point: KernelPoint) -> int:
    """Of a rank."""
    return int(point.tokens_per_rank) if point.tokens_per_rank is not None else int(point.seq or 0) // point.n


def _flops(point: KernelPoint) -> float:
    """Of a rank's share of one causal forward."""
    total = float(_tokens(point) * point.n)
    return 2 * total**2 * point.q * _D / point.n


def _attention_seconds(point: KernelPoint, calibration: Calibration) -> tuple[float, float, float, float]:
    """(forward, backward) as distributed, and of the kernel alone; zeros where there is no formula."""
    gpu = find_gpu(point.gpu)
    kernel, spread = _METHODS.get(point.method, ("", ""))
    if kernel not in gpu.kernels:
        return 0.0, 0.0, 0.0, 0.0
    rate = gpu.kernel(kernel)
    forward, backward = _flops(point) / rate.forward, _BACKWARD * _flops(point) / rate.backward
    if spread == "ring":
        slower = 1 + calibration.ring_tokens / _tokens(point)
        move = calibration.ring_traffic * _moved(point, "ring") / _bandwidth(gpu, point.n, calibration)
        spread_forward, spread_backward = (max(forward * slower, move), max(backward * slower, 2 * move))
    elif spread == "unbalanced":  # the last rank meets every block, on average a rank meets (n + 1)/2 of n
        worst = 2 * point.n / (point.n + 1)
        spread_forward, spread_backward = forward * worst, backward * worst
    elif spread:
        move = _moved(point, spread) / _bandwidth(gpu, point.n, calibration)
        spread_forward, spread_backward = forward + move, backward + (2 * move if spread == "all_gather" else move)
    else:
        spread_forward, spread_backward = forward, backward
    return spread_forward, spread_backward, forward, backward


def _moved(point: KernelPoint, spread: str) -> float:
    keys = 4 * point.kv * _D * _tokens(point)
    return keys * (point.n - 1) if spread != "a2a" else (keys + 4 * point.q * _D * _tokens(point)) * (point.n - 1) / point.n


def _bandwidth(gpu: Gpu, ranks: int, calibration: Calibration) -> float:
    inside = ranks <= gpu.gpus_per_node
    return gpu.nvlink_bandwidth * calibration.nvlink if inside else gpu.network_bandwidth * calibration.network


def _loss(point: LossPoint, source: str, calibration: Calibration) -> Iterator[PartRow]:
    entries = float(point.tokens) * point.vocab_local
    bytes_ = {**_LOGITS, "hf": calibration.hf_logit_bytes}.get(point.method)
    predicted = None if bytes_ is None else bytes_ * entries
    if point.gib is not None:
        yield PartRow(point.id, "memory, GiB", point.gib, None if predicted is None else predicted / 2**30, source)
    if point.mb is not None:
        yield PartRow(point.id, "memory, MB", point.mb, None if predicted is None else predicted / 1e6, source)
    if point.ms is not None:
        yield PartRow(point.id, "forward and backward, ms", point.ms, None, source)
