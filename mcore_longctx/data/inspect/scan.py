"""One pass over the tokens of a dataset: ids, checksums, and the tokens that a sidecar foretells. What is wrong is put into words."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.index_file import Index
from mcore_longctx.data.files.sidecar import LITERAL, PADDING, Runs
from mcore_longctx.data.methods.labels import literal_names, separator_tokens
from mcore_longctx.errors import DataError

__all__ = ["DatasetScan", "Faults", "Locate", "highest_id", "token_blocks"]

_READ = 1 << 20  # bytes read at once: they stay in the processor's cache for all checks
_ROWS = 1 << 18  # runs, or documents, looked at once
_NAMED = 3  # documents that are named for a sample

IntArray = npt.NDArray[np.int64]
Locate = Callable[[int, npt.NDArray[Any]], int | None]


@dataclass
class Faults:
    """What was found: the first few in words, all of them counted."""

    most: int
    words: list[str] = field(default_factory=list)
    count: int = 0

    @property
    def is_named(self) -> bool:
        """Whether the next fault will be named, or only counted."""
        return len(self.words) < self.most

    def add(self, where: object, what: str, times: int = 1) -> None:
        """Note one fault, which stands for `times`."""
        self.count += times
        if self.is_named:
            self.words.append(f"{where}: {what}")


def highest_id(dtype: np.dtype[Any], vocab_size: int | None) -> int | None:
    """Highest id that may stand in the file, None if every one may."""
    if vocab_size is not None:
        return vocab_size - 1
    return int(np.iinfo(dtype).max) if dtype.kind == "i" else None


def token_blocks(path: Path, size: int, dtype: np.dtype[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The first `size` bytes of a file as tokens, block after block in one buffer, with the number of the first.

    Read and not mapped: what a broken disk does to a map is no exception but the end of the process.

    Raises:
        DataError: it cannot be read.
    """
    buffer = memoryview(bytearray(_READ))
    at = 0
    try:
        with path.open("rb", buffering=0) as file:
            while size - at >= dtype.itemsize:
                filled, wanted = 0, min(_READ, (size - at) // dtype.itemsize * dtype.itemsize)
                while filled < wanted:
                    count = file.readinto(buffer[filled:wanted])
                    if not count:
                        raise DataError("became shorter while it was read", where=path)
                    filled += count
                yield at // dtype.itemsize, np.frombuffer(buffer[:wanted], dtype)
                at += wanted
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None


class DatasetScan:
    """One pass over a .bin.

    Args:
        prefix: path without suffix.
        index: of the dataset.
        runs: its sidecar, which agrees with the index in samples and lengths; None if there is none.
        faults: where to note what is wrong.
        locate: finds the damaged token of a sample, (sample, its tokens) -> position or None, if somebody can.
    """

    def __init__(
        self, prefix: Path, index: Index, runs: Runs | None, faults: Faults, locate: Locate = lambda sample, tokens: None
    ) -> None:
        self.path, self.index, self.runs, self.faults, self.locate = Path(f"{prefix}.bin"), index, runs, faults, locate

    def check(self, vocab_size: int | None, separator: Sequence[int] | None, digest: str | None) -> list[str]:
        """Compare every token; return what was compared."""
        index, runs, item = self.index, self.runs, self.index.dtype.itemsize
        size = self.path.stat().st_size
        if fault := index.size_fault(size):
            where = self.place(size // item) if size < index.bytes else ""
            self.faults.add(self.path, fault + (f": {where}" if where else ""))
        highest = highest_id(index.dtype, vocab_size)
        known = _KnownTokens(runs) if runs is not None else None
        sums = _SampleSums(runs, item) if runs is not None else None
        sha256, before = hashlib.sha256() if digest is not None else None, self.faults.count
        for first, block in token_blocks(self.path, min(size, index.bytes), index.dtype):
            if sha256 is not None:
                sha256.update(block.data)
            if highest is not None:
                self._check_ids(first, block, highest, vocab_size)
            if sums is not None:
                for sample in sums.differing(block):
                    self.faults.add(
                        self.path, f"sample {sample:,}: its checksum differs from the sidecar's ({self._damaged(sample)})"
                    )
            if known is not None:
                self._check_known(known, first, block)
        unexplained = size == index.bytes and self.faults.count == before
        if sha256 is not None and unexplained and sha256.hexdigest() != digest:
            self.faults.add(self.path, "contents differ from the manifest's sha256")
        if separator is not None:
            self._check_separator(np.array(separator, np.int64), size // item)
        found = {"ids": highest is not None, "checksums": runs is not None, "runs": runs is not None}
        found |= {"separators": runs is not None or separator is not None, "sha256": digest is not None}
        return [name for name, was in found.items() if was]

    def place(self, token: int) -> str:
        """Where a token of the file lies, in words."""
        sequence = self.index.sequence_at(token * self.index.dtype.itemsize)
        inside = token - int(self.index.sequence_pointers[sequence]) // self.index.dtype.itemsize
        if self.runs is None:
            document = int(np.searchsorted(self.index.document_indices[1:], sequence, side="right"))
            return f"sequence {sequence:,}, token {inside:,} (document {document:,})"
        rows = self.runs.rows(sequence)
        stops = np.cumsum(self.runs.length[rows], dtype=np.int64)
        row = int(np.searchsorted(stops, inside, side="right"))
        run = self.runs.sample(sequence)[row]
        begin = int(stops[row]) - run.length
        what = "padding" if run.is_padding else f"a {literal_names(self.runs)(run.start)}"
        if run.document is not None:
            what = f"token {run.start + inside - begin:,} of document {run.document!r} of source {run.source!r}"
        return f"sample {sequence:,}, token {inside:,} ({what})"

    def _damaged(self, sample: int) -> str:
        """Where in a sample the damage lies: the token, or at least the documents of which it must be one."""
        assert self.runs is not None
        length = self.runs.seq_length
        if self.faults.is_named:
            offset = sample * length * self.index.dtype.itemsize
            tokens = np.memmap(self.path, self.index.dtype, "r", offset, (length,))
            position = self.locate(sample, tokens)
            if position is not None:
                return f"first at {self.place(sample * length + position)}"
        document = self.runs.document[self.runs.rows(sample)]
        numbers = list(dict.fromkeys(document[document >= 0].tolist()))
        sources, of = self.runs.sources, self.runs.document_source
        words = [f"{self.runs.document_id(number)!r} of source {sources[int(of[number])]!r}" for number in numbers[:_NAMED]]
        more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
        return f"{'document' if len(numbers) == 1 else 'documents'} {', '.join(words)}{more}" if words else "no documents"

    def _check_ids(self, first: int, block: npt.NDArray[Any], highest: int, vocab_size: int | None) -> None:
        unsigned = block.view(f"u{block.itemsize}")  # a negative id is a very high one
        if not len(block) or int(unsigned.max()) <= highest:
            return
        wrong = np.flatnonzero(unsigned > highest)
        ends = f"the vocabulary ends at {vocab_size:,}" if vocab_size is not None else "ids are not negative"
        sequence = np.array(
            [self.index.sequence_at((first + at) * block.itemsize) for at in wrong[: 10 * self.faults.most].tolist()]
        )
        for at in np.unique(sequence, return_index=True)[1].tolist():  # the first of each sequence
            self.faults.add(self.path, f"{self.place(first + int(wrong[at]))} is id {int(block[wrong[at]]):,}, {ends}", 0)
        self.faults.count += len(wrong)

    def _check_known(self, known: _KnownTokens, first: int, block: npt.NDArray[Any]) -> None:
        positions, ids, padding = known.within(first, first + len(block))
        wrong = np.flatnonzero(block[positions - first] != ids)
        if len(wrong):
            at = int(positions[wrong[0]])
            text = f"{self.place(at)} is id {int(block[at - first]):,}, the sidecar says {int(ids[wrong[0]]):,}"
            self.faults.add(self.path, text, len(wrong))
        for begin, stop in padding:
            here = block[max(begin - first, 0) : stop - first]
            pad_id = known.pad_id if known.pad_id is not None else int(here[0])
            known.pad_id = pad_id
            if (here != pad_id).any():
                at = max(begin, first) + int(np.argmax(here != pad_id))
                self.faults.add(self.path, f"{self.place(at)} is id {int(block[at - first]):,}, padding is {pad_id:,}")

    def _check_separator(self, separator: IntArray, tokens: int) -> None:
        runs, index, count = self.runs, self.index, len(separator)
        if runs is not None:
            found = runs.literals[: separator_tokens(runs)]
            if (runs.document == LITERAL).any() and not np.array_equal(found, separator):
                self.faults.add(
                    f"{self.path.with_suffix('.runs')}", f"its separators are {found.tolist()}, not {separator.tolist()}"
                )
            return
        stored = np.memmap(self.path, index.dtype, "r", shape=(tokens,)) if tokens else np.zeros(0, index.dtype)
        for low in range(0, len(index.document_indices) - 1, _ROWS):
            sequence = index.document_indices[low : low + _ROWS + 1]
            last = sequence == len(index)
            ends = index.sequence_pointers[np.where(last, 0, sequence)] // index.dtype.itemsize
            ends[last] = index.bytes // index.dtype.itemsize
            begins, ends = ends[:-1], ends[1:]
            inside = ends <= len(stored)
            short = inside & (ends - begins < count)
            wrong = short.copy()
            at = np.flatnonzero(inside & ~short)
            wrong[at] = (stored[ends[at, None] - count + np.arange(count)] != separator).any(axis=1)
            if wrong.any():
                document = low + int(np.argmax(wrong))
                self.faults.add(self.path, f"document {document:,} does not end with {separator.tolist()}", int(wrong.sum()))


class _SampleSums:
    """CRC-32 of each sample while blocks go by."""

    def __init__(self, runs: Runs, itemsize: int) -> None:
        self._expected, self._sample_bytes = runs.crc32, runs.seq_length * itemsize
        self._sample, self._left, self._checksum = 0, self._sample_bytes, 0

    def differing(self, block: npt.NDArray[Any]) -> Iterator[int]:
        """Samples that end in this block with another checksum."""
        raw = block.data.cast("B")
        while raw:
            part, raw = raw[: self._left], raw[self._left :]
            self._checksum = zlib.crc32(part, self._checksum)
            self._left -= len(part)
            if not self._left:
                if self._checksum != int(self._expected[self._sample]):
                    yield self._sample
                self._sample, self._left, self._checksum = self._sample + 1, self._sample_bytes, 0


class _KnownTokens:
    """The tokens that a sidecar foretells, in the order in which they lie in the file: literals and padding."""

    def __init__(self, runs: Runs) -> None:
        self._runs, self._row, self._begin = runs, 0, 0
        self._positions, self._ids = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._begins, self._stops = np.zeros(0, np.int64), np.zeros(0, np.int64)  # of padding
        self.pad_id: int | None = runs.facts.get("pad_token_id")

    def within(self, low: int, high: int) -> tuple[IntArray, IntArray, list[tuple[int, int]]]:
        """Positions and ids of the literal tokens from `low` to `high`, and begin and stop of the paddings that overlap with them."""
        while self._begin < high and self._row < len(self._runs.length):
            self._load()
        cut = int(np.searchsorted(self._positions, high))
        positions, ids = self._positions[:cut], self._ids[:cut]
        self._positions, self._ids = self._positions[cut:], self._ids[cut:]
        first, last = np.searchsorted(self._stops, low, side="right"), np.searchsorted(self._begins, high)
        padding = list(zip(self._begins[first:last].tolist(), self._stops[first:last].tolist(), strict=True))
        self._begins, self._stops = self._begins[first:], self._stops[first:]
        return positions, ids, padding

    def _load(self) -> None:
        rows = slice(self._row, self._row + _ROWS)
        document, start = self._runs.document[rows], self._runs.start[rows]
        length = self._runs.length[rows].astype(np.int64)
        begin = self._begin + np.cumsum(length) - length
        literal, padding = document == LITERAL, document == PADDING
        count = length[literal]
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        self._positions = np.concatenate([self._positions, np.repeat(begin[literal], count) + within])
        self._ids = np.concatenate([self._ids, self._runs.literals[np.repeat(start[literal], count) + within].astype(np.int64)])
        self._begins = np.concatenate([self._begins, begin[padding]])
        self._stops = np.concatenate([self._stops, (begin + length)[padding]])
        self._begin = int(begin[-1] + length[-1])
        self._row += len(length)
