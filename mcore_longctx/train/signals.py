"""SIGTERM and SIGUSR1: leave politely, with a checkpoint, at the next border of a step or micro-batch."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

__all__ = ["HANDLED", "StopRequest"]

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first SIGTERM or SIGUSR1 that arrives inside the block; later ones change nothing.

    Both mean the same: SLURM sends SIGUSR1 ahead of a time limit (`--signal`) and SIGTERM at preemption, and either may come
    twice. The handler only sets a flag: all ranks agree on it where the training loop asks.
    """

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, signal.Handlers | int | None] = {}

    def __enter__(self) -> Self:
        for number in HANDLED:
            self._old[number] = signal.signal(number, self._remember)  # type: ignore[assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    @staticmethod
    def name(number: int) -> str:
        """`SIGTERM` for 15."""
        return signal.Signals(number).name
