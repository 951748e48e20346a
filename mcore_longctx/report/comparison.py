"""Several ways to extend one base, compared: the same tokens of training, the same evaluation, several seeds of each.

The unit is the training run. A figure of a method is its mean over runs, with Student's t interval over them. A rate of right answers
also has the interval of its samples, which are the same for every run: more runs do not narrow it. The wider of the two is shown, so that
three runs of 60 of 60 do not look exact. A difference to the reference is paired by seed: runs of one seed see the same order of the
same documents where they can.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from mcore_longctx.report.counts import by_length, needle_counts, ruler_averages, ruler_tasks
from mcore_longctx.report.losses import loss_bins, short_loss
from mcore_longctx.report.run_folder import Column, NeedleKind
from mcore_longctx.tasks.statistics import MeanInterval, mean_interval, paired_mean_interval, wilson_interval

__all__ = ["Arm", "Comparison", "Figure", "Measure", "compare_arms", "comparison_lines"]


@dataclass(frozen=True)
class Arm:
    """One method: its name, what it is in a few words, and what each of its runs measured, by seed."""

    name: str
    about: str
    tokens: int  # of training
    columns: Mapping[int, Column]


@dataclass(frozen=True)
class Figure:
    """One measure of one method.

    Attributes:
        mean: over the runs; a rate is a share of 1.
        low: lower end of its 95 % interval.
        high: upper end.
        runs: seed -> value.
        right: of a rate, right answers of all runs, else None.
        all: and all answers.
        difference: mean of (this - reference) over the seeds that both ran; None for the reference.
        difference_low: lower end of its interval.
        difference_high: upper end.
    """

    mean: float
    low: float
    high: float
    runs: Mapping[int, float]
    right: float | None = None
    all: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        if self.difference_low is None or self.difference_high is None:
            return False
        return self.difference_low > 0 or self.difference_high < 0


@dataclass(frozen=True)
class Measure:
    """What is compared: `needle 4,096`, a rate (higher is better) or a loss in nats per token (lower is better)."""

    name: str
    kind: Literal["rate", "loss"]


@dataclass(frozen=True)
class Comparison:
    """All measures of all methods; the first arm is the reference. A method that was not measured so has no figure there.

    `base`: measure -> value of the model that all start from, untrained; it has no runs, so no interval over them.
    """

    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    figures: Mapping[tuple[str, str], Figure]  # (arm, measure)
    base: Mapping[str, Figure]

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {
            "reference": self.arms[0].name,
            "base": {name: _plain_json(asdict(figure)) for name, figure in self.base.items()},
            "methods": [
                {
                    "name": arm.name,
                    "about": arm.about,
                    "tokens": arm.tokens,
                    "seeds": sorted(arm.columns),
                    "measures": {
                        measure.name: {"kind": measure.kind, **_plain_json(asdict(self.figures[arm.name, measure.name]))}
                        for measure in self.measures
                        if (arm.name, measure.name) in self.figures
                    },
                }
                for arm in self.arms
            ],
        }


@dataclass(frozen=True)
class _Value:
    """Of one run: a value, and for a rate the answers behind it and the interval of its samples."""

    value: float
    right: float | None = None
    all: int | None = None
    low: float = 0.0
    high: float = 1.0


def _plain_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not finite becomes null: JSON has no word for it."""
    nested = {name: _plain_json(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in nested.items()}


def compare_arms(arms: Sequence[Arm], *, base: Column | None = None) -> Comparison:
    """Figures of every method, the first as the reference.

    Args:
        arms: the methods.
        base: what the model that all start from measured.

    Raises:
        ValueError: no arms, or one without runs.
    """
    if not arms or not all(arm.columns for arm in arms):
        raise ValueError("nothing to compare: every method needs a run")
    tasks = ruler_tasks([column.ruler for arm in arms for column in arm.columns.values()])
    values = {arm.name: {seed: dict(_values(column, tasks)) for seed, column in sorted(arm.columns.items())} for arm in arms}
    measures = list(dict.fromkeys(measure for runs in values.values() for found in runs.values() for measure in found))
    figures = {}
    for arm in arms:
        for measure in measures:
            own = _of(values[arm.name], measure)
            if own:
                reference = None if arm is arms[0] else _of(values[arms[0].name], measure)
                figures[arm.name, measure.name] = _figure(measure, own, reference)
    untrained = _values(base, tasks) if base is not None else []
    of_base = {measure.name: _figure(measure, {0: value}, None) for measure, value in untrained if measure in measures}
    rates_first = sorted(measures, key=lambda measure: measure.kind == "loss")
    return Comparison(tuple(arms), tuple(rates_first), figures, of_base)


def _of(runs: Mapping[int, Mapping[Measure, _Value]], measure: Measure) -> dict[int, _Value]:
    return {seed: found[measure] for seed, found in runs.items() if measure in found}


def _values(column: Column, tasks: Sequence[str]) -> list[tuple[Measure, _Value]]:
    """What one run measured."""
    found: list[tuple[Measure, _Value]] = []
    for kind, rows in sorted(column.needles.items()):
        for length, count in needle_counts(rows, by_length).items():
            value = _Value(count.rate, count.right, count.all, *count.interval)
            found.append((Measure(f"{_needle_name(kind)} {length:,}", "rate"), value))
    for length, average in ruler_averages(column.ruler, tasks).items():
        if average.is_whole:
            ends = (average.interval.low, average.interval.high)
            value = _Value(average.interval.mean, average.count.right, average.count.all, *ends)
            found.append((Measure(f"ruler-like {length:,}", "rate"), value))
    if column.short_suite:
        right = [bool(row["correct"]) for row in column.short_suite.values()]
        ends = wilson_interval(sum(right), len(right))
        found.append((Measure("short suite", "rate"), _Value(fmean(right), sum(right), len(right), *ends)))
    bins = loss_bins(column)
    if bins:
        (first, end), windows = max(bins.items())
        found.append((Measure(f"loss {first:,}-{end:,}", "loss"), _Value(fmean(windows.values()))))
    if column.short_context:
        found.append((Measure("short loss", "loss"), _Value(fmean(short_loss(column).values()))))
    return found


def _needle_name(kind: NeedleKind) -> str:
    return ("pass key" if kind.kind == "passkey" else "fact") + (" (shared)" if kind.shared else "")


def _figure(measure: Measure, own: Mapping[int, _Value], reference: Mapping[int, _Value] | None) -> Figure:
    runs = {seed: value.value for seed, value in own.items()}
    over_runs = mean_interval(list(runs.values()))
    low, high = over_runs.low, over_runs.high
    answers: tuple[float | None, int | None] = (None, None)
    if measure.kind == "rate":
        low, high = _wider(over_runs, _of_samples(own.values()))
        low, high = max(0.0, low), min(1.0, high)
        answers = math.fsum(value.right or 0 for value in own.values()), sum(value.all or 0 for value in own.values())
    figure = Figure(over_runs.mean, low, high, runs, *answers)
    seeds = sorted(own.keys() & reference.keys()) if reference is not None else []
    if reference is None or not seeds:
        return figure
    before, after = [reference[seed] for seed in seeds], [own[seed] for seed in seeds]
    change = paired_mean_interval([value.value for value in before], [value.value for value in after])
    low, high = change.low, change.high
    if measure.kind == "rate":
        low, high = _wider(change, _newcombe(before, after))
        low, high = max(-1.0, low), min(1.0, high)
    return replace(figure, difference=change.mean, difference_low=low, difference_high=high)


def _wider(over_runs: MeanInterval, of_samples: tuple[float, float]) -> tuple[float, float]:
    """Both ends of the interval over runs, or of that of the samples where it reaches further; of one run the samples say it all."""
    if over_runs.count == 1:
        return of_samples
    return min(over_runs.low, of_samples[0]), max(over_runs.high, of_samples[1])


def _of_samples(values: Collection[_Value]) -> tuple[float, float]:
    """Interval of a mean over runs that all answered the same samples: that of one run, its ends averaged over the runs."""
    return fmean(value.low for value in values), fmean(value.high for value in values)


def _newcombe(before: Collection[_Value], after: Collection[_Value]) -> tuple[float, float]:
    """Interval of the difference of two rates from the interval of each. Source: Newcombe 1998, method 10.

    The samples of both are taken as independent; they are the same, which makes the true interval narrower.
    """
    p_1, p_2 = fmean(value.value for value in after), fmean(value.value for value in before)
    (low_1, high_1), (low_2, high_2) = _of_samples(after), _of_samples(before)
    difference = p_1 - p_2
    return difference - math.hypot(p_1 - low_1, high_2 - p_2), difference + math.hypot(high_1 - p_1, p_2 - low_2)


# ------------------------------------------------------------------ as text
def comparison_lines(comparison: Comparison) -> list[str]:
    """For people: a block for each measure, a line for each method: mean, interval, runs, difference to the reference."""
    lines = []
    width = max(4, *(len(arm.name) for arm in comparison.arms))
    for measure in comparison.measures:
        lines.append(f"{measure.name}{'' if measure.kind == 'rate' else ' (nats per token, lower is better)'}")
        if measure.name in comparison.base:
            lines.append(f"  {'base':<{width}}  {_line(measure, comparison.base[measure.name])}")
        for arm in comparison.arms:
            figure = comparison.figures.get((arm.name, measure.name))
            lines.append(f"  {arm.name:<{width}}  {'not measured' if figure is None else _line(measure, figure)}")
    reference = comparison.arms[0].name
    lines.append(
        f"95 % intervals over training runs, no narrower than those of the samples; differences to {reference}, paired by seed"
    )
    return lines


def _line(measure: Measure, figure: Figure) -> str:
    if measure.kind == "rate":
        found = f"{_plain(figure.right)}/{figure.all}"
        text = f"{found:>9}  {100 * figure.mean:5.1f} %  [{100 * figure.low:5.1f}, {100 * figure.high:5.1f}]"
        runs = " ".join(f"{100 * value:.0f}" for value in figure.runs.values())
    else:
        text = f"{figure.mean:7.3f}  {_range(figure.low, figure.high, 1, 3)}"
        runs = " ".join(f"{value:.3f}" for value in figure.runs.values())
    line = f"{text}  runs {runs}"
    if figure.difference is None:
        return line
    scale, digits = (100, 1) if measure.kind == "rate" else (1, 3)
    ends = _range(figure.difference_low, figure.difference_high, scale, digits)
    return f"{line}  difference {scale * figure.difference:+.{digits}f} {ends}{' *' if figure.differs else ''}"


def _range(low: float | None, high: float | None, scale: float, digits: int) -> str:
    if low is None or high is None or not math.isfinite(high - low):
        return "[one run]"
    return f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _plain(points: float | None) -> str:
    assert points is not None
    return f"{points:,.0f}" if abs(points - round(points)) < 1e-9 else f"{points:,.1f}"
