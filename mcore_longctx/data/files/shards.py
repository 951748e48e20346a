"""Token shards: what `data tokenize` leaves, one pair of files a task.

    000012.tokens    ids of its documents back to back, uint16 or int32 as in `.bin`
    000012.docs      one row a document: key, digest, length; their ids; loss flags; bad records. Published last: the shard is whole

Planning reads only the `.docs` files. The rows of all shards in the order of the tasks are the rows of one `DocumentTable`; that
order is the order of the input files and of the lines in them, whatever the number of tasks or workers.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import map_arrays, map_file, write_arrays
from mcore_longctx.errors import DataError
from mcore_longctx.manifest import partial_path

__all__ = ["DocumentTable", "Shard", "ShardWriter", "hash64", "read_shard", "read_table"]

UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_ENDS = 64  # tokens at each end of a document that its digest covers
_BUFFER = 1 << 22  # bytes
_ROWS = 1 << 20  # that are hashed at once


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


class ShardWriter:
    """Writes one shard. Use it as a context manager: nothing appears before `publish`, and an exception leaves nothing.

    Args:
        folder: where the shards lie.
        number: of the task.
        dtype: type of the ids, see `token_dtype`.
        source: name of the source; part of every document's key.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any], source: str) -> None:
        self.dtype, self.documents, self.tokens = dtype, 0, 0
        self._stem, self._source = folder / f"{number:06d}", source.encode() + b"\0"
        self._partial = partial_path(self._stem.with_suffix(".tokens"))
        self._file = self._partial.open("wb", buffering=_BUFFER)
        self._crc32 = 0
        self._key, self._digest, self._length = array("Q"), array("Q"), array("q")
        self._ids, self._id_stop = bytearray(), array("q")
        self._loss_document, self._loss_stop, self._loss_flag = array("q"), array("q"), array("b")

    def add(self, document_id: str, segments: Iterable[tuple[npt.NDArray[Any], bool]]) -> bool:
        """Append one document: stretches of ids with their loss flag. False, and nothing is written, if it has no token.

        The ids must fit `dtype`: compare the vocabulary with it once, before the first document.
        """
        parts = [(np.ascontiguousarray(tokens, self.dtype), loss) for tokens, loss in segments if len(tokens)]
        if not parts:
            return False
        length, digest = 0, hashlib.blake2b(digest_size=8)
        for tokens, loss in parts:
            raw = tokens.data.cast("B")
            self._file.write(raw)
            self._crc32 = zlib.crc32(raw, self._crc32)
            length += len(tokens)
            digest.update(b"%d%d" % (loss, len(tokens)) + tokens[:_ENDS].tobytes() + tokens[-_ENDS:].tobytes())
        if not all(loss for _, loss in parts):
            stop = 0
            for tokens, loss in parts:
                stop += len(tokens)
                self._loss_document.append(self.documents)
                self._loss_stop.append(stop)
                self._loss_flag.append(loss)
        name = document_id.encode()
        self._ids += name
        self._id_stop.append(len(self._ids))
        self._key.append(int.from_bytes(hashlib.blake2b(self._source + name, digest_size=8).digest(), "little"))
        self._digest.append(int.from_bytes(digest.digest(), "little"))
        self._length.append(length)
        self.documents += 1
        self.tokens += length
        return True

    def publish(self, facts: dict[str, Any]) -> None:
        """Make the shard appear: tokens first, then the table with `facts` (anything JSON) as the sign that it is whole."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._stem.with_suffix(".tokens"))
        columns: dict[str, npt.NDArray[Any]] = {
            "key": np.array(self._key, np.uint64),
            "digest": np.array(self._digest, np.uint64),
            "length": np.array(self._length, np.int64),
            "id_stop": np.array(self._id_stop, np.int64),
            "ids": np.frombuffer(self._ids, np.uint8),
            "loss_document": np.array(self._loss_document, np.int64),
            "loss_stop": np.array(self._loss_stop, np.int64),
            "loss_flag": np.array(self._loss_flag, np.bool_),
        }
        counts = {"tokens": self.tokens, "dtype": self.dtype.name, "tokens_crc32": self._crc32}
        write_arrays(self._stem.with_suffix(".docs"), columns, {"format": 1, **counts, **facts})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The table of one shard, mapped. Row d is one document."""

    path: Path  # of the .tokens file
    key: UInt64Array  # [documents] hash of the source's name and the document's id
    digest: UInt64Array  # [documents] hash of the length, the ends and the loss flags: tells documents of one id apart
    length: IntArray  # [documents] tokens, at least 1
    id_stop: IntArray  # [documents] bytes in `ids`
    ids: npt.NDArray[np.uint8]  # UTF-8
    loss_document: IntArray  # [segments] rows of documents that are not learned whole, ascending
    loss_stop: IntArray  # [segments] tokens from the start of the document
    loss_flag: npt.NDArray[np.bool_]  # [segments]
    facts: dict[str, Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids."""
        return np.dtype(str(self.facts["dtype"]))

    def document_id(self, row: int) -> str:
        """Id of one document."""
        start = int(self.id_stop[row - 1]) if row else 0
        return bytes(self.ids[start : int(self.id_stop[row])]).decode()

    def content_hash(self, row: int) -> int:
        """Hash of all tokens of one document, 64 bits."""
        start = int(self.length[:row].sum())
        tokens = np.ascontiguousarray(self.tokens()[start : start + int(self.length[row])])
        return int.from_bytes(hashlib.blake2b(tokens.data, digest_size=8).digest(), "little")

    def tokens(self) -> npt.NDArray[Any]:
        """All ids of the shard, mapped read-only, [tokens].

        Raises:
            DataError: the file is missing or has another size than the table says.
        """
        count = int(self.facts["tokens"])
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise DataError(
                "no such file, though its table is there", where=self.path, fix="start `data tokenize` again"
            ) from None
        if size != count * self.dtype.itemsize:
            raise DataError(
                f"{size:,} bytes, its table says {count * self.dtype.itemsize:,}",
                where=self.path,
                fix="remove it and start `data tokenize` again",
            )
        return map_file(self.path).view(self.dtype)


def read_shard(folder: Path, number: int) -> Shard:
    """Map the table of one shard.

    Raises:
        DataError: not there, or damaged.
    """
    path = folder / f"{number:06d}.docs"
    fix = "remove it and start `data tokenize` again, which makes this shard anew"
    try:
        arrays, facts = map_arrays(path)
    except DataError as error:
        raise DataError(error.what, where=path, fix=fix) from None
    try:
        shard = Shard(path=path.with_suffix(".tokens"), facts=facts, **arrays)
        rows, segments = len(shard.length), len(shard.loss_stop)
        sound = (
            len(shard.key) == len(shard.digest) == len(shard.id_stop) == rows
            and len(shard.loss_document) == len(shard.loss_flag) == segments
            and int(shard.length.sum()) == int(facts["tokens"])
            and (int(shard.id_stop[-1]) if rows else 0) == len(shard.ids)
            and facts["format"] == 1
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise DataError("not a table of documents", where=path, fix=fix)
    return shard


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentTable:
    """The documents of all shards: one row each, in the order of the input. Everything that a plan may look at."""

    sources: tuple[str, ...]
    source: npt.NDArray[np.uint16]  # [documents] row of `sources`, ascending
    key: UInt64Array  # [documents] different for every document, and for any order of files and lines the same
    length: IntArray  # [documents] tokens, at least 1
    loss_document: IntArray  # [segments] rows of documents that are not learned whole, ascending
    loss_stop: IntArray  # [segments] tokens from the start of the document; the last segment of a document stops at its length
    loss_flag: npt.NDArray[np.bool_]  # [segments]
    shards: tuple[Shard, ...] = ()
    shard_first: IntArray  # [shards + 1] row of each shard's first document

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.length)

    def document_id(self, row: int) -> str:
        """Id of one document."""
        shard = int(np.searchsorted(self.shard_first, row, side="right")) - 1
        return self.shards[shard].document_id(row - int(self.shard_first[shard]))

    def sha256(self) -> str:
        """Hash of keys, lengths and their order: two plans can share tokens only if it is the same."""
        digest = hashlib.sha256()
        for column in (self.key, self.length):
            for low in range(0, len(column), _ROWS):
                digest.update(np.ascontiguousarray(column[low : low + _ROWS]).data)
        return digest.hexdigest()

    @cached_property
    def token_offset(self) -> IntArray:
        """First token of each document in its shard, int64 [documents]."""
        stops = np.cumsum(self.length, dtype=np.int64)
        starts = stops - self.length
        filled = np.diff(self.shard_first) > 0
        bases = np.repeat(starts[self.shard_first[:-1][filled]], np.diff(self.shard_first)[filled])
        return starts - bases


def read_table(folder: Path, sources: Sequence[str], shard_source: Sequence[int]) -> DocumentTable:
    """The documents of shards 0, 1, ... of `folder`.

    Args:
        folder: where the shards lie.
        sources: names.
        shard_source: for each shard the row of `sources` that it was made from, ascending.

    Raises:
        DataError: a shard is missing or damaged.
    """
    shards = tuple(read_shard(folder, number) for number in range(len(shard_source)))
    counts = np.array([len(shard.length) for shard in shards], np.int64)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    key, digest, length = (_joined(shards, name) for name in ("key", "digest", "length"))
    source = np.repeat(np.array(shard_source, np.uint16), counts)

    def content(row: int) -> int:
        number = int(np.searchsorted(first, row, side="right")) - 1
        return shards[number].content_hash(row - int(first[number]))

    with_loss = [(shard, base) for shard, base in zip(shards, first.tolist(), strict=False) if len(shard.loss_stop)]
    loss_document = [shard.loss_document + base for shard, base in with_loss]
    return DocumentTable(
        sources=tuple(sources),
        source=source,
        key=_told_apart(key, digest, content),
        length=length,
        loss_document=np.concatenate(loss_document) if loss_document else np.zeros(0, np.int64),
        loss_stop=_joined([shard for shard, _ in with_loss], "loss_stop", np.int64),
        loss_flag=_joined([shard for shard, _ in with_loss], "loss_flag", np.bool_),
        shards=shards,
        shard_first=first,
    )


def _joined(shards: Sequence[Shard], name: str, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    columns = [getattr(shard, name) for shard in shards]
    return np.concatenate(columns) if columns else np.zeros(0, dtype)


def _told_apart(key: UInt64Array, digest: UInt64Array, content: Callable[[int], int]) -> UInt64Array:
    """Keys with the number among equals folded in. Equal ids are numbered by content, so their order in the files is nothing.

    The digest covers the length and both ends. Where that does not tell two documents of one id apart, `content` does: hardly ever.
    """
    order = np.argsort(key, kind="stable")
    inner = np.flatnonzero(key[order][1:] == key[order][:-1]) + 1  # places whose left neighbour has the same key
    if not len(inner):
        return key
    rows = order[np.unique(np.concatenate([inner - 1, inner]))]  # every document whose id occurs more than once
    rows = rows[np.lexsort((digest[rows], key[rows]))]
    same = np.flatnonzero((key[rows][1:] == key[rows][:-1]) & (digest[rows][1:] == digest[rows][:-1])) + 1
    whole = np.zeros(len(rows), np.uint64)
    for place in np.unique(np.concatenate([same - 1, same])).tolist():
        whole[place] = content(int(rows[place]))
    rows = rows[np.lexsort((whole, digest[rows], key[rows]))]
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = key[rows][1:] != key[rows][:-1]
    place = np.arange(len(rows))
    ordinal = place - np.maximum.accumulate(np.where(is_first, place, 0))
    told = key.copy()
    told[rows] = np.where(ordinal > 0, hash64(key[rows], ordinal), key[rows])
    return told
