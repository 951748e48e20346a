"""The stage runner: the steps of a recipe in order, what is finished is skipped, what was made from other inputs is refused.

`RUN_FOLDER/run.json` records each step: its state, the recipe values and files that it was made from, its outputs and its time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mcore_longctx.data.workspace import lock_folder
from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.manifest import write_atomic
from mcore_longctx.plan.stages import one_line, plan_stage
from mcore_longctx.recipe.load import RecipeFile, dump_recipe
from mcore_longctx.recipe.resolve import Resolved, resolve
from mcore_longctx.recipe.schema import Recipe
from mcore_longctx.rope import dropped_scaling, explain
from mcore_longctx.run.journal import Journal
from mcore_longctx.run.steps import Step, plan_steps

__all__ = ["print_plan", "refuse_changed_run", "run_recipe"]


def print_plan(file: RecipeFile, *, until: str | None = None, only: Sequence[str] | None = None) -> None:
    """Print every step with its resolved settings. Needs neither torch nor the model's weights."""
    resolved = resolve(file, need_model=False)
    recipe = file.recipe
    every = plan_steps(file, resolved)
    steps = _until(every, until) if only is None else _exactly(every, only)
    print(f"{recipe.name}: {file.file}")
    print(f"run folder   {recipe.run_folder}")
    for label, text in _describe_model(recipe, resolved):
        print(f"{label:<12} {text}")
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.name}")
        for line in step.about:
            print(f"    {line}")
        for stage in recipe.stages:
            if (
                step.name == f"train-{stage.name}"
                and (plan := plan_stage(stage, resolved.shape, recipe.cluster, backend=recipe.model.backend)) is not None
            ):
                print(f"    {one_line(plan)}")


def run_recipe(file: RecipeFile, *, until: str | None = None, only: Sequence[str] | None = None) -> int:
    """Run the steps of a recipe, skipping what is finished.

    Args:
        file: the recipe.
        until: the last step, or the stage of the last steps.
        only: exactly these steps; what they stand on must be done.

    Returns:
        0 when every step is done, else the exit code of the step that stopped (75: stopped on a signal, start again to go on).

    Raises:
        ConfigError: bad recipe, a finished step whose inputs have changed since, or steps of `only` that stand on unfinished ones.
        InUseError: another process works on the run folder.
    """
    resolved = resolve(file)
    recipe = replace(file.recipe, output=file.recipe.run_folder)
    folder = recipe.run_folder
    every = plan_steps(file, resolved)
    steps = _until(every, until) if only is None else _exactly(every, only)
    for step in steps:
        _check_inputs_exist(step)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        journal = Journal(folder)
        if only is not None:
            _check_needs(every, steps, journal, recipe)
        stamps = {step.name: journal.stamp(step, recipe) for step in steps}
        for step in steps:
            journal.refuse_changes(step, stamps[step.name], recipe)
        write_atomic(folder / "recipe.yaml", dump_recipe(recipe))
        print(f"{recipe.name}: {len(steps)} steps into {folder}")
        for number, step in enumerate(steps, 1):
            head = f"[{number}/{len(steps)}] {step.name}"
            if journal.is_done(step):
                print(f"{head}: done before, skipped", flush=True)
                continue
            print(f"{head}: {step.about[0]}", flush=True)
            started = time.monotonic()
            journal.begin(step, stamps[step.name])
            try:
                facts = step.action()
            except LongctxError as error:
                journal.end(
                    step, "stopped" if error.exit_code == 75 else "failed", time.monotonic() - started, {"error": str(error)}
                )
                raise
            except BaseException as error:
                journal.end(step, "failed", time.monotonic() - started, {"error": repr(error)})
                raise
            journal.end(step, "done", time.monotonic() - started, facts or {})
            print(f"{head}: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def refuse_changed_run(file: RecipeFile) -> None:
    """Raise ConfigError when steps of this run folder were made from other values of the recipe. Input files are not looked at."""
    recipe = replace(file.recipe, output=file.recipe.run_folder)
    if (recipe.run_folder / "run.json").exists():
        journal = Journal(recipe.run_folder)
        for step in plan_steps(file, resolve(file, need_model=False)):
            journal.refuse_changed_values(step, recipe)


def _describe_model(recipe: Recipe, resolved: Resolved) -> Iterator[tuple[str, str]]:
    shape = resolved.shape
    note = "" if resolved.model_found else " (not found here: sizes from the recipe)"
    yield "model", f"{recipe.model.path}{note}"
    yield (
        "",
        f"{shape.num_layers} layers, hidden {shape.hidden_size:,}, FFN {shape.ffn_hidden_size:,}, {shape.num_attention_heads} heads / "
        f"{shape.num_query_groups} KV x {shape.kv_channels}, vocabulary {shape.vocab_size:,}",
    )
    yield "tokenizer", str(recipe.tokenizer_folder)
    for i, line in enumerate(explain(resolved.rope).splitlines()):
        yield "rope" if i == 0 else "", line
    for stage in recipe.stages:
        if (rope := resolved.rope_of(stage.name)) != resolved.rope:
            yield "", f"stage {stage.name} has its own: {rope.describe()}"
    warning = dropped_scaling(resolved.own_rope, resolved.rope) if resolved.model_found else None
    if warning is not None:
        yield "WARNING", warning
    yield "phases", ", ".join(dict.fromkeys(recipe.rope_section(stage.name).phase_dtype for stage in recipe.stages))
    yield "seed", str(recipe.seed)


def _until(steps: list[Step], until: str | None) -> list[Step]:
    if until is None:
        return steps
    last = [i for i, step in enumerate(steps) if until in (step.name, step.stage)]
    if not last:
        stages = dict.fromkeys(step.stage for step in steps if step.stage)
        raise ConfigError(
            f"--until {until}: no such step or stage",
            fix=f"stages: {', '.join(stages)}; steps: {', '.join(s.name for s in steps)}",
        )
    return steps[: last[-1] + 1]


def _exactly(steps: list[Step], names: Sequence[str]) -> list[Step]:
    known = [step.name for step in steps]
    for name in names:
        if name not in known:
            raise ConfigError(f"--steps {name}: no such step", fix=f"steps: {', '.join(known)}")
    return [step for step in steps if step.name in names]


def _check_needs(every: list[Step], chosen: list[Step], journal: Journal, recipe: Recipe) -> None:
    """What the chosen steps stand on, and is not one of them, is done and was made from the same recipe."""
    names = {step.name for step in chosen}
    by_name = {step.name: step for step in every}
    for step in chosen:
        for need in step.needs:
            if need in names:
                continue
            if not journal.is_done(by_name[need]):
                raise ConfigError(
                    f"step {step.name} stands on {need}, which is not done",
                    where=journal.path,
                    fix=f"run it first: --steps {need}",
                )
            journal.refuse_changed_values(by_name[need], recipe)


def _check_inputs_exist(step: Step) -> None:
    for path in step.files:
        if not path.exists():
            raise ConfigError(
                f"step {step.name} needs it, but there is no such file or folder",
                where=path,
                fix="correct the path in the recipe",
            )
