"""Where a recipe runs: GPUs, nodes, and what a SLURM site wants to be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["ClusterSection", "ContainerSection"]


@dataclass(frozen=True, kw_only=True)
class ContainerSection:
    """The container that the ranks run in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mounts: tuple[str, ...] = ()  # HOST:CONTAINER

    def __post_init__(self) -> None:
        if (self.runtime == "none") != (self.image is None):
            raise ValueError("give image with runtime pyxis or apptainer, and only then")


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
