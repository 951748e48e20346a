"""`LongContextAttention`: the core attention that a Megatron ModuleSpec names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.kernels.attention import choose_kernel
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.parallel.exchange import CP_COMM_TYPES, attention, make_exchange, replayed_attention

__all__ = ["LongContextAttention"]

logger = logging.getLogger(__name__)


class LongContextAttention(torch.nn.Module):
    """Causal self-attention under context parallelism, in place of DotProductAttention or TEDotProductAttention.

    Built by Megatron's `SelfAttention` with keywords; rope is already applied to what `forward` is given. Memory is linear in
    sequence length; there is no attention mask. What it reads of the config: `attention_dropout` (must be 0), `cp_comm_type`
    (`p2p` or `all_gather`, one or one per layer), `softmax_scale` (None: 1/sqrt(kv_channels)).

    A layer that is computed again in the backward pass need not compute its attention again: run the layer inside `recording`,
    keep what it yields beside the layer's input, and run the layer again inside `replaying`. `forward_calls` counts the attentions
    that were really computed.

    Raises:
        ConfigError: anything that this attention does not compute: dropout, another exchange, a window, cross attention.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.config, self.layer_number = config, layer_number
        self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type or "p2p"
        self.softmax_scale = softmax_scale if softmax_scale is not None else float(config.kv_channels) ** -0.5
        where = f"attention of layer {layer_number}"
        if self.cp_comm_type not in CP_COMM_TYPES:
            raise ConfigError(f"cp_comm_type is {cp_comm_type!r}", where=where, fix=f"use one of {', '.join(CP_COMM_TYPES)}")
        if attention_type != "self" or attn_mask_type is not AttnMaskType.causal:
            raise ConfigError(
                f"{attention_type} attention with a {attn_mask_type.name} mask; only causal self-attention is computed",
                where=where,
            )
        for name, wanted in (("attention_dropout", 0.0), ("window_size", None), ("softmax_type", "vanilla")):
            if getattr(config, name, wanted) != wanted:
                raise ConfigError(f"{name} is {getattr(config, name)!r}, only {wanted!r} is supported", where=where)
        self.exchange = make_exchange(self.cp_comm_type, self.cp_group, getattr(pg_collection, "hcp", None))
        self.forward_calls = 0
        self._recorded: list[Tensor] | None = None
        self._replayed: tuple[Tensor, Tensor] | None = None
        if layer_number == 1:  # megatron-core 0.19 trains on with its own layer when --spec cannot be imported: be seen
            kernel = choose_kernel(training_device(), config.params_dtype, config.kv_channels)
            logger.info(
                "long-context attention: %s over %d context-parallel ranks, kernel %s",
                *(self.cp_comm_type, self.cp_group.size(), kernel.name),
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention over the whole sequence for this rank's zigzag rows.

        Args:
            query: [s/c, b, n/tp, d].
            key: [s/c, b, g/tp, d].
            value: [s/c, b, g/tp, d].
            attention_mask: must be None; a mask of s x s entries cannot exist at these lengths.
            attn_mask_type: causal, or None for the one given at construction.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [s/c, b, n/tp * d].

        Raises:
            ConfigError: a mask, a bias or packed sequences are given.
        """
        where = f"attention of layer {self.layer_number}"
        if attention_mask is not None:
            raise ConfigError(
                "an attention mask is given, and this attention is causal without one",
                where=where,
                fix="pass None (Megatron-LM: --no-create-attention-mask-in-dataloader)",
            )
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise ConfigError(f"a {attn_mask_type.name} mask is asked for, only causal is computed", where=where)
        if attention_bias is not None:
            raise ConfigError("an attention bias is given, which is not supported", where=where)
        if packed_seq_params is not None:
            raise ConfigError("packed sequences (cu_seqlens) are given, which are not supported", where=where)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s/c, d]
        if self._replayed is not None:
            out, lse = self._replayed
            out = out.unflatten(-1, (query.size(2), -1)).permute(1, 2, 0, 3)
            out = replayed_attention(q, k, v, out, lse, self.exchange, None, self.softmax_scale)
            return out.permute(2, 0, 1, 3).flatten(2)
        self.forward_calls += 1
        if self._recorded is None:
            return attention(q, k, v, self.exchange, None, self.softmax_scale).permute(2, 0, 1, 3).flatten(2)
        with torch.no_grad():
            out, lse = self.exchange.forward(q, k, v, None, self.softmax_scale)
        out = out.permute(2, 0, 1, 3).flatten(2)
        self._recorded += [out, lse]
        return out

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Yield a list to which a forward inside appends its output and log-sum-exp. Nothing is kept for autograd.

        The output [s/c, b, n/tp * d] shares its memory with what the forward returns: keeping it costs no copy. The log-sum-exp takes
        4 bytes for each row and head (8 in float64).
        """
        recorded: list[Tensor] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    @contextlib.contextmanager
    def replaying(self, out: Tensor, lse: Tensor) -> Iterator[None]:
        """A forward inside gives back `out`, computing no attention; its backward is that of the attention.

        `out` and `lse` are what `recording` yielded for the same input.
        """
        self._replayed = (out, lse)
        try:
            yield
        finally:
            self._replayed = None
