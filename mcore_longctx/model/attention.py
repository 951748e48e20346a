"""`LongContextAttention`: the core attention that a Megatron ModuleSpec names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.kernels.attention import kernel_and_reason
from mcore_longctx.layout.packed import PackLayout, plain_layout
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.model.packed import agreed_layout
from mcore_longctx.parallel.exchange import CP_COMM_TYPES, attention, make_exchange, replayed_attention
from mcore_longctx.parallel.past import KeysAndValues, past_attention

__all__ = ["LongContextAttention"]

logger = logging.getLogger(__name__)

# Megatron's `attention_backend`; "local" and "unfused" ask for code of Megatron that materialises s x s scores
_KERNELS_OF_BACKEND = {
    AttnBackend.auto: (),
    AttnBackend.flash: ("cpu_flash", "flash4", "flash3", "flash"),
    AttnBackend.fused: ("cudnn",),
}


class LongContextAttention(torch.nn.Module):
    """Causal self-attention under context parallelism, in place of DotProductAttention or TEDotProductAttention.

    Built by Megatron's `SelfAttention` with keywords; rope is already applied to what `forward` is given. Memory is linear in
    sequence length; there is no attention mask. What it reads of the config: `attention_dropout` (must be 0), `cp_comm_type` (`p2p`,
    `all_gather`, `a2a` or `a2a+p2p`, one or one per layer), `softmax_scale` (None: 1/sqrt(kv_channels)), `attention_backend` (`auto`,
    `flash` or `fused`: which kernels may be chosen).

    A layer that is computed again in the backward pass need not compute its attention again: run the layer inside `recording`,
    keep what it yields beside the layer's input, and run the layer again inside `replaying`. `forward_calls` counts the attentions
    that were really computed.

    A prompt can be kept and continued (`mcore_longctx.model.kv_cache`): run it inside `capturing`, then new tokens inside `continuing`.

    Raises:
        ConfigError: anything that this attention does not compute: dropout, another exchange, a window, cross attention; a kernel that
            is asked for and not there; `a2a+p2p` without its groups.
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
        backend = getattr(config, "attention_backend", AttnBackend.auto)
        if backend not in _KERNELS_OF_BACKEND:
            raise ConfigError(f"attention_backend is {backend.name!r}", where=where, fix="use auto, flash or fused")
        self.kernels = kernels = _KERNELS_OF_BACKEND[backend]
        _, reason = kernel_and_reason(training_device(), config.params_dtype, config.kv_channels, kernels)
        hierarchical_groups = getattr(pg_collection, "hcp", None)
        self.exchange = make_exchange(self.cp_comm_type, self.cp_group, hierarchical_groups, kernels)
        self.forward_calls = 0
        self._recorded: list[Tensor] | None = None
        self._replayed: tuple[Tensor, Tensor] | None = None
        self._captured: tuple[list[Tensor], int] | None = None
        self._past: tuple[KeysAndValues, ...] | None = None
        if layer_number == 1:  # megatron-core 0.19 trains on with its own layer when --spec cannot be imported: be seen
            ranks = self.cp_group.size()
            neighbours = f" ({self.exchange.inner} x {ranks // self.exchange.inner})" if self.cp_comm_type == "a2a+p2p" else ""
            logger.info("long-context attention: %s%s over %d ranks, %s", self.cp_comm_type, neighbours, ranks, reason)

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
        """Attention over the whole sequence, or over each document of a pack, for this rank's rows.

        Args:
            query: [s/c, b, n/tp, d]; [t, n/tp, d] in a pack of qkv_format "thd".
            key: the same with g/tp heads.
            value: as key.
            attention_mask: must be None; a mask of s x s entries cannot exist at these lengths.
            attn_mask_type: causal, or None for the one given at construction.
            attention_bias: must be None.
            packed_seq_params: documents that do not see each other (`mcore_longctx.model.packed`), b = 1. None: one sequence,
                whose zigzag chunks these rows are.

        Returns:
            [s/c, b, n/tp * d]; [t, n/tp * d] for "thd". 0 in the rows of padding, whatever they hold.

        Raises:
            ConfigError: a mask or a bias is given.
            LayoutError: rows that do not fit the pack, on every rank; a sequence that is not two equal chunks.
        """
        where = f"attention of layer {self.layer_number}"
        if attention_mask is not None:
            raise ConfigError(
                "an attention mask is given, and this attention is causal without one",
                where=where,
                fix="pass None (Megatron-LM: --no-create-attention-mask-in-dataloader)",
            )
        if attn_mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ConfigError(f"a {attn_mask_type.name} mask is asked for, only causal is computed", where=where)
        if attention_bias is not None:
            raise ConfigError("an attention bias is given, which is not supported", where=where)
        if self._captured is not None:
            kept, rows = self._captured
            kept += [tensor[:rows].clone() for tensor in (key, value)]  # the value is a view of a layer's whole projection
        if self._past is not None:
            return self._continue(query, key, value, self._past)
        if query.dim() == 3:  # thd
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return self._attend(query, key, value, self._layout(query, packed_seq_params, where)).squeeze(1)
        return self._attend(query, key, value, self._layout(query, packed_seq_params, where))

    def _layout(self, query: Tensor, packed_seq_params: Any, where: str) -> PackLayout:
        rows, batch, ranks = query.size(0), query.size(1), self.cp_group.size()
        if packed_seq_params is None:
            if ranks > 1 and rows % 2:
                raise LayoutError(f"a context-parallel rank holds {rows:,} tokens, which is not two equal chunks", where=where)
            return plain_layout(rows * ranks, ranks)
        layout = agreed_layout(packed_seq_params, rows, self.cp_group, query.device)
        if batch != 1:
            raise LayoutError(f"a pack with micro batch size {batch}", where=where, fix="use 1: a pack is a batch of documents")
        return layout

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
        """[t, b, heads, d] -> [t, b, n * d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self._replayed is not None:
            out, lse = self._replayed
            kept = out.view(q.size(2), q.size(0), q.size(1), -1).permute(1, 2, 0, 3)
            return _as_megatron(replayed_attention(q, k, v, kept, lse, self.exchange, layout, self.softmax_scale))
        self.forward_calls += 1
        if self._recorded is None:
            return _as_megatron(attention(q, k, v, self.exchange, layout, self.softmax_scale))
        with torch.no_grad():
            out, lse = self.exchange.forward(q, k, v, layout, self.softmax_scale)
        out = _as_megatron(out)
        self._recorded += [out, lse]
        return out

    def _continue(self, query: Tensor, key: Tensor, value: Tensor, past: tuple[KeysAndValues, ...]) -> Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return _as_megatron(past_attention(q, k, v, past, self.cp_group, self.softmax_scale, self.kernels))

    @contextlib.contextmanager
    def capturing(self, rows: int) -> Iterator[list[Tensor]]:
        """Yield a list to which a forward inside appends copies of its key and value, [rows, b, g/tp, d]: the first rows given.

        They are this rank's own rows after the rope, whatever the exchange makes of them later.
        """
        kept: list[Tensor] = []
        self._captured = (kept, rows)
        try:
            yield kept
        finally:
            self._captured = None

    @contextlib.contextmanager
    def continuing(self, past: tuple[KeysAndValues, ...], rows: int) -> Iterator[list[Tensor]]:
        """A forward inside is given new tokens, the same on every context-parallel rank, that come after all tokens of `past`.

        Yields the list of `capturing`: keys and values of the first `rows` new tokens. `past` holds what this rank keeps, see
        `past_attention`.
        """
        self._past = past
        try:
            with self.capturing(rows) as kept:
                yield kept
        finally:
            self._past = None

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


def _as_megatron(out: Tensor) -> Tensor:
    """[b, n, t, d] -> [t, b, n * d]; a view where it lies by rows, as everything here does."""
    return out.permute(2, 0, 1, 3).flatten(2)
