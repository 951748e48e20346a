"""Every way to run a stage on a number of GPUs: which layouts divide, which of them fit, which is fastest.

A layout is TP x PP x CP x DP with the exchange of its context parallelism. What divides is asked of the code that trains (`Stage`,
`Parallel`, `ModelShape.check_layout`, `check_seq_length`), never decided here. For each layout and exchange the policies are priced from the
fastest to the most sparing: `none`, `none` with a tiled MLP, `attention_kept`, `full`. As long as none has fitted, the last two are also tried
with as many eighths of their layers on the host as it takes. So the list holds what fits and, before it, what was faster but did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

from mcore_longctx.errors import LayoutError, LongctxError
from mcore_longctx.families import ModelShape
from mcore_longctx.layout import check_seq_length
from mcore_longctx.plan.hardware import Gpu
from mcore_longctx.plan.memory import Memory, memory
from mcore_longctx.plan.setup import Setup, stage_setup
from mcore_longctx.plan.step_time import StepTime, step_time
from mcore_longctx.plan.tables import gigabytes
from mcore_longctx.plan.terms import Term
from mcore_longctx.recipe.schema import CpCommType, Parallel, Stage, TokenCount

__all__ = [
    "COMFORTABLE",
    "HOST_USABLE",
    "MOST_NODES",
    "SAME_TIME",
    "USABLE",
    "Candidate",
    "Problem",
    "Search",
    "at_peak",
    "fit_problem",
    "nearest_counts",
    "search",
    "smallest_count",
]

USABLE = 0.92  # of a board: the rest is for what no formula knows
COMFORTABLE = 0.75  # of a board: fits even where the formulas are a fifth too low
HOST_USABLE = 0.9  # of a node's memory: the system, the page cache of checkpoints and data
SAME_TIME = 1.02  # times within 2 % are the same: the formulas are several times less exact
MOST_NODES = 512
_TILE = TokenCount(8192)
_EIGHTHS = 8

Backend = Literal["local", "te"]
Recompute = Literal["none", "full", "attention_kept"]


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
        """The fastest, unless one within 2 % of it needs no host memory, or leaves a quarter of the board free."""
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
    """Of what is as fast as the first, the most careful."""

    def cares(candidate: Candidate) -> tuple[bool, bool, float]:
        assert candidate.memory is not None
        tight = candidate.memory.total > COMFORTABLE * candidate.setup.gpu.memory_bytes
        return candidate.setup.offload_fraction > 0, tight, candidate.seconds

    close = [c for c in fitting if c.seconds <= SAME_TIME * fitting[0].seconds]
    return min(close, key=cares, default=None)


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


def search(stage: Stage, shape: ModelShape, gpu: Gpu, gpus: int, *, kernel: str = "", backend: Backend = "local") -> Search:
    """All layouts of `gpus` GPUs for a stage; its own `parallel` and `activations` do not matter, but for the size of its MLP tiles.

    Groups of an `a2a+p2p` that leave a node are not tried: a ring is as good there.

    Raises:
        LayoutError: GPUs that do not fill nodes, or that no layout divides; the nearest counts that work are named.
    """
    per_node = gpu.gpus_per_node
    if gpus < 1 or (gpus > per_node and gpus % per_node):
        raise LayoutError(f"{gpus:,} GPUs do not fill nodes of {per_node}", fix=_counts_that_work(stage, shape, gpu, gpus))
    layouts = list(_layouts(stage, shape, gpu, gpus))
    if not layouts:
        first = {name.split()[0]: f"{name}: {why}" for name, why in reversed(list(_refused(stage, shape, gpu, gpus)))}
        why = "; ".join(first[kind] for kind in ("TP", "PP", "CP", "DP") if kind in first)
        raise LayoutError(f"no layout divides {gpus:,} GPUs ({why})", fix=_counts_that_work(stage, shape, gpu, gpus))
    candidates = [candidate for layout in layouts for candidate in _exchanges(layout, shape, gpu, kernel=kernel, backend=backend)]
    return Search(gpus, tuple(candidates), tuple(_refused(stage, shape, gpu, gpus)))


def nearest_counts(stage: Stage, shape: ModelShape, gpu: Gpu, gpus: int) -> tuple[int | None, int | None]:
    """The nearest numbers of GPUs below and above `gpus` that a layout divides. None: there is none down to 1, or up to 512 nodes."""

    def works(count: int) -> bool:
        fills = count <= gpu.gpus_per_node or count % gpu.gpus_per_node == 0
        return fills and next(_layouts(stage, shape, gpu, count), None) is not None

    below = next((n for n in range(gpus - 1, 0, -1) if works(n)), None)
    above = next((n for n in range(max(gpus + 1, 1), MOST_NODES * gpu.gpus_per_node + 1) if works(n)), None)
    return below, above


def smallest_count(
    stage: Stage, shape: ModelShape, gpu: Gpu, *, kernel: str = "", backend: Backend = "local", above: int = 0
) -> Search | None:
    """The smallest number of GPUs above `above` on which the stage fits: 1, 2, 4, ... of a node, then 1, 2, 4, ... 512 nodes."""
    doubled = [1 << i for i in range(MOST_NODES.bit_length())]
    counts = [n for n in doubled if n < gpu.gpus_per_node] + [n * gpu.gpus_per_node for n in doubled]
    for count in counts:
        if count > above and next(_layouts(stage, shape, gpu, count), None) is not None:
            found = search(stage, shape, gpu, count, kernel=kernel, backend=backend)
            if found.fitting:
                return found
    return None


def _counts_that_work(stage: Stage, shape: ModelShape, gpu: Gpu, gpus: int) -> str:
    counts = [f"{n:,}" for n in nearest_counts(stage, shape, gpu, gpus) if n is not None]
    return f"nearest that work: {' and '.join(counts)}" if counts else "no number of GPUs works with this length and batch"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _size_checks(stage: Stage, shape: ModelShape, gpu: Gpu) -> dict[str, Callable[[int], object]]:
    """What each size must satisfy by itself; each raises."""

    def tensor(size: int) -> None:
        shape.check_layout(size, 1)
        if gpu.gpus_per_node % size:
            raise LayoutError(f"tensor parallelism leaves the node of {gpu.gpus_per_node} GPUs")

    return {
        "TP": tensor,
        "PP": lambda size: shape.check_layout(1, size),
        "CP": lambda size: check_seq_length(stage.seq_length, size),
        "DP": lambda size: replace(stage, parallel=Parallel(data_parallel_size=size)),
    }


def _reason(check: Callable[[int], object], size: int) -> str | None:
    try:
        check(size)
    except LongctxError as error:
        return error.what + (f", {error.fix}" if error.fix else "")
    except ValueError as error:
        return str(error)
    return None


def _refused(stage: Stage, shape: ModelShape, gpu: Gpu, gpus: int) -> Iterator[tuple[str, str]]:
    for name, check in _size_checks(stage, shape, gpu).items():
        for size in _divisors(gpus):
            reason = _reason(check, size)
            if reason is not None:
                yield f"{name} {size}", reason


def _layouts(stage: Stage, shape: ModelShape, gpu: Gpu, gpus: int) -> Iterator[Stage]:
    """The stage with each layout that divides, exchange p2p."""
    sizes = _divisors(gpus)
    legal = {
        name: {size for size in sizes if _reason(check, size) is None} for name, check in _size_checks(stage, shape, gpu).items()
    }
    for tp in sorted(legal["TP"]):
        for pp in sorted(legal["PP"]):
            for cp in sorted(legal["CP"]):
                dp, rest = divmod(gpus, tp * pp * cp)
                if rest or dp not in legal["DP"]:
                    continue
                try:
                    yield replace(
                        stage,
                        parallel=Parallel(
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            context_parallel_size=cp,
                            data_parallel_size=dp,
                            sequence_parallel=tp > 1,
                        ),
                    )
                except (ValueError, LongctxError):  # the tokens of a rank do not divide by TP
                    continue


def _exchanges(stage: Stage, shape: ModelShape, gpu: Gpu, *, kernel: str, backend: Backend) -> Iterator[Candidate]:
    """One layout with each exchange and policy."""
    parallel = stage.parallel
    for kind, sizes in _exchange_kinds(parallel, gpu.gpus_per_node):
        with_exchange = replace(stage, parallel=replace(parallel, cp_comm_type=kind, hierarchical_context_parallel_sizes=sizes))
        try:
            with_exchange.parallel.check_attention(shape.num_layers, shape.num_attention_heads, shape.num_query_groups)
        except LayoutError as error:
            setup = stage_setup(with_exchange, shape, gpu, kernel=kernel, backend=backend)
            yield Candidate(with_exchange, setup, problem=Problem("sizes", error.what))
            continue
        yield from _policies(with_exchange, shape, gpu, kernel=kernel, backend=backend)


def _exchange_kinds(parallel: Parallel, per_node: int) -> Iterator[tuple[CpCommType, tuple[int, int] | None]]:
    cp = parallel.context_parallel_size
    yield "p2p", None
    if cp == 1:
        return
    yield "all_gather", None
    yield "a2a", None
    for inner in _divisors(cp):
        if 1 < inner < cp and parallel.tensor_model_parallel_size * inner <= per_node:
            yield "a2a+p2p", (inner, cp // inner)


def _policies(stage: Stage, shape: ModelShape, gpu: Gpu, *, kernel: str, backend: Backend) -> Iterator[Candidate]:
    """Fastest first; with host memory only where a faster policy does not fit without."""
    tile = stage.activations.mlp_tile or _TILE
    policies: list[tuple[Recompute, TokenCount | None]] = [
        ("none", None),
        ("none", tile),
        ("attention_kept", tile),
        ("full", tile),
    ]
    if backend == "te":
        policies.pop(1)  # nothing tiles the MLP there

    def price(recompute: Recompute, mlp_tile: TokenCount | None, eighths: int) -> Candidate:
        activations = replace(stage.activations, recompute=recompute, mlp_tile=mlp_tile, offload_fraction=eighths / _EIGHTHS)
        tried = replace(stage, activations=activations)
        setup = stage_setup(tried, shape, gpu, kernel=kernel, backend=backend)
        needed = memory(setup)
        problem = fit_problem(setup, needed)
        return Candidate(tried, setup, needed, step_time(setup) if problem is None else None, problem)

    fitted = False
    for recompute, mlp_tile in policies:
        candidate = price(recompute, mlp_tile, 0)
        yield candidate
        fitted = fitted or candidate.problem is None
        if not fitted and recompute != "none":
            yield _least_offloaded(partial(price, recompute, mlp_tile))


def _least_offloaded(price: Callable[[int], Candidate]) -> Candidate:
    """The smallest number of eighths on the host with which it fits on the GPU; all of them where it never does."""
    low, high = 1, _EIGHTHS
    found = price(high)
    if found.problem is None or found.problem.kind == "host":
        while low < high:
            middle = (low + high) // 2
            tried = price(middle)
            if tried.problem is None or tried.problem.kind == "host":
                high, found = middle, tried
            else:
                low = middle + 1
    return found
