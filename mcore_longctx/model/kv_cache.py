"""Keys and values of a prompt, kept where they were computed, and new tokens that continue it.

    cache = prefill(model, input_ids, position_ids, length)    one forward of the prompt, in zigzag over the context-parallel ranks
    branch = Branch(cache)                                     as many as are wanted, one cache
    logits = extend(model, branch, tokens, rows)               new tokens, the same on every rank; again and again

A cache is never written to after `prefill`. It costs 2 * layers * g/tp * d numbers a token, of which each context-parallel rank holds
its zigzag rows; nothing of it ever moves. A branch adds the new tokens' keys and values: token p of a prompt of L tokens is kept by rank
(p - L) mod c. Hidden states of new tokens are the same on all context-parallel ranks, so only attention communicates
(`mcore_longctx.parallel.past`). It works for every `cp_comm_type`, which is how the ranks exchange during `prefill` alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.errors import ConfigError
from mcore_longctx.model.attention import LongContextAttention
from mcore_longctx.model.builder import LongContextGPTModel
from mcore_longctx.parallel.past import KeysAndValues

__all__ = ["Branch", "PrefixCache", "extend", "prefill"]


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """What `prefill` kept on this rank.

    Attributes:
        length: tokens of the prompt, over all ranks.
        layers: keys (after the rope) and values of each layer, [rows, 1, g/tp, d]: this rank's zigzag rows without padding.
        next_logits: of the token that follows the prompt, float32 [vocab_size], the same on every rank.
    """

    length: int
    layers: tuple[KeysAndValues, ...]
    next_logits: Tensor

    @property
    def bytes(self) -> int:
        """Memory of the keys and values on this rank."""
        return sum(rows.numel() * rows.element_size() for layer in self.layers for rows in layer)


@dataclass(eq=False)
class Branch:
    """A continuation of a prompt: `extend` appends to it, and leaves the prompt's cache and every other branch as they are.

    Attributes:
        prefix: the prompt.
        new_tokens: how many tokens continue it so far.
        layers: keys and values of this rank's share of them, [rows, 1, g/tp, d].
    """

    prefix: PrefixCache
    new_tokens: int = 0
    layers: tuple[KeysAndValues, ...] = field(default=())

    def fork(self) -> Branch:
        """Another branch with the same tokens. Nothing is copied: rows are appended by making new tensors."""
        return Branch(self.prefix, self.new_tokens, self.layers)


def prefill(model: LongContextGPTModel, input_ids: Tensor, position_ids: Tensor, length: int) -> PrefixCache:
    """Run a prompt and keep its keys and values. Every rank of the model must call it.

    Args:
        model: of `build_gpt_model`, in one pipeline stage, backend `local`.
        input_ids: [1, s/c], this rank's zigzag slice of the prompt and padding after it. Padding is never a key of a real token.
        position_ids: [1, s/c], ascending.
        length: tokens of the prompt, 1 to s; what stands at positions from `length` on is padding.

    Raises:
        ConfigError: layers whose attention is not ours (backend `te`).
        LayoutError: the model is split over pipeline stages.
    """
    attentions = _attentions(model)
    real = position_ids[0] < length  # ascending: the first rows
    rows = int(real.sum())
    with ExitStack() as stack:
        kept = [stack.enter_context(attention.capturing(rows)) for attention in attentions]
        found = model.logits_at(input_ids, position_ids, (position_ids[0] == length - 1).nonzero()[:, 0])
    next_logits = found.new_zeros(found.size(1))
    next_logits += found.sum(0)  # of one row or none
    dist.all_reduce(next_logits, group=model.pg_collection.cp)
    return PrefixCache(length, tuple((key, value) for key, value in kept), next_logits)


def extend(model: LongContextGPTModel, branch: Branch, tokens: Tensor, rows: Tensor) -> Tensor:
    """Continue a branch by new tokens; logits at some of them, float32 [len(rows), vocab_size], on every rank.

    Every rank of the model must call it with the same arguments. Memory beside the result: activations of the new tokens.

    Args:
        model: the one of `prefill`.
        branch: changed when all went well.
        tokens: int64 [n] on the model's device, n at least 1.
        rows: int64, indices into `tokens`.
    """
    attentions, group = _attentions(model), model.pg_collection.cp
    start = branch.prefix.length + branch.new_tokens
    split = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    padded = F.pad(tokens, (0, -len(tokens) % split))  # causal: nothing real sees what comes after it
    positions = torch.arange(start, start + len(padded), device=tokens.device)
    with ExitStack() as stack:
        made = [
            stack.enter_context(attention.continuing((prefix, *branch.layers[layer : layer + 1]), len(tokens)))
            for layer, (attention, prefix) in enumerate(zip(attentions, branch.prefix.layers, strict=True))
        ]
        logits = model.logits_at(padded[None], positions[None], rows)
    first = (group.rank() - branch.new_tokens) % group.size()
    shares = [(key[first :: group.size()], value[first :: group.size()]) for key, value in made]
    old = branch.layers or tuple((key[:0], value[:0]) for key, value in shares)
    branch.layers = tuple(
        (torch.cat((old_key, key)), torch.cat((old_value, value)))
        for (old_key, old_value), (key, value) in zip(old, shares, strict=True)
    )
    branch.new_tokens += len(tokens)
    return logits


def _attentions(model: LongContextGPTModel) -> list[LongContextAttention]:
    found = [layer.self_attention.core_attention for layer in model.decoder.layers]
    for attention in found:
        if not isinstance(attention, LongContextAttention):
            raise ConfigError(
                f"keys and values cannot be kept in {type(attention).__name__}: decoding, options and shared prompts need our attention",
                where="model.backend: te",
                fix="set backend: local for the evaluation, which reads the same checkpoint",
            )
    return found
