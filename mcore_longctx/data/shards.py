"""Tokenized documents: one token file, and a table that says where each document lies in it and how long it is.

The table is sorted by source and by the hash of the document's id, so everything that is decided from it is the same for any
order of files and lines. The position in the token file is the only thing that depends on the order of reading.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

__all__ = ["DocumentTable", "TokenWriter", "hash64"]

UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1


def hash64(*words: UInt64Array | IntArray | int) -> UInt64Array:
    """Hash of columns of 64-bit words, row by row: the only source of randomness of this room.

    Each word is folded in with splitmix64 (Steele et al. 2014), whose outputs pass as random bits. At least one word must be an
    array; integers are taken modulo 2^64.
    """
    shape = np.broadcast_shapes(*(np.shape(word) for word in words))
    state = np.zeros(shape, np.uint64)
    for word in words:
        column = np.uint64(word & _MASK) if isinstance(word, int) else word.astype(np.uint64)
        state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentTable:
    """One row a document, sorted by (source, key).

    A document is a list of segments with a loss flag each: its segments are rows segment_first[d] to segment_first[d + 1] of
    `segment_stop` and `segment_loss`, and the last one stops at `length[d]`.
    """

    sources: tuple[str, ...]
    ids: tuple[str, ...]
    source: npt.NDArray[np.int32]  # [documents] row of `sources`
    key: UInt64Array  # [documents] hash of source name, id, and number among equals
    offset: IntArray  # [documents] first token in the token file
    length: IntArray  # [documents] tokens, at least 1
    segment_first: IntArray  # [documents + 1]
    segment_stop: IntArray  # [segments] tokens from the start of the document
    segment_loss: npt.NDArray[np.bool_]  # [segments]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.length)


class TokenWriter:
    """Appends tokenized documents to a file and collects the table. Use it as a context manager.

    Args:
        path: the token file, overwritten.
        dtype: type of its ids.
        sources: names of the sources.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], sources: Sequence[str]) -> None:
        self.path, self.dtype, self.sources = path, dtype, tuple(sources)
        self._file = path.open("wb")
        self._ids: list[str] = []
        self._source, self._key, self._digest = array("i"), array("Q"), array("Q")
        self._length, self._segments = array("q"), array("q")
        self._segment_stop, self._segment_loss = array("q"), array("b")

    def add(self, source: int, document_id: str, segments: Iterable[tuple[npt.NDArray[np.int32], bool]]) -> bool:
        """Append one document of source number `source`. False, and nothing is written, if it has no token."""
        digest, length, count = hashlib.blake2b(digest_size=8), 0, 0
        for tokens, loss in segments:
            if not len(tokens):
                continue
            raw = tokens.astype(self.dtype).tobytes()
            self._file.write(raw)
            digest.update(bytes([loss]) + raw)
            length += len(tokens)
            count += 1
            self._segment_stop.append(length)
            self._segment_loss.append(loss)
        if not length:
            return False
        name = hashlib.blake2b(f"{self.sources[source]}\0{document_id}".encode(), digest_size=8)
        self._ids.append(document_id)
        self._source.append(source)
        self._key.append(int.from_bytes(name.digest(), "little"))
        self._digest.append(int.from_bytes(digest.digest(), "little"))
        self._length.append(length)
        self._segments.append(count)
        return True

    def table(self) -> DocumentTable:
        """The table of everything that was added."""
        source, key = np.array(self._source, np.int32), np.array(self._key, np.uint64)
        length, segments = np.array(self._length, np.int64), np.array(self._segments, np.int64)
        offset, segment_first = _exclusive_sum(length)[:-1], _exclusive_sum(segments)
        # equal ids: told apart by content, and documents of equal content need no telling apart
        order = np.lexsort((np.array(self._digest, np.uint64), key, source))
        source, key = source[order], key[order]
        is_first = np.ones(len(order), np.bool_)
        is_first[1:] = (source[1:] != source[:-1]) | (key[1:] != key[:-1])
        rows = np.arange(len(order))
        ordinal = rows - np.maximum.accumulate(np.where(is_first, rows, 0))
        new_first = _exclusive_sum(segments[order])
        taken = np.repeat(segment_first[order] - new_first[:-1], segments[order]) + np.arange(new_first[-1])
        return DocumentTable(
            sources=self.sources,
            ids=tuple(self._ids[row] for row in order),
            source=source,
            key=hash64(key, ordinal),
            offset=offset[order],
            length=length[order],
            segment_first=new_first,
            segment_stop=np.array(self._segment_stop, np.int64)[taken],
            segment_loss=np.array(self._segment_loss, np.bool_)[taken],
        )

    def tokens(self) -> npt.NDArray[Any]:
        """Everything that was added, mapped read-only, [tokens]."""
        self._file.flush()
        return np.memmap(self.path, self.dtype, "r") if self.path.stat().st_size else np.zeros(0, self.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def _exclusive_sum(values: IntArray) -> IntArray:
    """0, v0, v0 + v1, ... [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
