"""Questions about long tables of invented things, with computed answers (LongSkywork, arXiv 2406.00605, makes such data for its long SFT).

The first message holds the tables and the first question, the others a question each; an answer recites the rows that it follows
from and then says the value. Nothing in it is a fact of the world, so nothing is learned but to read. The original's prompts and
ratios are not published: the questions are ours. Table A may be joined with a table B over its group column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from mcore_longctx.data.synthesis.draws import Draws, new_names
from mcore_longctx.data.synthesis.sized import Messages, TokenCounter, fit
from mcore_longctx.data.synthesis.table_questions import QUESTIONS, Question, Table, Tables

__all__ = ["make_tables_chat"]

_THEMES = (  # entity, group, what table B says of a group
    ("person", "town", "river"),
    ("ship", "harbour", "coast"),
    ("mine", "valley", "owner"),
    ("song", "singer", "island"),
)
_NUMBERS = (("points", 10, 99), ("seats", 100, 999), ("tons", 1000, 9999), ("steps", 10000, 99999), ("years", 10, 999))
_STYLES = ("markdown", "csv", "sentences")
_NEW_GROUP = 1 / 5  # so a group has about five rows, however long the table is
_SMALLEST = 3  # rows


@dataclass(frozen=True)
class _Look:
    """What a chat's tables are about and how they are written."""

    style: str
    columns: tuple[str, ...]  # key, group, numbers
    ranges: tuple[tuple[int, int], ...]  # of the numbers
    extra: str | None  # column of table B; None: there is none
    kinds: tuple[str, ...] = tuple(QUESTIONS)


def make_tables_chat(count: TokenCounter, *, seed: int, index: int, length: int, turns: int = 4) -> dict[str, Any]:
    """One chat of at most `length` tokens with `turns` questions, fewer where so many do not fit: a record for `data build`.

    Beside id and messages it says the style of the tables, rows, tokens and the kind of every question.

    Args:
        count: of tokens.
        seed: of all chats.
        index: of this chat.
        length: tokens at most.
        turns: questions.

    Raises:
        DataError: no table of three rows with one question fits.
    """

    def chat(rows: _Rows, size: int, turns: int) -> tuple[Messages, list[Question]]:
        tables = rows.tables(size)
        questions = _ask(tables, Draws(seed, index, "questions"), turns, rows.look.kinds)
        return _messages(tables, questions), questions

    for look in _looks(Draws(seed, index, "look")):
        rows = _Rows(look, seed, index)
        if count(chat(rows, _SMALLEST, 1)[0]) <= length:
            break
    while turns > 1 and count(chat(rows, _SMALLEST, turns)[0]) > length:
        turns -= 1
    fitted = fit(lambda size: chat(rows, size, turns)[0], count, length, smallest=_SMALLEST, where="data synth tables")
    _, questions = chat(rows, fitted.size, turns)
    return {
        "id": f"tables-{seed}-{length}-{index}",
        "messages": fitted.messages,
        "tokens": fitted.tokens,
        "rows": fitted.size,
        "style": look.style,
        "questions": [question.kind for question in questions],
    }


def _looks(draws: Draws) -> Iterator[_Look]:
    """What is drawn for a chat, and what is taken instead where that does not fit: no table B, two numbers, the shortest answers."""
    drawn = _look(draws)
    yield drawn
    yield replace(drawn, extra=None)
    narrow = replace(drawn, extra=None, columns=drawn.columns[:4], ranges=drawn.ranges[:2])
    yield narrow
    yield replace(narrow, kinds=("look-up",))


def _look(draws: Draws) -> _Look:
    entity, group, extra = draws.choice(_THEMES)
    numbers = draws.sample(_NUMBERS, draws.between(2, 4))
    return _Look(
        style=draws.choice(_STYLES),
        columns=(entity, group, *(name for name, _, _ in numbers)),
        ranges=tuple((low, high) for _, low, high in numbers),
        extra=extra if draws.chance(0.5) else None,
    )


class _Rows:
    """The rows of a chat's tables. The first n are the same for every size, so that a longer table costs what its rows cost."""

    def __init__(self, look: _Look, seed: int, index: int) -> None:
        self.look, self._key = look, (seed, index)
        self._rows: list[tuple[str, ...]] = []
        self._stream = self._draw()

    def tables(self, size: int) -> Tables:
        """Table A of `size` rows, and table B of the groups in it."""
        self._rows.extend(islice(self._stream, max(0, size - len(self._rows))))
        look = self.look
        first = Table("A", look.columns, self._rows[:size], look.style)
        if look.extra is None:
            return Tables(first, None)
        groups = list(dict.fromkeys(row[1] for row in first.rows))
        # a name for each group, in the order of the groups; then in an order that says nothing about table A
        extras = zip(groups, islice(new_names(Draws(*self._key, "table B"), 1), len(groups)), strict=True)
        rows = Draws(*self._key, "order of B").shuffled(list(extras))
        return Tables(first, Table("B", (look.columns[1], look.extra), rows, look.style))

    def _draw(self) -> Iterator[tuple[str, ...]]:
        draws, names = Draws(*self._key, "rows"), new_names(Draws(*self._key, "names"), 2)
        new_groups = new_names(Draws(*self._key, "groups"), 1)
        groups: list[str] = []
        for name in names:
            if not groups or draws.chance(_NEW_GROUP):
                groups.append(next(new_groups))
            numbers = (str(draws.between(low, high)) for low, high in self.look.ranges)
            yield (name, draws.choice(groups), *numbers)


def _ask(tables: Tables, draws: Draws, turns: int, among: Sequence[str]) -> list[Question]:
    """Questions of different kinds as long as there are, no question twice."""
    kinds: list[str] = []
    found: dict[str, Question] = {}
    for _ in range(20 * turns):
        if len(found) == turns:
            break
        if not kinds:
            kinds = draws.shuffled([kind for kind in among if kind != "join" or tables.second is not None])
        question = QUESTIONS[kinds.pop()](tables, draws)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def _messages(tables: Tables, questions: Sequence[Question]) -> Messages:
    text = "\n\n".join(table.text() for table in (tables.first, tables.second) if table is not None)
    messages: Messages = []
    for number, question in enumerate(questions):
        messages.append({"role": "user", "content": question.text if number else f"{text}\n\n{question.text}"})
        messages.append({"role": "assistant", "content": question.answer})
    return messages
