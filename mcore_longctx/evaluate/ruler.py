"""RULER-like tasks: one prompt for each task, length and index, answered by teacher forcing or by greedy decoding.

    teacher_forced   one forward over prompt and answer. What greedy decoding gives is known up to the first token that is not the most
                     probable one; the score is the share of expected strings in that much of the answer. So it is a lower bound of the
                     greedy score, and equal to it where the whole answer is found.
    greedy           the prompt is read once into a key/value cache over all ranks, then `reserve` tokens are decoded, as RULER does.

Both write how probable the answer was, token by token: that moves long before a score does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.evaluate.cached import greedy, prefill, score_suffix
from mcore_longctx.evaluate.prompts import PromptCache, prompt_tail
from mcore_longctx.evaluate.rows import RowFile
from mcore_longctx.evaluate.scoring import AnswerScore, score_answer
from mcore_longctx.recipe.schema import RulerSection
from mcore_longctx.tasks import RULER_TASKS, RulerSample, RulerTexts, make_ruler_sample, score_ruler

__all__ = ["RulerPrompts", "ruler_rows", "ruler_tasks", "score_ruler_tasks"]


@dataclass(frozen=True)
class RulerPrompts:
    """The samples of a section. `texts` are on rank 0 alone."""

    section: RulerSection
    texts: RulerTexts | None
    tokenizer: EvaluationTokenizer
    seed: int
    cache: PromptCache

    def sample(self, task: str, length: int, index: int) -> RulerSample:
        """One sample, the same on every rank. All ranks call it."""

        def make() -> RulerSample:
            assert self.texts is not None, "samples are made on rank 0"
            prefix = self.tokenizer.prefix
            return make_ruler_sample(task, self.texts, self.tokenizer, seed=self.seed, length=length, index=index, prefix=prefix)

        return self.cache.get({"task": task, "length": length, "index": index}, make)


def ruler_tasks(section: RulerSection) -> tuple[str, ...]:
    """The tasks of a section, all where it names none, in the order of `RULER_TASKS`."""
    return tuple(task for task in RULER_TASKS if task in section.tasks or not section.tasks)


def ruler_rows(out: Path, section: RulerSection, identity: Mapping[str, Any]) -> RowFile:
    """The file of a section's rows, in the folder `out`. Rows that were scored in another way are refused. All ranks call it."""
    settings = {"protocol": "ruler-like", "scoring": section.scoring}
    return RowFile(out / "ruler.jsonl", ("task", "length", "index"), {**identity, **settings})


def score_ruler_tasks(
    model: Any,
    prompts: RulerPrompts,
    *,
    rows: RowFile,
    say: Callable[[str], None],
    step: Callable[[], None],
) -> None:
    """Measure every task at every length; write `rows`, one line per sample as soon as it is known, and go on from lines that are there.

    All ranks of the model call it.

    Args:
        model: of `build_gpt_model`.
        prompts: the samples, the same for every column.
        rows: of `ruler_rows`, with the section of `prompts`.
        say: takes a line of progress per length, on every rank.
        step: called after each sample, also a skipped one.
    """
    section = prompts.section
    answer = _greedy if section.scoring == "greedy" else _teacher_forced
    with rows:
        for length in sorted(section.lengths):
            started, scores = time.monotonic(), []
            for task in ruler_tasks(section):
                for index in range(section.samples):
                    key = (task, int(length), index)
                    if key not in rows:
                        sample = prompts.sample(*key)
                        begun = time.monotonic()
                        got, output, score = answer(model, sample, prompts.tokenizer)
                        row = _row(sample, key, got, output, score, prompts.tokenizer)
                        rows.add(row | {"seconds": round(time.monotonic() - begun, 4)})
                    scores.append(rows.rows[key]["score"])
                    step()
            right = sum(score == 1 for score in scores)
            seconds = time.monotonic() - started
            say(
                f"ruler-like  {length:>9,} tokens  {right}/{len(scores)} right, mean score {np.mean(scores):.3f}  {seconds:.0f} s"
            )


def _teacher_forced(model: Any, sample: RulerSample, tokenizer: EvaluationTokenizer) -> tuple[str, str, AnswerScore]:
    """What is shown, what is certain to be decoded greedily, and the answer's tokens."""
    score = score_answer(model, np.concatenate([sample.tokens, sample.answer]), len(sample.tokens))
    misses = np.flatnonzero(score.got != sample.answer)
    certain = score.got[: misses[0] + 1] if len(misses) else score.got
    return tokenizer.decode(score.got.tolist()), tokenizer.decode(certain.tolist()), score


def _greedy(model: Any, sample: RulerSample, tokenizer: EvaluationTokenizer) -> tuple[str, str, AnswerScore]:
    cache = prefill(model, sample.tokens)
    ids = greedy(model, cache, np.empty(0, np.int64), max_new_tokens=sample.reserve, stop_ids=tokenizer.end_ids)
    text = tokenizer.decode(ids)
    return text, text, score_suffix(model, cache, sample.answer, 0)


def _row(
    sample: RulerSample,
    key: tuple[str, int, int],
    got: str,
    output: str,
    answer: AnswerScore,
    tokenizer: EvaluationTokenizer,
) -> dict[str, Any]:
    score = score_ruler(sample.expected, sample.match, output)
    return {
        "task": key[0],
        "length": key[1],
        "index": key[2],
        "tokens": len(sample.tokens) + sample.reserve,
        "depths": [round(depth, 6) for depth in sample.depths],
        "needle_starts": list(sample.needle_starts),
        "haystack_start": sample.haystack_start,
        "unique_share": round(sample.unique_share, 6),
        "expected": list(sample.expected),
        "match": sample.match,
        "got": got,
        "correct": score == 1,
        "score": score,
        "tokens_right": int((answer.got == sample.answer).sum()),
        "tokens_of_answer": len(sample.answer),
        "log_probability": float(answer.log_probability.mean()),
        "prompt_tail": prompt_tail(tokenizer, sample.tokens),
    }
