"""Packed samples as training wants them: tokens, labels and loss mask, whole or as one context-parallel rank's share."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.indexed import IndexedReader
from mcore_longctx.data.files.sidecar import LITERAL, PADDING, check_index, read_runs
from mcore_longctx.data.methods.weights import loss_weights
from mcore_longctx.errors import DataError
from mcore_longctx.layout import check_seq_length, zigzag_chunks, zigzag_positions

__all__ = ["PackedSamples", "ReadAhead"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
K = TypeVar("K")
V = TypeVar("V")


class PackedSamples:
    """Reader of `PREFIX.bin`, `PREFIX.idx` and `PREFIX.runs`. A sample is a pure function of its index.

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
        self._begin_tokens = int(self.runs.facts.get("begin_tokens", 0))  # literals that stand before a document
        self._whole = bool(self.runs.loss.all())  # nothing to look up where every token is learned
        self._check()

    def _check(self) -> None:
        if len(self._tokens) != len(self.runs):
            raise DataError(
                f"{len(self._tokens):,} samples in .idx, {len(self.runs):,} in the sidecar",
                where=self.prefix,
                fix="build it again",
            )
        check_index(self.prefix, self.runs)
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
        return self._ranges(index, [(0, self.seq_length)])

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
        ranges = [(at * chunk, (at + 1) * chunk) for at in zigzag_chunks(cp_size, cp_rank)]
        return (*self._ranges(index, ranges), positions)

    def gather(self, index: int, places: IntArray) -> tuple[IntArray, IntArray, BoolArray]:
        """Tokens, labels and loss mask at some places of a sample, each [places]. Touches only their pages.

        places: from 0 to seq_length - 1, or -1 for a filler: 0, 0, False. Labels and mask as in `sample`.
        """
        stored, is_token = self._tokens[index], places >= 0
        tokens, labels = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
        loss_mask = np.zeros(len(places), np.bool_)
        tokens[is_token] = stored[places[is_token]]
        has_label = is_token & (places < self.seq_length - 1)
        following = places[has_label] + 1
        labels[has_label] = stored[following]
        loss_mask[has_label] = True
        if not self._whole:
            rows = self.runs.rows(index)
            ends = np.cumsum(self.runs.length[rows], dtype=np.int64)
            loss_mask[has_label] = self.runs.loss[rows][np.searchsorted(ends, following, side="right")]
        return tokens, labels, loss_mask

    def document_lengths(self, index: int) -> list[int]:
        """Tokens of each document of a sample, in order, for a mask between them. Padding at the end belongs to none.

        A separator belongs to the document before it: that it ends there is learned from that document. A begin token belongs to the
        document behind it. Two stretches are of one document when the second goes on where the first ended.

        Raises:
            DataError: padding that is not at the end, or documents that were cut and spread over the sample (`augment`).
        """
        if "augment" in self.runs.facts:
            what = f"augment {self.runs.facts['augment']['type']} has spread the documents of a sample over it: no border is between them"
            raise DataError(what, where=self.prefix, fix="leave out the mask between documents")
        rows = self.runs.rows(index)
        document, start = self.runs.document[rows], self.runs.start[rows]
        length = self.runs.length[rows].astype(np.int64)
        padding = document == PADDING
        if padding[:-1].any():
            raise DataError(f"sample {index} has padding before its end", where=self.prefix, fix="build it again")
        document, start, length = document[~padding], start[~padding], length[~padding]
        known = document >= 0
        goes_on = np.zeros(len(document), np.bool_)  # where the run before it ended
        goes_on[1:] = (document[1:] == document[:-1]) & (start[1:] == start[:-1] + length[:-1])
        begins = known & ~goes_on
        begins[1:] &= np.logical_or.accumulate(known)[:-1]  # the first document begins with what stands before it
        begin_tokens = (document == LITERAL) & (start < self._begin_tokens)
        begins[1:] &= ~begin_tokens[:-1]
        begins[1:] |= begin_tokens[1:]
        begins[:1] = False  # what comes first needs no border
        return [int(part.sum()) for part in np.split(length, np.flatnonzero(begins))]

    def sequence_weights(
        self, index: int, places: IntArray, loss_mask: BoolArray, *, apart: bool
    ) -> tuple[npt.NDArray[np.float32], int]:
        """Weights of the learned labels at some places of a sample, and how many conversations the sample teaches.

        A weight is 1/N, N the learned tokens of the label's conversation (`data/methods/weights.py`).

        places: from 0 to seq_length - 1, or -1 for a filler, as in `gather` and, as positions, `cp_slice`; loss_mask: theirs.
        apart: conversations do not see each other.
        """
        return loss_weights(self.runs, index, self.document_lengths(index), places, loss_mask, apart=apart)

    def _ranges(self, index: int, ranges: list[tuple[int, int]]) -> tuple[IntArray, IntArray, BoolArray]:
        count = sum(stop - start for start, stop in ranges)
        tokens, labels = np.empty(count, np.int64), np.empty(count, np.int64)
        loss_mask = np.ones(count, np.bool_)
        at = 0
        for start, stop in ranges:
            last = min(stop + 1, self.seq_length)
            read = self._tokens.read(index, start, last - start)  # [n + 1], or [n] at the end of the sample
            here, labelled = slice(at, at + stop - start), at + last - start - 1
            tokens[here] = read[: stop - start]
            labels[at:labelled] = read[1:]
            if not self._whole:
                loss_mask[at:labelled] = self.runs.loss_flags(index, start + 1, last)
            labels[labelled : here.stop], loss_mask[labelled : here.stop] = 0, False
            at = here.stop
        return tokens, labels, loss_mask


class ReadAhead(Generic[K, V]):
    """Reads in a thread what will be asked for next, so that a step does not wait for a disk.

    One value is held ahead: as much memory again as one value takes. The process may end in the middle of a read: nobody waits.

    Args:
        read: makes the value of a key; a pure function of it. Called in two threads.
    """

    def __init__(self, read: Callable[[K], V]) -> None:
        self._read = read
        self._ahead: tuple[K, Future[V]] | None = None

    def get(self, key: K, following: K | None) -> V:
        """The value of `key`; that of `following` is begun, if there is one. An error there is raised when that value is asked for."""
        if self._ahead is not None and self._ahead[0] == key:
            value = self._ahead[1].result()
        else:
            value = self._read(key)
        self._ahead = None if following is None else (following, self._begin(following))
        return value

    def _begin(self, key: K) -> Future[V]:
        future: Future[V] = Future()

        def read() -> None:
            try:
                future.set_result(self._read(key))
            except BaseException as error:
                future.set_exception(error)

        # a pool's thread is joined when the interpreter ends, a daemon is not: no half minute of reading after the last step
        Thread(target=read, name="read-ahead", daemon=True).start()
        return future
