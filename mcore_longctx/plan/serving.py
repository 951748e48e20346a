"""What serving a model at its new length needs: `plan --serve`.

Derived, not measured; no server was run. Rules:

    GPUs                weights/TP + KV/shards + 5 GB <= 92 % of a board, the smallest power of two (`convert.checks.commands`)
    time to first token FLOPs of one forward pass over the prompt, at 0.40 of the bf16 peak (a kernel of FlashAttention 3's class) and at
                        0.25 (chunked prefill over several GPUs, carefully)
    one more token      keys, values and weights once through the memory of all GPUs, at 0.7 of its bandwidth
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mcore_longctx.convert.checks.commands import KvType, Layout, kv_bytes, serve_commands, smallest_layout
from mcore_longctx.families import ModelShape
from mcore_longctx.plan.hardware import Gpu, known_gpus
from mcore_longctx.plan.models import parameters, parameters_per_layer, step_flops
from mcore_longctx.plan.tables import columns, count, duration, gigabytes
from mcore_longctx.plan.terms import Term

__all__ = ["SERVED_GPUS", "Precision", "ServingPlan", "ServingRow", "plan_serving", "serving_lines", "weight_bytes"]

SERVED_GPUS = ("h100-80gb", "h200-141gb", "b200-180gb")
_FAST, _CAREFUL = 0.40, 0.25  # of the bf16 peak, in prefill
_DECODE_BANDWIDTH = 0.7  # of the memory's


@dataclass(frozen=True)
class Precision:
    """What weights and the key/value cache are stored in."""

    weights: KvType
    kv: KvType

    @property
    def name(self) -> str:
        """For example `bf16, KV fp8`."""
        return f"{self.weights} weights, {self.kv} KV"


PRECISIONS = (Precision("bf16", "bf16"), Precision("bf16", "fp8"), Precision("fp8", "fp8"))


@dataclass(frozen=True)
class ServingRow:
    """One GPU and precision; `layout` None: more than 64 GPUs, and no times."""

    gpu: Gpu
    precision: Precision
    layout: Layout | None
    gpu_bytes: float  # of each GPU: weights, keys and values, 5 GB
    first_token: tuple[Term, Term] | None  # seconds: fast, careful
    next_token: Term | None  # seconds


@dataclass(frozen=True)
class ServingPlan:
    """One request of `length` tokens, prompt and answer together."""

    shape: ModelShape
    length: int
    prefill_flops: float
    rows: tuple[ServingRow, ...]
    commands: tuple[str, ...]


def weight_bytes(shape: ModelShape, kind: KvType) -> int:
    """Size of an exported folder: bf16, or fp8 in the linear layers alone (their scales are 0.1 %)."""
    linear = shape.num_layers * parameters_per_layer(shape)
    return 2 * parameters(shape) - (linear if kind == "fp8" else 0)


def plan_serving(shape: ModelShape, length: int, *, gpus: Sequence[Gpu] = (), path: str = "OUT") -> ServingPlan:
    """Plan one request at a time on each GPU (default: H100, H200, B200 of our table) and each precision.

    Args:
        shape: the extended model.
        length: its longest request.
        gpus: those to plan for.
        path: of the exported folder, for the commands.
    """
    prefill = _prefill(shape, length)
    table: Mapping[str, Gpu] = known_gpus()
    boards = gpus or [table[name] for name in SERVED_GPUS]
    rows = tuple(_row(shape, length, prefill, gpu, precision) for precision in PRECISIONS for gpu in boards)
    commands = serve_commands(shape, length, weight_bytes=weight_bytes(shape, "bf16"), path=path)
    return ServingPlan(shape, length, prefill, rows, tuple(commands))


def _prefill(shape: ModelShape, length: int) -> float:
    """FLOPs of one forward pass that makes the logits of its last token."""
    linear, _, attention = step_flops(shape, length)
    return (linear + attention) / 3


def _row(shape: ModelShape, length: int, prefill: float, gpu: Gpu, precision: Precision) -> ServingRow:
    weights, kv = weight_bytes(shape, precision.weights), kv_bytes(shape, length, precision.kv)
    layout = smallest_layout(shape, length, weight_bytes=weights, kv=precision.kv, gpu_bytes=gpu.memory_bytes)
    if layout is None:
        return ServingRow(gpu, precision, None, float("nan"), None, None)
    count_, shards = layout.tp, min(layout.tp, shape.num_query_groups) * layout.dcp
    return ServingRow(
        gpu,
        precision,
        layout,
        weights / layout.tp + kv / shards + 5e9,
        (_first_token(prefill, gpu, count_, _FAST), _first_token(prefill, gpu, count_, _CAREFUL)),
        Term(
            "one more token",
            (kv + weights) / (count_ * gpu.memory_bandwidth * _DECODE_BANDWIDTH),
            "(KV + weights) / (GPUs x memory bandwidth x 0.7)",
            f"({kv:.4g} + {weights:.4g}) / ({count_} x {gpu.memory_bandwidth:.3g} x {_DECODE_BANDWIDTH})",
        ),
    )


def _first_token(prefill: float, gpu: Gpu, gpus: int, share: float) -> Term:
    return Term(
        "first token",
        prefill / (gpus * gpu.peak_flops * gpu.sustained * share),
        f"prefill FLOPs / (GPUs x {share:.2f} peak)",
        f"{prefill:.4g} / ({gpus} x {share:.2f} x {gpu.peak_flops:.3g})",
    )


def serving_lines(plan: ServingPlan) -> list[str]:
    """For people: sizes, a table, the commands."""
    shape, length = plan.shape, plan.length
    rows = []
    for row in plan.rows:
        if row.layout is None or row.first_token is None or row.next_token is None:
            rows.append((row.precision.name, row.gpu.name, "more than 64", "-", "-", "-"))
            continue
        dcp = f" (dcp {row.layout.dcp})" if row.layout.dcp > 1 else ""
        first = " to ".join(duration(term.value) for term in row.first_token)
        rows.append(
            (
                row.precision.name,
                row.gpu.name,
                f"{row.layout.tp}{dcp}",
                gigabytes(row.gpu_bytes),
                first,
                duration(row.next_token.value),
            )
        )
    head = (
        f"one request of {count(length)} tokens: keys and values {gigabytes(kv_bytes(shape, length, 'bf16'))} GB in bf16,"
        f" {gigabytes(kv_bytes(shape, length, 'fp8'))} GB in fp8; weights {gigabytes(weight_bytes(shape, 'bf16'))} GB in bf16,"
        f" {gigabytes(weight_bytes(shape, 'fp8'))} GB in fp8; prefill {plan.prefill_flops / 1e15:,.0f} PFLOP"
    )
    table = columns(("stored in", "GPU", "GPUs", "GB each", "first token", "one more"), rows, left=(0, 1))
    return [head, "", *table, "", "derived, no server was run (docs/serving.md)", *plan.commands]
