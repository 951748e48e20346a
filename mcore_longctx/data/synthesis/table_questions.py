"""Tables as text, and the kinds of questions about them with their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mcore_longctx.data.synthesis.draws import Draws

__all__ = ["QUESTIONS", "Question", "Table", "Tables"]

Row = tuple[str, ...]

_MOST_RECITED = 8  # rows of a group, where a group of at most so many is found


@dataclass(frozen=True)
class Table:
    """A table and how it is written: `markdown`, `csv` or `sentences`."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    style: str

    def line(self, row: Row) -> str:
        """One row as it stands in the text."""
        if self.style == "sentences":
            rest = ", ".join(f"{column} {value}" for column, value in zip(self.columns[1:], row[1:], strict=True))
            return f"{row[0]}: {rest}."
        return f"| {' | '.join(row)} |" if self.style == "markdown" else ",".join(row)

    def text(self) -> str:
        """The whole table under its name."""
        head = [f"Table {self.name}"]
        if self.style == "markdown":
            head += [self.line(self.columns), "|" + "---|" * len(self.columns)]
        elif self.style == "csv":
            head.append(self.line(self.columns))
        else:
            head[0] += f", each line a {self.columns[0]}"
        return "\n".join([*head, *map(self.line, self.rows)])


@dataclass(frozen=True)
class Tables:
    """Table A, and table B if there is one, whose key is the second column of A."""

    first: Table
    second: Table | None


@dataclass(frozen=True)
class Question:
    """A question and its answer: the rows used, then the value."""

    kind: str
    text: str
    used: tuple[str, ...]  # lines of the tables
    value: str

    @property
    def answer(self) -> str:
        """What the assistant says."""
        return "\n".join(["Rows used:", *(self.used or ("none",)), f"Answer: {self.value}"])


def _number(tables: Tables, draws: Draws) -> tuple[int, str]:
    """One of the columns with numbers, and its name."""
    column = draws.between(2, len(tables.first.columns) - 1)
    return column, tables.first.columns[column]


def _group(tables: Tables, draws: Draws) -> tuple[str, list[Row]]:
    """A group and its rows: of several tries, one that is small enough to be recited."""
    rows = tables.first.rows
    for _ in range(10):
        group = draws.choice(rows)[1]
        members = [row for row in rows if row[1] == group]
        if 2 <= len(members) <= _MOST_RECITED:
            break
    return group, members


def _look_up(tables: Tables, draws: Draws) -> Question:
    column, name = _number(tables, draws)
    row = draws.choice(tables.first.rows)
    return Question("look-up", f"In table A, what is the {name} of {row[0]}?", (tables.first.line(row),), row[column])


def _reverse(tables: Tables, draws: Draws) -> Question | None:
    column, name = _number(tables, draws)
    times = Counter(row[column] for row in tables.first.rows)
    row = draws.choice(tables.first.rows)
    if times[row[column]] > 1:
        return None
    text = f"In table A, which {tables.first.columns[0]} has {name} {row[column]}?"
    return Question("reverse look-up", text, (tables.first.line(row),), row[0])


def _count(tables: Tables, draws: Draws) -> Question:
    column, name = _number(tables, draws)
    group, members = _group(tables, draws)
    border = draws.choice(members)[column]
    found = [row for row in members if int(row[column]) > int(border)]
    text = f"In table A, how many rows have {tables.first.columns[1]} {group} and {name} above {border}?"
    return Question("filter and count", text, tuple(map(tables.first.line, found)), str(len(found)))


def _extreme(tables: Tables, draws: Draws) -> Question | None:
    column, name = _number(tables, draws)
    group, members = _group(tables, draws)
    highest = draws.chance(0.5)
    ordered = sorted(members, key=lambda row: int(row[column]), reverse=highest)
    if len(members) < 2 or ordered[0][column] == ordered[1][column]:
        return None
    which = "highest" if highest else "lowest"
    columns = tables.first.columns
    text = f"In table A, which {columns[0]} has the {which} {name} among the rows with {columns[1]} {group}?"
    return Question(which, text, tuple(map(tables.first.line, members)), ordered[0][0])


def _sum(tables: Tables, draws: Draws) -> Question:
    column, name = _number(tables, draws)
    group, members = _group(tables, draws)
    text = f"In table A, what is the sum of {name} over the rows with {tables.first.columns[1]} {group}?"
    return Question("sum", text, tuple(map(tables.first.line, members)), str(sum(int(row[column]) for row in members)))


def _join(tables: Tables, draws: Draws) -> Question | None:
    assert tables.second is not None
    row = draws.choice(tables.first.rows)
    (other,) = (other for other in tables.second.rows if other[0] == row[1])
    group, extra = tables.second.columns
    text = f"Which {extra} does table B give for the {group} that table A gives for {row[0]}?"
    return Question("join", text, (tables.first.line(row), tables.second.line(other)), other[1])


def _next_row(tables: Tables, draws: Draws) -> Question | None:
    rows = tables.first.rows
    at = draws.below(len(rows) - 1)
    text = f"In table A, which {tables.first.columns[0]} stands in the row directly after {rows[at][0]}?"
    return Question("next row", text, tuple(map(tables.first.line, rows[at : at + 2])), rows[at + 1][0])


QUESTIONS: dict[str, Callable[[Tables, Draws], Question | None]] = {
    "look-up": _look_up,
    "reverse look-up": _reverse,
    "filter and count": _count,
    "extreme": _extreme,
    "sum": _sum,
    "join": _join,
    "next row": _next_row,
}
