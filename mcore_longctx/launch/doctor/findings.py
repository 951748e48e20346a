"""One line of an examination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "note", "ok", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line. `wrong`: what is asked for would fail, and `fix` says what to do; `note`: worth knowing."""

    level: Literal["ok", "note", "wrong"]
    subject: str
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.level == "wrong" and not self.fix:
            raise ValueError(f"{self.subject}: a fault without its fix")

    def line(self) -> str:
        """The line as it is printed, without its mark."""
        return f"{self.subject:<19} {self.text}{f'; {self.fix}' if self.fix else ''}"


def ok(subject: str, text: str) -> Finding:
    """As it should be."""
    return Finding("ok", subject, text)


def note(subject: str, text: str, fix: str = "") -> Finding:
    """Worth knowing, and nothing fails of it."""
    return Finding("note", subject, text, fix)


def wrong(subject: str, text: str, fix: str) -> Finding:
    """A fault."""
    return Finding("wrong", subject, text, fix)
