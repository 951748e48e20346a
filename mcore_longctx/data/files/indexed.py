"""Megatron's indexed dataset, read and written bit for bit: token ids in `PREFIX.bin`, where each sequence lies in `PREFIX.idx`.

`.bin` holds ids back to back, little endian, no header; `.idx` is told in `data/files/index_file.py`. Megatron never compares the size of
`.bin` with the index: a cut file opens, and merging it shifts everything behind it. Here it is refused.
"""

from __future__ import annotations

import os
import weakref
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.index_file import TOKEN_TYPES, IndexColumns, read_index, write_index
from mcore_longctx.errors import DataError
from mcore_longctx.manifest import fsync_folder, partial_path

__all__ = ["IndexedReader", "IndexedWriter", "find_prefix", "token_dtype"]

_MAX_SEQUENCE = 2**31 - 1  # lengths are int32


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type in which Megatron stores ids of a vocabulary: uint16 below 65,500 entries, else int32.

    Source: `DType.optimal_dtype`. (Other writers use uint16 up to 65,536: for 65,500 to 65,536 they differ from Megatron.)
    """
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def find_prefix(path: Path) -> Path:
    """Prefix of the indexed dataset that `path` means: a prefix, one of its files, or a folder that holds one pair.

    Raises:
        DataError: there is none, or more than one.
    """
    if path.is_dir():
        found = sorted(path.glob("*.idx"))
        if len(found) != 1:
            raise DataError(f"{len(found)} .idx files in this folder, expected one", where=path, fix="give a prefix")
        return found[0].with_suffix("")
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".runs") else path


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`.

    Use it as a context manager. Both are written under partial names; the end of the block renames `.bin`, then `.idx`, so Megatron
    finds a whole pair or nothing. An exception inside the block removes what was written. Memory grows by 4 bytes a sequence and 8
    a document.

    Args:
        prefix: path without suffix.
        dtype: token type, see `token_dtype`.

    Raises:
        DataError: one of the two files exists, or the type is none for token ids.
    """

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._partial_bin, self._partial_idx = partial_path(self._bin), partial_path(self._idx)
        if self.dtype not in TOKEN_TYPES:
            raise DataError(f"token type {self.dtype} has no code in the index", where=self._idx, fix="use uint16 or int32")
        self._refuse_existing()
        self._lengths, self._ends = array("i"), array("q", [0])
        self._checksum: int | None = None
        self._file = self._partial_bin.open("wb")

    def add(self, tokens: npt.NDArray[Any], *, ends_document: bool = True) -> None:
        """Append one sequence. tokens: integer ids [n], n below 2^31. By default it is a document of its own.

        Raises:
            DataError: too long for the index, no integers, or an id that the token type cannot hold.
        """
        if len(tokens) > _MAX_SEQUENCE:
            raise DataError(f"a sequence of {len(tokens):,} tokens; the index holds at most {_MAX_SEQUENCE:,}", where=self._bin)
        if len(tokens) and tokens.dtype.kind not in "iu":
            raise DataError(f"values of type {tokens.dtype} are no token ids", where=self._bin)
        if len(tokens) and tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                raise DataError(f"token id {low if low < limits.min else high} does not fit {self.dtype}", where=self._bin)
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(len(tokens))
        if ends_document:
            self.end_document()

    def end_document(self) -> None:
        """The sequences since the last call, if there are any, are one document."""
        self._ends.append(len(self._lengths))

    def finish(self) -> int:
        """Write the index and fsync both files, still under their partial names; return the CRC-32 of the index.

        For files that must appear before the index does and know it, such as a sidecar. Nothing can be added afterwards.

        Raises:
            DataError: the last document was not ended.
        """
        if self._checksum is None:
            if self._ends[-1] != len(self._lengths):
                raise DataError("the last document was not ended", where=self._bin)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            lengths, ends = np.frombuffer(self._lengths, np.int32), np.frombuffer(self._ends, np.int64)
            self._checksum = write_index(self._partial_idx, self.dtype, [IndexColumns(lengths, ends)])
        return self._checksum

    def close(self) -> None:
        """Make the pair appear, the index last."""
        self.finish()
        self._refuse_existing()
        self._partial_bin.rename(self._bin)
        self._partial_idx.rename(self._idx)
        fsync_folder(self._idx.parent)

    def _refuse_existing(self) -> None:
        for path in (self._bin, self._idx):
            if path.exists():
                raise DataError("file is already there", where=path, fix="choose another name or remove it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._file.close()
            self._partial_bin.unlink(missing_ok=True)
            self._partial_idx.unlink(missing_ok=True)


class IndexedReader:
    """Memory-mapped view of `PREFIX.bin` and `PREFIX.idx`, whoever wrote them.

    Attributes:
        index: the checked `.idx`.
        dtype: type of the stored ids.
        sequence_lengths: int32 [sequences], tokens.
        sequence_pointers: int64 [sequences], byte offsets in `.bin`.
        document_indices: int64 [documents + 1], sequence at which each document ends.

    Raises:
        DataError: a file is missing, is no index, is cut, or index and `.bin` do not agree.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self.index = read_index(Path(f"{prefix}.idx"))
        self.dtype, self.sequence_lengths = self.index.dtype, self.index.sequence_lengths
        self.sequence_pointers, self.document_indices = self.index.sequence_pointers, self.index.document_indices
        path = Path(f"{prefix}.bin")
        if not path.is_file():
            raise DataError("no such file", where=path, fix="give the path of .bin and .idx without suffix")
        size = path.stat().st_size
        if fault := self.index.size_fault(size):
            raise DataError(fault, where=path, fix="the file is damaged: rebuild it")
        # numpy refuses to map an empty file
        self._tokens: npt.NDArray[Any] = np.memmap(path, self.dtype, "r") if size else np.zeros(0, self.dtype)
        self._path, self._file = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # what is asked for and nothing ahead of it

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Tokens of one sequence: a read-only view of the map."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """`length` tokens of sequence `index` from `offset` on (to its end if None): a read-only view of the map."""
        start, length = self._span(index, offset, length)
        return self._tokens[start : start + length]

    def read(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """The same tokens as a copy, read and not mapped.

        Around a page of a map that is touched the kernel may fetch megabytes from the disk; here it fetches what is asked for.

        Raises:
            DataError: `.bin` has become shorter, or cannot be read any more.
        """
        start, length = self._span(index, offset, length)
        tokens = np.empty(length, self.dtype)
        missing, at = tokens.data.cast("B") if length else memoryview(b""), start * self.dtype.itemsize
        while missing:
            try:
                count = os.preadv(self._file, [missing], at)
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})", where=self._path) from None
            if not count:
                raise DataError("was cut while it was read", where=self._path, fix="the file is damaged: rebuild it")
            missing, at = missing[count:], at + count
        return tokens

    def _span(self, index: int, offset: int, length: int | None) -> tuple[int, int]:
        """First token in `.bin`, and how many."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        total = int(self.sequence_lengths[index])
        length = total - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > total:
            raise IndexError(f"tokens {offset} to {offset + length} of a sequence of {total}")
        return int(self.sequence_pointers[index]) // self.dtype.itemsize + offset, length
