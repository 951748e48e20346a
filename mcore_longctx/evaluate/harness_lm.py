"""lm-evaluation-harness over a model of Megatron: its requests as tokens, for all ranks of the model.

Text becomes tokens as in the harness's Hugging Face backend, so that both say the same of the same weights. What that backend does
in silence is refused here: a prompt too long for the model is not cut from the left, and nothing is sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.evaluate.harness_ranks import HarnessRanks

__all__ = ["LongctxLM"]

Tokens = npt.NDArray[np.int64]
Pair = tuple[tuple[str, str], Sequence[int], Sequence[int]]  # context and continuation as text; their tokens

_NEW_TOKENS = 256  # where a task does not say, as in the Hugging Face backend


class LongctxLM(TemplateLM):
    """The `LM` of rank 0; all other ranks are in `HarnessRanks.serve`. For the harness it is the only rank.

    Args:
        ranks: the model's ranks.
        tokenizer: of transformers, as the Hugging Face backend loads it from the exported folder.
        max_length: tokens that the model is made for, prompt and answer.
        info: facts about the model for the results.
    """

    def __init__(self, ranks: HarnessRanks, tokenizer: Any, *, max_length: int, info: Mapping[str, Any]) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self._ranks, self._info = ranks, dict(info)
        # a context is tokenised once for all its continuations: they come one after the other
        self._encode: Callable[[str, bool | None], tuple[int, ...]] = lru_cache(maxsize=2)(self._encode_now)

    # ---------------------------------------------------------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text that is scored whole.

        Raises:
            ConfigError: the tokenizer has neither a begin nor an end token.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(
            "states neither bos_token nor eos_token: the first token of a text has nothing before it", where="tokenizer"
        )

    @property
    def tokenizer_name(self) -> str:
        """Names requests that the harness keeps."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens are added as the tokenizer does by itself, unless the text begins with one or the caller says."""
        return list(self._encode(string, add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as one text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        return self._info

    def _encode_now(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        add = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self._begins_with_prefix(string):
            add = {"add_special_tokens": False}
        return tuple(self.tokenizer.encode(string, **add))

    def _begins_with_prefix(self, string: str) -> bool:
        return string.startswith(self.tokenizer.decode([self.prefix_token_id]))

    # ------------------------------------------------------------------------------------------------------------- requests

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation and whether greedy decoding says it. One prefill for all of a context."""
        groups: dict[bytes, list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            if not len(context) or not len(continuation):
                raise DataError(f"request {number} has {'no context' if not len(context) else 'a continuation without a token'}")
            # the last token is predicted, not read
            self._check_length(len(context) + len(continuation) - 1, f"request {number}: {len(context):,} tokens of context")
            groups.setdefault(_digest(_array(context)), []).append(number)
        results: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(groups.values(), key=lambda members: -len(requests[members[0]][1]))
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or None) as bar:
            for members in longest_first:
                scores = self._ranks.option_scores(
                    _array(requests[members[0]][1]), [_array(requests[number][2]) for number in members]
                )
                for number, score in zip(members, scores, strict=True):
                    results[number] = (score.log_probability, score.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
                bar.update(len(members))
        return [results[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text. One longer than the model is taken in windows, as the harness defines it."""
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm or None):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            total = 0.0
            for before, scored in map(make_disjoint_window, windows):
                total += self._ranks.log_probability(_array([*before, *scored]), len(before))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding says after each context, up to a stop string. One prefill for all requests of a context."""
        contexts, wanted = [], []
        for number, request in enumerate(requests):
            text, settings = request.args
            name = f"{request.task_name or 'request'} {request.doc_id if request.doc_id is not None else number}"
            until, most = self._settings(dict(settings), name)
            contexts.append(_array(self._encode(text, None)))
            self._check_length(len(contexts[-1]) + most, f"{name}: {len(contexts[-1]):,} tokens of prompt and {most:,} of answer")
            wanted.append((until, most))
        groups: dict[bytes, list[int]] = {}
        for number, context in enumerate(contexts):
            groups.setdefault(_digest(context), []).append(number)
        results: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or None) as bar:
            for members in sorted(groups.values(), key=lambda members: -len(contexts[members[0]])):
                said = self._ranks.generate(contexts[members[0]], [wanted[number] for number in members])
                for number, tokens in zip(members, said, strict=True):
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    results[number] = postprocess_generated_text(text, list(wanted[number][0]), None)
                    self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
                bar.update(len(members))
        return [results[number] for number in range(len(requests))]

    def _settings(self, given: dict[str, Any], name: str) -> tuple[tuple[str, ...], int]:
        """Stop strings and most tokens of a request.

        Raises:
            ConfigError: it asks for anything else than greedy decoding.
        """
        wanted = dict(normalize_gen_kwargs(given, _NEW_TOKENS))
        until = wanted.pop("until", None)
        most = int(wanted.pop("max_gen_toks"))
        if wanted.pop("do_sample", None) or wanted.pop("temperature", 0.0):
            raise ConfigError(
                "asks for sampling; this adapter decodes greedily", where=f"{name}: generation_kwargs", fix="set do_sample: false"
            )
        if wanted:
            raise ConfigError(
                f"{', '.join(sorted(wanted))} unknown to greedy decoding",
                where=f"{name}: generation_kwargs",
                fix="leave only until, max_gen_toks, do_sample: false and temperature: 0",
            )
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        return tuple(text for text in handle_stop_sequences(until, end) if text), most

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.max_length:
            raise DataError(
                f"{what}, but the model is made for {self.max_length:,}",
                fix="use shorter samples: cutting them from the left would cut away what is asked for",
            )


def _array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, dtype=np.int64)


def _digest(tokens: Tokens) -> bytes:
    return hashlib.sha256(tokens.tobytes()).digest()
