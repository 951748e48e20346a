"""A tensor as rows that are put together from pieces of files.

Conversion of a dense transformer only moves whole rows (QKV by groups, gate and up, layers, vocabulary padding) or, for a
tensor that was saved in column shards, parts of rows. A tensor of either format is therefore a list of boxes of a matrix,
each lying without gaps in one file, and every reader (import, export, verify) asks it for a band of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.disk import OpenFiles, read_into
from mcore_longctx.formats.dtypes import DType

__all__ = ["BAND_BYTES", "Piece", "Run", "TensorRows"]

BAND_BYTES = 1 << 20  # how much of one tensor is in memory at a time


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Run:
    """Where a part of a box comes from: `rows` times `width` bytes, `stride` bytes apart in `file`, the first at `offset`.

    They go to row `row` and on of the box, from byte `column` of each. `file` None: zeros.
    """

    file: Path | None
    offset: int
    stride: int
    width: int
    row: int
    rows: int
    column: int


@dataclass(frozen=True, slots=True)
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

    def runs(self, row: int, rows: int, column: int, columns: int) -> Iterator[Run]:
        """The parts of files that rows [row, row + rows) x columns [column, column + columns) are made of."""
        size = self.dtype.itemsize
        for piece in self.pieces:
            top, bottom = max(row, piece.row), min(row + rows, piece.row + piece.rows)
            left, right = max(column, piece.column), min(column + columns, piece.column + piece.columns)
            if top < bottom and left < right:
                skipped = ((top - piece.row) * piece.columns + left - piece.column) * size
                yield Run(
                    piece.file,
                    piece.offset + skipped,
                    piece.columns * size,
                    (right - left) * size,
                    top - row,
                    bottom - top,
                    (left - column) * size,
                )

    def read_box(self, row: int, rows: int, column: int, columns: int, files: OpenFiles) -> bytearray:
        """The bytes of rows [row, row + rows) x columns [column, column + columns), row-major.

        Raises:
            CheckpointError: a file that ended before its header said, or that cannot be read.
        """
        wide = columns * self.dtype.itemsize
        band = bytearray(rows * wide)
        view = memoryview(band)
        for run in self.runs(row, rows, column, columns):
            if run.file is None:
                continue
            descriptor, begin = files.descriptor(run.file), run.row * wide + run.column
            if run.stride == run.width == wide:
                read_into(descriptor, [view[begin : begin + run.rows * wide]], run.offset, run.file)
                continue
            parts = [view[at : at + run.width] for at in range(begin, begin + run.rows * wide, wide)]
            if run.stride == run.width:  # the kernel spreads what lies together in the file
                read_into(descriptor, parts, run.offset, run.file)
            else:
                for i, part in enumerate(parts):
                    read_into(descriptor, [part], run.offset + i * run.stride, run.file)
        return band

    def read(self, first: int, count: int) -> bytearray:
        """The bytes of rows [first, first + count), row-major. Raises as `read_box`."""
        files = OpenFiles(os.O_RDONLY)
        try:
            return self.read_box(first, count, 0, self.columns, files)
        finally:
            files.close()

    def bands(self) -> Iterator[tuple[int, bytearray]]:
        """(first row, bytes) of the whole tensor, about BAND_BYTES at a time."""
        files = OpenFiles(os.O_RDONLY)
        step = max(1, BAND_BYTES // max(1, self.row_bytes))
        try:
            for first in range(0, self.rows, step):
                yield first, self.read_box(first, min(step, self.rows - first), 0, self.columns, files)
        finally:
            files.close()
