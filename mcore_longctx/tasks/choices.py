"""Multiple-choice questions for models with a short context: read from a file, or made from a seed without any data.

    Question: Sort from small to large: 42, 7, 19.
    Answer: 7, 19, 42.

    Question: Sort from small to large: 61, 3, 88.
    Answer:| 3, 61, 88            the options differ from it as a wrong answer would: 3, 88, 61 ...

A made question is a pure function of (seed, index). It follows three solved ones of the same kind, so that a base model knows what is
asked. Every option has the form of the right one, none begins with another, and `solve_choice` finds the right one from the text alone.
These are skills that a context extension must not cost. They are no substitute for MMLU and its like, which no package carries: those
are measured on the exported folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcore_longctx.errors import DataError
from mcore_longctx.tasks.tokens import TextTokenizer, Tokens, encode_after

__all__ = [
    "CHOICE_KINDS",
    "ChoiceQuestion",
    "choice_questions",
    "encode_choices",
    "make_choice_question",
    "read_choice_questions",
    "solve_choice",
]

OPTIONS = 4
SHOTS = 3
_MAX_BYTES = 256 << 20
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvw", "aeiou"


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """One question.

    Attributes:
        kind: one of `CHOICE_KINDS`, or `file`.
        index: which one: of the seed, or the line of the file, from 0.
        prompt: all that comes before the answer.
        options: continuations of the prompt; each begins with the space between them.
        answer: index of the right option.
    """

    kind: str
    index: int
    prompt: str
    options: tuple[str, ...]
    answer: int

    @property
    def question(self) -> str:
        """The last question of the prompt, without those that show how to answer."""
        return self.prompt.rpartition("Question: ")[2].partition("\nAnswer:")[0]


def make_choice_question(*, seed: int, index: int) -> ChoiceQuestion:
    """The question number `index` of a seed. Kinds take turns.

    >>> make_choice_question(seed=1, index=0).prompt.count("Question:")
    4
    """
    kind = list(CHOICE_KINDS)[index % len(CHOICE_KINDS)]
    shots = [_draw(kind, _rng(seed, index, shot)) for shot in range(SHOTS)]
    asked, right, wrong = _draw(kind, _rng(seed, index, SHOTS))
    options = [right, *wrong]
    _rng(seed, index, -1).shuffle(options)
    solved = "".join(f"Question: {question}\nAnswer: {answer}.\n\n" for question, answer, _ in shots)
    return ChoiceQuestion(
        kind=kind,
        index=index,
        prompt=f"{solved}Question: {asked}\nAnswer:",
        options=tuple(f" {option}" for option in options),
        answer=options.index(right),
    )


def choice_questions(file: Path | None, *, count: int, seed: int) -> list[ChoiceQuestion]:
    """At most `count` questions of a file, or so many made ones.

    Raises:
        DataError: a file that cannot be read as questions.
    """
    if file is not None:
        return read_choice_questions(file, count=count, seed=seed)
    return [make_choice_question(seed=seed, index=index) for index in range(count)]


def encode_choices(question: ChoiceQuestion, tokenizer: TextTokenizer, prefix: Sequence[int] = ()) -> tuple[Tokens, list[Tokens]]:
    """Tokens of a prompt, with the ids that begin a text, and of each of its options.

    Raises:
        DataError: an option whose tokens depend on where the prompt ends.
    """
    prompt = np.array([*prefix, *tokenizer.encode(question.prompt)], dtype=np.int64)
    return prompt, [encode_after(tokenizer, question.prompt, option) for option in question.options]


def read_choice_questions(path: Path, *, count: int, seed: int) -> list[ChoiceQuestion]:
    """At most `count` questions of a JSONL file: objects with `question`, `choices` (a list of texts) and `answer` (its index, from 0).

    Which ones a larger file gives depends on the seed and on the number of its lines alone. `question` is put between `Question: ` and
    `Answer:`, and an option follows after a space.

    Raises:
        DataError: no such file, a line that is not such an object, or no line.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise DataError(f"not a file of questions: a regular file below {_MAX_BYTES >> 20} MiB is wanted", where=path)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    found = [_read_question(line, index, f"{path}:{index + 1}") for index, line in enumerate(lines) if line.strip()]
    if not found:
        raise DataError("holds no questions", where=path)
    chosen = sorted(found, key=lambda question: hashlib.sha256(repr((seed, question.index)).encode()).digest())[:count]
    return sorted(chosen, key=lambda question: question.index)


def solve_choice(prompt: str) -> str:
    """The answer that a reader of a made prompt finds, without the space in front.

    Raises:
        ValueError: no question of a known kind at the end of the prompt.
    """
    question = prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")
    for pattern, answer in _SOLVERS:
        if (match := re.fullmatch(pattern, question)) is not None:
            return answer(match)
    raise ValueError(f"not a question of a known kind: {question!r}")


def _read_question(line: bytes, index: int, where: str) -> ChoiceQuestion:
    try:
        row = json.loads(line)
        question, choices, answer = row["question"], row["choices"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError('not an object with "question", "choices" and "answer"', where=where) from None
    texts = [question, *choices] if isinstance(choices, list) else [choices]
    if not all(isinstance(text, str) and text.strip() for text in texts) or len(texts) < 3:
        raise DataError("question must be a text, and choices a list of at least two texts", where=where)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"answer is {answer!r}, expected the index of a choice, 0 to {len(choices) - 1}", where=where)
    if len(set(choices)) < len(choices):
        raise DataError("two choices are the same", where=where)
    return ChoiceQuestion(
        kind="file",
        index=index,
        prompt=f"Question: {question}\nAnswer:",
        options=tuple(f" {choice}" for choice in choices),
        answer=answer,
    )


# Each kind gives the question, the right answer and wrong ones, more than are needed: those that are right, doubled, or that begin with
# another option or are begun by one are left out.
_Drawn = tuple[str, str, Sequence[str]]


def _draw(kind: str, rng: random.Random) -> _Drawn:
    """A question with the right answer and three wrong ones."""
    while True:
        question, right, candidates = CHOICE_KINDS[kind](rng)
        wrong: list[str] = []
        for text in candidates:
            if len(wrong) < OPTIONS - 1 and not any(
                text.startswith(other) or other.startswith(text) for other in (right, *wrong)
            ):
                wrong.append(text)
        if len(wrong) == OPTIONS - 1:
            return question, right, wrong


def _near(rng: random.Random, value: int) -> list[str]:
    """Numbers that a wrong calculation would give."""
    steps = [1, -1, 2, -2, 9, -9, 10, -10, 11, 20]
    rng.shuffle(steps)
    return [str(value + step) for step in steps if value + step >= 0]


def _addition(rng: random.Random) -> _Drawn:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"What is {a} + {b}?", str(a + b), _near(rng, a + b)


def _subtraction(rng: random.Random) -> _Drawn:
    b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    return f"What is {a} - {b}?", str(a - b), _near(rng, a - b)


def _multiplication(rng: random.Random) -> _Drawn:
    a, b = rng.randint(2, 9), rng.randint(3, 12)
    return f"What is {a} x {b}?", str(a * b), [*_near(rng, a * b)[:3], str(a * (b + 1)), str((a + 1) * b), str(a * (b - 1))]


def _series(rng: random.Random) -> _Drawn:
    first, step = rng.randint(1, 40), rng.randint(2, 9)
    shown = ", ".join(str(first + step * i) for i in range(4))
    return f"Which number comes next: {shown}?", str(first + 4 * step), _near(rng, first + 4 * step)


def _largest(rng: random.Random) -> _Drawn:
    numbers = [str(n) for n in rng.sample(range(100, 1000), OPTIONS)]
    right = max(numbers, key=int)
    return f"Which number is the largest: {', '.join(numbers)}?", right, [n for n in numbers if n != right]


def _sorted_numbers(rng: random.Random) -> _Drawn:
    numbers = rng.sample(range(10, 100), 4)
    right = ", ".join(map(str, sorted(numbers)))
    return f"Sort from small to large: {', '.join(map(str, numbers))}.", right, _orders(rng, [str(n) for n in sorted(numbers)])


def _sorted_words(rng: random.Random) -> _Drawn:
    words = _words(rng, 4)
    return f"Sort by the alphabet: {', '.join(words)}.", ", ".join(sorted(words)), _orders(rng, sorted(words))


def _copy(rng: random.Random) -> _Drawn:
    words = _words(rng, 4)
    return f"Repeat these words: {', '.join(words)}.", ", ".join(words), _orders(rng, words)


def _backwards(rng: random.Random) -> _Drawn:
    words = _words(rng, 4)
    return f"Say these words in reverse: {', '.join(words)}.", ", ".join(reversed(words)), _orders(rng, words[::-1])


def _key_value(rng: random.Random) -> _Drawn:
    names, values = _words(rng, 5), [str(n) for n in rng.sample(range(100, 1000), 5)]
    asked = rng.randrange(5)
    table = ", ".join(f"{name} has {value}" for name, value in zip(names, values, strict=True))
    wrong = [value for value in values if value != values[asked]]
    rng.shuffle(wrong)
    return f"{table}. What does {names[asked]} have?", values[asked], wrong


def _place(rng: random.Random) -> _Drawn:
    words, asked = _words(rng, 5), rng.randrange(5)
    wrong = [word for word in words if word != words[asked]]
    rng.shuffle(wrong)
    return f"Which is word number {asked + 1} of: {', '.join(words)}?", words[asked], wrong


def _orders(rng: random.Random, right: Sequence[str]) -> list[str]:
    """Other orders of the same items."""
    found = []
    for _ in range(8):
        order = list(right)
        rng.shuffle(order)
        found.append(", ".join(order))
    return [text for text in found if text != ", ".join(right)]


def _words(rng: random.Random, count: int) -> list[str]:
    """Invented words, all different, none the beginning of another: they are of one length."""
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(2))
        if word not in found:
            found.append(word)
    return found


CHOICE_KINDS: dict[str, Callable[[random.Random], _Drawn]] = {
    "copy": _copy,
    "key_value": _key_value,
    "addition": _addition,
    "sorted_numbers": _sorted_numbers,
    "largest": _largest,
    "place": _place,
    "subtraction": _subtraction,
    "sorted_words": _sorted_words,
    "series": _series,
    "backwards": _backwards,
    "multiplication": _multiplication,
}


def _solve_key_value(match: re.Match[str]) -> str:
    table = dict(pair.split(" has ") for pair in match[1].split(", "))
    return table[match[2]]


def _solve_series(match: re.Match[str]) -> str:
    numbers = [int(text) for text in match[1].split(", ")]
    return str(2 * numbers[-1] - numbers[-2])


_SOLVERS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"What is (\d+) \+ (\d+)\?", lambda m: str(int(m[1]) + int(m[2]))),
    (r"What is (\d+) - (\d+)\?", lambda m: str(int(m[1]) - int(m[2]))),
    (r"What is (\d+) x (\d+)\?", lambda m: str(int(m[1]) * int(m[2]))),
    (r"Which number comes next: ([\d, ]+)\?", _solve_series),
    (r"Which number is the largest: ([\d, ]+)\?", lambda m: str(max(int(text) for text in m[1].split(", ")))),
    (r"Sort from small to large: ([\d, ]+)\.", lambda m: ", ".join(map(str, sorted(int(text) for text in m[1].split(", "))))),
    (r"Sort by the alphabet: ([\w, ]+)\.", lambda m: ", ".join(sorted(m[1].split(", ")))),
    (r"Repeat these words: ([\w, ]+)\.", lambda m: m[1]),
    (r"Say these words in reverse: ([\w, ]+)\.", lambda m: ", ".join(m[1].split(", ")[::-1])),
    (r"(.*)\. What does (\w+) have\?", _solve_key_value),
    (r"Which is word number (\d) of: ([\w, ]+)\?", lambda m: m[2].split(", ")[int(m[1]) - 1]),
)


def _rng(*key: int) -> random.Random:
    """A generator that depends on the key alone."""
    return random.Random(hashlib.sha256(repr(("choices", *key)).encode()).digest())
