"""Packs of documents on their way through Megatron: its PackedSeqParams, and the layout that they mean.

Two ways to hand a pack to the model, with the same results:

    packed_batch(layout)        recommended: any layout of `mcore_longctx.layout.packed`. Megatron is told "sbhd", so that none of its
                                packed code runs; positions are explicit and LongContextRotary makes angles for these rows alone
    a stock PackedSeqParams     every document in zigzag, as Megatron and TransformerEngine mean it; "thd" or "sbhd"

The layout that a PackedSeqParams means is read once for each object and agreed on by all context-parallel ranks before anything else
is exchanged: a pack that differs between ranks stops with one line instead of hanging or training on mixed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from mcore_longctx.errors import ConfigError, LayoutError, LongctxError
from mcore_longctx.layout.packed import PackLayout, pack_from_cu_seqlens
from mcore_longctx.parallel.collectives import gather_numbers

__all__ = ["PackedBatch", "agreed_layout", "packed_batch"]

_WHERE = "packed_seq_params"


@dataclass
class PackedBatch(PackedSeqParams):
    """A PackedSeqParams that carries its layout. Made by `packed_batch`."""

    layout: PackLayout | None = None


def packed_batch(layout: PackLayout) -> PackedBatch:
    """What to pass as `packed_seq_params` to the model, on every pipeline stage, beside `layout.positions(rank)` as positions."""
    return PackedBatch(qkv_format="sbhd", layout=layout)


def agreed_layout(params: Any, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> PackLayout:
    """The layout that a PackedSeqParams means, once all context-parallel ranks have agreed that they hold its rows.

    Both are done once for each object; reading cu_seqlens and agreeing wait for the device.

    Args:
        params: a PackedBatch or a stock PackedSeqParams.
        rows: rows that this rank holds.
        group: the context-parallel group; None: this rank alone.
        device: where numbers can be exchanged.

    Raises:
        LayoutError: on every rank, if one of them holds other rows, another pack, or one that cannot be read (see
            `pack_from_cu_seqlens`); queries and keys of different lengths; max_seqlen below the longest padded document, with which
            stock rotary code stops on one rank while the others wait; a layout for another number of ranks.
        ConfigError: another qkv_format, or a context-parallel size of the sample's own.
    """
    if getattr(params, "_longctx_agreed_rows", None) == rows:
        return params._longctx_layout
    size, layout, problem = 1 if group is None else group.size(), None, None
    try:
        layout = _layout_of(params, size)
    except LongctxError as error:
        problem = error
    mine = [rows, layout.rows, layout.fingerprint] if layout is not None else [rows, 0, 0]
    of_ranks = [mine] if group is None or size == 1 else gather_numbers(mine, group, device)
    if problem is not None or layout is None:
        raise problem or AssertionError
    for rank, (held, wanted, fingerprint) in enumerate(of_ranks):
        if not fingerprint:
            raise LayoutError(
                f"context-parallel rank {rank} cannot read its pack", where=_WHERE, fix="see that rank's own message"
            )
        if held != wanted:
            raise LayoutError(
                f"context-parallel rank {rank} holds {held:,} rows of a pack that has {wanted:,} on each of {size}"
                f" ({wanted * size:,} in all, padding included)",
                where=_WHERE,
                fix="slice tokens, labels and positions with the pack's own rows (PackLayout.source)",
            )
    if len({fingerprint for _, _, fingerprint in of_ranks}) > 1:
        raise LayoutError("context-parallel ranks hold different packs", where=_WHERE, fix="give all of them the same documents")
    params._longctx_layout, params._longctx_agreed_rows = layout, rows
    return layout


def _layout_of(params: Any, cp_size: int) -> PackLayout:
    layout: PackLayout = getattr(params, "layout", None) or _read_layout(params, cp_size)
    if layout.cp_size != cp_size:
        raise LayoutError(f"the pack is laid out for {layout.cp_size} context-parallel ranks, there are {cp_size}", where=_WHERE)
    return layout


def _read_layout(params: Any, cp_size: int) -> PackLayout:
    if params.qkv_format not in ("thd", "sbhd"):
        raise ConfigError(f"qkv_format is {params.qkv_format!r}, only 'thd' and 'sbhd' are supported", where=_WHERE)
    if params.cp_group is not None or params.local_cp_size is not None:
        raise ConfigError(
            "they name a context-parallel group of their own",
            where=_WHERE,
            fix="switch hybrid (dynamic) context parallelism off",
        )
    if params.cu_seqlens_q is None:
        raise ConfigError("without cu_seqlens_q", where=_WHERE)
    real = params.cu_seqlens_q.tolist()
    padded = real if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded.tolist()
    for name, sums in (("cu_seqlens_kv", real), ("cu_seqlens_kv_padded", padded)):
        of_keys = getattr(params, name)
        if of_keys is not None and of_keys.tolist() != sums:
            raise LayoutError(f"{name} are not those of the queries; only self-attention is computed", where=_WHERE)
    layout = pack_from_cu_seqlens(real, padded, cp_size, where=_WHERE)
    longest = max(b - a for a, b in pairwise(padded))
    if params.qkv_format == "thd" and (params.max_seqlen_q is None or int(params.max_seqlen_q) < longest):
        raise LayoutError(
            f"max_seqlen_q is {params.max_seqlen_q}, the longest document has {longest:,} rows with its padding",
            where=_WHERE,
            fix="max_seqlen counts padded rows, before the split over ranks",
        )
    return layout
