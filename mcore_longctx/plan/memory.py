"""Memory of one GPU, and of the host, term by term."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["Memory", "memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes. `terms` are what is there, `total` the peak of the worst rank: the loss and a layer's backward are not there together."""

    terms: tuple[Term, ...]
    total: float
    host: tuple[Term, ...]  # bytes of a node
    host_total: float


def memory(setup: Setup) -> Memory:
    """The peak of the worst rank and of its node."""
    raise NotImplementedError
