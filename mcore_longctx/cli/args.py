"""`mcore-longctx args`: one stage of a recipe as flags of Megatron-LM, or as overrides of Megatron-Bridge."""

from __future__ import annotations

import argparse
from typing import Any

_DESCRIPTION = """\
Print one training stage of a recipe for another program. Starts nothing, writes nothing, needs no GPU and no torch.

  mcore-longctx args ultralong-8b-4m --stage extend --for megatron-lm            bash arrays, Megatron's names and order
  mcore-longctx args ultralong-8b-4m --stage extend --for megatron-bridge
  source <(mcore-longctx args RECIPE --stage extend --for megatron-lm)           then: torchrun "${DISTRIBUTED_ARGS[@]}" ...

--program ours is `python -m mcore_longctx.megatron_lm`: Megatron-LM's training program with our layers, rope, loss and data.
--program stock is pretrain_gpt.py as it is; what it would drop or change without a word is refused (exit code 2), other
differences stand in the comment on top. docs/args.md
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "args",
        help="the same training for Megatron-LM or Megatron-Bridge: print flags",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or preset")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    parser.add_argument("--stage", metavar="NAME", help="which stage (not needed when there is one)")
    parser.add_argument("--for", dest="target", choices=("megatron-lm", "megatron-bridge"), required=True)
    parser.add_argument("--program", choices=("ours", "stock"), help="of Megatron-LM (default: ours)")
    parser.add_argument(
        "--format", choices=("array", "line"), default="array", help="bash arrays (default), or the whole command"
    )


def run(args: argparse.Namespace) -> int:
    """Print the command."""
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.launch.args import as_arrays, as_line, bridge_command, our_command, stage_run, stock_command
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.recipe.resolve import resolve

    if args.target == "megatron-bridge" and args.program is not None:
        raise ConfigError("--program belongs to --for megatron-lm", where="command line", fix="leave it out")
    file = open_recipe(args.recipe, args.overrides)
    stage = stage_run(file, resolve(file, need_model=False), args.stage)
    if args.target == "megatron-bridge":
        command = bridge_command(stage)
    else:
        command = stock_command(stage) if args.program == "stock" else our_command(stage)
    print(as_line(command) if args.format == "line" else as_arrays(command), end="")
    return 0
