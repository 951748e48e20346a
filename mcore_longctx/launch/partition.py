"""What a partition allows, held against a job script: SLURM takes a job that asks for more, and never starts it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.intervals import parse_time_limit

__all__ = ["check_partition"]

_OPTION = re.compile(r"^#SBATCH --(time|nodes|partition)=(\S+)", re.MULTILINE)


def check_partition(script: Path, environment: Mapping[str, str]) -> None:
    """Hold a script's --time and --nodes against its partition, as `scontrol show partition` tells it.

    What is not written as a plain number there or here (a range of nodes, a time of a site's own form) is left to sbatch, and so is
    everything where there is no scontrol.

    Raises:
        ConfigError: more nodes than the partition has or gives to a job, or more time.
    """
    asked = dict(_OPTION.findall(script.read_text(encoding="utf-8")))
    names = asked.get("partition", "")
    partitions = [_partition(name, environment) for name in names.split(",")]
    if not partitions or not all(partitions):
        return
    nodes = max(min(_number(facts, name) for name in ("TotalNodes", "MaxNodes")) for facts in partitions)
    name = names or partitions[0]["PartitionName"]
    if asked.get("nodes", "").isdigit() and int(asked["nodes"]) > nodes:
        raise ConfigError(
            f"asks for {int(asked['nodes']):,} nodes, a job in partition {name} gets at most {nodes:,.0f}",
            where=script,
            fix="choose another partition or a smaller layout",
        )
    longest = max(partitions, key=_max_seconds)
    if _seconds(asked.get("time", "")) > _max_seconds(longest):
        raise ConfigError(
            f"asks for {asked['time']}, partition {name} gives at most {longest['MaxTime']} (MaxTime)",
            where=script,
            fix="lower cluster.time_limit or choose another partition",
        )


def _partition(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Facts of a partition, of the default one where `name` is empty; nothing where SLURM knows none."""
    command = ["scontrol", "--oneliner", "show", "partition", *([name] if name else [])]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
    except OSError:
        return {}
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in answer.stdout.splitlines()]
    return next((row for row in rows if name or row.get("Default") == "YES"), {})


def _number(facts: Mapping[str, str], name: str) -> float:
    return int(facts[name]) if facts.get(name, "").isdigit() else float("inf")


def _max_seconds(facts: Mapping[str, str]) -> float:
    return _seconds(facts.get("MaxTime", "")) or float("inf")


def _seconds(text: str) -> float:
    """0 for what is no length of time, as UNLIMITED."""
    try:
        return parse_time_limit(text)
    except ValueError:
        return 0
