"""`mcore-longctx launch`: job scripts for SLURM, one a stage, and the chain of them."""

from __future__ import annotations

import argparse
from typing import Any

_DESCRIPTION = """\
Write into the run folder what SLURM needs: recipe.yaml (resolved, with the timeouts that follow from the planned step time) and
slurm/*.sbatch, one readable script a job:

  00-prepare            import the model, build the data of every stage
  10-evaluate-before    measure the model as it is
  20-STAGE              train; 21-evaluate-STAGE measures (after 21-merge-STAGE: 22-); 30-..., for every further stage
  90-finish             export, verify, report

and slurm/submit.sh, which submits them, each after the one before it has ended well. Scripts that you have edited are kept.
Relative paths start at the current folder: submit from it too.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "launch",
        help="write SLURM job scripts for a recipe, and submit them",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    parser.add_argument("--stage", metavar="NAME", help="only the training job of this stage")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--submit", action="store_true", help="submit the chain and print the job ids")
    what.add_argument("--dry-run", action="store_true", help="print the scripts, write nothing")
    parser.add_argument(
        "--force", action="store_true", help="write recipe and scripts anew that were edited since they were written"
    )


def run(args: argparse.Namespace) -> int:
    """Write, print or submit the chain."""
    from mcore_longctx.launch.chain import build_chain
    from mcore_longctx.launch.submit import check_submit, hold_chain, submit_chain, write_chain
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.run import refuse_changed_run

    file = open_recipe(args.recipe, args.overrides)
    chain = build_chain(file, only=args.stage)
    if args.dry_run:
        for name, text in chain.scripts.items():
            print(f"# ---------- {chain.recipe.run_folder}/slurm/{name}\n{text}")
        return 0
    refuse_changed_run(file)
    if args.submit:
        check_submit(chain)
    with hold_chain(chain):
        for line in [*write_chain(chain, force=args.force), *chain.summary]:
            print(line)
        if args.submit:
            for name, job in submit_chain(chain):
                print(f"job {job}: {name}")
    return 0
