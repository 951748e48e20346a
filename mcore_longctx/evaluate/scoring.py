"""Pass keys by teacher forcing: one forward per sample, logits at the answer's rows only.

The answer stands in the sample; each of its tokens is found when it is the most probable token at the position before it. Up to the
first miss that is greedy decoding, so "every token found" is "greedy decoding answers right", at the price of one prefill and
without a key/value cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_longctx.evaluate.held_out import EvaluationTokenizer
from mcore_longctx.evaluate.rows import RowFile
from mcore_longctx.evaluate.slices import local_rows, local_slice, padded, sum_over_ranks
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.recipe.schema import NeedleSection
from mcore_longctx.tasks import Haystack, NeedleSample, make_needle_sample, needle_depths, needle_grid

__all__ = ["AnswerScore", "score_answer", "score_needles", "score_rows"]

_ROWS_AT_ONCE = 64  # of a whole vocabulary in float64


@dataclass(frozen=True)
class AnswerScore:
    """`got`: most probable token at each place of the answer; `log_probability`: natural log of each right token's probability."""

    got: npt.NDArray[np.int64]
    log_probability: npt.NDArray[np.float64]


def score_answer(model: Any, tokens: npt.NDArray[np.int64], answer_start: int) -> AnswerScore:
    """Teacher-force `tokens[answer_start:]`. All ranks of the model must call it with the same arguments.

    Args:
        model: of `build_gpt_model`, in one pipeline stage.
        tokens: int64 [s], prompt and answer, of any length: padded on the right for the layout.
        answer_start: position of the answer's first token, at least 1.
    """
    answer = tokens[answer_start:]
    predicted_at = np.arange(answer_start - 1, len(tokens) - 1)  # the token at t is predicted at t - 1
    tokens = padded(tokens, model.config)
    which, rows = local_rows(predicted_at, len(tokens))
    input_ids, position_ids = local_slice(tokens)
    logits = model.logits_at(input_ids, position_ids, torch.from_numpy(rows).to(training_device()))  # [rows, v]
    found = np.zeros((2, len(answer)))
    if len(rows):
        found[:, which] = score_rows(logits, torch.from_numpy(answer[which]).to(logits.device))
    found = sum_over_ranks(found)  # each place is on one rank, the others hold zeros
    return AnswerScore(found[0].astype(np.int64), found[1])


def score_rows(logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
    """Most probable token of each row, and natural log of the probability of its target: float64 [2, rows].

    logits: [rows, v], float32 or wider. targets: int64 [rows].
    """
    parts = []
    for some, wanted in zip(logits.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True):
        right = some.double().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        parts.append(torch.stack((some.argmax(-1).double(), right)))
    return np.asarray(torch.cat(parts, dim=1).cpu().numpy())


def score_needles(
    model: Any,
    section: NeedleSection,
    haystack: Haystack,
    tokenizer: EvaluationTokenizer,
    *,
    seed: int,
    out: Path,
    identity: dict[str, Any],
    say: Callable[[str], None],
    step: Callable[[], None],
) -> None:
    """Measure the needle grid; write `out`, one line per sample as soon as it is known, and go on from lines that are there.

    Args:
        model: of `build_gpt_model`.
        section: lengths, depths, samples and digits.
        haystack: held-out text.
        tokenizer: the model's.
        seed: with length, depth and index it decides each sample: the same samples for every column.
        out: the .jsonl file.
        identity: what every line carries and must agree in (model, rope, seed).
        say: takes a line of progress per length, on every rank.
        step: called after each sample, also a skipped one.
    """
    place = {depth: number for number, depth in enumerate(needle_depths(section.depths))}
    started, right, every = time.monotonic(), 0, 0
    with RowFile(out, ("length", "depth", "index"), identity) as rows:
        for length, depth, index in needle_grid(section.lengths, section.depths, section.samples):
            key = (int(length), depth, index)
            if key not in rows:
                sample = make_needle_sample(
                    haystack,
                    tokenizer,
                    seed=seed,
                    length=length,
                    depth=depth,
                    index=index,
                    digits=section.digits,
                    prefix=tokenizer.prefix,
                )
                begun = time.monotonic()
                score = score_answer(model, sample.tokens, sample.answer_start)
                rows.add(_row(sample, score, tokenizer, key, time.monotonic() - begun))
            step()
            right, every = right + bool(rows.rows[key]["correct"]), every + 1
            if place[depth] == section.depths - 1 and index == section.samples - 1:
                say(f"needle  {length:>9,} tokens  {right}/{every} found  {time.monotonic() - started:.0f} s")
                started, right, every = time.monotonic(), 0, 0


def _row(
    sample: NeedleSample, score: AnswerScore, tokenizer: EvaluationTokenizer, key: tuple[int, float, int], seconds: float
) -> dict[str, Any]:
    hits = score.got == sample.answer
    return {
        "task": "needle",
        "length": key[0],
        "depth": key[1],
        "index": key[2],
        "correct": bool(hits.all()),
        "score": float(score.log_probability.mean()),  # mean log-probability of the answer's tokens: moves before `correct` does
        "tokens_right": int(hits.sum()),
        "tokens_of_answer": len(hits),
        "key": sample.key,
        "expected": f" {sample.value}",
        "got": tokenizer.decode(score.got.tolist()),
        "tokens": len(sample.tokens),
        "depth_in_tokens": round(sample.depth, 6),
        "needle_start": sample.needle_start,
        "haystack_start": sample.haystack_start,
        "unique_share": round(sample.unique_share, 6),
        "seconds": round(seconds, 4),
    }
