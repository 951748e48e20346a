"""Which part of the work is ours: one task of a SLURM step, or all of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mcore_longctx.errors import ConfigError

__all__ = ["Step", "read_step"]


@dataclass(frozen=True)
class Step:
    """This process among those that share the work.

    Attributes:
        rank: 0 prepares and finishes.
        size: how many there are.
        name: of this start of all of them, the same in each: job, step and how often the job was requeued.
    """

    rank: int = 0
    size: int = 1
    name: str = ""

    def share(self, count: int) -> range:
        """Our part of `count` things in a row: neighbours stay together, so that machines meet at few places of a file."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def owner(self, number: int, count: int) -> int:
        """The rank that `number` of `count` things belongs to."""
        return ((number + 1) * self.size - 1) // count


def read_step(environment: Mapping[str, str] = os.environ) -> Step:
    """The SLURM step that this process is a task of.

    Raises:
        ConfigError: it is none.
    """
    rank = environment.get("SLURM_PROCID")
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if rank is None or size is None:
        raise ConfigError(
            "no SLURM step (SLURM_PROCID is not set)", where="--srun", fix="start it with srun, or leave out --srun"
        )
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"SLURM_PROCID {rank} of {size} tasks", where="--srun", fix="start it with srun")
    name = ".".join(environment.get(f"SLURM_{part}", "") for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return Step(int(rank), int(size), name)
