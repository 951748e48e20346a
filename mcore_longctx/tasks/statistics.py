"""Intervals and paired tests for evaluation counts and losses, in plain arithmetic.

Which unit counts: for needles the sample, for losses the window (tokens of one text are correlated, windows hardly). Before and
after are measured on the same units, so their difference is paired and far narrower than either interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

__all__ = [
    "RULER_THRESHOLD",
    "EffectiveLength",
    "MeanInterval",
    "ScoreInterval",
    "effective_length",
    "exact_mcnemar",
    "macro_average",
    "mean_interval",
    "paired_mean_interval",
    "paired_sign_test",
    "score_interval",
    "student_t_quantile",
    "wilson_interval",
]

RULER_THRESHOLD = 0.856  # Llama-2-7B at 4K: 2404.06654 calls a length effective where a model scores more


@dataclass(frozen=True)
class ScoreInterval:
    """A mean of `count` scores of 0 to 1 and the ends of its interval, which need not lie evenly about it."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def certainty(self) -> float:
        """1 minus the width of the interval: 0.21 for 1/1, 0.72 for 10/10, 0.94 for 60/60."""
        return 1 - (self.high - self.low)


@dataclass(frozen=True)
class EffectiveLength:
    """Longest length above the threshold: by its `mean`, and by the lower end of its interval (`sure`); None: no length is."""

    mean: int | None
    sure: int | None


@dataclass(frozen=True)
class MeanInterval:
    """A mean over `count` units and the half width of its Student t interval (infinite for one unit)."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate; (0, 1) for no trials.

    >>> [round(x, 4) for x in wilson_interval(10, 10)]
    [0.7225, 1.0]

    Raises:
        ValueError: unless 0 <= successes <= trials.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    return _wilson(successes / trials, trials, _z(confidence)) if trials else (0.0, 1.0)


def score_interval(scores: Sequence[float], confidence: float = 0.95) -> ScoreInterval:
    """Mean of scores of 0 to 1 (a recall of several answers is fractional) with an interval that is honest at 0/n and n/n.

    `macro_average` of one task. Scores of 0 and 1 alone give `wilson_interval`.

    >>> found = score_interval([1.0, 0.75, 1.0, 0.5, 1.0])
    >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2)
    (0.85, 0.47, 0.97)

    Raises:
        ValueError: no scores, or one outside 0 to 1.
    """
    return macro_average({"scores": scores}, confidence)


def macro_average(scores: Mapping[str, Sequence[float]], confidence: float = 0.95) -> ScoreInterval:
    """Mean over tasks of the mean of each task's scores, every task with the same weight; `count` is the number of all scores.

    The interval is Wilson's, with the effective sample size in place of the number of trials (Korn and Graubard 1998): n answers of
    right or wrong at rate m have a mean of variance m (1 - m) / n, which for given m is the largest that scores of 0 to 1 can have
    (Bhatia and Davis 2000). The variance of our mean is estimated task by task; its ratio to the largest one, the design effect,
    says how many answers of right or wrong the scores are worth. Variances are measured with z^2 / 2 zeros and as many ones added
    (the pseudo-observations of Agresti and Coull 1998), spread evenly over the tasks, so that neither n/n nor five scores of 0.75
    look exact. The tasks are those that were asked, not a draw from others: the interval says what more of their samples would give.

    Raises:
        ValueError: no tasks, a task without scores, or a score outside 0 to 1.
    """
    if not scores or not all(scores.values()):
        raise ValueError("no scores")
    worst = [value for values in scores.values() for value in values if not 0 <= value <= 1]
    if worst:
        raise ValueError(f"a score of {worst[0]}, not of 0 to 1")
    z, tasks = _z(confidence), len(scores)
    added = z * z / (2 * tasks)  # zeros, and as many ones, of each task
    shrunk_means, variances = [], []
    for values in scores.values():
        trials = len(values) + 2 * added
        shrunk = (math.fsum(values) + added) / trials
        squares = math.fsum((value - shrunk) ** 2 for value in values) + added * ((1 - shrunk) ** 2 + shrunk**2)
        shrunk_means.append(shrunk)
        variances.append(squares / trials / trials)  # of the task's mean
    mean = fmean(fmean(values) for values in scores.values())
    trials = tasks**2 / math.fsum(1 / len(values) for values in scores.values())  # their number, if the tasks have equally many
    shrunk = fmean(shrunk_means)
    largest = shrunk * (1 - shrunk) / (trials + z * z)
    design_effect = math.fsum(variances) / tasks**2 / largest
    return ScoreInterval(mean, *_wilson(mean, trials / design_effect, z), sum(map(len, scores.values())))


def effective_length(averages: Mapping[int, ScoreInterval], threshold: float = RULER_THRESHOLD) -> EffectiveLength:
    """RULER's measure (2404.06654): the longest length whose average is above the threshold; `sure`: whose lower end is."""
    means = [length for length, average in averages.items() if average.mean > threshold]
    sure = [length for length, average in averages.items() if average.low > threshold]
    return EffectiveLength(max(means, default=None), max(sure, default=None))


def paired_sign_test(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, float]:
    """(lost, won, exact two-sided p) of the same samples before and after: the sign test; McNemar's for scores of 0 and 1.

    Raises:
        ValueError: not the same number of samples.
    """
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    won = sum(b < a for b, a in zip(before, after, strict=True))
    return lost, won, exact_mcnemar(lost, won)


def exact_mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p that samples change sides by chance: `lost` right before and wrong after, `won` the reverse.

    >>> exact_mcnemar(0, 6)
    0.03125

    Raises:
        ValueError: a negative count.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} lost, {won} won")
    changed = lost + won
    tail = sum(math.comb(changed, i) for i in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """Mean of one value per unit (window or document) with its Student t interval.

    A value that is no finite number, such as the loss of a model that has diverged, makes the mean one that is none either.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    count = len(values)
    if not all(map(math.isfinite, values)):
        return MeanInterval(math.nan, math.inf, count)
    if count == 1:
        return MeanInterval(values[0], math.inf, 1)
    half = student_t_quantile(0.5 + confidence / 2, count - 1) * stdev(values) / math.sqrt(count)
    return MeanInterval(fmean(values), half, count)


def paired_mean_interval(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """Interval of the mean of after - before, unit by unit.

    Raises:
        ValueError: no values, or not the same units.
    """
    return mean_interval([b - a for a, b in zip(before, after, strict=True)], confidence)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _wilson(rate: float, trials: float, z: float) -> tuple[float, float]:
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / scale
    # rounding must not push the ends past what was seen: 0/n begins at 0, n/n ends at 1
    low = 0.0 if rate == 0 else min(rate, max(0.0, centre - half))
    high = 1.0 if rate == 1 else max(rate, min(1.0, centre + half))
    return low, high


def student_t_quantile(probability: float, freedom: int) -> float:
    """The t below which `probability` (0.5 to 1) of Student's distribution lies; `freedom` degrees of freedom.

    >>> round(student_t_quantile(0.975, 11), 3)
    2.201

    Raises:
        ValueError: probability outside [0.5, 1) or freedom below 1.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"probability {probability}, {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _student_t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _student_t_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, by the finite series of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    theta = math.atan(t / math.sqrt(freedom))
    cos, odd = math.cos(theta), freedom % 2
    term = cos if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):  # both series have floor(freedom / 2) terms
        total += term
        term *= cos * cos * (2 * k + 2) / (2 * k + 3) if odd else cos * cos * (2 * k + 1) / (2 * k + 2)
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return 0.5 + inside / 2
