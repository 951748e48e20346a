"""Carries out a plan: into `OUT.partial`, by several processes, going on where a killed run stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.plans.plan import Plan

__all__ = ["Execution", "QuantizedRows", "execute"]


@dataclass(frozen=True)
class QuantizedRows:
    """What quantising some rows of a tensor did: the sums that a report needs. In the journal, so that a restart keeps it.

    Attributes:
        name: of the tensor.
        rows: how many.
        amax: largest magnitude before.
        squared: sum of the squared elements before.
        squared_error: sum of (scale x quantised - element)^2.
    """

    name: str
    rows: int
    amax: float
    squared: float
    squared_error: float


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out; none of it changes a byte of the output.

    Attributes:
        workers: processes on this machine.
        fsync: make files last before they get their name. False: as `cp` does; a crash of the machine may lose an output that
            looks finished (a killed process does not).
        checksum: hash what is written (the manifest then holds sha256 of every file).
        srun: this process is one task of a SLURM step, all of which share the work (SLURM_PROCID of SLURM_STEP_NUM_TASKS).
    """

    workers: int = 1
    fsync: bool = True
    checksum: bool = False
    srun: bool = False


def execute(plan: Plan, out: Path, finish: Callable[[Path, Sequence[QuantizedRows]], None], how: Execution) -> None:
    """Write `plan` into `OUT.partial`, call `finish(partial folder, facts)` for the files beside the weights, rename to `out`."""
    raise NotImplementedError
