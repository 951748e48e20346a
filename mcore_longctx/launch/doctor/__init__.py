"""What this machine can run, the traps that are known to stop people, and whether a recipe would fail here. No torch: it is asked.

findings.py     one line: ok, note, or wrong with its fix
probes.py       the processes that import torch and megatron-core
libraries.py    versions, GPUs, attention kernels, apex, transformer-engine, psutil
environment.py  variables of NCCL, torch and CUDA
machine.py      cores, host memory, /dev/shm, ulimits, clock, SLURM
storage.py      the run folder's file system, and room for all that the run keeps
stages.py       layouts, inputs, the plan, timeouts, the time limit, the dense mask
rope.py         the rope of the model as built, of stock Megatron-LM, of checkpoints that are there
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

from mcore_longctx.launch.doctor import environment, libraries, machine, rope, stages, storage
from mcore_longctx.launch.doctor.findings import Finding
from mcore_longctx.launch.doctor.probes import MEGATRON, TORCH, Probe
from mcore_longctx.plan.stages import StagePlan
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import Resolved
from mcore_longctx.recipe.schema import Recipe

__all__ = ["Finding", "examine", "examine_recipe"]


def examine() -> list[Finding]:
    """Look at packages, torch, megatron-core, the environment and the machine."""
    with Probe("-c", TORCH, question={"heads": [["bf16", 128]]}) as torch, Probe("-c", MEGATRON, question={}) as megatron:
        findings = [
            *environment.variables(os.environ),
            machine.cores(),
            machine.memory_found(),
            machine.shared_memory(1, on_gpus=False),
            *machine.limits(),
            machine.slurm(wanted=False),
        ]
        return [
            *libraries.installed(),
            *libraries.torch_found(torch.answer()),
            *libraries.megatron_found(megatron.answer()),
            *findings,
        ]


def examine_recipe(file: RecipeFile) -> tuple[list[Finding], Resolved | None]:
    """Look at the same, and at whether the recipe would fail here. None instead of the resolved recipe where it cannot be resolved."""
    recipe = file.recipe
    resolved, layouts = stages.resolved_part_by_part(file)
    heads = [[precision, resolved.shape.kv_channels] for precision in _precisions(recipe)] if resolved else []
    with ExitStack() as probes:
        torch = probes.enter_context(Probe("-c", TORCH, question={"heads": heads}))
        built = {}
        if resolved is not None:
            for stage in rope.stages_to_build(recipe, resolved):
                question = rope.question(recipe, resolved, stage)
                built[stage] = probes.enter_context(Probe("-m", "mcore_longctx.model.as_built", question=question))
        planned, of_plan = stages.plans(recipe, resolved) if resolved else ({}, [])
        about_torch = torch.answer()
        about_models = {stage: probe.answer() for stage, probe in built.items()}
        about_model = next(iter(about_models.values()), {"error": ""})
        findings = [
            *libraries.installed(),
            *libraries.torch_found(about_torch),
            *libraries.megatron_found(_why_not() if "error" in about_model else about_model),
            *environment.variables({**os.environ, **recipe.cluster.environment}, nodes=stages.largest_nodes(recipe)),
            *_machine(recipe, resolved, planned, about_torch),
            *layouts,
        ]
        if resolved is None:
            return findings, None
        of_jobs = [
            *of_plan,
            *stages.gpus_here(about_torch.get("gpus", []), recipe, planned),
            *stages.timeouts(recipe.stages, planned),
            *stages.time_limit(recipe, planned),
        ]
        findings += [
            *stages.inputs(recipe, model_found=resolved.model_found),
            *of_jobs,
            *stages.launch(file, [*layouts, *of_jobs]),
            stages.dense_mask(recipe),
            *_ropes(about_models, recipe, resolved),
            *rope.of_checkpoints(recipe, resolved),
        ]
    return findings, resolved


def _ropes(about_models: Mapping[str, Mapping[str, object]], recipe: Recipe, resolved: Resolved) -> Iterator[Finding]:
    """Each rope as it is built; where stages have several, with the name of a stage."""
    for stage, about in about_models.items():
        for finding in rope.as_built(about, recipe, resolved.rope_of(stage), stage):
            yield finding if len(about_models) == 1 else replace(finding, text=f"stage {stage}: {finding.text}")


def _why_not() -> Mapping[str, object]:
    """megatron-core by itself, where no model could be built."""
    with Probe("-c", MEGATRON, question={}) as probe:
        return probe.answer()


def _machine(
    recipe: Recipe, resolved: Resolved | None, planned: Mapping[str, StagePlan], about_torch: Mapping[str, object]
) -> Iterator[Finding]:
    on_gpus, gpus_here = recipe.cluster.gpu != "none", bool(about_torch.get("gpus"))
    ranks_here = min(recipe.cluster.nproc_per_node, max(stage.parallel.world_size for stage in recipe.stages))
    yield machine.cores()
    needed = max((plan.memory.host_total for plan in planned.values()), default=0.0)
    yield machine.memory_found(needed, only_here=gpus_here or not on_gpus)
    yield machine.shared_memory(ranks_here, on_gpus=gpus_here)
    yield from machine.limits()
    yield machine.clock(storage.nearest_folder(recipe.run_folder))
    yield storage.file_system(recipe.run_folder, stages.largest_nodes(recipe))
    if resolved is not None:
        sizes = {name: plan.intervals.checkpoint_bytes.value for name, plan in planned.items()}
        yield from storage.disk(recipe, resolved.shape, sizes, is_here=resolved.model_found)
    yield machine.slurm(wanted=on_gpus)


def _precisions(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys([*(stage.precision for stage in recipe.stages), recipe.evaluate.precision]))
