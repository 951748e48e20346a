"""Needle (passkey) samples on token level: a made-up name's number hidden in held-out text, asked for at the end.

    haystack ... The pass key for dolu is 4829137.\\n ... haystack The pass key for dolu is| 4829137
                 ^ at the line start nearest to the depth                                  ^ teacher-forced answer

A sample is a pure function of (haystack, tokenizer, seed, length, depth, index, digits). The haystack is tokenized once; a
sample costs one copy of its tokens, also at 4M. The start of the haystack differs from sample to sample, so that no two samples
share their text, and the share of it that is not repeated is reported.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import ConfigError, DataError

__all__ = [
    "Haystack",
    "NeedleSample",
    "TextTokenizer",
    "make_needle_sample",
    "needle_depths",
    "needle_grid",
    "solve_needle",
]

STEM = "The pass key for"
QUESTION = STEM + " {key} is"
ANSWER = " {value}"  # the space belongs to the answer: tokenizers glue it to what follows
NEEDLE = QUESTION + ANSWER + ".\n"
CONSONANTS, VOWELS = "bcdfghjklmnprstvw", "aeiou"


class TextTokenizer(Protocol):
    """What the tasks need of a tokenizer. Neither direction adds or drops special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Haystack:
    """Held-out text as a ring of tokens.

    Attributes:
        tokens: int64 [n].
        ends_line: bool [n]; True where a token's text ends in a newline, so that a line starts after it.
    """

    tokens: npt.NDArray[np.int64]
    ends_line: npt.NDArray[np.bool_]

    @classmethod
    def from_documents(cls, documents: Sequence[str], tokenizer: TextTokenizer, *, where: object = None) -> Haystack:
        """Tokenize documents once and find the line starts. A document that does not end its last line gets a newline.

        Raises:
            DataError: no text, or the text holds pass key sentences already.
        """
        parts: list[npt.NDArray[np.int64]] = []
        for text in documents:
            if STEM in text:
                raise DataError(f"the haystack holds the words {STEM!r}: its answers would not be unique", where=where)
            whole = text if text.endswith("\n") else text + "\n"
            parts.append(np.array(tokenizer.encode(whole), dtype=np.int64))
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
        if not "".join(documents).strip() or not len(tokens):
            raise DataError("the haystack holds no text", where=where)
        ids = np.unique(tokens)
        newline = np.array([tokenizer.decode([int(token)]).endswith("\n") for token in ids])
        ends_line = newline[np.searchsorted(ids, tokens)]
        if not ends_line.any():
            raise DataError("no token of this tokenizer ends in a newline: needles need line starts", where=where)
        return cls(tokens, ends_line)

    def cut(self, start: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`count` tokens that end where a line ends, from the ring at `start` or as little after it as that needs.

        Returns:
            the tokens, int64 [count], and where in them lines start, ascending int64 (0 and `count` included).
        """
        n = len(self.tokens)
        last = (start + count - 1) % n
        ends = np.flatnonzero(self.ends_line)
        at = np.searchsorted(ends, last)
        shift = int(ends[at] if at < len(ends) else ends[0] + n) - last
        ring = (start + shift + np.arange(count)) % n
        return self.tokens[ring], np.union1d([0], np.flatnonzero(self.ends_line[ring]) + 1)


@dataclass(frozen=True, kw_only=True)
class NeedleSample:
    """One sample: `tokens[:answer_start]` is the prompt, the rest the answer.

    Attributes:
        tokens: int64 [length], prompt and answer.
        answer_start: position of the answer's first token.
        needle_start: position of the needle's first token.
        haystack_start: where in the haystack's ring the text was wanted to begin.
        depth: where the needle really is: tokens of text before it / tokens of text, 0 to 1.
        unique_share: share of the sample's text that is not a repetition of itself.
    """

    tokens: npt.NDArray[np.int64]
    answer_start: int
    key: str
    value: str
    needle_start: int
    haystack_start: int
    depth: float
    unique_share: float

    @property
    def answer(self) -> npt.NDArray[np.int64]:
        """Answer tokens, int64."""
        return self.tokens[self.answer_start :]


def needle_depths(count: int) -> list[float]:
    """`count` equally spaced depths from 0 (start) to 1 (just before the question); a single one is the middle.

    >>> needle_depths(5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if count == 1:
        return [0.5]
    return [round(i / (count - 1), 6) for i in range(count)]


def needle_grid(lengths: Sequence[int], depths: int, samples: int) -> Iterator[tuple[int, float, int]]:
    """(length, depth, index) of every sample, short lengths first, so that a stopped evaluation holds whole lengths."""
    for length in sorted(lengths):
        for depth in needle_depths(depths):
            for index in range(samples):
                yield length, depth, index


def make_needle_sample(
    haystack: Haystack,
    tokenizer: TextTokenizer,
    *,
    seed: int,
    length: int,
    depth: float,
    index: int,
    digits: int,
    prefix: Sequence[int] = (),
) -> NeedleSample:
    """Build a sample of exactly `length` tokens, the answer included.

    Args:
        haystack: held-out text.
        tokenizer: the model's tokenizer.
        seed: with length, depth and index it decides key, value and text.
        length: tokens of the sample.
        depth: wanted place of the needle, 0 (start) to 1 (just before the question).
        index: number of the sample in its cell.
        digits: digits of the value; up to ten they differ from each other, so that digits in a wrong order are not right by chance.
        prefix: ids with which the model's tokenizer begins a text (begin token), if any.

    Raises:
        ConfigError: the sample does not fit in `length`.
        DataError: the tokenizer does not tokenize question + answer as the question followed by the answer.
    """
    rng = _rng(int(seed), int(length), float(depth), int(index))
    key = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))
    value = "".join(rng.sample("0123456789", digits) if digits <= 10 else rng.choices("0123456789", k=digits))
    needle = tokenizer.encode(NEEDLE.format(key=key, value=value))
    question = tokenizer.encode(QUESTION.format(key=key))
    answer = _answer_ids(tokenizer, question, QUESTION.format(key=key) + ANSWER.format(value=value))

    room = length - len(prefix) - len(needle) - len(question) - len(answer)
    if room < 1:
        raise ConfigError(
            f"a needle sample of {digits} digits needs more than {length - room:,} tokens, the length is {length:,}",
            where="evaluate.needle.lengths",
            fix="use longer lengths or fewer digits",
        )
    start = rng.randrange(len(haystack.tokens))
    text, line_starts = haystack.cut(start, room)
    place = int(line_starts[np.argmin(np.abs(line_starts - depth * room))])
    tokens = np.concatenate(
        [np.array(part, dtype=np.int64) for part in (prefix, text[:place], needle, text[place:], question, answer)]
    )
    assert len(tokens) == length
    return NeedleSample(
        tokens=tokens,
        answer_start=length - len(answer),
        key=key,
        value=value,
        needle_start=len(prefix) + place,
        haystack_start=start,
        depth=place / room,
        unique_share=min(1.0, len(haystack.tokens) / room),
    )


def solve_needle(prompt: str) -> str:
    """The value that a reader of the whole prompt finds.

    Raises:
        ValueError: the prompt asks nothing, or does not answer its question exactly once.
    """
    asked = re.search(re.escape(STEM) + r" (\w+) is$", prompt)
    if asked is None:
        raise ValueError("the prompt does not end in a question")
    found = re.findall(re.escape(STEM) + rf" {asked[1]} is (\d+)\.", prompt)
    if len(found) != 1:
        raise ValueError(f"{len(found)} answers for {asked[1]!r} in the prompt")
    return str(found[0])


def _rng(*key: float) -> random.Random:
    """A generator that depends on the key alone: not on the process, the order of samples or earlier draws."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def _answer_ids(tokenizer: TextTokenizer, question: list[int], whole: str) -> list[int]:
    """Ids of question + answer without the question's: what a model that was trained on plain text predicts."""
    ids = tokenizer.encode(whole)
    if ids[: len(question)] != question or len(ids) == len(question):
        raise DataError(
            f"the tokenizer joins the end of the question with the answer in {whole!r}: the answer cannot be scored",
            where="tokenizer",
        )
    return ids[len(question) :]
