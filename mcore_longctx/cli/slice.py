"""`mcore-longctx slice`: what a training job script asks before and after its ranks ran."""

from __future__ import annotations

import argparse
import os
from typing import Any

_DESCRIPTION = """\
Used by the job scripts that `mcore-longctx launch` writes.

  mcore-longctx slice begin RUN/recipe.yaml --stage NAME       before the ranks start: prints what will run, notes the checkpoint
  mcore-longctx slice end RUN/recipe.yaml --stage NAME         after they ended: one line, a line in logs/NAME/slices.jsonl, and

exit codes of `end`: 0 done; 1 failed, or held by a file logs/NAME/hold; 2 bad input; 3 no progress: two slices in a row without a newer checkpoint; 75 requeue.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "slice",
        help="used by job scripts: how a slice of a training began and ended",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("begin", "end"))
    parser.add_argument("recipe", metavar="RECIPE", help="RUN/recipe.yaml, as launch wrote it")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="as given to train")
    parser.add_argument("--stage", metavar="NAME", required=True)
    parser.add_argument(
        "--queued", default="", metavar="IDS", help="begin: jobs in the queue, as squeue --format=%%A prints them"
    )
    parser.add_argument(
        "--asked", default="", metavar="SIGNAL", help="end: the signal that told the job to stop, PREEMPT, or empty"
    )
    parser.add_argument("--srun-code", type=int, metavar="N", help="end: exit code of srun")


def run(args: argparse.Namespace) -> int:
    """Begin or end a slice."""
    from mcore_longctx.launch.progress import begin_slice, end_slice
    from mcore_longctx.launch.slice_facts import describe, short_seconds, stage_folders
    from mcore_longctx.recipe.load import open_recipe

    file = open_recipe(args.recipe, args.overrides)
    stage = stage_folders(file, args.stage)
    if args.action == "end":
        verdict = end_slice(stage, os.environ, asked=args.asked, srun_code=args.srun_code)
        print(verdict.line, flush=True)
        return verdict.code
    short = short_seconds(file, args.stage)
    now = begin_slice(stage, os.environ, short_seconds=short, queued=args.queued.split())
    for line in describe(file, args.stage, now):
        print(line)
    return 0
