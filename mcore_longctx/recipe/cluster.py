"""Where a recipe runs: GPUs, nodes, and what a SLURM site wants to be told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

__all__ = ["ClusterSection", "ContainerSection"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = ("*TOKEN*", "*KEY*", "*SECRET*", "*PASSWORD*", "*PASSWD*", "*_PASS", "*_PAT", "*CREDENTIAL*", "*AUTH*")
_NO_SECRET = re.compile(r"TOKENIZER|AUTHOR")
# NAME=value, but not what is looked up when the line runs: NAME=$OTHER, NAME="$(cat file)", or nothing
_GIVEN = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(?![\"]?[$`]|[\"']{2}|[\s;&|]|$)")
_IN_A_LINE = ("account", "partition", "cpu_partition", "qos", "reservation", "constraint", "time_limit")


@dataclass(frozen=True, kw_only=True)
class ContainerSection:
    """The container that the ranks run in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mounts: tuple[str, ...] = ()  # HOST:CONTAINER

    def __post_init__(self) -> None:
        if (self.runtime == "none") != (self.image is None):
            raise ValueError("give image with runtime pyxis or apptainer, and only then")
        for mount in self.mounts:
            if not 1 <= mount.count(":") <= 2 or "" in mount.split(":"):
                raise ValueError(f"mount {mount!r} is not of the form HOST:CONTAINER")


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """The machines: `plan` prices them, `launch` writes the job scripts for them."""

    gpu: str = "h100-80gb"  # a name of the hardware table (docs/plan.md), or none: ranks on CPUs over gloo
    hardware: Path | None = None  # a site's own hardware table, YAML, beside ours
    nproc_per_node: int = 8  # ranks of a node: its GPUs
    account: str | None = None
    partition: str | None = None
    cpu_partition: str | None = None  # for jobs that need no GPU; None: partition
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time_limit: str = "04:00:00"  # of one job, as sbatch --time takes it
    container: ContainerSection = field(default_factory=ContainerSection)
    setup: tuple[str, ...] = ()  # shell lines before anything else on the node of the script: module load, source venv
    environment: dict[str, str] = field(default_factory=dict)  # set, or set otherwise than the script does
    secrets: tuple[str, ...] = ()  # names of variables that the job takes from whoever submits it; their values are never written
    sbatch: tuple[str, ...] = ()  # further options of sbatch, for example --mail-type=END

    def __post_init__(self) -> None:
        if self.nproc_per_node < 1:
            raise ValueError(f"nproc_per_node is {self.nproc_per_node}, expected 1 or more")
        for name in _IN_A_LINE:  # of a script: sbatch reads it, no shell does
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[^\s\"'#]+", value):
                raise ValueError(f"{name} {value!r} cannot stand in an #SBATCH line")
        for option in self.sbatch:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"sbatch option {option!r}, expected for example --mail-type=END")
        for name in (*self.environment, *self.secrets):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        for name in self.environment:
            _refuse_secret(name, f"environment.{name}")
        for number, line in enumerate(self.setup):
            for name in _GIVEN.findall(line):
                _refuse_secret(name, f"setup[{number}]: {name}")
        for number, option in enumerate(self.sbatch):
            for name in _GIVEN.findall(re.sub(r"^--?[\w-]+[= ]?", "", option)):  # the option itself is none: --wckey=NAME
                _refuse_secret(name, f"sbatch[{number}]: {name}")


def _refuse_secret(name: str, where: str) -> None:
    plain = _NO_SECRET.sub("", name.upper())
    if any(fnmatchcase(plain, pattern) for pattern in _SECRET):
        raise ValueError(
            f"{where} looks like a secret, and its value would be written into scripts and logs: "
            f"export it before sbatch, and list its name in cluster.secrets"
        )
