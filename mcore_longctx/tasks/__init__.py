"""Evaluation tasks as pure functions of a seed, with solvers; intervals and paired tests."""

from mcore_longctx.tasks.needle import (
    Haystack,
    NeedleSample,
    TextTokenizer,
    make_needle_sample,
    needle_depths,
    needle_grid,
    solve_needle,
)
from mcore_longctx.tasks.statistics import MeanInterval, exact_mcnemar, mean_interval, paired_mean_interval, wilson_interval

__all__ = [
    "Haystack",
    "MeanInterval",
    "NeedleSample",
    "TextTokenizer",
    "exact_mcnemar",
    "make_needle_sample",
    "mean_interval",
    "needle_depths",
    "needle_grid",
    "paired_mean_interval",
    "solve_needle",
    "wilson_interval",
]
