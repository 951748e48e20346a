"""What a check found: one line each, an error or a warning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mcore_longctx.errors import LongctxError

__all__ = ["Finding", "Findings"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`) or that somebody should know (`warning`). `where` is a file or tensor of the folder."""

    level: Literal["error", "warning"]
    where: str
    what: str

    def describe(self) -> str:
        """One line."""
        return f"{self.level}: {self.where}: {self.what}"


@dataclass
class Findings:
    """Findings as they are made."""

    found: list[Finding] = field(default_factory=list)

    def error(self, where: str, what: str) -> None:
        """Something is wrong."""
        self.found.append(Finding("error", where, what))

    def warning(self, where: str, what: str) -> None:
        """Something that some programs stumble over."""
        self.found.append(Finding("warning", where, what))

    def refused(self, where: str, error: LongctxError) -> None:
        """An error that a reader of ours raised."""
        self.error(where, error.what + (f"; {error.fix}" if error.fix else ""))
