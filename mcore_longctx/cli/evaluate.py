"""`mcore-longctx evaluate`: one column of before and after."""

from __future__ import annotations

import argparse
import os
from typing import Any

from mcore_longctx.errors import ConfigError

_DESCRIPTION = """\
Measure one checkpoint of a run under one rope: needles by length and depth, RULER-like tasks, loss by position, short-context loss and
questions. `run` does this by itself; by hand it is started on as many ranks as evaluate.parallel asks for:

  torchrun --nproc-per-node 2 -m mcore_longctx evaluate runs/NAME/recipe.yaml --checkpoint base --rope own --column before
  torchrun --nproc-per-node 2 -m mcore_longctx evaluate runs/NAME/recipe.yaml --checkpoint base --rope recipe --column scaled
  torchrun --nproc-per-node 2 -m mcore_longctx evaluate runs/NAME/recipe.yaml --checkpoint extend --rope recipe --column extend

Results go to RUN_FOLDER/evaluate/COLUMN/*.jsonl, one line per sample as soon as it is known; started again, it goes on from there.
What it costs by the plan is printed first. --level quick is a look at the longest length; docs/evaluate.md has the numbers.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a checkpoint: needles, RULER-like tasks, loss by position, short-context skills",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset; of a run: RUN_FOLDER/recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="NAME",
        help="`base`, or a stage: its newest checkpoint is taken, or the merged one",
    )
    parser.add_argument(
        "--rope", required=True, choices=("own", "recipe"), help="measure with the checkpoint's own rope, or with the recipe's"
    )
    parser.add_argument(
        "--column", required=True, metavar="NAME", help="`before`, `scaled` or the stage: the folder of the results"
    )
    parser.add_argument("--level", choices=("quick", "standard", "publish"), help="how much is measured; default: evaluate.level")


def run(args: argparse.Namespace) -> int:
    """Measure the column."""
    from mcore_longctx.plan.evaluation import check_evaluation
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.recipe.resolve import resolve
    from mcore_longctx.run.checkpoints import final_checkpoint
    from mcore_longctx.run.measuring import cost_line

    level = [] if args.level is None else [f"evaluate.level={args.level}"]
    file = open_recipe(args.recipe, [*args.overrides, *level])
    recipe = file.recipe
    stages = [stage.name for stage in recipe.stages]
    _check_name("--checkpoint", args.checkpoint, ["base", *stages])
    _check_name("--column", args.column, ["before", "scaled", *stages])
    _check_column(args.checkpoint, args.rope, args.column)
    if not recipe.evaluate.measures:
        raise ConfigError(
            "nothing to measure: none of needle, ruler, loss_by_position, short_suite is given", where=file.where("evaluate")
        )
    resolved = resolve(file)
    check_evaluation(file, resolved.shape)
    # the recipe's rope for a stage is that stage's; for `base`, the one that the run ends with
    own = resolved.rope_of(args.checkpoint)

    from mcore_longctx.evaluate import EvaluateJob, evaluate_column

    job = EvaluateJob(
        evaluate=recipe.evaluate,
        shape=resolved.shape,
        rope=resolved.rope if args.rope == "recipe" and args.checkpoint == "base" else own,
        checkpoint=final_checkpoint(recipe, args.checkpoint),
        checkpoint_rope=own,
        tokenizer=recipe.tokenizer_folder,
        out=recipe.run_folder / "evaluate" / args.column,
        phase_dtype=recipe.rope_section(None if args.checkpoint == "base" else args.checkpoint).phase_dtype,
        backend=recipe.model.backend,
        seed=recipe.evaluation_seed,
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"  {args.column:<10} {cost_line(recipe, resolved.shape)}", flush=True)
    evaluate_column(job, say=lambda line: print(f"  {line}", flush=True))
    return 0


def _check_name(option: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise ConfigError(f"{name!r} is not known here", where=option, fix=f"one of {', '.join(names)}")


def _check_column(checkpoint: str, rope: str, column: str) -> None:
    """A column's name says to the report which model it is: a base that is filed as a stage would be shown as the trained model."""
    if checkpoint != "base" and rope == "own":
        raise ConfigError(
            f"a stage is measured with the recipe's rope, which {checkpoint!r} was trained with",
            where="--rope own",
            fix="use --rope recipe",
        )
    right = checkpoint if checkpoint != "base" else {"own": "before", "recipe": "scaled"}[rope]
    if column != right:
        raise ConfigError(
            f"{column!r} is the column of another model than --checkpoint {checkpoint} --rope {rope}",
            where="--column",
            fix=f"use --column {right}",
        )
