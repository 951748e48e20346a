"""Long texts in pieces, without changing a token.

A cut is exact where the tokenizer ends a token whatever stands on the other side. It is looked for at the border of two words
or of two lines, and kept only where the tokens of the text around it are the same with and without the cut.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NEVER", "Cutter", "Encode"]

Encode = Callable[[str], npt.NDArray[Any]]

NEVER = sys.maxsize  # as a piece: every text stays whole
_MARGIN = 512  # characters on each side of a cut that are compared
_TRIES = 16
_WINDOW = 8192  # characters searched for a place; doubled where there is none, up to _WIDEST
_WIDEST = 1 << 20
# before the space between two words, at the start of a line, between a letter and punctuation (ASCII, general, CJK)
_PUNCTUATION = r"[!-/:-@\[-`{-~\u2010-\u2027\u3001-\u3011\uff01-\uff0f\uff1a-\uff20]"
_BORDER = re.compile(rf"(?<=\w)(?= \w)|(?<=\S\n)(?=\S)|(?<=[^\W\d_])(?={_PUNCTUATION})")
# the space between two words of ASCII, which no normalizer joins
_SPACE = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")


@dataclass(frozen=True)
class Cutter:
    """Cuts texts that are longer than `piece` characters.

    Attributes:
        encode: tokens of a short text.
        piece: characters of a piece, at most, where the text has places to cut.
        drops_space: the tokenizer puts a space before every text (sentencepiece's dummy prefix), so the piece after a cut goes
            without its own. Only right where no token of the vocabulary has a space inside.
    """

    encode: Encode
    piece: int
    drops_space: bool = False

    def encode_long(self, text: str) -> npt.NDArray[Any]:
        """Tokens of a text of any length."""
        if len(text) <= self.piece:
            return self.encode(text)
        return np.concatenate([self.encode(piece) for piece in self.pieces(text)])

    def pieces(self, text: str) -> Iterator[str]:
        """The text in pieces whose tokens, joined, are those of the whole text."""
        start = 0
        while len(text) - start > self.piece:
            cut = self._cut(text, start + self.piece // 2, start + self.piece)
            if cut is None:
                break
            yield text[start:cut]
            start = cut + self.drops_space
        if start < len(text):
            yield text[start:]

    def _cut(self, text: str, low: int, high: int) -> int | None:
        """The last place in [low, high) to cut, else the first one after it that is found."""
        window = _WINDOW
        while high > low:
            places = self._places(text, max(low, high - window), high)
            cut = self._first_exact(text, reversed(places[-_TRIES:]))
            if cut is not None:
                return cut
            high -= window
            window = min(_WIDEST, 2 * window)
        start, window = low + self.piece // 2, _WINDOW
        while start < len(text):  # a run without a border: it stays whole, and the piece ends behind it
            cut = self._first_exact(text, self._places(text, start, min(len(text), start + window))[:_TRIES])
            if cut is not None:
                return cut
            start += window
            window = min(_WIDEST, 2 * window)
        return None

    def _places(self, text: str, low: int, high: int) -> list[int]:
        pattern = _SPACE if self.drops_space else _BORDER
        return [match.start() for match in pattern.finditer(text, low, high)]

    def _first_exact(self, text: str, places: Iterable[int]) -> int | None:
        return next((cut for cut in places if self._is_exact(text, cut)), None)

    def _is_exact(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - _MARGIN) : cut], text[cut + self.drops_space : cut + _MARGIN]
        whole = self.encode(text[max(0, cut - _MARGIN) : cut + _MARGIN])
        return np.array_equal(whole, np.concatenate([self.encode(left), self.encode(right)]))
