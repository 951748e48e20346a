"""The plan of a recipe: each stage as it stands in the recipe, priced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mcore_longctx.families import ModelShape
from mcore_longctx.plan.candidates import fit_problem
from mcore_longctx.plan.hardware import Gpu, find_gpu
from mcore_longctx.plan.intervals import Intervals, intervals
from mcore_longctx.plan.layouts import Backend
from mcore_longctx.plan.memory import Memory, memory
from mcore_longctx.plan.setup import Setup, stage_setup
from mcore_longctx.plan.step_time import StepTime, step_time
from mcore_longctx.plan.tables import duration, gigabytes
from mcore_longctx.recipe import ClusterSection, Stage

__all__ = ["StagePlan", "cluster_gpu", "one_line", "plan_stage", "price_stage"]


@dataclass(frozen=True)
class StagePlan:
    """One stage with its layout as written."""

    name: str
    setup: Setup
    memory: Memory
    time: StepTime
    intervals: Intervals
    hours: float  # of all iterations
    fits: bool
    problem: str  # why not: the largest term, its bytes, what the board has
    iterations: int = 0
    notes: tuple[str, ...] = ()  # where the formulas know less than the recipe says


def plan_stage(
    stage: Stage, shape: ModelShape, cluster: ClusterSection, *, kernel: str = "", backend: Backend = "local"
) -> StagePlan | None:
    """Price one stage of a recipe. None for a cluster without GPUs (`cluster.gpu: none`): there is no formula for CPUs.

    Raises:
        ConfigError: an unknown GPU, a bad hardware file.
    """
    gpu = cluster_gpu(cluster)
    return None if gpu is None else price_stage(stage, shape, gpu, kernel=kernel, backend=backend)


def price_stage(stage: Stage, shape: ModelShape, gpu: Gpu, *, kernel: str = "", backend: Backend = "local") -> StagePlan:
    """The same for a GPU that is at hand, and a kernel of it by name."""
    setup = stage_setup(stage, shape, gpu, kernel=kernel, backend=backend)
    needed, time = memory(setup), step_time(setup)
    problem = fit_problem(setup, needed)
    return StagePlan(
        name=stage.name,
        setup=setup,
        memory=needed,
        time=time,
        intervals=intervals(setup, time, needed, asynchronous=stage.async_save),
        hours=stage.iterations * time.total / 3600,
        fits=problem is None,
        problem=problem.what if problem is not None else "",
        iterations=stage.iterations,
        notes=tuple(_notes(stage, gpu)),
    )


def cluster_gpu(cluster: ClusterSection) -> Gpu | None:
    """The GPU of a cluster, in nodes as the recipe has them (`nproc_per_node`); None without GPUs.

    Raises:
        ConfigError: an unknown GPU, a bad hardware file.
    """
    if cluster.gpu == "none":
        return None
    return replace(find_gpu(cluster.gpu, cluster.hardware), gpus_per_node=cluster.nproc_per_node)


def one_line(plan: StagePlan) -> str:
    """For a dry run: `plan: 260 s a step, 10.8 h for 150 steps, 37.9 of 80 GB a GPU, 0.9 of 2,000 GB a node, fits`."""
    gpu = plan.setup.gpu
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {plan.problem}"
    return (
        f"plan: {duration(plan.time.total)} a step, {duration(3600 * plan.hours)} for {plan.iterations:,} steps,"
        f" {gigabytes(plan.memory.total)} of {gigabytes(gpu.memory_bytes)} GB a GPU,"
        f" {gigabytes(plan.memory.host_total)} of {gigabytes(gpu.host_memory_bytes)} GB a node, {verdict}"
    )


def _notes(stage: Stage, gpu: Gpu) -> Iterator[str]:
    tp = stage.parallel.tensor_model_parallel_size
    if tp > 1 and not stage.parallel.sequence_parallel:
        yield "sequence_parallel is off: the plan prices it as on, real memory is larger"
    if tp > gpu.gpus_per_node:
        yield f"TP {tp} leaves the node of {gpu.gpus_per_node} GPUs: the plan prices it at NVLink speed, a real step is far slower"
    if stage.precision == "fp32":
        yield "precision fp32: the plan prices products and attention at bf16 speed, a real step is several times slower"
    if stage.cross_document_mask:
        yield "cross_document_mask: attention is priced as if each sample were one document, which is its upper bound"
