"""Needle samples on token level: a sentence hidden in held-out text and asked for at the end.

    passkey   ... The pass key for dolu is 4829137.\\n ... haystack The pass key for dolu is| 4829137
                  ^ at the line start nearest to the depth                                  ^ teacher-forced answer
    sentence  ... end. Mira Dolusek keeps the lighthouse of Tarobi. Next ... Mira Dolusek keeps the lighthouse of| Tarobi

A sample is a pure function of (haystack, tokenizer, kind, seed, length, depth, index, digits). The haystack is tokenized once; a
sample costs one copy of its tokens, also at 4M. The start of the haystack differs from sample to sample, so that no two samples
share their text, and the share of it that is not repeated is reported.

`make_shared_needles` hides one needle at every depth of one haystack: read once, asked once for each. The other needles distract
then, so it is another task, and shown under another name (`needles_shared`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import ConfigError
from mcore_longctx.tasks.haystack import Haystack
from mcore_longctx.tasks.placing import Insert, place_sentences
from mcore_longctx.tasks.tokens import TextTokenizer, Tokens, encode_after, seeded

__all__ = [
    "NeedleKind",
    "NeedleSample",
    "SharedNeedle",
    "SharedNeedles",
    "check_needle_grid",
    "make_needle_sample",
    "make_shared_needles",
    "needle_depths",
    "needle_grid",
    "solve_needle",
]

NeedleKind = Literal["passkey", "sentence"]

CONSONANTS, VOWELS = "bcdfghjklmnprstvw", "aeiou"
PASSKEY = "The pass key for {key} is"
FACTS = ("{key} keeps the lighthouse of", "{key} repairs the clocks of", "{key} rings the bells of", "{key} paints the doors of")
ANSWER = " {value}"  # the space belongs to the answer: tokenizers glue it to what follows
WHERE = "evaluate.needle.lengths"


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


@dataclass(frozen=True, kw_only=True)
class SharedNeedle:
    """One of the needles of a haystack, with its question.

    Attributes:
        suffix: int64 [m], question and answer, to follow the haystack.
        answer_start: position of the answer's first token in the suffix.
        needle_start: position of the needle's first token in the haystack.
        depth: where the needle really is, 0 to 1.
    """

    suffix: npt.NDArray[np.int64]
    answer_start: int
    key: str
    value: str
    needle_start: int
    depth: float

    @property
    def answer(self) -> npt.NDArray[np.int64]:
        """Answer tokens, int64."""
        return self.suffix[self.answer_start :]


@dataclass(frozen=True, kw_only=True)
class SharedNeedles:
    """One haystack with a needle at every depth: `tokens` followed by any needle's `suffix` is a sample.

    Attributes:
        tokens: int64 [n]; n + the longest suffix is the length asked for.
        needles: in the order of the depths asked for.
        haystack_start: where in the haystack's ring the text was wanted to begin.
        unique_share: share of the text that is not a repetition of itself.
    """

    tokens: npt.NDArray[np.int64]
    needles: tuple[SharedNeedle, ...]
    haystack_start: int
    unique_share: float


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
    kind: NeedleKind = "passkey",
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
        digits: digits of a passkey; up to ten they differ from each other, so that digits in a wrong order are not right by chance.
        kind: a pass key, or where an invented person works.
        prefix: ids with which the model's tokenizer begins a text (begin token), if any.

    Raises:
        ConfigError: the sample does not fit in `length`.
        DataError: the tokenizer does not tokenize question + answer as the question followed by the answer.
    """
    plan = _Wanted(tokenizer, seed, length, digits, kind, prefix).one(depth, index)
    (fact,), (asked,) = plan.facts, plan.asked
    start = plan.rng.randrange(len(haystack.tokens))
    placed = place_sentences(haystack, tokenizer, plan.inserts, [depth], start=start, room=plan.room)
    tokens = np.concatenate([np.array(prefix, dtype=np.int64), placed.tokens, asked.suffix])
    assert len(tokens) == length
    return NeedleSample(
        tokens=tokens,
        answer_start=length - len(asked.suffix) + asked.answer_start,
        key=fact.key,
        value=fact.value,
        needle_start=len(prefix) + placed.starts[0],
        haystack_start=start,
        depth=placed.depths[0],
        unique_share=haystack.unique_share(placed.text_tokens),
    )


def make_shared_needles(
    haystack: Haystack,
    tokenizer: TextTokenizer,
    *,
    seed: int,
    length: int,
    depths: Sequence[float],
    index: int,
    digits: int,
    kind: NeedleKind = "passkey",
    prefix: Sequence[int] = (),
) -> SharedNeedles:
    """One haystack with a needle at every depth; with the longest suffix it has exactly `length` tokens.

    Arguments and errors are those of `make_needle_sample`. No two needles share key or value.
    """
    plan = _Wanted(tokenizer, seed, length, digits, kind, prefix).shared(depths, index)
    start = plan.rng.randrange(len(haystack.tokens))
    placed = place_sentences(haystack, tokenizer, plan.inserts, depths, start=start, room=plan.room)
    return SharedNeedles(
        tokens=np.concatenate([np.array(prefix, dtype=np.int64), placed.tokens]),
        needles=tuple(
            SharedNeedle(
                suffix=each.suffix,
                answer_start=each.answer_start,
                key=fact.key,
                value=fact.value,
                needle_start=len(prefix) + at,
                depth=depth,
            )
            for fact, each, at, depth in zip(plan.facts, plan.asked, placed.starts, placed.depths, strict=True)
        ),
        haystack_start=start,
        unique_share=haystack.unique_share(placed.text_tokens),
    )


def check_needle_grid(
    tokenizer: TextTokenizer,
    *,
    seed: int,
    length: int,
    depths: Sequence[float],
    samples: int,
    shared: bool,
    digits: int,
    kind: NeedleKind = "passkey",
    prefix: Sequence[int] = (),
) -> None:
    """Raise what making the samples of a length would raise, whatever the text: needles and questions are drawn alone.

    Arguments and errors are those of `make_needle_sample`; `shared`: of `make_shared_needles`.
    """
    wanted = _Wanted(tokenizer, seed, length, digits, kind, prefix)
    for index in range(samples):
        if shared:
            wanted.shared(depths, index)
        else:
            for depth in depths:
                wanted.one(depth, index)


def solve_needle(prompt: str) -> str:
    """The value that a reader of the whole prompt finds.

    Raises:
        ValueError: the prompt asks nothing, or does not answer its question exactly once.
    """
    asked = re.search(re.escape(PASSKEY).replace(r"\{key\}", r"(\w+)") + "$", prompt)
    value = r"(\d+)"
    if asked is None:
        asked = re.search("(?:" + "|".join(fact.format(key=r"([A-Z]\w+ [A-Z]\w+)") for fact in FACTS) + ")$", prompt)
        value = r"([A-Z]\w+)"
    if asked is None:
        raise ValueError("the prompt does not end in a question")
    found = re.findall(rf"{re.escape(asked[0])} {value}\.", prompt)
    if len(found) != 1:
        raise ValueError(f"{len(found)} answers for {next(key for key in asked.groups() if key)!r} in the prompt")
    return str(found[0])


@dataclass(frozen=True)
class _Fact:
    key: str
    value: str
    question: str

    @property
    def sentence(self) -> str:
        return self.question + ANSWER.format(value=self.value) + "."


@dataclass(frozen=True)
class _Asked:
    """Tokens of question and answer."""

    suffix: Tokens
    answer_start: int

    @classmethod
    def of(cls, tokenizer: TextTokenizer, fact: _Fact) -> _Asked:
        question = np.array(tokenizer.encode(fact.question), dtype=np.int64)
        answer = encode_after(tokenizer, fact.question, ANSWER.format(value=fact.value))
        return cls(np.concatenate([question, answer]), len(question))


@dataclass(frozen=True)
class _Plan:
    """A sample but for its text: needles with their questions, and `room` tokens for text and needles."""

    rng: random.Random  # of what is drawn next
    facts: list[_Fact]
    asked: list[_Asked]
    inserts: list[Insert]
    room: int


@dataclass(frozen=True)
class _Wanted:
    """Samples of a length."""

    tokenizer: TextTokenizer
    seed: int
    length: int
    digits: int
    kind: NeedleKind
    prefix: Sequence[int]

    def one(self, depth: float, index: int) -> _Plan:
        """Of one needle."""
        key: tuple[object, ...] = (int(self.seed), int(self.length), float(depth), int(index))
        rng = seeded(*key) if self.kind == "passkey" else seeded(self.kind, *key)
        return self._plan(rng, 1, "a needle sample")

    def shared(self, depths: Sequence[float], index: int) -> _Plan:
        """Of a needle at every depth."""
        count = len(depths)
        if self.kind == "passkey" and count > 9**self.digits // 2:
            what = f"{self.digits} digits are too few for {count} needles with different values"
            raise ConfigError(what, where="evaluate.needle.digits", fix="use more digits, or fewer depths")
        places = tuple(float(depth) for depth in depths)
        rng = seeded("shared", self.kind, int(self.seed), int(self.length), places, int(index))
        return self._plan(rng, count, f"one text with {count} needles")

    def _plan(self, rng: random.Random, count: int, what: str) -> _Plan:
        facts: list[_Fact] = []
        while len(facts) < count:
            facts.append(_draw(rng, self.kind, self.digits, known=facts))
        asked = [_Asked.of(self.tokenizer, fact) for fact in facts]
        inserts = [_insert(self.tokenizer, fact, self.kind) for fact in facts]
        room = self.length - len(self.prefix) - max(len(each.suffix) for each in asked)
        most = sum(insert.most for insert in inserts)
        if room <= most:
            is_key = self.kind == "passkey"
            size, digits = (f" of {self.digits} digits", " or fewer digits") if is_key else ("", "")
            raise ConfigError(
                f"{what}{size} needs more than {self.length - room + most:,} tokens, the length is {self.length:,}",
                where=WHERE,
                fix=f"use longer lengths{digits}{', or fewer depths' if count > 1 else ''}",
            )
        return _Plan(rng, facts, asked, inserts, room)


def _draw(rng: random.Random, kind: NeedleKind, digits: int, known: Sequence[_Fact] = ()) -> _Fact:
    """A fact whose key and value no known one has."""
    while True:
        if kind == "passkey":
            key = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))
            value = "".join(rng.sample("0123456789", digits) if digits <= 10 else rng.choices("0123456789", k=digits))
            question = PASSKEY
        else:
            key, value = f"{_name(rng)} {_name(rng)}", _name(rng)
            question = rng.choice(FACTS)
        if all(fact.key != key and fact.value != value for fact in known):
            return _Fact(key, value, question.format(key=key))


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3)).capitalize()


def _insert(tokenizer: TextTokenizer, fact: _Fact, kind: NeedleKind) -> Insert:
    """Pass keys stand on lines of their own, encoded by themselves."""
    if kind == "sentence":
        return Insert.of(tokenizer, fact.sentence)
    return Insert(fact.sentence, np.array(tokenizer.encode(fact.sentence + "\n"), dtype=np.int64))
