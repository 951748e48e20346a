"""`mcore-longctx compare`: ways to extend one base, beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Train one base by several methods, each with the same tokens of training and the same evaluation, several seeds of each; print one
table with intervals and write one page. RECIPE is the reference. A method is a preset or a file, most often one that extends RECIPE:

  mcore-longctx compare tiny-cpu --methods tiny-utk,tiny-cip --seeds 3

Started again, it goes on where it was stopped. On a cluster, --dry-run prints the `launch` command of each run; once they are done,
compare reports.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "compare",
        help="train one base by several methods and compare them with intervals",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset: the reference")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of every recipe")
    parser.add_argument("--methods", required=True, metavar="A,B", help="presets or files, divided by commas")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: runs/compare-<name of RECIPE>)")
    parser.add_argument("--dry-run", action="store_true", help="check the recipes, print the runs and stop")


def run(args: argparse.Namespace) -> int:
    """Compare, or print what would run."""
    from mcore_longctx.run.compare import compare_methods, launch_lines, plan_comparison

    methods = [name for name in args.methods.split(",") if name]
    plan = plan_comparison(args.recipe, methods, seeds=args.seeds, overrides=args.overrides, folder=args.output)
    if args.dry_run:
        for (name, seed, file), line in zip(plan.runs, launch_lines(plan, args.overrides), strict=True):
            print(f"{name}, seed {seed} -> {file.recipe.run_folder}\n    {line}")
        return 0
    compare_methods(plan)
    return 0
