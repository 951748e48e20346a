"""From chosen pieces to samples: where each piece, each separator and the padding stand, as runs.

Every packing is one stream of tokens that is cut at every seq_length tokens; packings that keep pieces whole put padding where a
sample is left unfilled. Streams are made in blocks, twice: once to count their runs and once to write them, so that 10^8 documents
need little memory beside their order.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import new_arrays
from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import LITERAL, PADDING, RUN_COLUMNS, Runs
from mcore_longctx.data.planning.bins import best_fit, first_fit, next_fit

__all__ = ["Pieces", "Separator", "Stream", "fit", "lay_out", "release", "run_blocks", "stream_of"]

IntArray = npt.NDArray[np.int64]
Columns = tuple[npt.NDArray[Any], ...]  # document, start, length, loss

_BLOCK = 1 << 16  # pieces at once: their temporary columns stay in the cache
_ROWS = 1 << 18  # runs at once
_RELEASE = 1 << 6  # blocks after which mapped pages leave the memory of this process


@dataclass(frozen=True, kw_only=True)
class Separator:
    """Token ids that stand beside documents.

    With `before`, every document is wrapped: `before` + document + `after` (BOS and EOS). Without, `after` stands between documents:
    behind every one but the last. Both empty: nothing.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    loss: bool = True  # whether they are learned

    @property
    def wrapping(self) -> int:
        """Tokens that every document takes with it."""
        return len(self.before) + len(self.after)

    @property
    def between(self) -> int:
        """Of these, tokens that the last document of a stream does without."""
        return 0 if self.before else len(self.after)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Stretches of wrapped documents in the order in which they are laid out.

    A document that is wrapped is `before` + its tokens + `after`; with a separator between documents, and with none, the wrapped
    document is the document.
    """

    document: npt.NDArray[Any]  # [pieces] row of the table
    length: IntArray  # [pieces] tokens
    start: IntArray | None = None  # [pieces] tokens from the start of the wrapped document; None: 0
    whole: IntArray | None = None  # [pieces] tokens of the wrapped document; None: `length`
    free: IntArray | None = None  # [pieces] padding behind the last piece of each sample, -1 behind others; None: pieces go on

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.document)


class Stream:
    """Pieces and what stands beside them as one stream of tokens, cut at every `seq_length` tokens.

    Args:
        table: of the documents.
        pieces: in order.
        separator: beside documents.
        seq_length: tokens of a sample. What is left at the end of the stream is dropped.
    """

    def __init__(self, table: DocumentTable, pieces: Pieces, separator: Separator, seq_length: int) -> None:
        self.table, self.pieces, self.separator, self.seq_length = table, pieces, separator, seq_length
        free = pieces.free
        last = min(1, len(pieces)) if free is None else int((free >= 0).sum())  # pieces with no separator behind them
        padding = 0 if free is None else int(np.maximum(free, 0).sum())
        total = int(pieces.length.sum()) + (len(pieces) - last) * separator.between + padding
        self.samples = total // seq_length

    @cached_property
    def runs_of_sample(self) -> IntArray:
        """Runs of each sample, int64 [samples]."""
        starts, rows = [np.zeros(0, np.int64)], 0
        for columns, begins in self.blocks():
            starts.append(rows + begins)
            rows += len(columns[0])
        return np.diff(np.concatenate([*starts, np.array([rows], np.int64)]))

    def blocks(self) -> Iterator[tuple[Columns, IntArray]]:
        """Runs in order: columns document, start, length, loss, and the rows of the block at which samples begin."""
        at, end = 0, self.samples * self.seq_length
        for low in range(0, len(self.pieces), _BLOCK):
            if at >= end:
                return
            columns = self._split_at_loss(*self._uncut(slice(low, min(low + _BLOCK, len(self.pieces)))))
            columns, begins, at = self._cut(columns, at, end)
            yield columns, begins

    def _uncut(self, block: slice) -> Columns:
        """Pieces with their separators and padding: document, start, length, loss."""
        pieces, separator = self.pieces, self.separator
        document, length = pieces.document[block], pieces.length[block]
        start = np.zeros(len(length), np.int64) if pieces.start is None else pieces.start[block]
        stop = start + length
        before, after = len(separator.before), len(separator.after)
        parts: list[tuple[Any, Any, IntArray, bool]] = []  # document, start, length, loss, in the order of the stream
        if before:
            body = (length if pieces.whole is None else pieces.whole[block]) - after  # where `after` starts
            parts.append((LITERAL, start, np.minimum(stop, before) - start, separator.loss))
            low = np.maximum(start, before)
            parts.append((document, low - before, np.minimum(stop, body) - low, True))
            low = np.maximum(start, body)
            parts.append((LITERAL, low - body + before, stop - low, separator.loss))
        else:
            parts.append((document, start, length, True))
        if separator.between:
            behind = np.full(len(length), after)
            if pieces.free is not None:
                behind[pieces.free[block] >= 0] = 0
            # the one behind the last piece of a stream that goes on lies past its last sample
            parts.append((LITERAL, 0, behind, separator.loss))
        if pieces.free is not None:
            parts.append((PADDING, 0, pieces.free[block], False))
        columns: Columns = tuple(np.empty((len(length), len(parts)), dtype) for dtype in (np.int64, np.int64, np.int64, np.bool_))
        for number, part in enumerate(parts):
            for column, value in zip(columns, part, strict=True):
                column[:, number] = value
        there = columns[2] > 0
        return tuple(column.ravel() if there.all() else column[there] for column in columns)

    def _split_at_loss(self, document: Any, start: IntArray, length: IntArray, loss: Any) -> Columns:
        """The same runs, split where the loss flag of their document changes."""
        known, base, stops, flags = self._loss_stops
        if not len(known):
            return document, start, length, loss
        ordinal = np.searchsorted(known, document)
        mine = np.flatnonzero(known[np.minimum(ordinal, len(known) - 1)] == document)
        low = base[ordinal[mine]] + start[mine]
        first = np.searchsorted(stops, low, side="right")
        last = np.searchsorted(stops, low + length[mine], side="left")
        count = np.ones(len(document), np.int64)
        count[mine] = last - first + 1
        row = np.repeat(np.arange(len(document)), count)
        shift = np.zeros(len(document), np.int64)  # from a place in the stream of documents with flags to one in the document
        shift[mine] = start[mine] - low
        segment = np.zeros(len(document), np.int64)
        segment[mine] = first
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        is_mine = np.zeros(len(document), np.bool_)
        is_mine[mine] = True
        segment = (segment[row] + nth)[is_mine[row]]
        begin, stop, flag = start[row], (start + length)[row], loss[row]
        inside = is_mine[row]
        begins = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
        begin[inside] = np.maximum(begin[inside], begins[segment] + shift[row][inside])
        stop[inside] = np.minimum(stop[inside], stops[segment] + shift[row][inside])
        flag[inside] = flags[segment]
        return document[row], begin, stop - begin, flag

    @cached_property
    def _loss_stops(self) -> Columns:
        """Rows of documents with loss flags; where each starts in a stream of them all; where flags change in it; the flags."""
        table = self.table
        document, place = np.unique(table.loss_document, return_inverse=True)
        last = np.searchsorted(table.loss_document, document, side="right") - 1
        length = table.loss_stop[last]
        base = np.cumsum(length) - length
        goes_on = np.zeros(len(table.loss_stop), np.bool_)  # the next segment of the document has the same flag
        goes_on[:-1] = (table.loss_document[1:] == table.loss_document[:-1]) & (table.loss_flag[1:] == table.loss_flag[:-1])
        return document, base, (base[place] + table.loss_stop)[~goes_on], table.loss_flag[~goes_on]

    def _cut(self, columns: Columns, at: int, end: int) -> tuple[Columns, IntArray, int]:
        """Runs cut where samples end and at the end of the last one; rows at which samples begin; where the block ends."""
        document, start, length, loss = columns
        stops = at + np.cumsum(length)
        reached = int(stops[-1])
        if reached > end:
            keep = int(np.searchsorted(stops, end)) + 1
            document, start, loss, stops = document[:keep], start[:keep], loss[:keep], stops[:keep]
            stops[-1] = end
        first = -(-at // self.seq_length)  # sample that begins first in this block
        borders = np.arange(first * self.seq_length, int(stops[-1]), self.seq_length)
        within = np.searchsorted(stops, borders)
        inner = (borders > at) & (stops[within] > borders)
        if inner.any():
            row = np.repeat(np.arange(len(stops)), 1 + np.bincount(within[inner], minlength=len(stops)))
            begins = np.concatenate([np.array([at]), stops[:-1]])
            stops = np.insert(stops, within[inner], borders[inner])
            cut_begins = np.concatenate([np.array([at]), stops[:-1]])
            start = start[row] + np.where(document[row] == PADDING, 0, cut_begins - begins[row])
            document, loss = document[row], loss[row]
        length = np.diff(stops, prepend=at)
        sample_rows = np.searchsorted(stops, borders, side="right")
        return (document, start, length, loss), sample_rows, min(reached, end)


def stream_of(
    table: DocumentTable, document: npt.NDArray[Any], length: IntArray, *, packing: str, separator: Separator, seq_length: int
) -> Stream:
    """Whole documents, packed.

    Args:
        table: of the documents.
        document: rows of the table in the order in which they are laid out, [documents].
        length: tokens taken of each, [documents].
        packing: `concatenate`: a document that crosses a border goes on in the next sample. `best_fit`: documents that are longer
            than a sample are cut at every seq_length tokens (arXiv 2404.10830), and pieces are packed whole, best-fit-decreasing.
            `intact`: in order; a document that does not fit in the rest of the sample begins the next; none is longer than a sample.
            `first_fit`: as `best_fit` without cutting, first-fit in order.
        separator: beside documents. In packings with padding it does not stand behind the last document of a sample.
        seq_length: tokens of a sample.
    """
    extra = separator.wrapping - separator.between
    wrapped = length + extra if extra else length
    if packing == "concatenate":
        return Stream(table, Pieces(document=document, length=wrapped), separator, seq_length)
    if packing == "best_fit":
        count = -(-wrapped // seq_length)
        row = np.repeat(np.arange(len(document)), count)
        start = (np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)) * seq_length
        whole = wrapped[row]
        pieces = Pieces(document=document[row], length=np.minimum(whole - start, seq_length), start=start, whole=whole)
    else:
        pieces = Pieces(document=document, length=wrapped)
    return Stream(table, fit(pieces, packing, separator, seq_length), separator, seq_length)


def fit(pieces: Pieces, packing: str, separator: Separator, seq_length: int) -> Pieces:
    """Whole pieces in samples by `best_fit`, `first_fit` or `intact`; inside a sample they keep their order."""
    function = {"best_fit": best_fit, "first_fit": first_fit, "intact": next_fit}[packing]
    bins = function(pieces.length + separator.between, seq_length + separator.between)
    order = np.argsort(bins, kind="stable")
    size = pieces.length[order]
    bins = bins[order]
    last = np.flatnonzero(np.diff(bins, append=-1)) if len(bins) else np.zeros(0, np.int64)
    used = np.bincount(bins, size + separator.between).astype(np.int64) - separator.between if len(bins) else last
    free = np.full(len(bins), -1, np.int64)
    free[last] = seq_length - used
    return Pieces(
        document=pieces.document[order],
        length=size,
        start=None if pieces.start is None else pieces.start[order],
        whole=None if pieces.whole is None else pieces.whole[order],
        free=free,
    )


def lay_out(
    path: Path,
    streams: Sequence[Stream],
    *,
    samples: IntArray | None,
    limit: int | None,
    literals: Sequence[int],
    metadata: Mapping[str, Any],
) -> None:
    """Write the runs of all samples of the streams to `path`, whole or not at all.

    Args:
        path: of the file of runs.
        streams: whose samples are numbered on.
        samples: order in which they are written, a permutation of their numbers; None: as numbered.
        limit: samples that are written at most.
        literals: that LITERAL runs point into.
        metadata: of the file.

    Raises:
        DataError: no space is left, or the folder cannot be written.
    """
    counts = np.concatenate([stream.runs_of_sample for stream in streams])
    written = np.arange(len(counts)) if samples is None else samples
    written = written[:limit]
    first_run = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[written])])
    target = np.full(len(counts), -1, np.int64)  # row of the file at which each sample begins; -1: it is not written
    target[written] = first_run[:-1]
    columns: dict[str, Any] = {name: (dtype, int(first_run[-1])) for name, dtype in RUN_COLUMNS.items()}
    columns |= {"first_run": (np.int64, len(first_run)), "literals": (np.int32, len(literals))}
    with new_arrays(path, columns, metadata) as file:
        file["first_run"][:], file["literals"][:] = first_run, literals
        out = tuple(file[name] for name in RUN_COLUMNS)
        sample, row, blocks = -1, 0, 0  # sample of the last row that was handled, rows of it that were
        for stream in streams:
            for runs, begins in stream.blocks():
                # stretches of the block that belong to one sample each; the first one may go on from the block before
                rows = np.diff(np.concatenate([np.zeros(1, np.int64), begins, np.array([len(runs[0])])]))
                at = target[np.maximum(np.arange(sample, sample + len(rows)), 0)] + np.where(np.arange(len(rows)) == 0, row, 0)
                is_kept = target[np.maximum(np.arange(sample, sample + len(rows)), 0)] >= 0
                _copy(out, runs, at, rows, is_kept)
                row = int(rows[-1]) + (row if len(rows) == 1 else 0)
                sample += len(begins)
                blocks += 1
                if not blocks % _RELEASE:
                    release(out)
        release(out)


def run_blocks(runs: Runs) -> Iterator[slice]:
    """Rows of mapped runs in blocks. What was read leaves the memory of this process now and then."""
    columns = [getattr(runs, name) for name in RUN_COLUMNS]
    for number, low in enumerate(range(0, len(runs.document), _ROWS)):
        if not number % _RELEASE:
            release(columns)
        yield slice(low, low + _ROWS)
    release(columns)


def _copy(out: Columns, runs: Columns, at: IntArray, rows: IntArray, is_kept: npt.NDArray[np.bool_]) -> None:
    """Copy stretches of `rows` runs each to the places `at` of the file, leaving out those that are not kept."""
    begins = np.cumsum(rows) - rows
    there = np.flatnonzero(is_kept & (rows > 0))
    if not len(there):
        return
    low, high = int(begins[there[0]]), int(begins[there[-1]] + rows[there[-1]])
    in_order = (at[there] - begins[there] == at[there[0]] - low).all() and int(rows[there].sum()) == high - low
    if in_order:
        place = slice(int(at[there[0]]), int(at[there[0]]) + high - low)
        for column, values in zip(out, runs, strict=True):
            column[place] = values[low:high]
        return
    shift = np.repeat(at - begins, rows)
    kept = np.repeat(is_kept, rows)
    places = (np.arange(len(shift)) + shift)[kept]
    for column, values in zip(out, runs, strict=True):
        column[places] = values[kept]


def release(columns: Sequence[npt.NDArray[Any]]) -> None:
    """Hand pages of mapped columns back to the page cache; the kernel writes changed ones when it likes."""
    for column in columns:
        base: Any = column.base
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)
