"""The chain of jobs of a recipe: written into the run folder, submitted one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.families import ModelShape
from mcore_longctx.launch.slurm import Job, Times, render_steps, render_submit, render_training, shape_of_job
from mcore_longctx.plan.evaluation import check_evaluation, evaluation_price
from mcore_longctx.plan.intervals import check_time_limit, parse_time_limit
from mcore_longctx.plan.stages import StagePlan, cluster_gpu, plan_stage
from mcore_longctx.plan.tables import duration
from mcore_longctx.recipe import Recipe, Stage
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import resolve

__all__ = ["Chain", "build_chain"]

UNPLANNED_LEAD_SECONDS = 60  # SLURM may be this early; there is no planned step to add
UNPLANNED_TIMEOUT_MINUTES = 30.0


@dataclass(frozen=True)
class Chain:
    """The recipe with what was derived, and the text of every file by name, in the order of the jobs."""

    recipe: Recipe
    jobs: tuple[Job, ...]
    scripts: dict[str, str]  # 00-prepare.sbatch, ..., submit.sh
    summary: tuple[str, ...]  # a line a job


def build_chain(file: RecipeFile, *, only: str | None = None) -> Chain:
    """Plan the jobs of a recipe and render their scripts. Writes nothing.

    Args:
        file: the recipe.
        only: a stage whose training job is all that is wanted.

    Raises:
        ConfigError: what cannot run as it stands: a stage that does not fit, a layout that fills no nodes, a time limit that is too
            short for two steps or for what an evaluation job measures, more to measure than `evaluate.max_budget_share` allows, an
            unknown GPU, a secret in the recipe.
    """
    resolved = resolve(file, need_model=False)
    check_evaluation(file, resolved.shape)
    recipe = file.recipe
    plans = {
        stage.name: plan_stage(stage, resolved.shape, recipe.cluster, backend=recipe.model.backend) for stage in recipe.stages
    }
    for stage in recipe.stages:
        plan = plans[stage.name]
        if plan is not None and not plan.fits:
            raise LayoutError(
                f"does not fit on {recipe.cluster.gpu}: {plan.problem}",
                where=file.where(f"stages.{stage.name}"),
                fix="`mcore-longctx plan` lists layouts that fit",
            )
    where = file.where("cluster.time_limit")
    _seconds_of(recipe.cluster.time_limit, where)
    stages = tuple(_with_timeout(stage, plans[stage.name]) for stage in recipe.stages)
    recipe = replace(recipe, output=recipe.run_folder, stages=stages)
    jobs = tuple(job for job in _jobs(recipe, file) if only in (None, job.stage))
    if not jobs:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"no stage {only!r}", where=file.file, fix=f"stages: {names}")
    staged = {stage.name: stage for stage in stages}
    times = {
        job.stage: _times(staged[job.stage], plans[job.stage], recipe.cluster.time_limit, where) for job in jobs if job.stage
    }
    start_up = max((plan.intervals.start_up.value for plan in plans.values() if plan is not None), default=0.0)
    scripts: dict[str, str] = {}
    for job in jobs:
        if job.stage is not None:
            text = render_training(recipe, job, staged[job.stage], times[job.stage])
        else:
            text = render_steps(recipe, job, _measured(job, recipe, resolved.shape, start_up, file) if job.evaluates else "")
        scripts[f"{job.name}.sbatch"] = text
    if only is None:
        scripts["submit.sh"] = render_submit(recipe, list(jobs))
    return Chain(recipe, jobs, scripts, tuple(_describe(job, plans.get(job.stage or "")) for job in jobs))


def _measured(job: Job, recipe: Recipe, shape: ModelShape, start_up: float, file: RecipeFile) -> str:
    """How long the models of an evaluation job take, held against the time limit: such a job is not signalled and not continued.

    `start_up`: seconds of processes, imports and a checkpoint that is read, for each model once.
    """
    gpu = cluster_gpu(recipe.cluster)
    price = None if gpu is None else evaluation_price(recipe.evaluate, shape, gpu)
    if price is None:
        return "not held against a plan (no formula for CPUs)"
    models = len(job.steps)
    needed, limit = models * (price.seconds + start_up), _seconds_of(recipe.cluster.time_limit, file.where("cluster.time_limit"))
    what = "one model" if models == 1 else f"{models} models"
    if needed > limit:
        row = max(price.rows, key=lambda row: row.seconds)
        raise ConfigError(
            f"{job.name} measures {what}: {duration(needed)} [planned], cluster.time_limit gives {duration(limit)};"
            f" most of it: {row.task}, {row.sequences:,} x {row.length:,} tokens, {duration(row.seconds)}",
            where=file.where("evaluate"),
            fix="fewer samples or windows (evaluate.level=quick), more ranks in evaluate.parallel, or a longer time limit",
        )
    return f"{what} in {needed / 3600:.1f} h [planned]"


def _describe(job: Job, plan: StagePlan | None) -> str:
    nodes = f"{job.name:<22} {job.nodes:>4} {'node' if job.nodes == 1 else 'nodes'}  {', '.join(job.steps)}"
    return nodes if plan is None else f"{nodes}: {plan.hours:,.1f} h [planned]"


def _with_timeout(stage: Stage, plan: StagePlan | None) -> Stage:
    if stage.distributed_timeout_minutes is not None:
        return stage
    minutes = UNPLANNED_TIMEOUT_MINUTES if plan is None else plan.intervals.distributed_timeout.value / 60
    return replace(stage, distributed_timeout_minutes=minutes)


def _seconds_of(time_limit: str, where: str) -> int:
    try:
        return parse_time_limit(time_limit)
    except ValueError as error:
        raise ConfigError(f"time_limit {error}", where=where) from None


def _times(stage: Stage, plan: StagePlan | None, time_limit: str, where: str) -> Times:
    timeout = f"{stage.distributed_timeout_minutes:g} minutes"
    if plan is None:
        limit = _seconds_of(time_limit, where)
        if limit <= 2 * UNPLANNED_LEAD_SECONDS:
            raise ConfigError(
                f"{limit} s leave no time before the signal that asks the ranks to stop", where=where, fix="raise it"
            )
        return Times(
            lead=UNPLANNED_LEAD_SECONDS,
            lead_note="not planned (no formula for CPUs): more than a micro-batch and a save",
            timeout_note=f"A rank waits up to {timeout} for the others: not planned (no formula for CPUs).",
            limit_note="not held against a plan (no formula for CPUs)",
        )
    lead, waits = plan.intervals.signal_lead, plan.intervals.distributed_timeout
    steps = check_time_limit(time_limit, plan.time, plan.intervals, where=f"{where} (stage {stage.name})")
    return Times(
        lead=round(lead.value),
        lead_note=lead.formula,
        timeout_note=f"A rank waits up to {timeout} for the others [planned: {waits.formula} = {waits.value / 60:,.0f} min].",
        limit_note=f"{steps:,} steps of {plan.time.total:,.0f} s fit [planned]",
    )


def _jobs(recipe: Recipe, file: RecipeFile) -> Iterator[Job]:
    data = tuple(f"data-{stage.name}" for stage in recipe.stages)
    yield Job(name="00-prepare", steps=("import", *data), needs_gpus=False)
    evaluate, nproc = recipe.evaluate, recipe.cluster.nproc_per_node
    has_tasks = evaluate.measures
    nodes, ranks = shape_of_job(evaluate.parallel, nproc, where=file.where("evaluate.parallel")) if has_tasks else (1, 1)
    if has_tasks:
        yield Job(name="10-evaluate-before", steps=("evaluate-before", "evaluate-scaled"), nodes=nodes, ranks_per_node=ranks)
    if len(recipe.stages) > 7:
        raise ConfigError(
            f"{len(recipe.stages)} stages; the jobs of a chain are numbered for up to 7", where=file.where("stages")
        )
    for number, stage in enumerate(recipe.stages, 2):
        stage_nodes, stage_ranks = shape_of_job(stage.parallel, nproc, where=file.where(f"stages.{stage.name}.parallel"))
        yield Job(
            name=f"{number}0-{stage.name}",
            steps=(f"train-{stage.name}",),
            stage=stage.name,
            nodes=stage_nodes,
            ranks_per_node=stage_ranks,
        )
        if stage.merge is not None:
            yield Job(name=f"{number}1-merge-{stage.name}", steps=(f"merge-{stage.name}",), needs_gpus=False)
        if has_tasks:
            yield Job(
                name=f"{number}{1 if stage.merge is None else 2}-evaluate-{stage.name}",
                steps=(f"evaluate-{stage.name}",),
                nodes=nodes,
                ranks_per_node=ranks,
            )
    yield Job(name="90-finish", steps=("export", "verify", "report"))
