"""A flag with the recipe keys that it says, what cannot be said, and a command line made of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Command", "Difference", "Expansion", "Flag", "flag", "number"]


class Expansion(str):
    """Text that the shell expands: printed in double quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class Flag:
    """One flag of a program, its values, the recipe keys that it says, and a comment where one helps."""

    name: str
    values: tuple[str, ...]
    keys: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Difference:
    """What the other program does otherwise, or cannot be told, and the recipe keys that this is about."""

    keys: tuple[str, ...]
    what: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line for another program. Names in `keys` are those of the recipe: `stage.seq_length`, `rope.factor`, `seed`."""

    title: str
    accepted_by: str  # versions, in words
    environment: tuple[tuple[str, str, str], ...]  # name, value, why
    before: tuple[str, ...]  # shell lines, once, before the first start
    launcher: tuple[str, ...]  # what starts the ranks: takes the first array
    program: tuple[str, ...]  # what a rank runs: takes the other arrays
    arrays: tuple[tuple[str, tuple[Flag, ...]], ...]
    differences: tuple[Difference, ...]

    @property
    def flags(self) -> Iterator[Flag]:
        """All flags of the program, without those of the launcher."""
        for name, array in self.arrays:
            if name != "DISTRIBUTED_ARGS":
                yield from array

    @property
    def keys(self) -> frozenset[str]:
        """Recipe keys that a flag says or a difference names."""
        said = [flag.keys for _, array in self.arrays for flag in array]
        return frozenset(key for keys in (*said, *(one.keys for one in self.differences)) for key in keys)


def flag(name: str, *values: object, keys: str | tuple[str, ...] = (), why: str = "") -> Flag:
    """A flag; `keys` are recipe keys, one or several separated by spaces."""
    words = tuple(keys.split()) if isinstance(keys, str) else keys
    return Flag(name, tuple(value if isinstance(value, str) else number(value) for value in values), words, why)


def number(value: object) -> str:
    """A number as a flag takes it: whole ones without a point, others with all digits that they have."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(int(value)) if isinstance(value, int) else str(value)
