"""What a recipe asks for: layouts that divide, inputs that are there, the plan of each stage, timeouts, the time limit, no dense mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.launch.chain import UNPLANNED_LEAD_SECONDS, build_chain
from mcore_longctx.launch.doctor.findings import Finding, note, ok, wrong
from mcore_longctx.manifest import readable_bytes
from mcore_longctx.plan.intervals import check_time_limit, parse_time_limit
from mcore_longctx.plan.stages import StagePlan, one_line, plan_stage
from mcore_longctx.recipe import Parallel, Recipe, Stage
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import Resolved, resolve
from mcore_longctx.recipe.schema import EvaluateSection

__all__ = [
    "dense_mask",
    "gpus_here",
    "inputs",
    "largest_nodes",
    "launch",
    "plans",
    "resolved_part_by_part",
    "time_limit",
    "timeouts",
]


def largest_nodes(recipe: Recipe) -> int:
    """Nodes of the largest job."""
    return max(_nodes(parallel, recipe) for _, parallel in _layouts(recipe))


def _nodes(parallel: Parallel, recipe: Recipe) -> int:
    return -(-parallel.world_size // recipe.cluster.nproc_per_node)


def _layouts(recipe: Recipe) -> Iterator[tuple[str, Parallel]]:
    for stage in recipe.stages:
        yield f"stages.{stage.name}", stage.parallel
    if recipe.evaluate.measures:
        yield "evaluate", recipe.evaluate.parallel


# ------------------------------------------------------------------------------------------------------------------------ layouts


def resolved_part_by_part(file: RecipeFile) -> tuple[Resolved | None, list[Finding]]:
    """Model and rope of a recipe, and one finding for each layout: every stage that does not fit the model is named, not the first.

    None where the model or the rope itself cannot be used.
    """
    recipe, findings, resolved = file.recipe, [], None
    parts = {f"stages.{stage.name}": replace(recipe, stages=(stage,), evaluate=EvaluateSection()) for stage in recipe.stages}
    layouts = dict(_layouts(recipe))
    if "evaluate" in layouts:
        parts["evaluate"] = replace(recipe, stages=(_alone(recipe.stages[0]),))
    said = set()
    for name, part in parts.items():
        try:
            resolved = resolve(replace(file, recipe=part), need_model=False)
        except LongctxError as error:
            what = error.what if error.where is None else f"{error.where}: {error.what}"
            if what not in said:
                findings.append(wrong("recipe", what, error.fix or "correct it in the recipe"))
            said.add(what)
            continue
        findings.append(_layout(name, layouts[name], recipe))
    return resolved, findings


def _alone(stage: Stage) -> Stage:
    """A stage that every model can run: evaluation is looked at without the stages."""
    return replace(stage, parallel=Parallel())


def _layout(name: str, parallel: Parallel, recipe: Recipe) -> Finding:
    nodes, per_node = _nodes(parallel, recipe), recipe.cluster.nproc_per_node
    text = f"{name}: {parallel.describe()}, on {nodes:,} node{'s' if nodes > 1 else ''}"
    if nodes > 1 and parallel.world_size % per_node:
        return wrong("layout", f"{text}: not whole nodes of {per_node}", "change the layout, or cluster.nproc_per_node")
    return ok("layout", text)


# ------------------------------------------------------------------------------------------------------------------------- inputs


def inputs(recipe: Recipe, *, model_found: bool) -> Iterator[Finding]:
    """Files and folders that the run starts from."""
    path = recipe.model.path
    if model_found:
        yield ok("model", str(path))
    elif path.exists():
        yield wrong("model", f"{path} has no config.json", f"hf download again with --local-dir {path}, or correct model.path")
    else:
        text = f"no such folder: {path} (sizes are those of the recipe)"
        yield wrong("model", text, f"hf download NAME --local-dir {path}, or correct model.path")
    wanted: dict[Path, str] = {}
    if model_found or recipe.tokenizer is not None:
        wanted[recipe.tokenizer_folder / "tokenizer.json"] = "tokenizer"
    for name in dict.fromkeys(stage.data for stage in recipe.stages):
        for source in recipe.data[name].sources:
            wanted[source.path] = f"data.{name}.sources.{source.name}"
        sentences = recipe.data[name].sentences
        if sentences is not None and sentences.offsets is not None:
            wanted[sentences.offsets] = f"data.{name}.sentences.offsets"
    for key, path in recipe.evaluate.at_level().texts.items():
        wanted.setdefault(path, f"evaluate.{key}")
    for path, key in wanted.items():
        if path.exists():
            continue
        yield wrong("inputs", f"{key}: no such file or folder: {path}", "correct the path in the recipe, or put it there")


# -------------------------------------------------------------------------------------------------------------------------- plans


def plans(recipe: Recipe, resolved: Resolved) -> tuple[dict[str, StagePlan], list[Finding]]:
    """The plan of each stage, by name, and what it says. Empty for a cluster without GPUs: there is no formula for CPUs."""
    found: dict[str, StagePlan] = {}
    findings: list[Finding] = []
    for stage in recipe.stages:
        try:
            plan = plan_stage(stage, resolved.shape, recipe.cluster, backend=recipe.model.backend)
        except LongctxError as error:
            return {}, [wrong("plan", str(error), error.fix or "correct cluster.gpu or cluster.hardware")]
        if plan is None:
            continue
        found[stage.name] = plan
        text = f"{stage.name} on {plan.setup.gpu.name}: {one_line(plan).removeprefix('plan: ')} (planned)"
        if plan.fits:
            findings.append(ok("plan", text))
        else:
            findings.append(wrong("plan", text, "`mcore-longctx plan` names the nearest layout that fits"))
        findings += [note("plan", f"{stage.name}: {said}") for said in plan.notes]
    return found, findings


def timeouts(stages: Sequence[Stage], planned: Mapping[str, StagePlan]) -> Iterator[Finding]:
    """How long a rank waits for another, against the planned step."""
    for stage in stages:
        plan, given = planned.get(stage.name), stage.distributed_timeout_minutes
        if plan is None:
            if given is not None:
                yield ok("timeout", f"{stage.name}: ranks wait {given:g} min for each other")
            continue
        derived, step = plan.intervals.distributed_timeout.value / 60, plan.time.total / 60
        if given is None:
            yield ok(
                "timeout",
                f"{stage.name}: ranks wait {derived:.0f} min for each other ({plan.intervals.distributed_timeout.numbers})",
            )
        elif given < step:
            yield wrong(
                "timeout",
                f"{stage.name}: distributed_timeout_minutes is {given:g}, one step is planned to take {step:.1f}",
                f"leave it out ({derived:.0f} min are derived), or raise it",
            )
        elif given < derived:
            yield note("timeout", f"{stage.name}: distributed_timeout_minutes is {given:g}, the plan would say {derived:.0f}")
        else:
            yield ok("timeout", f"{stage.name}: ranks wait {given:g} min for each other, the plan would say {derived:.0f}")


def time_limit(recipe: Recipe, planned: Mapping[str, StagePlan]) -> Iterator[Finding]:
    """Whether a job of cluster.time_limit is long enough to go forward, as `launch` asks. A stage that does not fit has no times."""
    limit = recipe.cluster.time_limit
    try:
        seconds = parse_time_limit(limit)
    except ValueError as error:
        yield wrong("time limit", f"cluster.time_limit {error}", "write it as sbatch takes it: 04:00:00")
        return
    for stage in recipe.stages:
        plan = planned.get(stage.name)
        if plan is None:
            if recipe.cluster.gpu != "none":
                continue  # said by `plans`
            least = 2 * UNPLANNED_LEAD_SECONDS
            if seconds > least:
                yield ok("time limit", f"{stage.name}: {limit}, not held against a plan (no formula for CPUs)")
            else:
                text = f"{stage.name}: cluster.time_limit {limit} is {seconds} s, the signal that asks the ranks to stop comes before"
                yield wrong("time limit", text, f"use more than {least} s")
        elif plan.fits:
            try:
                steps = check_time_limit(limit, plan.time, plan.intervals)
            except ConfigError as error:
                yield wrong("time limit", f"{stage.name}: {error.what}", error.fix or "raise cluster.time_limit")
            else:
                yield ok("time limit", f"{stage.name}: {limit} holds {steps:,} steps of {plan.time.total:,.0f} s (planned)")


def launch(file: RecipeFile, said: Sequence[Finding]) -> Iterator[Finding]:
    """What `launch` refuses beside what was `said`: it stops at the first fault, which with others is most likely one of them."""
    if any(finding.level == "wrong" for finding in said):
        return
    try:
        chain = build_chain(file)
    except LongctxError as error:
        yield wrong("launch", str(error).removesuffix(f"; {error.fix}"), error.fix or "correct it in the recipe")
    else:
        yield ok("launch", f"{len(chain.jobs)} jobs could be written")


def dense_mask(recipe: Recipe) -> Finding:
    """Megatron-LM's loader makes a mask of s x s unless told otherwise, one byte an entry; our samples have none."""
    longest = max(recipe.stages, key=lambda stage: stage.seq_length)
    length = longest.seq_length
    return ok(
        "attention mask",
        f"none is made; Megatron-LM's own loader would make {length:,} x {length:,} for a sample of {longest.name}, "
        f"{readable_bytes(length * length)} (--no-create-attention-mask-in-dataloader stops it)",
    )


def gpus_here(gpus: Sequence[Mapping[str, Any]], recipe: Recipe, planned: Mapping[str, StagePlan]) -> Iterator[Finding]:
    """The GPUs of this machine against the cluster of the recipe; nothing where there are none: a login node."""
    if not gpus or recipe.cluster.gpu == "none":
        return
    cluster, smallest = recipe.cluster, min(int(gpu["bytes"]) for gpu in gpus)
    if len(gpus) < min(cluster.nproc_per_node, max(parallel.world_size for _, parallel in _layouts(recipe))):
        yield wrong(
            "gpus",
            f"{len(gpus)} here, cluster.nproc_per_node is {cluster.nproc_per_node}",
            "set it to what a node has, or ask for whole nodes",
        )
    for stage, plan in planned.items():
        if plan.memory.total > smallest:
            yield wrong(
                "gpus",
                f"{gpus[0]['name']} has {readable_bytes(smallest)}, {stage} is planned to take {readable_bytes(round(plan.memory.total))}",
                f"set cluster.gpu to this one (it is {cluster.gpu}) and plan again",
            )
