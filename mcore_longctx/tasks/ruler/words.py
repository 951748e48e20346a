"""Invented words, names, numbers and identifiers. Nothing here occurs in training data, and nothing is downloaded."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator

__all__ = ["coded_word", "distinct_words", "identifier", "number", "person", "place_name", "word_key"]

_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choices(_SYLLABLES, k=syllables))


def word_key(rng: random.Random) -> str:
    """Two words of three syllables each with a hyphen: one of 4e11."""
    return f"{_word(rng, 3)}-{_word(rng, 3)}"


def number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randrange(10**6, 10**7))


def identifier(rng: random.Random) -> str:
    """A random UUID (version 4)."""
    raw = bytearray(rng.randbytes(16))
    raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def person(rng: random.Random) -> str:
    """First and last name of three syllables each."""
    return f"{_word(rng, 3).capitalize()} {_word(rng, 3).capitalize()}"


def place_name(rng: random.Random) -> str:
    """A capitalised word of four syllables: no part of a person's name."""
    return _word(rng, 4).capitalize()


def coded_word(rng: random.Random) -> str:
    """Six random letters."""
    return "".join(rng.choices(_LETTERS, k=6))


def distinct_words(rng: random.Random) -> Iterator[str]:
    """Words of two to four syllables without end, none twice: 5e7 of them."""
    known: set[str] = set()
    while True:
        word = _word(rng, rng.choice((3, 3, 3, 4)) if len(known) > 2000 else rng.choice((2, 3, 4)))
        if word not in known:
            known.add(word)
            yield word
