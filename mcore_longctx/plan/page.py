"""What `mcore-longctx plan` prints for one stage."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mcore_longctx.errors import ConfigError
from mcore_longctx.families import ModelShape
from mcore_longctx.plan.advice import (
    breaks_nearby,
    describe,
    exchange_name,
    nearest_fitting,
    overrides,
    policy_name,
    refused_sizes,
    remedy,
    smallest_miss,
    why_best,
)
from mcore_longctx.plan.candidates import HOST_USABLE, USABLE, Candidate, Problem, Search, at_peak, fit_problem
from mcore_longctx.plan.hardware import Gpu
from mcore_longctx.plan.intervals import Intervals, check_time_limit
from mcore_longctx.plan.layouts import MOST_NODES, Backend, search, smallest_count
from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.stages import StagePlan, price_stage
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.plan.tables import columns, count, duration, gigabytes, side_by_side, size
from mcore_longctx.plan.terms import Term
from mcore_longctx.recipe import ClusterSection, Stage

_WIDTH = 100

__all__ = ["StagePage", "explain", "interval_terms", "kernel_name", "make_page", "page", "wrapped", "written_candidate"]


@dataclass(frozen=True)
class StagePage:
    """All that is known about one stage: as written, and what else its GPUs could do.

    `written` is None for a plan without a recipe. `smallest` is the smallest GPU count that fits, looked for where nothing does.
    """

    model: str
    stage: Stage
    gpus: int
    written: StagePlan | None
    search: Search
    best: StagePlan | None
    smallest: Search | None
    time_limit: str  # of one job


def make_page(
    model: str,
    stage: Stage,
    shape: ModelShape,
    gpu: Gpu,
    gpus: int,
    *,
    kernel: str = "",
    backend: Backend = "local",
    written: bool = False,
    time_limit: str = ClusterSection().time_limit,
) -> StagePage:
    """Price a stage as it is written (if it is from a recipe), and look for the best layout of `gpus` GPUs.

    Raises:
        LayoutError: GPUs that do not fill nodes, or that no layout divides.
    """
    found = search(stage, shape, gpu, gpus, kernel=kernel, backend=backend)
    best = found.best
    return StagePage(
        model=model,
        stage=stage,
        gpus=gpus,
        written=price_stage(stage, shape, gpu, kernel=kernel, backend=backend) if written else None,
        search=found,
        best=price_stage(best.stage, shape, gpu, kernel=kernel, backend=backend) if best is not None else None,
        smallest=None if best is not None else smallest_count(stage, shape, gpu, kernel=kernel, backend=backend, above=gpus),
        time_limit=time_limit,
    )


def page(it: StagePage, *, top: int) -> list[str]:
    """The lines of a stage."""
    plan = it.written or it.best
    setup = plan.setup if plan is not None else it.search.candidates[0].setup
    lines = [*_head(it, setup), ""]
    if it.written is not None:
        lines += [f"as written: {_layout(it.written.setup)}", *_indent(_priced(it.written)), ""]
    lines += _table(it, top)
    lines += _verdict(it)
    if it.best is not None and (it.written is None or not _same_layout(it.written.setup, it.best.setup)):
        lines += ["", f"in detail: {_layout(it.best.setup)}", *_indent(_priced(it.best))]
    if plan is not None:
        lines += ["", *_times(plan, it)]
    return wrapped(lines)


def wrapped(lines: Sequence[str]) -> list[str]:
    """At most 100 columns; what is to be copied into a shell stays whole."""
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    if len(line) <= _WIDTH or line.lstrip().startswith(("'stages.", "stages.")):
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, _WIDTH, subsequent_indent=indent + "    ", break_long_words=False, break_on_hyphens=False)


def explain(plan: StagePlan) -> list[str]:
    """Every formula with its numbers."""
    lines = [f"{_layout(plan.setup)}, every formula (symbols: docs/plan.md)"]
    groups: tuple[tuple[str, Sequence[Term], Callable[[Term], str]], ...] = (
        (f"memory of a GPU: {size(plan.memory.total)}", plan.memory.terms, lambda term: size(term.value)),
        (f"memory of a node's host: {size(plan.memory.host_total)}", plan.memory.host, lambda term: size(term.value)),
        (f"time of a step: {duration(plan.time.total)}", plan.time.terms, lambda term: duration(term.value)),
        ("what follows", interval_terms(plan.intervals), partial(_interval_value, plan.intervals)),
    )
    for title, terms, write in groups:
        lines += ["", title]
        for term in terms:
            value = write(term)
            lines.append(f"  {term.name:<28} {value:>10}  = {term.formula}")
            if term.numbers:
                lines.append(f"  {'':<28} {'':>10}  = {term.numbers}")
            if term.note:
                lines.append(f"  {'':<28} {'':>10}    {term.note}")
    return lines


def _head(it: StagePage, setup: Setup) -> list[str]:
    stage = it.stage
    tokens = stage.global_batch_size * stage.seq_length
    return [
        f"{it.model}: {count(stage.seq_length)} tokens ({stage.seq_length:,}) on {it.gpus:,} x {setup.gpu.name}"
        f" (kernel {kernel_name(setup)}, {setup.gpu.gpus_per_node} a node)",
        f"stage {stage.name}: {count(tokens)} tokens a step ({stage.global_batch_size:,} x {count(stage.seq_length)}),"
        f" {stage.iterations:,} steps, {tokens * stage.iterations / 1e9:,.2f}B tokens",
    ]


def _layout(setup: Setup) -> str:
    p = setup.parallel
    exchange = f" {exchange_name(setup)}" if p.context_parallel_size > 1 else ""
    return (
        f"TP {p.tensor_model_parallel_size} x CP {p.context_parallel_size}{exchange} x PP {p.pipeline_model_parallel_size}"
        f" x DP {p.data_parallel_size} = {p.world_size:,} GPUs, {policy_name(setup)}"
    )


def _priced(plan: StagePlan) -> list[str]:
    time, needed, gpu = plan.time, plan.memory, plan.setup.gpu
    head = (
        f"step {duration(time.total)}   {time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU   MFU {time.mfu:.1%} (causal)"
        f"   {duration(3600 * plan.hours)} for {plan.iterations:,} steps"
    )
    board = f"{gigabytes(needed.total)} of {gigabytes(gpu.memory_bytes)} GB a GPU"
    verdict = f"{board}: fits (up to {USABLE:.0%} does)" if plan.fits else f"DOES NOT FIT: {plan.problem}"
    host = f"host memory of a node: {size(needed.host_total)} of {gigabytes(gpu.host_memory_bytes)} GB (up to {HOST_USABLE:.0%} fits)"
    return [
        head,
        verdict,
        *side_by_side(_memory_lines(needed), _time_lines(time)),
        host,
        *_traffic(plan.setup, time),
        *(f"note: {n}" for n in plan.notes),
    ]


def _memory_lines(memory: Memory) -> list[str]:
    """In brackets: there, but not at the peak."""
    texts = [(term.name, gigabytes(term.value), at_peak(term)) for term in memory.terms]
    lines = [f"  {name:<28}{text if peak else f'({text})':>{10 if peak else 11}}" for name, text, peak in texts if text != "0"]
    return [f"{'memory of a GPU, GB':<30}{gigabytes(memory.total):>10}", *lines]


def _time_lines(time: StepTime) -> list[str]:
    texts = [(term.name, duration(term.value)) for term in time.terms]
    return [
        f"{'time of a step':<30}{duration(time.total):>10}",
        *(f"  {name:<28}{text:>10}" for name, text in texts if text != "0 ms"),
    ]


def _traffic(setup: Setup, time: StepTime) -> list[str]:
    lines = []
    if setup.parallel.context_parallel_size > 1:
        ring = {"p2p", "a2a+p2p"} >= set(setup.parallel.cp_comm_types)
        hidden = "its ring hides behind the kernels" if time.exchange_hidden else "its ring does not hide behind the kernels"
        received = f"{size(time.exchange_bytes)} received a GPU, layer and sequence (forward)"
        lines.append(f"key/value exchange: {received}; {hidden if ring else 'not overlapped with the kernels'}")
    if setup.offload_fraction:
        hidden = "waits" if any(t.name == "offload" and t.value > 0 for t in time.terms) else "hides behind the layers"
        lines.append(f"offload: {size(time.offload_bytes)} a GPU and micro-batch, out and back; {hidden}")
    return lines


def _table(it: StagePage, top: int) -> list[str]:
    search = it.search
    if not search.fitting:
        return [f"no layout of {it.gpus:,} {'GPU' if it.gpus == 1 else 'GPUs'} fits"]
    heads = ("", "TP", "CP", "PP", "DP", "exchange", "policy", "step", "tok/s/GPU", "MFU", "in all", "GB/GPU", "GB/node")
    rows = [_row(c, it.stage.iterations, c is search.best) for c in search.by_layout[:top]]
    more = len(search.by_layout) - top
    text = columns(heads, rows, left=(0, 5, 6), gap=1)
    return [f"layouts that fit, the best of each{f' (and {more} more: --top)' if more > 0 else ''}", *_indent(text)]


def _row(c: Candidate, iterations: int, is_best: bool) -> list[str]:
    assert c.time is not None
    assert c.memory is not None
    tp, cp, pp, dp = c.layout
    return [
        "*" if is_best else "",
        *(str(size) for size in (tp, cp, pp, dp)),
        exchange_name(c.setup),
        policy_name(c.setup).replace(" on the host", " host"),
        duration(c.time.total),
        f"{c.time.tokens_per_second_per_gpu:,.0f}",
        f"{c.time.mfu:.0%}",
        duration(c.time.total * iterations),
        gigabytes(c.memory.total),
        gigabytes(c.memory.host_total),
    ]


def _verdict(it: StagePage) -> list[str]:
    lines: list[str] = []
    if it.written is not None and not it.written.fits:
        problem = fit_problem(it.written.setup, it.written.memory)
        assert problem is not None
        lines.append(f"as written it does not fit: {problem.what}{_change(problem)}")
        near = nearest_fitting(it.search, it.written.setup)
        if near is not None:
            lines += [f"nearest to the recipe that fits: {describe(near)}: {duration(near.seconds)} a step"]
    if it.best is not None:
        assert it.search.best is not None
        lines += why_best(it.search, written_candidate(it))
        if it.written is not None and not _same_layout(it.written.setup, it.best.setup):
            lines += ["  to use it, append:", *(f"    {text}" for text in overrides(it.search.best))]
        broken = breaks_nearby(it.search)
        lines += ["does not work beside it:", *_indent(broken)] if broken else []
        return lines
    miss = smallest_miss(it.search)
    if miss is not None and miss.problem is not None:
        lines.append(f"nearest: {describe(miss)}: {miss.problem.what}{_change(miss.problem)}")
    if it.smallest is not None and it.smallest.best is not None:
        best = it.smallest.best
        lines.append(f"smallest that fits: {it.smallest.gpus:,} GPUs, {describe(best)}: {duration(best.seconds)} a step")
    elif it.smallest is None:
        lines.append(f"no larger number of these GPUs that was tried fits it (up to {MOST_NODES:,} nodes)")
    refused = refused_sizes(it.search)
    return [*lines, "sizes that do not divide:", *_indent(refused)] if refused else lines


def _change(problem: Problem) -> str:
    words = remedy(problem)
    return f" (change: {words})" if words else ""


def _times(plan: StagePlan, it: StagePage) -> list[str]:
    times = plan.intervals
    try:
        steps = check_time_limit(it.time_limit, plan.time, times)
        slot = f"a job of {it.time_limit} holds {steps:,} steps, the stage takes {math.ceil(plan.iterations / steps):,} such jobs"
    except ConfigError as error:
        slot = f"REFUSED by launch: {error}"
    own = f" (the recipe: {it.stage.save_interval:,})" if it.written is not None else ""
    return [
        f"follows from the {'best layout' if it.written is None else 'layout as written'}:",
        f"  {slot}; {duration(times.start_up.value)} to start, signalled {times.signal_lead.value:,.0f} s before the limit",
        f"  save every {times.save_interval.value:,.0f} steps{own}: a checkpoint has {size(times.checkpoint_bytes.value)},"
        f" {duration(times.save_seconds.value)} to write; process groups wait {times.distributed_timeout.value / 60:.0f} min",
    ]


def interval_terms(it: Intervals) -> tuple[Term, ...]:
    """All of them, in the order of a page."""
    return (it.distributed_timeout, it.signal_lead, it.save_interval, it.save_seconds, it.start_up, it.checkpoint_bytes)


def _interval_value(times: Intervals, term: Term) -> str:
    if term is times.checkpoint_bytes:
        return size(term.value)
    return f"{term.value:,.0f} steps" if term is times.save_interval else duration(term.value)


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def kernel_name(setup: Setup) -> str:
    """The attention kernel that is priced."""
    return setup.kernel or setup.gpu.default_kernel


def _same_layout(one: Setup, other: Setup) -> bool:
    return _layout(one) == _layout(other)


def written_candidate(it: StagePage) -> Candidate | None:
    """The layout as written, to be compared: None where it does not fit, or is for another number of GPUs."""
    plan = it.written
    if plan is None or not plan.fits or plan.setup.parallel.world_size != it.gpus:
        return None
    return Candidate(it.stage, plan.setup, plan.memory, plan.time)
