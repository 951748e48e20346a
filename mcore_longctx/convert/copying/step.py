"""Which part of the work is ours: one task of a SLURM step, or all of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mcore_longctx.errors import ConfigError

__all__ = ["Step", "read_step"]


MOST_TASKS = 65_536  # many times the units of the largest plan


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

    def owners(self, *counts: int) -> list[int]:
        """The ranks that have a share of so many things, in order."""
        return sorted({self.owner(number, count) for count in counts for number in range(count)})


def read_step(environment: Mapping[str, str] = os.environ) -> Step:
    """The SLURM step that this process is a task of.

    Raises:
        ConfigError: it is none, or has more tasks than there can be work for.
    """
    rank = environment.get("SLURM_PROCID")
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if rank is None or size is None:
        raise ConfigError(
            "no SLURM step (SLURM_PROCID is not set)", where="--srun", fix="start it with srun, or leave out --srun"
        )
    numbers = [int(text) if text.isdecimal() and len(text) < 20 else -1 for text in (rank, size)]
    if not 0 <= numbers[0] < numbers[1]:
        raise ConfigError(f"SLURM_PROCID {rank[:20]} of {size[:20]} tasks", where="--srun", fix="start it with srun")
    if numbers[1] > MOST_TASKS:
        raise ConfigError(f"{numbers[1]:,} tasks; expected at most {MOST_TASKS:,}", where="--srun", fix="start fewer")
    name = ".".join(environment.get(f"SLURM_{part}", "") for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return Step(numbers[0], numbers[1], name)
