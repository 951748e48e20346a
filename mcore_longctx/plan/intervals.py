"""Times that follow from the step time: how long a rank may wait, when SLURM must signal, how often to save."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.plan.terms import Term

__all__ = ["Intervals", "intervals"]


@dataclass(frozen=True)
class Intervals:
    """Each with its formula."""

    distributed_timeout: Term  # seconds, whole minutes
    signal_lead: Term  # seconds before the time limit at which SLURM sends USR1
    save_interval: Term  # steps between checkpoints (Young/Daly)
    save_seconds: Term  # to write one checkpoint
    start_up: Term  # seconds from the start of a job to its first step
    checkpoint_bytes: Term


def intervals(setup: Setup, time: StepTime, memory: Memory, *, asynchronous: bool) -> Intervals:
    """Derive them for one setup."""
    raise NotImplementedError
