"""Evaluation tasks as pure functions of a seed, with solvers; intervals and paired tests."""

from mcore_longctx.tasks.haystack import Haystack, cached_haystack, open_haystack
from mcore_longctx.tasks.needle import (
    NeedleKind,
    NeedleSample,
    SharedNeedle,
    SharedNeedles,
    check_needle_grid,
    make_needle_sample,
    make_shared_needles,
    needle_depths,
    needle_grid,
    solve_needle,
)
from mcore_longctx.tasks.ruler import (
    RULER_TASKS,
    RulerSample,
    RulerTexts,
    check_ruler_lengths,
    check_ruler_tasks,
    make_ruler_sample,
    ruler_minimum_length,
    score_ruler,
    solve_ruler,
)
from mcore_longctx.tasks.statistics import MeanInterval, exact_mcnemar, mean_interval, paired_mean_interval, wilson_interval
from mcore_longctx.tasks.tokens import TextTokenizer

__all__ = [
    "RULER_TASKS",
    "Haystack",
    "MeanInterval",
    "NeedleKind",
    "NeedleSample",
    "RulerSample",
    "RulerTexts",
    "SharedNeedle",
    "SharedNeedles",
    "TextTokenizer",
    "cached_haystack",
    "check_needle_grid",
    "check_ruler_lengths",
    "check_ruler_tasks",
    "exact_mcnemar",
    "make_needle_sample",
    "make_ruler_sample",
    "make_shared_needles",
    "mean_interval",
    "needle_depths",
    "needle_grid",
    "open_haystack",
    "paired_mean_interval",
    "ruler_minimum_length",
    "score_ruler",
    "solve_needle",
    "solve_ruler",
    "wilson_interval",
]
