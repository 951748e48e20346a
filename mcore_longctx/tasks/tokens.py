"""Text as tokens where it stands: pieces are encoded behind the text that comes before them, so that joined they are the whole."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import DataError

__all__ = ["Lines", "TextTokenizer", "Tokens", "encode_after", "encode_lines", "line_ends", "seeded", "spell_tokens"]

Tokens = npt.NDArray[np.int64]

_BLOCK = 1 << 20  # characters encoded at once: a list of ids takes ten times the memory of an array


class TextTokenizer(Protocol):
    """What the tasks need of a tokenizer. Neither direction adds or drops special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Lines:
    """Lines as tokens, one behind the other.

    Attributes:
        tokens: int64 [n].
        ends: int64 [lines]; line i is `tokens[ends[i - 1]:ends[i]]`.
    """

    tokens: Tokens
    ends: Tokens

    @property
    def starts(self) -> Tokens:
        """Where each line begins, int64 [lines]."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])


def seeded(*key: object) -> random.Random:
    """A generator that depends on the key alone: not on the process, the order of samples or earlier draws."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def encode_after(tokenizer: TextTokenizer, before: str, text: str) -> Tokens:
    """Ids of `text` where it follows `before`, int64 [n].

    Raises:
        DataError: the tokenizer joins the end of `before` with the beginning of `text`.
    """
    head = tokenizer.encode(before)
    whole = tokenizer.encode(before + text)
    if whole[: len(head)] != head or len(whole) == len(head):
        raise DataError(
            f"the tokenizer joins the end of {before[-80:]!r} with the beginning of {text[:80]!r}: "
            "what follows cannot be placed or scored by itself",
            where="tokenizer",
        )
    return np.array(whole[len(head) :], dtype=np.int64)


def encode_lines(tokenizer: TextTokenizer, lines: Sequence[str]) -> Lines:
    """Lines that follow a line each, as one text would be encoded. No line holds a newline; every line gets one.

    Raises:
        DataError: a newline is not the end of a token, so that lines cannot be taken apart.
    """
    parts: list[Tokens] = []
    block: list[str] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line) + 1
        if size >= _BLOCK:
            parts.append(encode_after(tokenizer, "\n", "\n".join(block) + "\n"))
            block, size = [], 0
    if block:
        parts.append(encode_after(tokenizer, "\n", "\n".join(block) + "\n"))
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
    ends = line_ends(tokenizer, tokens)
    if len(ends) != len(lines) or (len(lines) and ends[-1] != len(tokens)):
        raise DataError(
            f"the tokenizer makes {len(ends):,} ends of line of {len(lines):,} lines: lines cannot be taken apart",
            where="tokenizer",
        )
    return Lines(tokens, ends)


def line_ends(tokenizer: TextTokenizer, tokens: npt.NDArray[np.integer]) -> Tokens:
    """Positions behind the tokens whose text ends in a newline, ascending int64."""
    ids = np.unique(tokens)
    newline = np.array([text.endswith("\n") for text in spell_tokens(tokenizer, ids)], dtype=np.bool_)
    return np.flatnonzero(newline[np.searchsorted(ids, tokens)]) + 1


def spell_tokens(tokenizer: TextTokenizer, ids: npt.NDArray[np.integer]) -> list[str]:
    """Text of each id where it follows a full stop (alone, decoders of sentencepiece drop its space)."""
    before = tokenizer.encode(".")
    at = len(tokenizer.decode(before))
    return [tokenizer.decode([*before, int(token)])[at:] for token in ids]
