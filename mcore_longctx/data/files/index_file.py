"""The index of Megatron's indexed dataset, `PREFIX.idx`, bit for bit.

    offset    type       content
    0         9 bytes    MMIDIDX\\0\\0
    9         uint64     version, 1
    17        uint8      code of the token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    18        uint64     sequences N
    26        uint64     length D of the document indices: documents + 1
    34        int32[N]   tokens of each sequence
    34 + 4N   int64[N]   byte offset of each sequence in .bin
    34 + 12N  int64[D]   sequence at which each document ends; first 0, last N
    then      int8[N]    modes, only in multimodal files

Source: megatron/core/datasets/indexed_dataset.py, unchanged between 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import map_file
from mcore_longctx.errors import DataError

__all__ = ["TOKEN_TYPES", "Index", "IndexColumns", "read_index", "write_index"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_BLOCK = 1 << 20  # sequences handled at once

TOKEN_TYPES = frozenset(_CODES)  # the types of token ids that the index has a code for

IntArray = npt.NDArray[np.int64]


class IndexColumns(NamedTuple):
    """What an index says of the sequences and documents of one file, or of one of several that become one."""

    sequence_lengths: npt.NDArray[np.int32]  # [sequences] tokens
    document_indices: IntArray  # [documents + 1] sequence at which each document ends; first 0, last the number of sequences
    sequence_modes: npt.NDArray[np.int8] | None = None  # [sequences], only in multimodal files


def write_index(path: Path, dtype: npt.DTypeLike, parts: Sequence[IndexColumns]) -> int:
    """Write an index over the sequences of `parts`, one part behind the other, and fsync it. Memory holds one block.

    Args:
        path: replaced if it exists; give it a partial name and rename it.
        dtype: token type.
        parts: their columns, which may be mapped.

    Returns:
        CRC-32 of the file.
    """
    itemsize = np.dtype(dtype).itemsize
    checksum = 0
    with path.open("wb") as file:

        def write(block: bytes) -> None:
            nonlocal checksum
            checksum = zlib.crc32(block, checksum)
            file.write(block)

        sequences = sum(len(part.sequence_lengths) for part in parts)
        boundaries = 1 + sum(len(part.document_indices) - 1 for part in parts)
        write(_HEADER.pack(_MAGIC, 1, _CODES[np.dtype(dtype)], sequences, boundaries))
        for part in parts:
            for lengths in _blocks(part.sequence_lengths):
                write(lengths.astype("<i4").tobytes())
        begin = 0
        for part in parts:
            for lengths in _blocks(part.sequence_lengths):
                stops = _stops(begin, lengths, itemsize)
                write((stops - lengths.astype(np.int64) * itemsize).astype("<i8").tobytes())
                begin = int(stops[-1])
        write(bytes(8))
        base = 0
        for part in parts:
            for ends in _blocks(part.document_indices[1:]):
                write((ends.astype(np.int64) + base).astype("<i8").tobytes())
            base += len(part.sequence_lengths)
        for part in parts:
            if part.sequence_modes is not None:
                for modes in _blocks(part.sequence_modes):
                    write(modes.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return checksum


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """An index that agrees with itself, mapped."""

    path: Path
    dtype: np.dtype[Any]
    sequence_lengths: npt.NDArray[np.int32]  # [sequences] tokens
    sequence_pointers: IntArray  # [sequences] byte offsets in .bin
    document_indices: IntArray  # [documents + 1] sequence at which each document ends
    sequence_modes: npt.NDArray[np.int8] | None
    bytes: int  # that .bin must have

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    @property
    def columns(self) -> IndexColumns:
        """What `write_index` needs to write it again."""
        return IndexColumns(self.sequence_lengths, self.document_indices, self.sequence_modes)

    def sequence_at(self, byte: int) -> int:
        """Sequence that holds a byte of .bin; the last one for what lies behind the end."""
        return int(np.searchsorted(self.sequence_pointers[1:], byte, side="right"))

    def size_fault(self, size: int) -> str | None:
        """What is wrong with a .bin of `size` bytes, in words; None if nothing is."""
        if size == self.bytes:
            return None
        fault = f"{size:,} bytes, its index says {self.bytes:,}"
        if size > self.bytes:
            return f"{fault}: {size - self.bytes:,} bytes too many"
        return f"{fault}: cut, sequence {self.sequence_at(size):,} of {len(self):,} is the first that is not whole"


def read_index(path: Path) -> Index:
    """Map an index and check it: type, sizes, lengths, pointers, documents.

    Raises:
        DataError: missing, no index, cut, or its columns contradict each other; names the first sequence that does.
    """
    if not path.is_file():
        raise DataError("no such file", where=path, fix="give the path of .bin and .idx without suffix")
    size = path.stat().st_size
    if size < _HEADER.size:
        raise DataError("too short for an index", where=path, fix="rebuild it")
    raw = map_file(path)
    magic, version, code, sequences, boundaries = _HEADER.unpack_from(raw[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise DataError("not an index of Megatron's indexed dataset (wrong first bytes)", where=path)
    if code in _FLOATS:
        raise DataError(f"holds {_FLOATS[code]} values, which are no token ids", where=path)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"index version {version} with token type {code} is unknown", where=path)
    at = _HEADER.size
    expected = at + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):
        raise DataError(
            f"{size:,} bytes, {sequences:,} sequences and {boundaries:,} borders of documents need {expected:,}",
            where=path,
            fix="rebuild it",
        )
    dtype = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(raw, "<i4", sequences, at)
    pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
    ends = np.frombuffer(raw, "<i8", boundaries, at + 12 * sequences)
    modes = np.frombuffer(raw, "i1", sequences, expected) if size > expected else None
    return Index(
        path=path,
        dtype=dtype,
        sequence_lengths=lengths,
        sequence_pointers=pointers,
        document_indices=ends,
        sequence_modes=modes,
        bytes=_checked_bytes(path, lengths, pointers, ends, dtype.itemsize),
    )


def _checked_bytes(path: Path, lengths: npt.NDArray[np.int32], pointers: IntArray, ends: IntArray, itemsize: int) -> int:
    """Compare the columns with each other; return the bytes that .bin must have."""
    begin = 0
    for low, block, found in zip(range(0, len(lengths), _BLOCK), _blocks(lengths), _blocks(pointers), strict=True):
        negative, stops = block < 0, _stops(begin, block, itemsize)
        wrong = stops - block.astype(np.int64) * itemsize != found
        if not (negative.any() or wrong.any()):
            begin = int(stops[-1])
            continue
        at = int(np.argmax(negative | wrong))
        if not wrong[at]:
            raise DataError(f"sequence {low + at:,} has a negative length ({block[at]:,})", where=path, fix="rebuild it")
        expected = int(stops[at]) - int(block[at]) * itemsize
        hint = " (it wrapped: written with 32-bit pointers)" if (expected - int(found[at])) % 2**32 == 0 else ""
        raise DataError(
            f"sequence {low + at:,} starts at byte {found[at]:,}, the lengths before it say {expected:,}{hint}",
            where=path,
            fix="rebuild it",
        )
    before = 0
    for block in _blocks(ends):
        if block[0] < before or (block[1:] < block[:-1]).any():
            before = -1
            break
        before = int(block[-1])
    if not len(ends) or ends[0] != 0 or before != len(lengths):
        raise DataError(f"document indices do not go from 0 to {len(lengths):,}", where=path, fix="rebuild it")
    return begin


def _blocks(column: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for low in range(0, len(column), _BLOCK):
        yield column[low : low + _BLOCK]


def _stops(begin: int, lengths: npt.NDArray[np.int32], itemsize: int) -> IntArray:
    """Byte behind each sequence, summed in int64 (an int32 sum wraps past 2 GiB)."""
    return begin + np.cumsum(lengths, dtype=np.int64) * itemsize
