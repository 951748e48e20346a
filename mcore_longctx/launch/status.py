"""How a training ended, in its own words: one line `STATE CODE REASON` in a file. torchrun makes 1 of every exit code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

__all__ = ["State", "Status", "read_status"]

State = Literal["done", "stopped", "failed", "hung", "running", "none"]


@dataclass(frozen=True)
class Status:
    """`running` is what a killed training leaves; `none`: there is no such line."""

    state: State
    code: int | None
    reason: str


def read_status(*files: Path) -> Status:
    """The line of the first file that holds one."""
    for file in files:
        try:
            words = file.read_text(encoding="utf-8", errors="replace").strip().split(maxsplit=2)
        except OSError:
            continue
        states: dict[str, State] = {state: state for state in get_args(State)}
        if len(words) >= 2 and words[0] in states:
            return Status(states[words[0]], int(words[1]) if words[1].isdigit() else None, " ".join(words[2:]))
    return Status("none", None, "")
