"""Every way to run a stage on a number of GPUs: which layouts divide, which of them fit, which is fastest.

A layout is TP x PP x CP x DP with the exchange of its context parallelism. What divides is asked of the code that trains (`Stage`,
`Parallel`, `ModelShape.check_layout`, `check_seq_length`), never decided here. For each layout and exchange the policies are priced from
the fastest to the most sparing: `none`, `none` with a tiled MLP, `attention_kept`, `full`. As long as none has fitted, the last two are
also tried with as many eighths of their layers on the host as it takes; where `none` fits with room to spare nothing else is. So the list
holds what fits and, before it, what was faster but did not. Of a layout on which not even `full` with everything on the host fits, the
list has just that and `attention_kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from mcore_longctx.errors import LayoutError, LongctxError
from mcore_longctx.families import ModelShape
from mcore_longctx.layout import check_seq_length
from mcore_longctx.plan.candidates import Candidate, Problem, Search, fit_problem, is_tight
from mcore_longctx.plan.hardware import Gpu
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.setup import stage_setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.recipe.schema import CpCommType, Parallel, Stage, TokenCount

__all__ = ["MOST_NODES", "Backend", "nearest_counts", "search", "smallest_count"]

MOST_NODES = 512
_TILE = TokenCount(8192)
_EIGHTHS = 8
Backend = Literal["local", "te"]
Recompute = Literal["none", "full", "attention_kept"]


def search(stage: Stage, shape: ModelShape, gpu: Gpu, gpus: int, *, kernel: str = "", backend: Backend = "local") -> Search:
    """All layouts of `gpus` GPUs for a stage; its own `parallel` and `activations` do not matter, but for the size of its MLP tiles.

    Groups of an `a2a+p2p` that leave a node are not tried: a ring is as good there.

    Raises:
        LayoutError: GPUs that do not fill nodes, or that no layout divides; the nearest counts that work are named. More than 512 nodes.
    """
    per_node = gpu.gpus_per_node
    if gpus > MOST_NODES * per_node:
        raise LayoutError(
            f"{gpus:,} GPUs are more than {MOST_NODES} nodes of {per_node}", fix=f"plan for {MOST_NODES * per_node:,} or fewer"
        )
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
            with_exchange.parallel.check_attention(
                shape.num_layers, shape.num_attention_heads, shape.num_query_groups, backend=backend
            )
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

    *_, last = policies
    sparest = price(*last, _EIGHTHS)
    if sparest.problem is not None and sparest.problem.kind == "memory":  # then nothing fits: no need to price the rest
        yield from (price(*policies[-2], 0), sparest)
        return
    fitted = False
    for recompute, mlp_tile in policies:
        candidate = price(recompute, mlp_tile, 0)
        yield candidate
        fitted = fitted or candidate.problem is None
        if recompute == "none" and fitted and not is_tight(candidate):
            return  # nothing is faster, and there is nothing to spare
        if not fitted and recompute != "none":
            offloaded = _least_offloaded(partial(price, recompute, mlp_tile))
            yield offloaded
            fitted = offloaded.problem is None


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
