"""The ranks of one model, led by rank 0: it says what comes next, the others do the same.

    rank 0    ranks = HarnessRanks(build, decode, end_ids)    others    the same
              with ranks.leading():                                     ranks.serve()
                  ranks.build()
                  ranks.option_scores(context, options)

lm-evaluation-harness asks one process, and under context parallelism every rank has to see the same request at the same time. Rank 0
is the harness's only rank; it sends the name of a step with its arguments to all others, and all run it. How long rank 0 takes between
two steps does not matter. When it leaves the block, also with an error of the harness or of a task, the others end, too. An error inside
a step is different: ranks may then wait for each other in a collective, so whoever meets it must end its process and the launcher the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mcore_longctx.evaluate.cached import OptionScore, greedy, option_scores, prefill
from mcore_longctx.evaluate.slices import local_slice, padded, sum_over_ranks

__all__ = ["HarnessRanks", "tokens_log_probability"]

Tokens = npt.NDArray[np.int64]

_PATIENCE = timedelta(days=7)  # tasks are made and scored by rank 0 alone, while the others wait for the next step
_NOTHING = np.empty(0, np.int64)


class HarnessRanks:
    """The steps that lm-evaluation-harness needs, each run by all ranks. Every rank makes one, after the process groups are there.

    Args:
        build: makes the model; called on every rank.
        decode: text of token ids, special tokens written out. The same on every rank.
        end_ids: tokens at which decoding ends.
    """

    def __init__(self, build: Callable[[], Any], decode: Callable[[Sequence[int]], str], end_ids: frozenset[int]) -> None:
        self._build, self._decode, self._end_ids = build, decode, end_ids
        self._model: Any = None
        self._in_step = False
        # gloo, with a patience of its own: NCCL would take a long preparation of the tasks for a hang
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.get_world_size() > 1 else None

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0: what is in the block may ask for steps."""
        try:
            yield
        finally:
            if not self._in_step:
                self._send("end", ())

    def serve(self) -> None:
        """All other ranks: do what rank 0 says until it ends."""
        while True:
            order: list[Any] = [None]
            dist.broadcast_object_list(order, src=0, group=self._group)
            step, arguments = order[0]
            if step == "end":
                return
            getattr(self, step)(*arguments)

    def build(self) -> None:
        """Make the model."""
        self._together("_build_model")

    def option_scores(self, context: Tokens, options: Sequence[Tokens]) -> list[OptionScore]:
        """One prefill of `context`, int64 [s], and the log-probability of each option after it, int64 [n]."""
        found: list[OptionScore] = self._together("_option_scores", context, list(options))
        return found

    def log_probability(self, tokens: Tokens, start: int) -> float:
        """Sum of the natural logs of the probabilities of `tokens[start:]`, given all before each."""
        return float(self._together("_log_probability", tokens, start))

    def generate(self, context: Tokens, wanted: Sequence[tuple[tuple[str, ...], int]]) -> list[list[int]]:
        """One prefill of `context`; for each (stop strings, most tokens) what greedy decoding says, up to the token that ends it.

        An end token is left out. The tokens that spell a stop string are part of the result.
        """
        found: list[list[int]] = self._together("_generate", context, list(wanted))
        return found

    def _together(self, step: str, *arguments: Any) -> Any:
        self._send(step, arguments)
        self._in_step = True
        result = getattr(self, step)(*arguments)
        self._in_step = False
        return result

    def _send(self, step: str, arguments: tuple[Any, ...]) -> None:
        if self._group is not None:
            dist.broadcast_object_list([(step, arguments)], src=0, group=self._group)

    def _build_model(self) -> None:
        self._model = self._build()

    def _option_scores(self, context: Tokens, options: list[Tokens]) -> list[OptionScore]:
        return option_scores(self._model, prefill(self._model, context), _NOTHING, options)

    def _log_probability(self, tokens: Tokens, start: int) -> float:
        return tokens_log_probability(self._model, tokens, start)

    def _generate(self, context: Tokens, wanted: list[tuple[tuple[str, ...], int]]) -> list[list[int]]:
        cache = prefill(self._model, context)
        return [
            greedy(self._model, cache, _NOTHING, max_new_tokens=most, stop_ids=self._end_ids, stop=self._stop(until))
            for until, most in wanted
        ]

    def _stop(self, until: tuple[str, ...]) -> Callable[[Sequence[int]], bool]:
        # a character takes at most four tokens (bytes); some more, as the first characters of a cut may be spelt in another way
        tail = 4 * max(map(len, until), default=0) + 8
        return lambda found: any(text in self._decode(found[-tail:]) for text in until)


def tokens_log_probability(model: Any, tokens: Tokens, start: int) -> float:
    """Sum of the natural logs of the probabilities of `tokens[start:]`, by one forward. Every rank of the model must call it.

    Unlike `option_scores`, whose options are short and run by every rank, this splits all tokens over the context-parallel ranks and
    makes logits in pieces: for whole documents.

    Args:
        model: of `build_gpt_model`, in one pipeline stage.
        tokens: int64 [s], any s of at least 2; the last one is only predicted.
        start: at least 1.
    """
    read = padded(tokens[:-1], model.config)
    following = np.zeros_like(read)
    following[: len(tokens) - 1] = tokens[1:]
    input_ids, position_ids = local_slice(read)
    labels = torch.from_numpy(following).to(input_ids.device)[position_ids]  # [1, s/c]
    with torch.no_grad():
        losses = model(input_ids, position_ids, labels=labels)  # [1, s/c]
    predicted = position_ids[0].cpu().numpy() + 1
    counted = (predicted >= start) & (predicted < len(tokens))
    total = sum_over_ranks(np.array([losses[0].double().cpu().numpy()[counted].sum()]))
    return -float(total[0])
