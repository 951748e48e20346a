"""Random numbers that are the same in every Python and numpy, and names that nobody bears."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

__all__ = ["Draws", "new_names"]

T = TypeVar("T")

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_AT_ONCE = 256


class Draws:
    """Draws from a stream that a key decides.

    Raw bits of Philox do not change with the version of numpy; what Generator and `random` make of them may.

    >>> Draws(1, "rows").below(100) == Draws(1, "rows").below(100)
    True
    """

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))
        self._words: Iterator[int] = iter(())

    def below(self, stop: int) -> int:
        """A whole number from 0 to `stop` - 1."""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._bits.random_raw(_AT_ONCE).tolist())
            word = next(self._words)
        return word * stop >> 64

    def between(self, first: int, last: int) -> int:
        """A whole number from `first` to `last`, both included."""
        return first + self.below(last - first + 1)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.below(1 << 53) < probability * (1 << 53)

    def choice(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in random order."""
        rest = list(items)
        for at in range(count):
            other = at + self.below(len(rest) - at)
            rest[at], rest[other] = rest[other], rest[at]
        return rest[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of them in random order."""
        return self.sample(items, len(items))


def new_names(draws: Draws, words: int) -> Iterator[str]:
    """Invented names of so many words, none twice, without end: 118 billion of two words."""
    seen: set[str] = set()
    while True:
        name = " ".join("".join(draws.choice(_SYLLABLES) for _ in range(draws.between(2, 3))).title() for _ in range(words))
        if name not in seen:
            seen.add(name)
            yield name
