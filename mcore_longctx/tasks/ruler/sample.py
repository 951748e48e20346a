"""The 13 tasks by name, and how a sample of any of them is made and solved.

[prefix ids] instruction (and example) | context, grown to the length | question and the answer's first words | reserve
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.tasks.haystack import Haystack
from mcore_longctx.tasks.ruler.counting import draft_coded, draft_common, solve_coded, solve_common
from mcore_longctx.tasks.ruler.draft import Draft, Match
from mcore_longctx.tasks.ruler.needles import NeedleTask, draft_needles, solve_needles
from mcore_longctx.tasks.ruler.questions import draft_question, solve_question
from mcore_longctx.tasks.ruler.texts import RulerTexts
from mcore_longctx.tasks.ruler.tracing import draft_tracing, solve_tracing
from mcore_longctx.tasks.ruler.words import identifier
from mcore_longctx.tasks.tokens import TextTokenizer, Tokens, encode_after, seeded

__all__ = [
    "RULER_TASKS",
    "RulerSample",
    "check_ruler_lengths",
    "check_ruler_tasks",
    "make_ruler_sample",
    "ruler_minimum_length",
    "score_ruler",
    "solve_ruler",
]

WHERE = "evaluate.ruler"
_DRAWS, _MARGIN = 16, 1.05  # drafts that the least length is taken over, and what other drafts may need more

Drafter = Callable[[random.Random, RulerTexts, TextTokenizer, int], Draft]


@dataclass(frozen=True)
class _Task:
    draft: Drafter
    solve: Callable[[str], tuple[str, ...]]
    reserve: int  # tokens kept free for the answer, as in RULER


def _needles(task: NeedleTask) -> _Task:
    return _Task(partial(draft_needles, task), partial(solve_needles, task), 128)


_TASKS: Mapping[str, _Task] = {
    "niah_single_1": _needles(NeedleTask(context="noise")),
    "niah_single_2": _needles(NeedleTask(context="text")),
    "niah_single_3": _needles(NeedleTask(context="text", value=identifier)),
    "niah_multikey_1": _needles(NeedleTask(context="text", keys=4)),
    "niah_multikey_2": _needles(NeedleTask(context="needles")),
    "niah_multikey_3": _needles(NeedleTask(context="needles", key=identifier, value=identifier)),
    "niah_multivalue": _needles(NeedleTask(context="text", values=4)),
    "niah_multiquery": _needles(NeedleTask(context="text", keys=4, asked=4)),
    "vt": _Task(draft_tracing, solve_tracing, 30),
    "cwe": _Task(draft_common, solve_common, 120),
    "fwe": _Task(draft_coded, solve_coded, 50),
    "qa_1": _Task(partial(draft_question, 1), partial(solve_question, 1), 32),
    "qa_2": _Task(partial(draft_question, 2), partial(solve_question, 2), 32),
}
RULER_TASKS: tuple[str, ...] = tuple(_TASKS)


@dataclass(frozen=True, kw_only=True)
class RulerSample:
    """A prompt and what is to follow it.

    Attributes:
        task: its name in `RULER_TASKS`.
        tokens: int64 [n], the whole prompt: prefix ids, instruction, context, question, the answer's first words.
        answer: int64 [m], what teacher forcing continues with: the references in the order asked, as the question wants them.
        expected: the references.
        match: "all": score is the share of them found in the output; "any": 1 if one is.
        reserve: tokens kept free for the output; n + reserve is at most the length asked for.
        depths: of the needles that are asked for, in the order asked: tokens of text before each / tokens of text. Else empty.
        needle_starts: positions of their first tokens in `tokens`.
        haystack_start: where in the haystack's ring the text was wanted to begin; 0 where the context is made.
        unique_share: share of the context that is not a repetition of itself.
    """

    task: str
    tokens: npt.NDArray[np.int64]
    answer: npt.NDArray[np.int64]
    expected: tuple[str, ...]
    match: Match
    reserve: int
    depths: tuple[float, ...]
    needle_starts: tuple[int, ...]
    haystack_start: int
    unique_share: float


def make_ruler_sample(
    task: str,
    texts: RulerTexts,
    tokenizer: TextTokenizer,
    *,
    seed: int,
    length: int,
    index: int,
    prefix: Sequence[int] = (),
) -> RulerSample:
    """A sample whose prompt and reserve together fill `length` tokens, as far as whole lines allow.

    Args:
        task: one of `RULER_TASKS`.
        texts: what is read by the tasks whose context is text.
        tokenizer: the model's tokenizer.
        seed: with task, length and index it decides everything that is drawn.
        length: tokens of prompt and answer.
        index: number of the sample.
        prefix: ids with which the model's tokenizer begins a text (begin token), if any.

    Raises:
        ConfigError: no such task, or a length below the task's least.
        DataError: the tokenizer joins the end of the prompt with the answer, or pieces of the prompt with each other.
    """
    check_ruler_tasks([task])
    draft = _TASKS[task].draft(seeded(task, int(seed), int(length), int(index)), texts, tokenizer, int(index))
    frame = _Frame.of(task, draft, tokenizer, prefix)
    room = length - frame.tokens
    if room < draft.least:
        least = max(ruler_minimum_length(task, tokenizer, prefix), frame.tokens + draft.least)
        what = f"{task} needs at least {least:,} tokens with this tokenizer, the length is {length:,}"
        raise ConfigError(what, where=f"{WHERE}.lengths", fix="use longer lengths, or leave the task out")
    body = draft.fill(room)
    assert len(body.tokens) <= room
    return RulerSample(
        task=task,
        tokens=np.concatenate([frame.head, body.tokens, frame.tail]),
        answer=frame.answer,
        expected=draft.expected,
        match=draft.match,
        reserve=frame.reserve,
        depths=body.depths,
        needle_starts=tuple(len(frame.head) + start for start in body.starts),
        haystack_start=body.haystack_start,
        unique_share=body.unique_share,
    )


def check_ruler_tasks(names: Sequence[str], *, where: object = f"{WHERE}.tasks") -> None:
    """Raise ConfigError, with the nearest name, unless all are in `RULER_TASKS`."""
    for name in names:
        if name not in _TASKS:
            near = difflib.get_close_matches(name, RULER_TASKS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown task {name!r}", where=where, fix=f"did you mean {near!r}?")


def ruler_minimum_length(task: str, tokenizer: TextTokenizer, prefix: Sequence[int] = ()) -> int:
    """Tokens of the shortest sample of a task, prompt and reserve. It depends on the tokenizer, not on the texts.

    Raises:
        ConfigError: no such task.
    """
    check_ruler_tasks([task])
    nothing = RulerTexts(Haystack(np.zeros(1, np.int64), np.ones(1, np.int64), np.empty(0, np.int64)))
    most = 0
    for index in range(_DRAWS):
        draft = _TASKS[task].draft(seeded("least", task, index), nothing, tokenizer, index)
        most = max(most, _Frame.of(task, draft, tokenizer, prefix).tokens + draft.least)
    return int(most * _MARGIN) + 1


def check_ruler_lengths(
    tasks: Sequence[str], shortest: int, tokenizer: TextTokenizer, prefix: Sequence[int] = ()
) -> dict[str, int]:
    """The least length of each task, in tokens.

    Raises:
        ConfigError: no such task, or some whose least is above `shortest`; all of these are named.
    """
    least = {task: ruler_minimum_length(task, tokenizer, prefix) for task in tasks}
    short = [f"{task} {tokens:,}" for task, tokens in least.items() if tokens > shortest]
    if short:
        raise ConfigError(
            f"{shortest:,} tokens are too few with this tokenizer for {', '.join(short)}",
            where=f"{WHERE}.lengths",
            fix=f"use longer lengths, or name the other tasks in {WHERE}.tasks",
        )
    return least


def solve_ruler(task: str, prompt: str) -> tuple[str, ...]:
    """The references that a reader of the rendered prompt finds, in the order asked.

    Raises:
        ConfigError: no such task.
        ValueError: the prompt does not answer its question, or not in one way alone.
    """
    check_ruler_tasks([task])
    return _TASKS[task].solve(prompt)


def score_ruler(expected: Sequence[str], match: Match, output: str) -> float:
    """Share of `expected` that is in `output`, or 1 if any is, whatever the case of letters. As in RULER.

    >>> score_ruler(("12", "34"), "all", "it is 34."), score_ruler(("Tiro", "tiro town"), "any", "TIRO")
    (0.5, 1.0)
    """
    found = [each.lower() in output.lower() for each in expected]
    return float(any(found)) if match == "any" else sum(found) / len(found)


@dataclass(frozen=True)
class _Frame:
    """Everything of a prompt but its context."""

    head: Tokens
    tail: Tokens
    answer: Tokens
    reserve: int

    @classmethod
    def of(cls, task: str, draft: Draft, tokenizer: TextTokenizer, prefix: Sequence[int]) -> _Frame:
        head = np.array([*prefix, *tokenizer.encode(draft.head)], dtype=np.int64)
        tail = encode_after(tokenizer, "\n", draft.question)
        answer = encode_after(tokenizer, draft.question, draft.answer)
        if not np.array_equal(encode_after(tokenizer, "\n", draft.question + draft.answer), np.concatenate([tail, answer])):
            raise DataError(
                f"the tokens of {draft.answer[:80]!r} drift with what stands before the question: the answer cannot be scored",
                where="tokenizer",
            )
        return cls(head, tail, answer, max(_TASKS[task].reserve, len(answer)))

    @property
    def tokens(self) -> int:
        """Prompt without its context, and reserve."""
        return len(self.head) + len(self.tail) + self.reserve
