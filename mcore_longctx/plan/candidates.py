"""One way to run a stage, priced: whether it fits, and which of several is the one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.plan.tables import gigabytes
from mcore_longctx.plan.terms import Term
from mcore_longctx.recipe import Stage

__all__ = [
    "COMFORTABLE",
    "HOST_USABLE",
    "NO_DIFFERENCE",
    "SAME_TIME",
    "USABLE",
    "Candidate",
    "Problem",
    "Search",
    "at_peak",
    "drawbacks",
    "fit_problem",
    "is_tight",
]

USABLE = 0.92  # of a board: the rest is for what no formula knows
COMFORTABLE = 0.75  # of a board: fits even where the formulas are a fifth too low
HOST_USABLE = 0.9  # of a node's memory: the system, the page cache of checkpoints and data
SAME_TIME = 1.05  # what a simpler or safer layout may cost: the formulas are less exact than that
NO_DIFFERENCE = 1.01


@dataclass(frozen=True)
class Problem:
    """Why a layout cannot run: sizes that do not divide, or `excess` bytes too many on the GPU or on the host of a node."""

    kind: Literal["sizes", "memory", "host"]
    what: str
    excess: float = 0.0
    largest: str = ""  # name of the largest term


@dataclass(frozen=True)
class Candidate:
    """One layout, exchange and policy: priced, or with the reason why it is impossible.

    `memory` is None where sizes do not divide, `time` where it does not fit.
    """

    stage: Stage  # the stage with this layout and these activations
    setup: Setup
    memory: Memory | None = None
    time: StepTime | None = None
    problem: Problem | None = None

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """TP, CP, PP, DP."""
        p = self.setup.parallel
        return (
            p.tensor_model_parallel_size,
            p.context_parallel_size,
            p.pipeline_model_parallel_size,
            p.data_parallel_size,
        )

    @property
    def seconds(self) -> float:
        """Of a step; infinite for what does not run."""
        return self.time.total if self.time is not None else float("inf")


@dataclass(frozen=True)
class Search:
    """What was tried for a number of GPUs. `refused` are sizes that no layout can have: `("TP 16", reason)`."""

    gpus: int
    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]

    @cached_property
    def fitting(self) -> tuple[Candidate, ...]:
        """All that fit, fastest first."""
        return tuple(sorted((c for c in self.candidates if c.problem is None), key=lambda c: c.seconds))

    @cached_property
    def best(self) -> Candidate | None:
        """The fastest, unless one within 5 % of it is safer or simpler.

        That is, in this order: no host memory; a quarter of the board free; no pipeline; no exchange in two levels. Of what then differs
        by less than 1 %, the one with most data parallelism, then with least memory.
        """
        return _choice(self.fitting)

    @cached_property
    def by_layout(self) -> tuple[Candidate, ...]:
        """The best of each TP x CP x PP x DP, in order of time, the best of all first."""
        layouts: dict[tuple[int, int, int, int], list[Candidate]] = {}
        for candidate in self.fitting:
            layouts.setdefault(candidate.layout, []).append(candidate)
        best = [choice for same in layouts.values() if (choice := _choice(same)) is not None]
        return tuple(sorted(best, key=lambda c: (c is not self.best, c.seconds)))


def _choice(fitting: Sequence[Candidate]) -> Candidate | None:
    close = [c for c in fitting if c.seconds <= SAME_TIME * fitting[0].seconds]
    if not close:
        return None
    least = min(drawbacks(c) for c in close)
    alike = [c for c in close if drawbacks(c) == least]
    return min((c for c in alike if c.seconds <= NO_DIFFERENCE * alike[0].seconds), key=_plainness)


def _plainness(candidate: Candidate) -> tuple[int, float]:
    """Data parallelism asks least of a network and of a kernel; then memory to spare."""
    assert candidate.memory is not None
    return -candidate.setup.parallel.data_parallel_size, candidate.memory.total


def drawbacks(candidate: Candidate) -> tuple[bool, bool, bool, bool]:
    """Whether it needs host memory, fills more than three quarters of the board, has a pipeline, or an exchange in two levels."""
    parallel = candidate.setup.parallel
    return (
        candidate.setup.offload_fraction > 0,
        is_tight(candidate),
        parallel.pipeline_model_parallel_size > 1,
        parallel.hierarchical_context_parallel_sizes is not None,
    )


def is_tight(candidate: Candidate) -> bool:
    """Whether it fills more than three quarters of the board."""
    assert candidate.memory is not None
    return candidate.memory.total > COMFORTABLE * candidate.setup.gpu.memory_bytes


def fit_problem(setup: Setup, needed: Memory) -> Problem | None:
    """Why a setup does not fit on its GPU or in the memory of its node, with the largest term; None if it does."""
    gpu = setup.gpu
    return _too_much("memory", "a GPU", needed.total, needed.terms, gpu.memory_bytes, USABLE) or _too_much(
        "host", "of host memory a node", needed.host_total, needed.host, gpu.host_memory_bytes, HOST_USABLE
    )


def _too_much(
    kind: Literal["memory", "host"], place: str, total: float, terms: tuple[Term, ...], there: float, share: float
) -> Problem | None:
    excess = total - share * there
    if excess <= 0:
        return None
    largest = max((term for term in terms if at_peak(term)), key=lambda term: term.value)
    return Problem(
        kind,
        f"{gigabytes(total)} GB {place}, {gigabytes(excess)} GB over {gigabytes(share * there)} ({share:.0%} of {gigabytes(there)} GB);"
        f" largest: {largest.name} {gigabytes(largest.value)} GB",
        excess,
        largest.name,
    )


def at_peak(term: Term) -> bool:
    """Whether a term of `Memory.terms` is part of its total: the loss head and the layer that is run again are not there together."""
    return "not at the peak" not in term.note
