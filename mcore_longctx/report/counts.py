"""Right answers of all that were asked: needles by cell and length, ruler-like tasks, the short suite; before against after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from mcore_longctx.report.rows import Row
from mcore_longctx.tasks.statistics import (
    EffectiveLength,
    ScoreInterval,
    effective_length,
    macro_average,
    paired_sign_test,
    score_interval,
    wilson_interval,
)

__all__ = [
    "Average",
    "Changed",
    "Count",
    "by_cell",
    "by_length",
    "compare",
    "needle_counts",
    "p_value",
    "percent_interval",
    "ruler_averages",
    "ruler_counts",
    "ruler_effective_length",
    "ruler_scorings",
    "ruler_tasks",
    "same_samples",
    "shared_samples",
    "suite_changed",
    "suite_counts",
]

Key = TypeVar("Key")
RulerRows = Mapping[tuple[str, int, int], Row]
SuiteRows = Mapping[tuple[str, int], Row]


@dataclass(frozen=True)
class Count:
    """`right` of `all` answers, with a 95 % interval.

    Attributes:
        right: answers; a task with several of them in a sample gives parts of one.
        all: samples.
        ends: of the interval, where it is not Wilson's of right and wrong: parts of answers, or samples that are no independent ones.
    """

    right: float
    all: int
    ends: tuple[float, float] | None = None

    @classmethod
    def of_scores(cls, scores: Sequence[float]) -> Count:
        """Of scores of 0 to 1, one a sample."""
        found = score_interval(scores)
        return cls(math.fsum(scores), len(scores), (found.low, found.high))

    @property
    def rate(self) -> float:
        """Share of right samples; 0 without samples."""
        return self.right / self.all if self.all else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return wilson_interval(round(self.right), self.all) if self.ends is None else self.ends

    @property
    def certainty(self) -> float:
        """1 minus the width of the interval: 0.21 for 1/1, 0.72 for 10/10, 0.94 for 60/60."""
        low, high = self.interval
        return 1 - (high - low)

    def __str__(self) -> str:
        return f"{_plain(self.right)}/{self.all}"


def _plain(points: float) -> str:
    """Whole numbers without a point; else one digit, never rounded to all or nothing."""
    if abs(points - round(points)) < 1e-9:
        return f"{round(points):,}"
    tenths = max(0.1, math.floor(points * 10) / 10)
    return f"{tenths:,.1f}"


@dataclass(frozen=True)
class Changed:
    """Of the `same` samples of two columns, those that scored less and more afterwards, and the p of `paired_sign_test`."""

    lost: int
    won: int
    p: float
    same: int


@dataclass(frozen=True)
class Average:
    """Macro average of a length over the tasks measured there; `is_whole`: over all tasks of the run."""

    interval: ScoreInterval
    count: Count
    tasks: int
    is_whole: bool
    samples: tuple[int, int]  # fewest and most of a task


def needle_counts(rows: Mapping[Any, Row], by: Callable[[Row], Any]) -> dict[Any, Count]:
    """Right and all samples per group, for example per length, or per (length, depth).

    Needles that share a haystack are read in one go and stand or fall together: then the haystack is the unit of the interval.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows.values():
        groups.setdefault(by(row), []).append(row)
    return {group: _needle_count(groups[group]) for group in sorted(groups)}


def _needle_count(rows: Sequence[Row]) -> Count:
    right = sum(bool(row["correct"]) for row in rows)
    if not _is_shared(rows[0]):
        return Count(right, len(rows))
    found = score_interval([fmean(scores) for scores in _by_unit(rows).values()])
    return Count(right, len(rows), (found.low, found.high))


def _is_shared(row: Row) -> bool:
    return bool(row.get("shared", row.get("task") == "needles_shared"))


def _by_unit(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[float]]:
    """Scores by sample, or by haystack where needles share one."""
    units: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        unit = (row["length"], row["index"]) if _is_shared(row) else (row["length"], row["depth"], row["index"])
        units.setdefault(unit, []).append(float(row["correct"]))
    return units


def by_length(row: Row) -> int:
    """Group of a row: its length."""
    return int(row["length"])


def by_cell(row: Row) -> tuple[int, float]:
    """Group of a needle row: its cell of the grid."""
    return int(row["length"]), float(row["depth"])


def compare(before: Mapping[Any, Row], after: Mapping[Any, Row], length: int | None = None) -> Changed | None:
    """Rows of needles, ruler-like tasks or the short suite on the samples that both measured; None if they share none.

    What makes a sample the same: see `shared_samples`. `length`: of these samples alone.
    """
    old, new = shared_samples(before, after)
    pairs = [(row, new[key]) for key, row in old.items() if length is None or row["length"] == length]
    if not pairs:
        return None
    if _is_shared(pairs[0][0]):
        units = [list(map(fmean, _by_unit(side).values())) for side in zip(*pairs, strict=True)]
    else:
        units = [[_score(row) for row in side] for side in zip(*pairs, strict=True)]
    return Changed(*paired_sign_test(*units), same=len(units[0]))


def shared_samples(before: Mapping[Key, Row], after: Mapping[Key, Row]) -> tuple[dict[Key, Row], dict[Key, Row]]:
    """The rows of the samples that both measured, in the order of the first.

    A sample is the same when its seed, its expected answer, the text it was measured on and the way of scoring are. Rows that do not
    say their text are the same only where both do not.
    """
    same = [key for key, row in before.items() if key in after and _sample(row) == _sample(after[key])]
    return {key: before[key] for key in same}, {key: after[key] for key in same}


def same_samples(columns: Iterable[Mapping[Key, Row]]) -> bool:
    """Whether all columns that measured anything measured the same samples."""
    measured = [column for column in columns if column]
    return all(
        column.keys() == measured[0].keys() and len(shared_samples(measured[0], column)[0]) == len(column) for column in measured
    )


def _sample(row: Row) -> list[Any]:
    return [row.get("seed"), row.get("expected"), row.get("text"), _scoring(row)]


def _scoring(row: Row) -> str:
    return str(row.get("scoring", "teacher_forced"))


def _score(row: Row) -> float:
    """What a sample is worth: a ruler-like task's share of answers, else right or wrong."""
    return float(row["score"]) if row.get("protocol") else float(row["correct"])


def ruler_tasks(columns: Iterable[RulerRows]) -> list[str]:
    """Tasks in the order in which they were measured."""
    return list(dict.fromkeys(task for rows in columns for task, _, _ in rows))


def ruler_scorings(columns: Iterable[RulerRows]) -> list[str]:
    """Ways in which the rows were scored, in words."""
    return sorted({_scoring(row).replace("_", " ") for rows in columns for row in rows.values()})


def ruler_counts(rows: RulerRows) -> dict[tuple[str, int], Count]:
    """(task, length) -> points of all samples."""
    return {key: Count.of_scores(scores) for key, scores in _ruler_scores(rows).items()}


def _ruler_scores(rows: RulerRows) -> dict[tuple[str, int], list[float]]:
    scores: dict[tuple[str, int], list[float]] = {}
    for (task, length, _), row in sorted(rows.items()):
        scores.setdefault((task, length), []).append(float(row["score"]))
    return scores


def ruler_averages(rows: RulerRows, tasks: Sequence[str]) -> dict[int, Average]:
    """Length -> macro average. `tasks`: all of the run; an average over fewer is marked."""
    scores = _ruler_scores(rows)
    found = {}
    for length in sorted({length for _, length in scores}):
        here = {task: scores[task, length] for task in tasks if (task, length) in scores}
        counts = [len(values) for values in here.values()]
        points = math.fsum(value for values in here.values() for value in values)
        interval = macro_average(here)
        count = Count(points, interval.count, (interval.low, interval.high))
        found[length] = Average(interval, count, len(here), len(here) == len(tasks), (min(counts), max(counts)))
    return found


def ruler_effective_length(averages: Mapping[int, Average]) -> EffectiveLength:
    """RULER's measure over the lengths at which every task was measured."""
    return effective_length({length: average.interval for length, average in averages.items() if average.is_whole})


def suite_counts(rows: SuiteRows) -> dict[str, Count]:
    """Task -> right and all questions, in the order measured."""
    tasks: dict[str, list[bool]] = {}
    for (task, _), row in rows.items():
        tasks.setdefault(task, []).append(bool(row["correct"]))
    return {task: Count(sum(right), len(right)) for task, right in tasks.items()}


def suite_changed(before: SuiteRows, after: SuiteRows) -> dict[str, Changed]:
    """Task -> questions lost and won, of the tasks that both measured."""
    found = {}
    for task in suite_counts(before):
        old, new = ({key: row for key, row in rows.items() if key[0] == task} for rows in (before, after))
        changed = compare(old, new)
        if changed is not None:
            found[task] = changed
    return found


def percent_interval(count: Count | ScoreInterval) -> str:
    """For example `83–94 %`, rounded outwards."""
    low, high = count.interval if isinstance(count, Count) else (count.low, count.high)
    return f"{math.floor(100 * low + 1e-9)}–{math.ceil(100 * high - 1e-9)} %"


def p_value(p: float) -> str:
    """For example `0.031`, `2e-18`."""
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"
