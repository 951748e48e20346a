"""How far it is, on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol

__all__ = ["Progress"]


class _Bar(Protocol):
    def update(self, n: float, /) -> object: ...

    def close(self) -> None: ...


class Progress:
    """A bar of bytes on stderr where that is a terminal; nothing elsewhere."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar: _Bar | None = None
        if shown and total and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, leave=False)

    def add(self, count: int) -> None:
        """`count` bytes more are done."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
