"""Intervals and paired tests for evaluation counts and losses, in plain arithmetic.

Which unit counts: for needles the sample, for losses the window (tokens of one text are correlated, windows hardly). Before and
after are measured on the same units, so their difference is paired and far narrower than either interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

__all__ = ["MeanInterval", "exact_mcnemar", "mean_interval", "paired_mean_interval", "student_t_quantile", "wilson_interval"]


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
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, scale = successes / trials, 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / scale
    # rounding must not push the ends past what was seen: 0/n begins at 0, n/n ends at 1
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


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

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    count = len(values)
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
