"""Packed samples as training wants them: tokens, labels and loss mask, whole or as one context-parallel rank's share."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.indexed import IndexedReader
from mcore_longctx.data.sidecar import LITERAL, PADDING, read_runs
from mcore_longctx.errors import DataError
from mcore_longctx.layout import check_seq_length, zigzag_chunks, zigzag_positions

__all__ = ["PackedSamples"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class PackedSamples:
    """Reader of `PREFIX.bin`, `PREFIX.idx` and `PREFIX.runs.npz`. A sample is a pure function of its index.

    Args:
        prefix: path of the three files without suffix.

    Raises:
        DataError: a file is missing or damaged, or the three do not belong together.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._tokens = IndexedReader(prefix)
        self.runs = read_runs(prefix)
        self.seq_length = self.runs.seq_length
        self._check()

    def _check(self) -> None:
        if len(self._tokens) != len(self.runs):
            raise DataError(
                f"{len(self._tokens):,} samples in .idx, {len(self.runs):,} in the sidecar",
                where=self.prefix,
                fix="build it again",
            )
        wrong = self._tokens.sequence_lengths != self.seq_length
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"sequence {at} has {self._tokens.sequence_lengths[at]:,} tokens, the sidecar says {self.seq_length:,}",
                where=self.prefix,
                fix="build it again",
            )
        if len(self):
            self.check_sample(0)  # sizes agree for any two builds of one recipe: compare contents once

    def check_sample(self, index: int) -> None:
        """Compare the checksum of a sample with the sidecar's. Raises DataError if they differ."""
        if zlib.crc32(np.ascontiguousarray(self._tokens[index]).data) != int(self.runs.crc32[index]):
            raise DataError(
                f"sample {index} is not the one that the sidecar describes (checksum differs)",
                where=self.prefix,
                fix="a file was damaged or replaced: build it again",
            )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._tokens)

    def tokens(self, index: int) -> npt.NDArray[Any]:
        """The stored ids of one sample, [seq_length]: a read-only view of the map."""
        return self._tokens[index]

    def sample(self, index: int) -> tuple[IntArray, IntArray, BoolArray]:
        """Tokens, labels and loss mask of one sample, each [seq_length].

        labels[t] is tokens[t + 1] and loss_mask[t] says whether that token is learned. The last position has no next token: its
        label is 0 and its mask False.
        """
        return self._range(index, 0, self.seq_length)

    def cp_slice(self, index: int, cp_size: int, cp_rank: int) -> tuple[IntArray, IntArray, BoolArray, IntArray]:
        """Tokens, labels, loss mask and global positions of one rank's zigzag share, each [seq_length / cp_size].

        Reads the rank's two chunks and one token behind each, nothing else.

        Raises:
            LayoutError: seq_length is not a multiple of 2 x `cp_size`.
        """
        check_seq_length(self.seq_length, cp_size, where=self.prefix)
        positions = zigzag_positions(self.seq_length, cp_size, cp_rank)
        if cp_size == 1:
            return (*self.sample(index), positions)
        chunk = self.seq_length // (2 * cp_size)
        early, late = (self._range(index, at * chunk, (at + 1) * chunk) for at in zigzag_chunks(cp_size, cp_rank))
        tokens, labels, loss_mask = (np.concatenate(pair) for pair in zip(early, late, strict=True))
        return tokens, labels, loss_mask, positions

    def document_lengths(self, index: int) -> list[int]:
        """Tokens of each document of a sample, in order, for a mask between them. Padding at the end belongs to none.

        A separator belongs to the document before it: that it ends there is learned from that document. Two stretches are of one
        document when the second goes on where the first ended.

        Raises:
            DataError: padding that is not at the end.
        """
        runs, lengths = self.runs, [0]
        rows = range(int(runs.first_run[index]), int(runs.first_run[index + 1]))
        open_document: tuple[int, int, int] | None = None  # source, document, and the token at which it would go on
        for row in rows:
            source, document = int(runs.source[row]), int(runs.document[row])
            start, length = int(runs.start[row]), int(runs.length[row])
            if source == PADDING:
                if row != rows[-1]:
                    raise DataError(f"sample {index} has padding before its end", where=self.prefix, fix="build it again")
                continue
            if source == LITERAL:
                if open_document is not None:
                    open_document = (*open_document[:2], -1)  # what follows a separator is another document
            else:
                if open_document not in (None, (source, document, start)):
                    lengths.append(0)
                open_document = (source, document, start + length)
            lengths[-1] += length
        return lengths

    def _range(self, index: int, start: int, stop: int) -> tuple[IntArray, IntArray, BoolArray]:
        last = min(stop + 1, self.seq_length)
        read = self._tokens.get(index, start, last - start).astype(np.int64)  # [n + 1], or [n] at the end of the sample
        labels = np.zeros(stop - start, dtype=np.int64)
        loss_mask = np.zeros(stop - start, dtype=np.bool_)
        labels[: last - start - 1] = read[1:]
        loss_mask[: last - start - 1] = self.runs.loss_flags(index, start + 1, last)
        return read[: stop - start], labels, loss_mask
