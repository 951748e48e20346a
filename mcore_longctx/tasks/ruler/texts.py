"""The texts that RULER-like tasks hide things in."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.tasks.haystack import Haystack

__all__ = ["RulerTexts"]


@dataclass(frozen=True)
class RulerTexts:
    """Held-out text, and source code for every other sample of the tasks whose context is text."""

    haystack: Haystack
    code: Haystack | None = None

    def of(self, index: int) -> Haystack:
        """The text of a sample: code for odd ones, where there is code."""
        return self.code if self.code is not None and index % 2 else self.haystack
