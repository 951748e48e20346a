"""One prompt, many continuations: answers by teacher forcing, options, greedy decoding, all on one prefill.

    cache = prefill(model, prompt)
    score_suffix(model, cache, question_and_answer, answer_start)      every token of the answer found?
    option_scores(model, cache, question, options)                     log-probability of each option
    greedy(model, cache, question, max_new_tokens=32)                  what the model says

Every rank of the model calls these functions with the same arguments and gets the same result. The cache lies where the prefill
computed it, split over the context-parallel ranks, and is left as it is by all of them (`mcore_longctx.model.kv_cache`), so a haystack
of a million tokens is read once for any number of questions. Each result equals that of a full forward over prompt and continuation, up
to the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_longctx.errors import DataError
from mcore_longctx.evaluate.scoring import AnswerScore, score_rows
from mcore_longctx.evaluate.slices import from_first_rank, local_slice, padded
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.model.kv_cache import Branch, PrefixCache
from mcore_longctx.model.kv_cache import extend as extend_branch
from mcore_longctx.model.kv_cache import prefill as prefill_rows

__all__ = ["OptionScore", "PrefixCache", "greedy", "option_scores", "prefill", "score_suffix"]

Tokens = npt.NDArray[np.int64]

_TOKENS_AT_ONCE = 256  # of a suffix: bounds the activations, whose merged attention is gathered from all ranks


@dataclass(frozen=True)
class OptionScore:
    """How likely one option is.

    Attributes:
        log_probability: sum of the natural logarithms of its tokens' probabilities.
        tokens: how many there are.
        is_greedy: each of them is the most probable one, so greedy decoding would say it.
    """

    log_probability: float
    tokens: int
    is_greedy: bool


def prefill(model: Any, tokens: Tokens) -> PrefixCache:
    """Run a prompt once and keep its keys and values on the ranks that computed them.

    Args:
        model: of `build_gpt_model` with backend `local`, in one pipeline stage.
        tokens: int64 [s], s at least 1; any length. It is padded on the right for the layout; padding is seen by nothing and not kept.

    Raises:
        DataError: no token, or one outside the vocabulary.
        ConfigError: layers of TransformerEngine, which keep no keys and values for us.
        LayoutError: a model in pipeline stages.
    """
    _check(model, tokens, "the prompt", least=1)
    input_ids, position_ids = local_slice(padded(tokens, model.config))
    return prefill_rows(model, input_ids, position_ids, len(tokens))


def score_suffix(model: Any, cache: PrefixCache, suffix: Tokens, answer_start: int) -> AnswerScore:
    """Teacher-force `suffix[answer_start:]` after the prompt and `suffix[:answer_start]`.

    Args:
        model: the one of `prefill`.
        cache: of `prefill`; left as it is.
        suffix: int64 [m], what follows the prompt: question and answer.
        answer_start: index in `suffix` of the answer's first token; 0: the answer follows the prompt itself.

    Raises:
        DataError: no answer, or a token outside the vocabulary.
    """
    _check(model, suffix, "the suffix", least=1)
    if not 0 <= answer_start < len(suffix):
        raise DataError(f"the answer starts at token {answer_start} of a suffix of {len(suffix)}")
    branch = Branch(cache)
    first = _extend(model, branch, suffix[:answer_start])
    return _score(model, branch, first, suffix[answer_start:])


def option_scores(model: Any, cache: PrefixCache, suffix: Tokens, options: Sequence[Tokens]) -> list[OptionScore]:
    """Log-probability of each option after the prompt and `suffix`, which is run once for all of them.

    Args:
        model: the one of `prefill`.
        cache: of `prefill`; left as it is.
        suffix: int64 [m], m may be 0.
        options: int64 [n] each, n at least 1.

    Raises:
        DataError: an option without a token, or a token outside the vocabulary.
    """
    _check(model, suffix, "the suffix", least=0)
    for number, option in enumerate(options, start=1):
        _check(model, option, f"option {number}", least=1)
    branch = Branch(cache)
    first = _extend(model, branch, suffix)
    scores = [_score(model, branch.fork(), first, option) for option in options]
    return [
        OptionScore(float(score.log_probability.sum()), len(option), bool((score.got == option).all()))
        for score, option in zip(scores, options, strict=True)
    ]


def greedy(
    model: Any,
    cache: PrefixCache,
    suffix: Tokens,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    stop: Callable[[Sequence[int]], bool] = lambda found: False,
) -> list[int]:
    """The most probable token, again and again, after the prompt and `suffix`.

    Args:
        model: the one of `prefill`.
        cache: of `prefill`; left as it is.
        suffix: int64 [m], m may be 0.
        max_new_tokens: how many at most.
        stop_ids: tokens at which to end; they are not part of the result.
        stop: given all tokens found so far, says whether to end; the last of them is part of the result. The same on every rank.

    Raises:
        DataError: a token of the suffix outside the vocabulary.
    """
    _check(model, suffix, "the suffix", least=0)
    branch = Branch(cache)
    logits = _extend(model, branch, suffix)
    found: list[int] = []
    while len(found) < max_new_tokens:
        # ranks may differ in the last bits of a logit, and must not go on with different tokens
        token = int(from_first_rank(np.array([float(logits.argmax())]))[0])
        if token in stop_ids:
            break
        found.append(token)
        if stop(found):
            break
        if len(found) < max_new_tokens:
            logits = _extend(model, branch, np.array([token]))
    return found


def _extend(model: Any, branch: Branch, tokens: Tokens) -> Tensor:
    """Append tokens to a branch; logits [v] of the token that follows them, of the prompt's follower if there are none."""
    logits: Tensor = branch.prefix.next_logits
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        piece = _on_device(tokens[start : start + _TOKENS_AT_ONCE])
        is_last = start + _TOKENS_AT_ONCE >= len(tokens)
        rows = torch.tensor([len(piece) - 1] if is_last else [], dtype=torch.int64, device=piece.device)
        logits = extend_branch(model, branch, piece, rows).sum(0)  # of one row
    return logits


def _score(model: Any, branch: Branch, first: Tensor, answer: Tokens) -> AnswerScore:
    """Teacher-force an answer, whose first token has the logits `first` [v]. The branch then holds all of it but its last token."""
    found = [score_rows(first[None], _on_device(answer[:1]))]
    for start in range(0, len(answer) - 1, _TOKENS_AT_ONCE):
        piece = _on_device(answer[start : min(start + _TOKENS_AT_ONCE, len(answer) - 1)])
        logits = extend_branch(model, branch, piece, torch.arange(len(piece), device=piece.device))
        found.append(score_rows(logits, _on_device(answer[start + 1 : start + 1 + len(piece)])))
    got, log_probability = from_first_rank(np.concatenate(found, axis=1))
    return AnswerScore(got.astype(np.int64), log_probability)


def _on_device(tokens: Tokens) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens)).to(training_device())


def _check(model: Any, tokens: Tokens, name: str, *, least: int) -> None:
    if tokens.ndim != 1 or len(tokens) < least:
        raise DataError(f"{name} has shape {list(tokens.shape)}, expected at least {least} token in one row")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.real_vocab_size:
        raise DataError(
            f"{name} holds the token {int(tokens.max() if int(tokens.min()) >= 0 else tokens.min()):,},"
            f" the model's vocabulary is 0 to {model.real_vocab_size - 1:,}"
        )
