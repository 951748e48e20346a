"""The needle grid: one forward for each needle, or one for each text with needles at all depths (`shared`).

Teacher forcing alone: every token of the answer is the most probable one exactly when greedy decoding gives the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.evaluate.cached import prefill, score_suffix
from mcore_longctx.evaluate.prompts import prompt_tail
from mcore_longctx.evaluate.rows import RowFile, on_first_rank
from mcore_longctx.evaluate.scoring import AnswerScore, score_answer
from mcore_longctx.recipe.schema import NeedleSection
from mcore_longctx.tasks import (
    Haystack,
    NeedleSample,
    SharedNeedle,
    SharedNeedles,
    make_needle_sample,
    make_shared_needles,
    needle_depths,
    needle_grid,
)

__all__ = ["needle_rows", "score_needles"]


@dataclass(frozen=True)
class _Grid:
    """What every sample of the grid is made from. The haystack is on rank 0 alone."""

    section: NeedleSection
    haystack: Haystack | None
    tokenizer: EvaluationTokenizer
    seed: int

    def sample(self, length: int, depth: float, index: int) -> NeedleSample:
        return on_first_rank(
            lambda: make_needle_sample(*self._texts(), length=length, depth=depth, index=index, **self._settings())
        )

    def shared(self, length: int, index: int) -> SharedNeedles:
        depths = needle_depths(self.section.depths)
        return on_first_rank(
            lambda: make_shared_needles(*self._texts(), length=length, depths=depths, index=index, **self._settings())
        )

    def _texts(self) -> tuple[Haystack, EvaluationTokenizer]:
        assert self.haystack is not None, "samples are made on rank 0"
        return self.haystack, self.tokenizer

    def _settings(self) -> dict[str, Any]:
        section = self.section
        return {"seed": self.seed, "digits": section.key_digits, "kind": section.kind, "prefix": self.tokenizer.prefix}


def needle_rows(out: Path, section: NeedleSection, identity: Mapping[str, Any]) -> RowFile:
    """The file of a section's rows, in the folder `out`. Rows that were asked for in another way are refused. All ranks call it."""
    task = "needles_shared" if section.shared else "needle"
    digits = section.key_digits if section.kind == "passkey" else None
    settings = {"task": task, "kind": section.kind, "digits": digits, "shared": section.shared}
    return RowFile(out / "needle.jsonl", ("length", "depth", "index"), {**identity, **settings})


def score_needles(
    model: Any,
    section: NeedleSection,
    haystack: Haystack | None,
    tokenizer: EvaluationTokenizer,
    *,
    seed: int,
    rows: RowFile,
    say: Callable[[str], None],
    step: Callable[[], None],
) -> None:
    """Measure the needle grid; write `rows`, one line per sample as soon as it is known, and go on from lines that are there.

    All ranks of the model call it. Samples are made on rank 0 and sent to the others: they cost a copy of the text each, and so one
    process of the job holds the text.

    Args:
        model: of `build_gpt_model`.
        section: lengths, depths, samples, kind, whether texts are shared.
        haystack: held-out text; on ranks other than 0 it may be None.
        tokenizer: the model's.
        seed: with length, depth and index it decides each sample: the same samples for every column.
        rows: of `needle_rows`, with the same section.
        say: takes a line of progress per length, on every rank.
        step: called after each sample, also a skipped one.
    """
    grid = _Grid(section, haystack, tokenizer, seed)
    with rows:
        for length in sorted(section.lengths):
            started, right, every = time.monotonic(), 0, 0
            scored = _shared_rows(model, grid, int(length), rows) if section.shared else _rows(model, grid, int(length), rows)
            for row in scored:
                right, every = right + bool(row["correct"]), every + 1
                step()
            name = "needles, shared text" if section.shared else "needle"
            say(f"{name}  {length:>9,} tokens  {right}/{every} found  {time.monotonic() - started:.0f} s")


def _rows(model: Any, grid: _Grid, length: int, rows: RowFile) -> Iterator[dict[str, Any]]:
    section = grid.section
    for _, depth, index in needle_grid([length], section.depths, section.samples):
        key = (length, depth, index)
        if key not in rows:
            sample = grid.sample(length, depth, index)
            begun = time.monotonic()
            score = score_answer(model, sample.tokens, sample.answer_start)
            seconds = time.monotonic() - begun
            tail = prompt_tail(grid.tokenizer, sample.tokens[: sample.answer_start])
            text = {"haystack_start": sample.haystack_start, "unique_share": sample.unique_share, "tokens": len(sample.tokens)}
            rows.add(_row(key, sample, score, grid.tokenizer, text | {"prompt_tail": tail, "seconds": seconds}))
        yield rows.rows[key]


def _shared_rows(model: Any, grid: _Grid, length: int, rows: RowFile) -> Iterator[dict[str, Any]]:
    """`seconds` of a row are its own and its part of the text's, which are read once for all depths that are not known yet."""
    depths = needle_depths(grid.section.depths)
    for index in range(grid.section.samples):
        missing = [number for number, depth in enumerate(depths) if (length, depth, index) not in rows]
        if missing:
            made = grid.shared(length, index)
            begun = time.monotonic()
            cache = prefill(model, made.tokens)
            reading = (time.monotonic() - begun) / len(missing)
            for number in missing:
                needle = made.needles[number]
                begun = time.monotonic()
                score = score_suffix(model, cache, needle.suffix, needle.answer_start)
                seconds = reading + time.monotonic() - begun
                tail = prompt_tail(grid.tokenizer, made.tokens, needle.suffix[: needle.answer_start])
                total = len(made.tokens) + len(needle.suffix)
                text = {"haystack_start": made.haystack_start, "unique_share": made.unique_share, "tokens": total}
                facts = text | {"prompt_tail": tail, "seconds": seconds}
                rows.add(_row((length, depths[number], index), needle, score, grid.tokenizer, facts))
            del cache
        for depth in depths:
            yield rows.rows[length, depth, index]


def _row(
    key: tuple[int, float, int],
    needle: NeedleSample | SharedNeedle,
    score: AnswerScore,
    tokenizer: EvaluationTokenizer,
    facts: dict[str, Any],
) -> dict[str, Any]:
    hits = score.got == needle.answer
    return {
        "length": key[0],
        "depth": key[1],
        "index": key[2],
        "correct": bool(hits.all()),
        "score": float(score.log_probability.mean()),  # mean log-probability of the answer's tokens: moves before `correct` does
        "tokens_right": int(hits.sum()),
        "tokens_of_answer": len(hits),
        "key": needle.key,
        "expected": f" {needle.value}",
        "got": tokenizer.decode(score.got.tolist()),
        "tokens": facts["tokens"],
        "depth_in_tokens": round(needle.depth, 6),
        "needle_start": needle.needle_start,
        "haystack_start": facts["haystack_start"],
        "unique_share": round(facts["unique_share"], 6),
        "prompt_tail": facts["prompt_tail"],
        "seconds": round(facts["seconds"], 4),
    }
