"""Time of one optimizer step, term by term."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["StepTime", "step_time"]


@dataclass(frozen=True)
class StepTime:
    """Seconds. `micro_batch` is the unit after which a signal is answered: one forward and backward of one micro-batch."""

    terms: tuple[Term, ...]
    total: float
    micro_batch: float
    tokens_per_second_per_gpu: float
    mfu: float  # causal, no recompute counted, of the bf16 peak
    exchange_hidden: bool  # whether the key/value ring hides behind its kernels
    exchange_bytes: float  # received by a GPU per layer and sequence, forward
    offload_bytes: float  # to the host and back, per micro-batch and GPU


def step_time(setup: Setup) -> StepTime:
    """One optimizer step."""
    raise NotImplementedError
