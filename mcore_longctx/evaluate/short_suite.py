"""The short suite: multiple choice by the likelihood of the options, each continuing its question, which is read once.

`correct` is the option with the largest sum of log-probabilities. Two more readings of the same numbers stand in each row: `correct_norm`
takes the sum per character (as `acc_norm` of the lm-evaluation-harness does), and `exact` says that greedy decoding writes the right
option. Perplexity on short text is `short_context`, measured with the loss by position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.evaluate.cached import option_scores, prefill
from mcore_longctx.evaluate.rows import RowFile
from mcore_longctx.tasks.choices import ChoiceQuestion, encode_choices

__all__ = ["choice_rows", "score_choices"]


def choice_rows(out: Path, identity: Mapping[str, Any]) -> RowFile:
    """The file of the rows, in the folder `out`. All ranks call it."""
    return RowFile(out / "short_suite.jsonl", ("task", "index"), identity)


def score_choices(
    model: Any,
    questions: Sequence[ChoiceQuestion],
    tokenizer: EvaluationTokenizer,
    *,
    rows: RowFile,
    say: Callable[[str], None],
    step: Callable[[], None],
) -> None:
    """Ask every question; write `rows`, one line per question as soon as it is known, and go on from lines that are there.

    All ranks of the model call it.

    Args:
        model: of `build_gpt_model`.
        questions: the same for every column.
        tokenizer: the model's.
        rows: of `choice_rows`.
        say: takes a line of progress, on every rank.
        step: called after each question, also a skipped one.
    """
    started, right = time.monotonic(), 0
    with rows:
        for question in questions:
            key = (question.kind, question.index)
            if key not in rows:
                rows.add(_row(model, question, tokenizer))
            right += bool(rows.rows[key]["correct"])
            step()
    chance = float(np.mean([1 / len(question.options) for question in questions]))
    seconds = time.monotonic() - started
    say(f"short suite  {right}/{len(questions)} right ({chance:.0%} by chance)  {seconds:.0f} s")


def _row(model: Any, question: ChoiceQuestion, tokenizer: EvaluationTokenizer) -> dict[str, Any]:
    prompt, options = encode_choices(question, tokenizer, tokenizer.prefix)
    begun = time.monotonic()
    scores = option_scores(model, prefill(model, prompt), np.empty(0, np.int64), options)
    seconds = time.monotonic() - begun
    sums = [score.log_probability for score in scores]
    per_character = [total / len(option) for total, option in zip(sums, question.options, strict=True)]
    best = int(np.argmax(sums))
    return {
        "task": question.kind,
        "index": question.index,
        "question": question.question,
        "expected": question.options[question.answer],
        "got": question.options[best],
        "correct": best == question.answer,
        "correct_norm": int(np.argmax(per_character)) == question.answer,
        "exact": bool(scores[question.answer].is_greedy),
        # above 0 exactly when `correct`: how much more probable the right option is than the best wrong one, natural log
        "score": sums[question.answer] - max(total for i, total in enumerate(sums) if i != question.answer),
        "options": [
            {"text": text, "log_probability": score.log_probability, "tokens": score.tokens}
            for text, score in zip(question.options, scores, strict=True)
        ],
        "seconds": round(seconds, 4),
    }
