"""From a plan to samples: lay the pieces out, cut at every seq_length tokens, write `.bin/.idx` and the sidecar.

One sequence, and one document, of exactly seq_length tokens per sample. Stored with seq_length + 1, Megatron's GPTDataset would
drift by one token a sample; this way it reads the very samples (except the last one of an epoch, see `docs/data.md`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.indexed import IndexedWriter
from mcore_longctx.data.plan import Plan
from mcore_longctx.data.shards import DocumentTable
from mcore_longctx.data.sidecar import LITERAL, PADDING, Runs, write_runs

__all__ = ["Filler", "first_fit", "lay_out", "write_samples"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Filler:
    """What stands behind some of the pieces: the separator (`LITERAL`) or padding (`PADDING`)."""

    source: int
    after: IntArray  # [fillers] rows of the plan
    length: IntArray  # [fillers] tokens
    loss: bool


def separators(plan: Plan, length: int) -> Filler:
    """A separator of `length` tokens between every two pieces. It is learned like the text around it."""
    count = max(0, len(plan) - 1) if length else 0
    return Filler(source=LITERAL, after=np.arange(count), length=np.full(count, length, np.int64), loss=True)


def first_fit(lengths: IntArray, capacity: int) -> IntArray:
    """Bin of each item, int64 [items]: the first bin with room, in the given order of items; a new one if there is none.

    lengths: at most `capacity` each.
    """
    room = np.empty(len(lengths), np.int64)
    bins, count = np.empty(len(lengths), np.int64), 0
    for item, length in enumerate(lengths.tolist()):
        fits = room[:count] >= length
        index = int(fits.argmax()) if count else 0
        if not count or not fits[index]:
            index, count = count, count + 1
            room[index] = capacity
        bins[item] = index
        room[index] -= length
    return bins


def pack_whole(plan: Plan, seq_length: int) -> tuple[Plan, Filler]:
    """Whole pieces first-fit into samples, in the order of the plan; what is free is padding without loss."""
    bins = first_fit(plan.length, seq_length)
    order = np.argsort(bins, kind="stable")
    used = np.bincount(bins, weights=plan.length).astype(np.int64)
    last = np.cumsum(np.bincount(bins)) - 1
    free = np.flatnonzero(used < seq_length)
    packed = Plan(document=plan.document[order], start=plan.start[order], length=plan.length[order])
    return packed, Filler(source=PADDING, after=last[free], length=seq_length - used[free], loss=False)


def lay_out(
    table: DocumentTable, plan: Plan, filler: Filler, literals: npt.NDArray[np.int32], *, seq_length: int, max_samples: int | None
) -> Runs:
    """Pieces and fillers as one stream, cut every `seq_length` tokens; an incomplete last sample is dropped.

    A piece that crosses a border goes on in the next sample. `crc32` is still zero: see `write_samples`.
    """
    piece, segment_start, segment_length, loss = _segments(table, plan)
    order = np.argsort(np.concatenate([2 * piece, 2 * filler.after + 1]), kind="stable")
    fillers = len(filler.after)
    document = plan.document[piece]
    source = np.concatenate([table.source[document], np.full(fillers, filler.source, np.int32)])[order]
    document = np.concatenate([document, np.full(fillers, -1)])[order]
    start = np.concatenate([segment_start, np.zeros(fillers, np.int64)])[order]
    length = np.concatenate([segment_length, filler.length])[order]
    loss = np.concatenate([loss, np.full(fillers, filler.loss)])[order]

    stops = np.cumsum(length, dtype=np.int64)
    samples = int(stops[-1]) // seq_length if len(stops) else 0
    if max_samples is not None:
        samples = min(samples, max_samples)
    begins = stops - length
    inside = begins < samples * seq_length
    begins, stops = begins[inside], np.minimum(stops[inside], samples * seq_length)
    crossed = (stops - 1) // seq_length - begins // seq_length + 1  # samples that a run lies in
    row = np.repeat(np.arange(len(begins)), crossed)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(crossed) - crossed, crossed)
    low = np.maximum(begins[row], (begins[row] // seq_length + nth) * seq_length)
    high = np.minimum(stops[row], (begins[row] // seq_length + nth + 1) * seq_length)
    return Runs(
        seq_length=seq_length,
        sources=table.sources,
        document_ids=table.ids,
        first_run=np.searchsorted(low, np.arange(samples + 1) * seq_length),
        source=source[inside][row],
        document=document[inside][row],
        start=np.where(source[inside][row] == PADDING, 0, start[inside][row] + low - begins[row]),
        length=high - low,
        loss=loss[inside][row],
        literals=literals,
        crc32=np.zeros(samples, np.uint32),
    )


def write_samples(
    prefix: Path, runs: Runs, table: DocumentTable, tokens: npt.NDArray[Any], *, dtype: np.dtype[Any], pad_id: int | None = None
) -> None:
    """Write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.runs.npz` for the runs of `lay_out`. Memory holds one sample.

    Args:
        prefix: path without suffix.
        runs: whose `document` are rows of `table`; the sidecar keeps only those that are used.
        table: of the documents.
        tokens: the token file that the table points into.
        dtype: type of the ids in `.bin`.
        pad_id: token that fills padding.
    """
    crc32 = np.zeros(len(runs), np.uint32)
    sample = np.empty(runs.seq_length, dtype)
    offset = table.offset[np.maximum(runs.document, 0)] + runs.start
    with IndexedWriter(prefix, dtype) as writer:
        for index in range(len(runs)):
            at = 0
            for row in range(int(runs.first_run[index]), int(runs.first_run[index + 1])):
                stop = at + int(runs.length[row])
                if runs.source[row] == PADDING:
                    assert pad_id is not None
                    sample[at:stop] = pad_id
                elif runs.source[row] == LITERAL:
                    sample[at:stop] = runs.literals[runs.start[row] :][: stop - at]
                else:
                    sample[at:stop] = tokens[offset[row] :][: stop - at]
                at = stop
            crc32[index] = zlib.crc32(sample.data)
            writer.add(sample)
    write_runs(prefix, _only_used(replace(runs, crc32=crc32)))


def _segments(table: DocumentTable, plan: Plan) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[np.bool_]]:
    """Pieces split where the loss flag changes: piece, start in the document, length, loss flag; each [segments]."""
    base = np.cumsum(table.length) - table.length  # as if the documents lay behind each other in the order of the table
    owner = np.repeat(np.arange(len(table)), np.diff(table.segment_first))
    stops = base[owner] + table.segment_stop  # ascending
    begins = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    low = base[plan.document] + plan.start
    high = low + plan.length
    first, last = np.searchsorted(stops, low, side="right"), np.searchsorted(stops, high, side="left")
    count = last - first + 1
    piece = np.repeat(np.arange(len(plan)), count)
    segment = np.repeat(first - np.cumsum(count) + count, count) + np.arange(len(piece))
    start = np.maximum(begins[segment], low[piece])
    length = np.minimum(stops[segment], high[piece]) - start
    return piece, start - base[plan.document[piece]], length, table.segment_loss[segment]


def _only_used(runs: Runs) -> Runs:
    """The same runs with the ids of only those documents that occur in them."""
    used, document = np.unique(runs.document, return_inverse=True)
    others = int((used < 0).sum())  # the -1 of fillers comes first, if there is one
    return replace(runs, document=document - others, document_ids=tuple(runs.document_ids[row] for row in used[others:]))
