"""The options of `data build` that start it beyond this process: `--engine local|slurm` (`data/engines/scale_out.py`)."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError

_SLURM = ("partition", "time", "cpus_per_task", "mem_per_cpu", "sbatch", "finish_sbatch")


def add_engine_options(parser: Any) -> None:
    """Add the options to `data build`."""
    group = parser.add_argument_group(
        "beyond one machine", "token shards in parallel ranks under datatrove, then plan and pack; the result is the same"
    )
    group.add_argument("--engine", choices=("local", "slurm"), help="datatrove's executor (default: none, just --workers)")
    group.add_argument("--ranks", type=int, metavar="N", help="ranks of the engine (default for local: the number of workers)")
    group.add_argument("--partition", metavar="NAME", help="slurm: where jobs run")
    group.add_argument("--time", metavar="HH:MM:SS", help="slurm: limit of each job")
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="slurm: cores and processes of a rank (default: 1)")
    group.add_argument("--mem-per-cpu", type=int, metavar="GB", help="slurm: memory of a core (default: 2)")
    group.add_argument(
        "--sbatch", action="append", metavar="KEY[=VALUE]", help="slurm: any other option of sbatch; may be repeated"
    )
    group.add_argument(
        "--finish-sbatch", action="append", metavar="KEY[=VALUE]", help="slurm: the same, for the job that plans and packs"
    )


def run_engine(args: argparse.Namespace, arguments: Mapping[str, Any], workers: int) -> int:
    """`build(**arguments)` under the engine that is asked for."""
    from mcore_longctx.data.engines.scale_out import SlurmOptions, launch

    slurm = None
    if args.engine == "local":
        given = [name for name in _SLURM if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} has no meaning with --engine local", fix="remove it")
        ranks = workers if args.ranks is None else args.ranks
    else:
        missing = [name for name in ("ranks", "partition", "time") if getattr(args, name) is None]
        if missing:
            raise ConfigError(f"--engine slurm needs --{missing[0]}")
        if args.workers is not None:
            raise ConfigError("--workers has no meaning with --engine slurm", fix="say --cpus-per-task")
        for name in ("cpus_per_task", "mem_per_cpu"):
            number = getattr(args, name)
            if number is not None and number < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {number}: expected 1 or more")
        ranks = args.ranks
        slurm = SlurmOptions(
            partition=args.partition,
            time=args.time,
            cpus_per_task=1 if args.cpus_per_task is None else args.cpus_per_task,
            mem_per_cpu_gb=2 if args.mem_per_cpu is None else args.mem_per_cpu,
            sbatch=_options(args.sbatch, "--sbatch"),
            finish_sbatch=_options(args.finish_sbatch, "--finish-sbatch"),
        )
    report = launch(arguments, args.engine, ranks=ranks, workers=workers, slurm=slurm)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    return 0


def refuse_without_engine(args: argparse.Namespace) -> None:
    """Raise ConfigError if an option of an engine is given and no engine."""
    for name in ("ranks", *_SLURM):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning without --engine", fix="say --engine slurm")


def _options(texts: list[str] | None, option: str) -> dict[str, str]:
    """Options of sbatch by name; a flag has an empty value."""
    options = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        name = name.removeprefix("--")
        # each becomes a line of the job script
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or (value and not value.isprintable()):
            raise ConfigError(f"{option} {text!r}: expected KEY=VALUE, or KEY for a flag")
        # it is also the number of processes
        if name == "cpus-per-task" and not (value.isascii() and value.isdigit() and int(value)):
            raise ConfigError(f"{option} {name}={value}: expected a whole number, 1 or more")
        options[name] = value
    return options
