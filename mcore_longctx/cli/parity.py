"""`mcore-longctx parity`: check a Megatron model spec of one's own under context parallelism, on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

_TOLERANCE = 1e-5  # float32

_DESCRIPTION = f"""\
Build a tiny model from a spec of yours twice, whole and cut over context-parallel ranks, and compare loss and gradients.

  mcore-longctx parity examples/own_model_spec.py:build_model
  mcore-longctx parity my_package.specs:layer_spec --cp 4 --cp-comm-type all_gather

TARGET is FILE.py:NAME or PACKAGE.MODULE:NAME: a ModuleSpec, TransformerBlockSubmodules, or a function of the TransformerConfig that
returns one of them or a model. It is imported and run. Exit code 1 if anything differs by more than {_TOLERANCE:g} of its largest entry.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "parity",
        help="check a Megatron model spec of your own under context parallelism",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="FILE.py:NAME or PACKAGE.MODULE:NAME")
    parser.add_argument("--cp", type=int, default=2, metavar="N", help="context-parallel ranks (default 2)")
    parser.add_argument(
        "--cp-comm-type", default="p2p", choices=("p2p", "all_gather", "a2a"), help="how ranks exchange keys and values"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Start the ranks, or be one of them."""
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.recipe.schema import Parallel

    if args.cp < 2:
        raise ConfigError(f"--cp is {args.cp}", fix="2 or more: with one rank there is nothing to compare")
    parallel = Parallel(context_parallel_size=args.cp, cp_comm_type=args.cp_comm_type)
    if "RANK" not in os.environ:
        _check_target(args.target)
        return _start(args)
    from mcore_longctx.model.parity import compare_context_parallel, load_target

    differences = compare_context_parallel(load_target(args.target), parallel)
    worst = max(differences, key=lambda one: one.relative)
    equal = all(one.relative <= _TOLERANCE for one in differences)
    if os.environ["RANK"] == "0":
        if args.json:
            print(json.dumps({"equal": equal, "tolerance": _TOLERANCE, "differences": [asdict(one) for one in differences]}))
        else:
            for one in differences:
                print(f"{'ok   ' if one.relative <= _TOLERANCE else 'WRONG'} {one.relative:9.1e}  {one.name}")
            verdict = "equal to one rank" if equal else f"NOT equal to one rank, worst {worst.name}"
            print(f"{parallel.describe()}: {verdict} (float32, relative to the largest entry of each)")
    return 0 if equal else _differs()


def _check_target(target: str) -> None:
    from mcore_longctx.errors import ConfigError

    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ConfigError(f"target {target!r}", fix="expected path/to/file.py:NAME or package.module:NAME")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError("no such file", where=place)


def _differs() -> int:
    from mcore_longctx.errors import TrainingError

    raise TrainingError("loss or gradients differ from one rank")


def _start(args: argparse.Namespace) -> int:
    from mcore_longctx.launch.local import launch_ranks

    words = ["parity", args.target, "--cp", str(args.cp), "--cp-comm-type", args.cp_comm_type, *(["--json"] if args.json else [])]
    with tempfile.TemporaryDirectory(prefix="mcore-longctx-parity-") as folder:
        launch_ranks(words, args.cp, log=Path(folder))
    return 0
