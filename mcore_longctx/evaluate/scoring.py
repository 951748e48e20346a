"""Answers by teacher forcing: one forward per sample, logits at the answer's rows only.

The answer stands in the sample; each of its tokens is found when it is the most probable token at the position before it. Up to the
first miss that is greedy decoding, so "every token found" is "greedy decoding answers right", at the price of one prefill and
without a key/value cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_longctx.errors import DataError
from mcore_longctx.evaluate.slices import local_rows, local_slice, padded, sum_over_ranks
from mcore_longctx.megatron_compat import training_device

__all__ = ["AnswerScore", "score_answer", "score_rows"]

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

    Raises:
        DataError: no answer, or nothing before it.
    """
    if not 1 <= answer_start < len(tokens):
        raise DataError(f"the answer starts at token {answer_start} of {len(tokens)}, expected 1 to {len(tokens) - 1}")
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
