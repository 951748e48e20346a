"""What measuring a model costs, on the layout of `evaluate.parallel` and at the section's level.

Every needle, RULER-like sample and window is one forward pass over its tokens; a question needs the logits of its answer alone, a window
those of all tokens. Where keys and values are kept (shared needles, greedy decoding, options), every later pass reads the weights and the
cache once. Work grows with the square of the length, so the longest length decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from mcore_longctx.convert.checks.commands import kv_bytes
from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.families import ModelShape
from mcore_longctx.plan.evaluation_checks import check_files, check_section
from mcore_longctx.plan.hardware import Gpu
from mcore_longctx.plan.models import parameters, step_flops
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.stages import cluster_gpu, plan_stage
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.plan.tables import columns, count, duration, gigabytes
from mcore_longctx.plan.terms import Term
from mcore_longctx.recipe.evaluation import Level
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.schema import EvaluateSection, Parallel, Recipe
from mcore_longctx.tasks import RULER_TASKS, check_ruler_tasks
from mcore_longctx.tasks.statistics import wilson_interval

__all__ = [
    "EvaluationPrice",
    "EvaluationRow",
    "EvaluationWork",
    "check_budget",
    "check_evaluation",
    "evaluation_lines",
    "evaluation_price",
    "evaluation_work",
    "forward_seconds",
    "pass_seconds",
    "work_line",
]

_MUCH = 1.5  # quadratic work of a grid over that of its longest length, above which lengths are worth a word
_MANY = 20  # needles of the longest length, above which they are
_DECODED = 128  # tokens of a RULER-like answer at most, if longer ones are rare
_SHORT_TOKENS, _OPTIONS = 256, 4  # of a question of the short suite, about
_BANDWIDTH = 0.7  # of the memory's, as in serving
_LAYER_SECONDS = (
    5e-4  # of a pass over few tokens beside reading: kernels one by one and three collectives a layer (assumed, not measured)
)
_FULL = 0.92  # of a board


@dataclass(frozen=True)
class EvaluationWork:
    """Forward passes over one length, and what follows each of them from its keys and values."""

    task: str
    length: int
    sequences: int
    every_token: bool = False  # logits of all tokens, or of the answer alone
    passes: int = 0  # over few tokens, after each sequence

    @property
    def tokens(self) -> int:
        """Read by all forward passes."""
        return self.sequences * self.length

    def flops(self, shape: ModelShape) -> float:
        """Of all forward passes."""
        linear, head, attention = step_flops(shape, self.length)
        return self.sequences * (linear + attention + (head if self.every_token else 0.0)) / 3


@dataclass(frozen=True)
class EvaluationRow:
    """Work over one length, priced."""

    task: str
    length: int
    sequences: int
    forward: Term  # seconds of one
    passes: int = 0  # that follow each
    one_pass: Term | None = None  # seconds

    @property
    def each(self) -> float:
        """Seconds of one sequence with all that is asked of it."""
        return self.forward.value + (self.passes * self.one_pass.value if self.one_pass is not None else 0.0)

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return self.sequences * self.each


@dataclass(frozen=True)
class EvaluationPrice:
    """What one column costs (a column: one model that is measured), and all of them."""

    gpus: int
    columns: int
    rows: tuple[EvaluationRow, ...]
    advice: tuple[str, ...]
    level: Level = "standard"
    other_levels: tuple[tuple[Level, float], ...] = ()  # GPU-hours of all columns

    @property
    def seconds(self) -> float:
        """Of one column, without reading the checkpoint."""
        return sum(row.seconds for row in self.rows)

    @property
    def gpu_hours(self) -> float:
        """Of all columns."""
        return self.columns * self.gpus * self.seconds / 3600


def evaluation_work(section: EvaluateSection) -> list[EvaluationWork]:
    """What one column computes, at the section's level."""
    section = section.at_level()
    found: list[EvaluationWork] = []
    if (needle := section.needle) is not None:
        for length in needle.lengths:
            if needle.shared:  # each question is one pass, its answer another
                found.append(EvaluationWork("needles, shared text", length, needle.samples, passes=2 * needle.depths))
            else:
                found.append(EvaluationWork("needle", length, needle.depths * needle.samples))
    if (ruler := section.ruler) is not None:
        samples = (len(ruler.tasks) or len(RULER_TASKS)) * ruler.samples
        passes = _DECODED if ruler.scoring == "greedy" else 0
        found += [EvaluationWork("ruler-like", length, samples, passes=passes) for length in ruler.lengths]
    if (loss := section.loss_by_position) is not None:
        found.append(EvaluationWork("loss by position", loss.seq_length, loss.windows, every_token=True))
        found.append(EvaluationWork("short context", loss.short_length, loss.short_windows, every_token=True))
    if section.short_suite is not None:
        found.append(EvaluationWork("short suite", _SHORT_TOKENS, section.short_suite.questions, passes=_OPTIONS))
    return found


def evaluation_price(
    section: EvaluateSection, shape: ModelShape, gpu: Gpu, *, columns: int = 1, kernel: str = ""
) -> EvaluationPrice | None:
    """Price the `evaluate` section of a recipe at its level; None where it measures nothing.

    Args:
        section: tasks, layout and level.
        shape: the model.
        gpu: what it runs on.
        columns: models that are measured: a run has `before`, `scaled` and one for each stage.
        kernel: attention kernel of that GPU; empty: its default.

    Raises:
        ConfigError: the GPU has no kernel of that name.
    """
    price = _price(section, shape, gpu, columns, kernel)
    if not price.rows:
        return None
    others = [level for level in get_args(Level) if level != section.level]
    hours = tuple((level, _price(replace(section, level=level), shape, gpu, columns, kernel).gpu_hours) for level in others)
    advice = (*_advice(section.at_level(), price.rows), *_memory_advice(section.at_level(), shape, gpu))
    return replace(price, advice=advice, other_levels=hours)


def _price(section: EvaluateSection, shape: ModelShape, gpu: Gpu, models: int, kernel: str) -> EvaluationPrice:
    parallel, rows = section.parallel, []
    for work in evaluation_work(section):
        forward = forward_seconds(shape, gpu, parallel, work.length, every_token=work.every_token, kernel=kernel)
        one_pass = pass_seconds(shape, gpu, parallel, work.length) if work.passes else None
        rows.append(EvaluationRow(work.task, work.length, work.sequences, forward, work.passes, one_pass))
    return EvaluationPrice(parallel.world_size, models, tuple(rows), (), section.level)


def check_evaluation(file: RecipeFile, shape: ModelShape) -> None:
    """Find before anything is started what would stop an evaluation hours later.

    Raises:
        ConfigError, LayoutError, DataError: what `check_section` and `check_files` find.
        ConfigError: more work than `evaluate.max_budget_share` allows.
    """
    recipe = file.recipe
    if not recipe.evaluate.measures:
        return
    try:
        if recipe.evaluate.ruler is not None:
            check_ruler_tasks(recipe.evaluate.ruler.tasks)  # also where the level leaves them out
        check_section(recipe.evaluate.at_level(), backend=recipe.model.backend)
        check_files(recipe, shape.vocab_size)
    except LongctxError as error:
        is_key = isinstance(error.where, str) and (error.where == "tokenizer" or error.where.startswith("evaluate."))
        raise type(error)(error.what, where=file.where(str(error.where)) if is_key else error.where, fix=error.fix) from None
    check_budget(file.recipe, shape, where=file.where("evaluate.max_budget_share"))


def check_budget(recipe: Recipe, shape: ModelShape, *, where: object = None) -> None:
    """Raise ConfigError when measuring all models of a run costs more than `evaluate.max_budget_share` of its training.

    In GPU-hours; on ranks without GPUs, for which there is no time, in floating-point operations.

    Args:
        recipe: the run.
        shape: of its model.
        where: of the key, for the message.
    """
    section = recipe.evaluate
    if section.max_budget_share is None:
        return
    models = len(recipe.stages) + 2
    quick = replace(section, level="quick")
    gpu = cluster_gpu(recipe.cluster)
    if gpu is None:
        measuring, quickly = (models * sum(work.flops(shape) for work in evaluation_work(s)) / 1e15 for s in (section, quick))
        training = (
            sum(stage.iterations * stage.global_batch_size * sum(step_flops(shape, stage.seq_length)) for stage in recipe.stages)
            / 1e15
        )
        unit = "PFLOP"
    else:
        measuring, quickly = (_price(s, shape, gpu, models, "").gpu_hours for s in (section, quick))
        plans = [(stage, plan_stage(stage, shape, recipe.cluster, backend=recipe.model.backend)) for stage in recipe.stages]
        training = sum(plan.hours * stage.parallel.world_size for stage, plan in plans if plan is not None)
        unit = "GPU-hours"
    share = measuring / training
    if share > section.max_budget_share:
        cheaper = "" if section.level == "quick" else f"evaluate.level=quick ({quickly:,.3g} {unit}), "
        raise ConfigError(
            f"measuring {models} models takes {measuring:,.4g} {unit} [planned], {share:.1%} of the {training:,.4g} {unit} of the training;"
            f" max_budget_share is {section.max_budget_share:.1%}",
            where=where,
            fix=f"{cheaper}fewer samples or lengths, or a larger max_budget_share",
        )


def pass_seconds(shape: ModelShape, gpu: Gpu, parallel: Parallel, length: int) -> Term:
    """One pass over few tokens after a prompt of `length`, whose keys and values are kept over all ranks.

    Weights and cache are read once; each rank has its part of both. (A tensor-parallel rank beyond the number of key/value heads has a copy.)
    """
    tp, cp, layers = parallel.tensor_model_parallel_size, parallel.context_parallel_size, shape.num_layers
    weights = 2 * parameters(shape) / tp
    cache = kv_bytes(shape, length, "bf16") / (min(tp, shape.num_query_groups) * cp)
    return Term(
        f"one pass after {count(length)}",
        (weights + cache) / (_BANDWIDTH * gpu.memory_bandwidth) + layers * _LAYER_SECONDS,
        "(weights/TP + KV/(TP CP)) / (0.7 memory bandwidth) + layers x 0.5 ms",
        f"({weights:.3g} + {cache:.3g}) / ({_BANDWIDTH} x {gpu.memory_bandwidth:.3g}) + {layers} x {_LAYER_SECONDS}",
        "assumed, not measured",
    )


def work_line(section: EvaluateSection, shape: ModelShape, *, columns: int = 1) -> str:
    """For ranks on CPUs, for which there is no formula: how much there is to do."""
    work = evaluation_work(section)
    models = "" if columns == 1 else f" a model, {columns} models"
    return (
        f"{sum(it.sequences for it in work):,} forward passes over {sum(it.tokens for it in work):,} tokens,"
        f" {sum(it.flops(shape) for it in work) / 1e12:,.3g} TFLOP{models} (there is no formula for time on CPUs)"
    )


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
            duration(row.each),
            duration(row.seconds),
            f"{price.gpus * row.seconds / 3600:,.1f}",
        )
        for row in price.rows
    ]
    lines = columns(("task", "tokens", "sequences", "each", "all", "GPU-hours"), rows, left=(0,))
    models = "one model" if price.columns == 1 else f"{price.columns} models: {duration(price.columns * price.seconds)}"
    total = f"on {price.gpus:,} GPUs a model takes {duration(price.seconds)}; {models}, {price.gpu_hours:,.1f} GPU-hours"
    others = ", ".join(f"{level} {hours:,.1f}" for level, hours in price.other_levels)
    return [*lines, total, f"this is level {price.level}; others would take, in GPU-hours: {others}", *price.advice]


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
    each = next(row for row in rows if row.task.startswith("needle") and row.length == longest)
    if each.sequences > _MANY and not needle.shared:
        fewer = max(1, _MANY // needle.depths)
        kept = fewer * needle.depths
        lines.append(
            f"{each.sequences} needles of {count(longest)} take {duration(each.seconds)}; with samples {fewer} it is {kept} over all depths"
            f" in {duration(kept * each.forward.value)}, and {kept} of {kept} found still mean at least {wilson_interval(kept, kept)[0]:.0%}"
        )
    return lines


def _memory_advice(section: EvaluateSection, shape: ModelShape, gpu: Gpu) -> Iterator[str]:
    """Where keys and values of a prompt do not fit beside the weights."""
    parallel = section.parallel
    tp, cp = min(parallel.tensor_model_parallel_size, shape.num_query_groups), parallel.context_parallel_size
    weights = 2 * parameters(shape) / parallel.tensor_model_parallel_size
    longest = max((work.length for work in evaluation_work(section) if work.passes), default=0)
    cache = kv_bytes(shape, longest, "bf16") / (tp * cp) if longest else 0.0
    if weights + cache > _FULL * gpu.memory_bytes:
        yield (
            f"keys and values of {count(longest)} take {gigabytes(cache)} GB a GPU beside {gigabytes(weights)} GB of weights, a board has"
            f" {gigabytes(gpu.memory_bytes)}: more context parallelism, or teacher forcing without shared texts"
        )
