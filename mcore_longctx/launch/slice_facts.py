"""What a slice of a stage is planned to be: its folders, its shortest useful time, and what is printed when it starts."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.progress import Slice, StageFolders
from mcore_longctx.manifest import versions
from mcore_longctx.plan.intervals import parse_time_limit, steps_per_slot
from mcore_longctx.plan.stages import one_line, plan_stage
from mcore_longctx.recipe import Recipe, Stage
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import resolve

__all__ = ["describe", "short_seconds", "stage_folders"]

UNPLANNED_START_UP_SECONDS = 60.0
UNPLANNED_STEP_SECONDS = 240.0  # where nothing is planned and nothing has been measured


def stage_folders(file: RecipeFile, name: str) -> StageFolders:
    """The folders of a stage of a recipe.

    Raises:
        ConfigError: no such stage.
    """
    stage, folder = _stage(file, name), file.recipe.run_folder
    return StageFolders(name, folder / "logs" / name, folder / "checkpoints" / name, stage.iterations)


def short_seconds(file: RecipeFile, name: str) -> float:
    """Start-up and one step: planned, or without a plan (CPUs) from the steps that the stage has taken."""
    stage = _stage(file, name)
    plan = plan_stage(stage, resolve(file, need_model=False).shape, file.recipe.cluster, backend=file.recipe.model.backend)
    if plan is not None:
        return plan.intervals.start_up.value + plan.time.total
    return UNPLANNED_START_UP_SECONDS + _measured_step(file.recipe.run_folder / "metrics" / f"{name}.jsonl")


def _measured_step(metrics: Path) -> float:
    seconds = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            seconds.append(float(json.loads(line)["seconds"]))
        except (ValueError, TypeError, KeyError):  # the last line of a killed training
            continue
    return statistics.median(seconds) if seconds else UNPLANNED_STEP_SECONDS


def describe(file: RecipeFile, name: str, now: Slice) -> Iterator[str]:
    """Lines for the log of the job; all of them at its first slice, then only where it goes on."""
    recipe, stage = file.recipe, _stage(file, name)
    if now.restart == 0:
        yield "versions: " + ", ".join(f"{package} {version}" for package, version in versions().items()) + _commit()
        yield f"recipe: {file.file} ({recipe.name}), stage {name}: {stage.iterations:,} iterations, {stage.parallel.describe()}"
        yield _planned(recipe, stage, file)
    yield f"slice {now.restart} begins at " + ("the start of the stage" if now.before < 0 else f"checkpoint {now.before}")


def _planned(recipe: Recipe, stage: Stage, file: RecipeFile) -> str:
    plan = plan_stage(stage, resolve(file, need_model=False).shape, recipe.cluster, backend=recipe.model.backend)
    if plan is None:
        return "step time: not planned (no formula for CPUs)"
    steps = steps_per_slot(parse_time_limit(recipe.cluster.time_limit), plan.time, plan.intervals)
    return f"{one_line(plan)}; {steps:,} steps fit in a job of {recipe.cluster.time_limit}"


def _commit() -> str:
    """The commit of the working tree that this package runs from, if it is one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    asked = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return f", commit {asked.stdout.strip()}" if asked.returncode == 0 else ""


def _stage(file: RecipeFile, name: str) -> Stage:
    for stage in file.recipe.stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in file.recipe.stages)
    raise ConfigError(f"no stage {name!r}", where=file.file, fix=f"stages: {names}")
