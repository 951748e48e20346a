"""`mcore-longctx harness`: lm-evaluation-harness on a checkpoint of a run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_longctx.errors import ConfigError, LongctxError

if TYPE_CHECKING:
    from mcore_longctx.evaluate.harness import HarnessJob

_DESCRIPTION = """\
Run tasks of lm-evaluation-harness on a checkpoint as Megatron runs it, on as many ranks as evaluate.parallel asks for. The model has
the rope that it was trained with; a prompt that is too long for it is refused, not cut; decoding is greedy.

  torchrun --nproc-per-node 2 -m mcore_longctx harness runs/NAME/recipe.yaml --checkpoint extend \\
      --include-path examples/lm_eval_tasks --tasks longctx_needle,longctx_choices --metadata '{"max_seq_lengths": [1024, 4096]}'

Needs lm-eval (pip install 'mcore-longctx[harness]'). The same tasks run on an exported folder with lm_eval itself: docs/lm_eval.md
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "harness",
        help="run tasks of lm-evaluation-harness on a checkpoint (started by torchrun or srun)",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset; of a run: RUN_FOLDER/recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    parser.add_argument("--checkpoint", required=True, metavar="NAME", help="`base`, or a stage: what it ended with")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="tasks or groups")
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder with tasks, in place of those that lm-eval brings"
    )
    parser.add_argument("--metadata", metavar="JSON", help="an object for tasks that make their samples, such as their lengths")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of each task (default: all)")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples before each question (default: as the task says)"
    )
    parser.add_argument("--apply-chat-template", action="store_true", help="ask in a chat, by the tokenizer's template")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (default: RUN_FOLDER/harness/CHECKPOINT.json)")
    parser.add_argument(
        "--log-samples", action="store_true", help="write every request and answer beside the results (.samples.jsonl)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the tasks."""
    from mcore_longctx.cli.main import leave_note

    try:
        job = _job(args)
        from mcore_longctx.evaluate.harness import run_harness

        run_harness(job, say=lambda line: print(line, flush=True))
    except LongctxError as error:
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) > 0:  # rank 0 meets the same and says it
            leave_note(error)
            return error.exit_code
        raise
    return 0


def _job(args: argparse.Namespace) -> HarnessJob:
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.recipe.resolve import resolve
    from mcore_longctx.run.checkpoints import final_checkpoint

    file = open_recipe(args.recipe, args.overrides)
    recipe = file.recipe
    names = ["base", *(stage.name for stage in recipe.stages)]
    if args.checkpoint not in names:
        raise ConfigError(f"{args.checkpoint!r} is not known here", where="--checkpoint", fix=f"one of {', '.join(names)}")
    tasks = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    if not tasks:
        raise ConfigError("no task is named", where="--tasks")
    for option, value in (("--limit", args.limit), ("--num-fewshot", args.num_fewshot)):
        if value is not None and value < (1 if option == "--limit" else 0):
            raise ConfigError(f"{value} is too small", where=option)
    metadata = _metadata(args.metadata)
    resolved = resolve(file)

    from mcore_longctx.evaluate.harness import HarnessJob

    return HarnessJob(
        tasks=tasks,
        checkpoint=final_checkpoint(recipe, args.checkpoint),
        shape=resolved.shape,
        rope=resolved.rope_of(args.checkpoint),
        hf=recipe.model.path,
        tokenizer=recipe.tokenizer_folder,
        parallel=recipe.evaluate.parallel,
        out=args.out or recipe.run_folder / "harness" / f"{args.checkpoint}.json",
        include_path=args.include_path,
        metadata=metadata,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
        log_samples=args.log_samples,
        precision=recipe.evaluate.precision,
        phase_dtype=recipe.rope_section(None if args.checkpoint == "base" else args.checkpoint).phase_dtype,
        backend=recipe.model.backend,
        seed=recipe.seed,
    )


def _metadata(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise ConfigError(
            f"is no JSON: {error}", where="--metadata", fix="""for example '{"max_seq_lengths": [4096]}'"""
        ) from None
    if not isinstance(value, dict):
        raise ConfigError("is no JSON object", where="--metadata", fix="""for example '{"max_seq_lengths": [4096]}'""")
    return value
