"""A tensor as rows that are put together from pieces of files.

Conversion of a dense transformer only moves whole rows (QKV by groups, gate and up, layers, vocabulary padding) or, for a
tensor that was saved in column shards, parts of rows. A tensor of either format is therefore a list of boxes of a matrix,
each lying without gaps in one file, and every reader (import, export, verify) asks it for a band of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import DType

__all__ = ["BAND_BYTES", "Piece", "TensorRows"]

BAND_BYTES = 8 << 20  # how much of one tensor is in memory at a time


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + rows) x columns [column, column + columns) of a tensor, row-major from byte `offset` of `file`.

    `file` None: zeros.
    """

    row: int
    rows: int
    column: int
    columns: int
    file: Path | None
    offset: int


@dataclass(frozen=True)
class TensorRows:
    """A matrix [rows, columns], or a vector (columns is 1, `is_vector`), covered once by `pieces`."""

    dtype: DType
    rows: int
    columns: int
    is_vector: bool
    pieces: tuple[Piece, ...]

    @classmethod
    def stored(cls, dtype: DType, shape: tuple[int, ...], file: Path, offset: int) -> TensorRows:
        """A vector or matrix that lies in one file as it is."""
        rows, columns = shape if len(shape) == 2 else (shape[0], 1)
        return cls(dtype, rows, columns, len(shape) == 1, (Piece(0, rows, 0, columns, file, offset),))

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows,) or (rows, columns)."""
        return (self.rows,) if self.is_vector else (self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return self.columns * self.dtype.itemsize

    def pieces_of(self, first: int, count: int, *, at: int) -> list[Piece]:
        """The pieces of rows [first, first + count), moved so that `first` becomes row `at`."""
        moved = []
        for piece in self.pieces:
            begin, end = max(first, piece.row), min(first + count, piece.row + piece.rows)
            if begin < end:
                skipped = (begin - piece.row) * piece.columns * self.dtype.itemsize
                moved.append(
                    Piece(begin - first + at, end - begin, piece.column, piece.columns, piece.file, piece.offset + skipped)
                )
        return moved

    def rows_between(self, first: int, count: int) -> TensorRows:
        """Rows [first, first + count) as a tensor of their own."""
        return TensorRows(self.dtype, count, self.columns, self.is_vector, tuple(self.pieces_of(first, count, at=0)))

    def read(self, first: int, count: int) -> bytearray:
        """The bytes of rows [first, first + count), row-major.

        Raises:
            CheckpointError: a file that ended before its header said.
        """
        band = bytearray(count * self.row_bytes)
        target = memoryview(band)
        for piece in self.pieces_of(first, count, at=0):
            if piece.file is None:
                continue
            if piece.columns == self.columns:
                _read_into(piece, target[piece.row * self.row_bytes : (piece.row + piece.rows) * self.row_bytes])
            else:
                part = bytearray(piece.rows * piece.columns * self.dtype.itemsize)
                _read_into(piece, memoryview(part))
                begin, end = piece.column * self.dtype.itemsize, (piece.column + piece.columns) * self.dtype.itemsize
                matrix = np.frombuffer(band, np.uint8).reshape(count, self.row_bytes)
                matrix[piece.row : piece.row + piece.rows, begin:end] = np.frombuffer(part, np.uint8).reshape(piece.rows, -1)
        return band

    def bands(self) -> Iterator[tuple[int, bytearray]]:
        """(first row, bytes) of the whole tensor, about BAND_BYTES at a time."""
        step = max(1, BAND_BYTES // max(1, self.row_bytes))
        for first in range(0, self.rows, step):
            yield first, self.read(first, min(step, self.rows - first))


def _read_into(piece: Piece, target: memoryview) -> None:
    assert piece.file is not None
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.offset)
        filled = 0
        while filled < len(target):
            count = file.readinto(target[filled:])
            if not count:
                raise CheckpointError("ended while it was read; it changed or is damaged", where=piece.file)
            filled += count
