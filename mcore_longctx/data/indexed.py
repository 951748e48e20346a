"""Megatron's indexed dataset files, read and written bit for bit: `PREFIX.bin` and `PREFIX.idx`.

`.bin` holds token ids back to back, little endian, no header. `.idx`:

    offset    type       content
    0         9 bytes    MMIDIDX\\0\\0
    9         uint64     version, 1
    17        uint8      code of the token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    18        uint64     sequences N
    26        uint64     length D of the document indices: documents + 1
    34        int32[N]   tokens of each sequence
    34 + 4N   int64[N]   byte offset of each sequence in .bin
    34 + 12N  int64[D]   sequence at which each document ends; first 0, last N
    then      int8[N]    modes, only in multimodal files (skipped here)

Megatron never compares the size of `.bin` with the index: a cut file opens, and merging it shifts everything behind it. Here
it is refused. Source: megatron/core/datasets/indexed_dataset.py, unchanged between 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import DataError

__all__ = ["IndexedReader", "IndexedWriter", "token_dtype"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_MAX_SEQUENCE = 2**31 - 1  # lengths are int32


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type in which Megatron stores ids of a vocabulary: uint16 below 65,500 entries, else int32.

    Source: `DType.optimal_dtype`. (Other writers use uint16 up to 65,536: for 65,500 to 65,536 they differ from Megatron.)
    """
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`; every added sequence is a document of its own.

    Use it as a context manager. The tokens go to `PREFIX.bin.partial`; `close` renames it and writes the index last, so Megatron
    finds a whole pair or nothing. An exception inside the block removes what was written.

    Args:
        prefix: path without suffix.
        dtype: token type, see `token_dtype`.

    Raises:
        DataError: one of the two files exists.
    """

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._partial = Path(f"{prefix}.bin.partial")
        if self.dtype not in _CODES:
            raise DataError(f"token type {self.dtype} has no code in the index", where=self._idx, fix="use uint16 or int32")
        for path in (self._bin, self._idx):
            if path.exists():
                raise DataError("file is already there", where=path, fix="choose another name or remove it")
        self._lengths: list[int] = []
        self._file = self._partial.open("wb")

    def add(self, tokens: npt.NDArray[Any]) -> None:
        """Append one sequence. tokens: integer ids [n], n below 2^31.

        Raises:
            DataError: too long for the index, or an id that the token type cannot hold.
        """
        if len(tokens) > _MAX_SEQUENCE:
            raise DataError(f"a sequence of {len(tokens):,} tokens; the index holds at most {_MAX_SEQUENCE:,}", where=self._bin)
        if len(tokens) and tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                raise DataError(f"token id {low if low < limits.min else high} does not fit {self.dtype}", where=self._bin)
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(len(tokens))

    def close(self) -> None:
        """Make the pair appear: fsync and rename the tokens, then write the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.array(self._lengths, dtype="<i4")
        aside = self._idx.with_name(self._idx.name + ".partial")
        with aside.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(_pointers(lengths, self.dtype.itemsize).tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._partial.rename(self._bin)
        aside.rename(self._idx)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        self._file.close()
        self._partial.unlink(missing_ok=True)


class IndexedReader:
    """Memory-mapped view of `PREFIX.bin` and `PREFIX.idx`, whoever wrote them.

    Attributes:
        dtype: type of the stored ids.
        sequence_lengths: int32 [sequences], tokens.
        sequence_pointers: int64 [sequences], byte offsets in `.bin`.
        document_indices: int64 [documents + 1], sequence at which each document ends.

    Raises:
        DataError: a file is missing, is no index, is cut, or index and `.bin` do not agree.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._idx, self._bin = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (self._idx, self._bin):
            if not path.is_file():
                raise DataError("no such file", where=path, fix="give the path of .bin and .idx without suffix")
        self._read_index()
        self._check_pointers()
        size = self._bin.stat().st_size
        expected = int(self.sequence_lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{size:,} bytes, its index says {expected:,}", where=self._bin, fix="the file is damaged: rebuild it"
            )
        # numpy refuses to map an empty file
        self._tokens: npt.NDArray[Any] = np.memmap(self._bin, self.dtype, "r") if size else np.zeros(0, self.dtype)

    def _read_index(self) -> None:
        size = self._idx.stat().st_size
        if size < _HEADER.size:
            raise DataError("too short for an index", where=self._idx, fix="rebuild it")
        raw = np.memmap(self._idx, np.uint8, "r")
        magic, version, code, sequences, boundaries = _HEADER.unpack_from(raw[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise DataError("not an index of Megatron's indexed dataset (wrong first bytes)", where=self._idx)
        if version != 1 or code not in _DTYPES:
            raise DataError(f"index version {version} with token type {code} is unknown", where=self._idx)
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (expected, expected + sequences):
            raise DataError(f"{size:,} bytes, {sequences:,} sequences need {expected:,}", where=self._idx, fix="rebuild it")
        self.dtype = np.dtype(_DTYPES[code])
        at = _HEADER.size
        self.sequence_lengths: npt.NDArray[np.int32] = np.frombuffer(raw, "<i4", sequences, at)
        self.sequence_pointers: npt.NDArray[np.int64] = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        self.document_indices: npt.NDArray[np.int64] = np.frombuffer(raw, "<i8", boundaries, at + 12 * sequences)

    def _check_pointers(self) -> None:
        if (self.sequence_lengths < 0).any():
            raise DataError(f"negative length at sequence {int(np.argmax(self.sequence_lengths < 0))}", where=self._idx)
        wrong = _pointers(self.sequence_lengths, self.dtype.itemsize) != self.sequence_pointers
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(f"sequence {at} starts at byte {self.sequence_pointers[at]}, the lengths disagree", where=self._idx)
        ends = self.document_indices
        if not len(ends) or ends[0] != 0 or ends[-1] != len(self) or (np.diff(ends) < 0).any():
            raise DataError(f"document indices do not go from 0 to {len(self)}", where=self._idx)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Tokens of one sequence: a read-only view of the map."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """`length` tokens of sequence `index` from `offset` on (to its end if None). Touches only those pages."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        total = int(self.sequence_lengths[index])
        length = total - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > total:
            raise IndexError(f"tokens {offset} to {offset + length} of a sequence of {total}")
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]


def _pointers(lengths: npt.NDArray[np.int32], itemsize: int) -> npt.NDArray[np.int64]:
    """Byte offset of each sequence, summed in int64 (an int32 sum wraps past 2 GiB)."""
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    return pointers * itemsize
