"""`mcore-longctx run`: a recipe from its first stage to its report."""

from __future__ import annotations

import argparse
from typing import Any

_DESCRIPTION = """\
Run a recipe: import the model, measure it, build the data, train each stage, measure again, export to Hugging Face format,
verify, and write the report. What is finished is skipped; what was made from other inputs is refused by name.

RECIPE is a YAML file or the name of a preset. Relative paths in it start at the current folder.
Trailing section.name=value arguments change single values, for example
  mcore-longctx run tiny-cpu output=runs/other stages.extend.optimizer.lr=1e-4
A stage is addressed by its name. Lengths may be written 128k or 4M (powers of two).

Training and evaluation start under torchrun on this machine, or under srun inside a SLURM allocation.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run a recipe, from the Hugging Face model to the report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--until", metavar="STEP", help="stop after this step (as printed by --dry-run) or after all steps of this stage"
    )
    which.add_argument(
        "--steps", metavar="STEP,STEP", help="exactly these steps; what they stand on must be done (job scripts use it)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print every step with its resolved settings and stop")


def run(args: argparse.Namespace) -> int:
    """Run the recipe, or print what would run."""
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.run import print_plan, run_recipe

    file = open_recipe(args.recipe, args.overrides)
    only = None if args.steps is None else [name for name in args.steps.split(",") if name]
    if args.dry_run:
        print_plan(file, until=args.until, only=only)
        return 0
    return run_recipe(file, until=args.until, only=only)
