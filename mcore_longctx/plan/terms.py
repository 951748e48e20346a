"""Numbers that say where they come from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Term"]


@dataclass(frozen=True)
class Term:
    """One number of a plan with its formula.

    `formula` is in the symbols of docs/plan.md, `numbers` the same with the values put in; `note` says what it means or why it is 0.
    """

    name: str
    value: float  # bytes or seconds, as the owner says
    formula: str
    numbers: str
    note: str = ""
