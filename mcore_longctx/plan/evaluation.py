"""What measuring a model costs: forward passes of the needle grid and of the held-out windows, on the layout of `evaluate.parallel`.

Every needle sample and every window is one forward pass over its tokens; a needle needs the logits of its answer alone, a window those of
all tokens. Nothing is kept. Work grows with the square of the length, so the longest length decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_longctx.families import ModelShape
from mcore_longctx.plan.hardware import Gpu
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.plan.tables import columns, count, duration
from mcore_longctx.plan.terms import Term
from mcore_longctx.recipe.schema import EvaluateSection, Parallel
from mcore_longctx.tasks.statistics import wilson_interval

__all__ = ["EvaluationPrice", "EvaluationRow", "evaluation_lines", "evaluation_price", "forward_seconds"]

_MUCH = 1.5  # quadratic work of a grid over that of its longest length, above which lengths are worth a word
_MANY = 20  # needles of the longest length, above which they are


@dataclass(frozen=True)
class EvaluationRow:
    """Forward passes over one length."""

    task: str
    length: int
    sequences: int
    forward: Term  # seconds of one

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return self.sequences * self.forward.value


@dataclass(frozen=True)
class EvaluationPrice:
    """What one column costs (a column: one model that is measured), and all of them."""

    gpus: int
    columns: int
    rows: tuple[EvaluationRow, ...]
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of one column, without reading the checkpoint."""
        return sum(row.seconds for row in self.rows)

    @property
    def gpu_hours(self) -> float:
        """Of all columns."""
        return self.columns * self.gpus * self.seconds / 3600


def evaluation_price(
    section: EvaluateSection, shape: ModelShape, gpu: Gpu, *, columns: int = 1, kernel: str = ""
) -> EvaluationPrice | None:
    """Price the `evaluate` section of a recipe; None where it measures nothing.

    Args:
        section: tasks and layout.
        shape: the model.
        gpu: what it runs on.
        columns: models that are measured: a run has `before`, `scaled` and one for each stage.
        kernel: attention kernel of that GPU; empty: its default.

    Raises:
        ConfigError: the GPU has no kernel of that name.
    """
    rows: list[EvaluationRow] = []

    def add(task: str, length: int, sequences: int, *, every_token: bool) -> None:
        forward = forward_seconds(shape, gpu, section.parallel, length, every_token=every_token, kernel=kernel)
        rows.append(EvaluationRow(task, length, sequences, forward))

    if section.needle is not None:
        for length in section.needle.lengths:
            add("needle", length, section.needle.depths * section.needle.samples, every_token=False)
    if (loss := section.loss_by_position) is not None:
        add("loss by position", loss.seq_length, loss.windows, every_token=True)
        add("short context", loss.short_length, loss.short_windows, every_token=True)
    if not rows:
        return None
    return EvaluationPrice(section.parallel.world_size, columns, tuple(rows), tuple(_advice(section, rows)))


def forward_seconds(shape: ModelShape, gpu: Gpu, parallel: Parallel, length: int, *, every_token: bool, kernel: str = "") -> Term:
    """One forward pass over a sequence on a layout without pipeline stages: the forward's part of each term of `step_time`.

    That is a third of matrix products and elementwise work, the attention's forward, 4 of 10 collectives of tensor parallelism, and of the
    exchange one pass of four (all_gather, ring: gradients are float32) or of three (all-to-all).
    """
    setup = Setup(
        shape=shape,
        gpu=gpu,
        seq_length=length,
        global_batch_size=1,
        parallel=parallel,
        recompute="none",
        mlp_tile=None,
        kernel=kernel,
    )
    exchange = min(3 if kind.startswith("a2a") else 4 for kind in parallel.cp_comm_types)
    share = {
        "attention forward": 1.0,
        "linear layers": 1 / 3,
        "elementwise": 1 / 3,
        "head": 1 / 3 if every_token else 0.0,
        "tensor-parallel collectives": 4 / 10,
        "context-parallel exchange": 1 / exchange,
    }
    terms = {term.name: term.value * share[term.name] for term in step_time(setup).terms if term.name in share}
    return Term(
        f"forward over {count(length)}",
        sum(terms.values()),
        "attention forward + (linear layers + elementwise + head)/3 + 0.4 TP collectives + exchange/n of a step with this layout",
        " + ".join(f"{name} {value:.3g}" for name, value in terms.items() if value),
        "logits of every token" if every_token else "logits of the answer alone",
    )


def evaluation_lines(price: EvaluationPrice) -> list[str]:
    """For people: a table, the sum, and advice."""
    rows = [
        (
            row.task,
            count(row.length),
            str(row.sequences),
            duration(row.forward.value),
            duration(row.seconds),
            f"{price.gpus * row.seconds / 3600:,.1f}",
        )
        for row in price.rows
    ]
    lines = columns(("task", "tokens", "sequences", "each", "all", "GPU-hours"), rows, left=(0,))
    models = "one model" if price.columns == 1 else f"{price.columns} models: {duration(price.columns * price.seconds)}"
    total = f"on {price.gpus:,} GPUs a model takes {duration(price.seconds)}; {models}, {price.gpu_hours:,.1f} GPU-hours"
    return [*lines, total, *price.advice]


def _advice(section: EvaluateSection, rows: Sequence[EvaluationRow]) -> list[str]:
    """What would cost less and tell as much."""
    needle = section.needle
    if needle is None:
        return []
    lines, longest = [], max(needle.lengths)
    work = sum((length / longest) ** 2 for length in needle.lengths)
    if len(needle.lengths) > 2 and work > _MUCH:
        doubled = tuple(longest >> i for i in reversed(range(len(needle.lengths))) if longest >> i >= 1)
        lines.append(
            f"needle lengths cost {work:.2f} times their longest; doubled from one to the next"
            f" ({count(doubled[0])} ... {count(longest)}) they would cost {sum((n / longest) ** 2 for n in doubled):.2f} times"
        )
    each = next(row for row in rows if row.task == "needle" and row.length == longest)
    if each.sequences > _MANY:
        fewer = max(1, _MANY // needle.depths)
        kept = fewer * needle.depths
        lines.append(
            f"{each.sequences} needles of {count(longest)} take {duration(each.seconds)}; with samples {fewer} it is {kept} over all depths"
            f" in {duration(kept * each.forward.value)}, and {kept} of {kept} found still mean at least {wilson_interval(kept, kept)[0]:.0%}"
        )
    return lines
