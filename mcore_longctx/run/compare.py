"""Methods compared: recipes that start from one base, with the same tokens of training and the same evaluation, several seeds of each.

    FOLDER/<method>/seed<N>/     a run folder each (`run_recipe`): what is finished is skipped, so a comparison that was stopped goes on
    FOLDER/comparison.json       figures with intervals (`mcore_longctx.report.comparison`)
    FOLDER/comparison.html       the same as one page

Runs follow each other on this machine, or inside an allocation. On a cluster `launch_lines` has the command of each run, and `compare` then
reports what it finds done.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import RecipeFile, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.recipe.schema import Recipe
from mcore_longctx.report.comparison import Arm, Comparison, compare_arms, comparison_lines
from mcore_longctx.report.comparison_page import write_comparison
from mcore_longctx.report.run_folder import Column, read_run_folder
from mcore_longctx.run import run_recipe
from mcore_longctx.run.steps import plan_steps

__all__ = ["Plan", "compare_methods", "launch_lines", "plan_comparison"]

_BUDGETS_DIFFER = 0.02  # by more than this share they are not the same: a stage has whole steps


@dataclass(frozen=True)
class Plan:
    """Runs of a comparison, seed by seed, so that one that is stopped holds whole seeds: (method, seed, recipe)."""

    folder: Path
    methods: tuple[str, ...]
    runs: tuple[tuple[str, int, RecipeFile], ...]

    def of(self, method: str) -> Recipe:
        """The recipe of a method, that of its first seed."""
        return next(file.recipe for name, _, file in self.runs if name == method)


def plan_comparison(
    reference: str, methods: Sequence[str], *, seeds: int, overrides: Sequence[str] = (), folder: Path | None = None
) -> Plan:
    """Read all recipes and check that they can be compared. Writes nothing.

    Args:
        reference: preset or file; what the others are compared with.
        methods: presets or files.
        seeds: runs of each; they are the recipe's seed and those after it.
        overrides: on top of each recipe.
        folder: of the comparison; None: runs/compare-<name of the reference>.

    Raises:
        ConfigError: a bad recipe; two of one name; another base, tokenizer, evaluation or token budget than the reference's.
    """
    if seeds < 1:
        raise ConfigError(f"{seeds} seeds", where="--seeds", fix="1 or more; from 2 on there is an interval over runs")
    if not methods:
        raise ConfigError("no method to compare with the reference", where="--methods", fix="name a preset or a file")
    first = open_recipe(reference, overrides).recipe
    folder = folder if folder is not None else Path("runs") / f"compare-{first.name}"
    sources: dict[str, str] = {}
    for source in (reference, *methods):
        file = open_recipe(source, overrides)
        name = file.recipe.name
        if name in sources:
            raise ConfigError(
                f"two methods are called {name!r}", where=file.where("name"), fix="give each recipe a name of its own"
            )
        sources[name] = source
        _refuse_unlike(first, file)
    runs = []
    for seed in range(first.seed, first.seed + seeds):
        for name, source in sources.items():
            own = [f"seed={seed}", f"evaluate.seed={first.evaluation_seed}"]
            file = open_recipe(source, [*overrides, *own])
            # not an override: what stands there is YAML, and a folder's name may mean something in it
            runs.append((name, seed, replace(file, recipe=replace(file.recipe, output=folder / name / f"seed{seed}"))))
    return Plan(folder, tuple(sources), tuple(runs))


def launch_lines(plan: Plan, overrides: Sequence[str]) -> list[str]:
    """For each run the command that writes its job scripts. The overrides are those of the comparison."""
    lines = []
    for _, seed, file in plan.runs:
        recipe = file.recipe
        own = [f"seed={seed}", f"evaluate.seed={recipe.evaluate.seed}", f"output={json.dumps(str(recipe.run_folder))}"]
        lines.append(shlex.join(["mcore-longctx", "launch", file.file, *overrides, *own]))
    return lines


def compare_methods(plan: Plan) -> Comparison:
    """Run what is not done, then write and print the comparison.

    Of each recipe the steps up to the last stage's evaluation are run; the base is measured once.

    Raises:
        ConfigError: as `run_recipe`.
    """
    for number, (name, seed, file) in enumerate(plan.runs, 1):
        print(f"== {number}/{len(plan.runs)}: {name}, seed {seed}", flush=True)
        run_recipe(file, only=_steps(file, measure_base=number == 1))
    comparison = compare_arms([_arm(plan, name) for name in plan.methods], base=_columns(plan.runs[0][2])["before"])
    base = plan.runs[0][2].recipe
    evaluation = f"Base {base.model.path}, {_tokens(base):,} tokens of training each, the same evaluation samples for every run."
    page = write_comparison(comparison, plan.folder, title=f"Methods compared with {plan.methods[0]}", evaluation=evaluation)
    print("\n".join(["", *comparison_lines(comparison), f"report: {page}"]))
    return comparison


def _steps(file: RecipeFile, *, measure_base: bool) -> list[str]:
    names = [step.name for step in plan_steps(file, resolve(file))]
    measured = f"evaluate-{file.recipe.stages[-1].name}"
    wanted = [name for name in names if name.split("-", 1)[0] in ("import", "data", "train", "merge")]
    return [*(["evaluate-before"] if measure_base else []), *wanted, measured]


def _arm(plan: Plan, name: str) -> Arm:
    recipe = plan.of(name)
    last = recipe.stages[-1].name
    columns = {}
    for method, seed, file in plan.runs:
        if method == name:
            columns[seed] = _columns(file)[last]
    return Arm(name, recipe.about, _tokens(recipe), columns)


def _columns(file: RecipeFile) -> dict[str, Column]:
    return {column.name: column for column in read_run_folder(file.recipe.run_folder).columns}


def _tokens(recipe: Recipe) -> int:
    return sum(stage.iterations * stage.global_batch_size * stage.seq_length for stage in recipe.stages)


def _refuse_unlike(first: Recipe, file: RecipeFile) -> None:
    """Raise ConfigError unless a recipe starts where the reference starts, is measured alike and trains on as many tokens."""
    recipe = file.recipe
    same = {
        "model": (first.model, recipe.model),
        "tokenizer": (first.tokenizer_folder, recipe.tokenizer_folder),
        "evaluate": (replace(first.evaluate, parallel=recipe.evaluate.parallel), recipe.evaluate),
    }
    for section, (wanted, found) in same.items():
        if wanted != found:
            raise ConfigError(
                f"{section} is not that of {first.name}: nothing could be compared",
                where=file.where(section),
                fix=f"take it from there (extends: and changes: of {first.name})",
            )
    if not recipe.evaluate.measures:
        raise ConfigError(
            "nothing is measured", where=file.where("evaluate"), fix="give needle, ruler, loss_by_position or short_suite"
        )
    wanted_tokens, tokens = _tokens(first), _tokens(recipe)
    if abs(tokens - wanted_tokens) > _BUDGETS_DIFFER * wanted_tokens:
        raise ConfigError(
            f"{recipe.name} trains on {tokens:,} tokens, {first.name} on {wanted_tokens:,}: not the same budget",
            where=file.where("stages"),
            fix="change train_iters or train_tokens",
        )
