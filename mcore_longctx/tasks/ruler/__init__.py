"""All 13 RULER-like tasks: rules of NVIDIA/RULER (arXiv 2404.06654), own words and texts, offline, each with a solver.

Prompts, words and haystacks differ from RULER's, so results are `ruler-like` and stand in no table beside published RULER without
a note. Every answer has one order (of the text, of the question, of the alphabet, of frequency), so that it can be teacher-forced.
"""

from mcore_longctx.tasks.ruler.sample import (
    RULER_TASKS,
    RulerSample,
    check_ruler_lengths,
    check_ruler_tasks,
    make_ruler_sample,
    ruler_minimum_length,
    score_ruler,
    solve_ruler,
)
from mcore_longctx.tasks.ruler.texts import RulerTexts

__all__ = [
    "RULER_TASKS",
    "RulerSample",
    "RulerTexts",
    "check_ruler_lengths",
    "check_ruler_tasks",
    "make_ruler_sample",
    "ruler_minimum_length",
    "score_ruler",
    "solve_ruler",
]
