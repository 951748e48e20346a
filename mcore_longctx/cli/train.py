"""`mcore-longctx train`: one training stage of a recipe. This is what torchrun and srun start."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_longctx.train import TrainJob

_DESCRIPTION = """\
Train one stage of a recipe, or go on where it stopped: from its newest checkpoint if it has one, else from the stage before it
(the first stage: from RUN_FOLDER/checkpoints/base, which `convert import` makes).

Start one process a GPU, as many as the stage's layout needs:

  torchrun --nproc-per-node 8 -m mcore_longctx train RECIPE --stage extend
  srun --ntasks 256 --ntasks-per-node 8 python -m mcore_longctx train RECIPE --stage extend
  mcore-longctx train tiny-cpu --stage extend stages.extend.parallel.context_parallel_size=1

SIGTERM and SIGUSR1 save a checkpoint and end with exit code 75: start the same command again to go on. torchrun turns every exit
code into 1; RUN_FOLDER/logs/STAGE/STATUS tells the truth. Metrics go to RUN_FOLDER/metrics/STAGE.jsonl and tensorboard/STAGE.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train one stage of a recipe (started by torchrun or srun)",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    parser.add_argument("--stage", metavar="NAME", help="which stage (not needed when there is one)")


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit code of `train_stage`."""
    from mcore_longctx.cli.main import leave_note
    from mcore_longctx.errors import LongctxError

    try:
        job = train_job(args.recipe, args.overrides, args.stage)
        from mcore_longctx.train.loop import train_stage
    except LongctxError as error:
        if _rank() > 0:  # rank 0 meets the same and says it, if it gets that far before it is stopped
            leave_note(error)
            return error.exit_code
        raise
    code = train_stage(job)
    if code not in (0, 75):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # another rank may be gone: an orderly end would wait for it
    return code


def train_job(recipe_name: str, overrides: list[str], stage_name: str | None) -> TrainJob:
    """The job of one stage of a recipe.

    Raises:
        ConfigError: no such stage, or the stage before it is not finished.
    """
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.recipe.resolve import resolve
    from mcore_longctx.run import training

    file = open_recipe(recipe_name, overrides)
    return training.train_job(file, resolve(file), stage_name)


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
