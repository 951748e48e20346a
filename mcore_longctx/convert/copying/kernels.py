"""The bytes of one unit of work, from its sources to its place.

Ranges that stay as they are go from file to file inside the kernel (`copy_file_range`) where pages lie on pages; elsewhere the
kernel takes three times as long for them as a read and a write of whole pages. Holes stay holes. Boxes whose rows are put
together or taken apart, and numbers that change, go through bands of about 1 MiB. Nothing here needs numpy but the last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.copying.units import Part, Unit
from mcore_longctx.convert.disk import OpenFiles, read_into, storage_error, write_all
from mcore_longctx.convert.plans.plan import Blend
from mcore_longctx.convert.views import BAND_BYTES, TensorRows
from mcore_longctx.errors import CheckpointError

__all__ = ["Copier", "QuantizedRows", "joined"]

_CALL_BYTES = 16 << 20  # of one system call: in between, a worker looks whether it is still wanted
_PAGE = 4096
_LEAST_HOLE = 1 << 20  # shorter ranges are copied without asking for holes


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """What quantising rows of a tensor did: the sums that a report needs. They go through the journal, so a restart keeps them.

    Attributes:
        name: of the tensor.
        rows: how many.
        amax: largest magnitude before.
        squared: sum of the squared elements before.
        squared_error: sum of (scale x quantised - element)^2.
    """

    name: str
    rows: int
    amax: float
    squared: float
    squared_error: float


@dataclass(slots=True)
class _Range:
    """Bytes that stay as they are and lie together on both sides."""

    source: Path
    source_offset: int
    target: Path
    target_offset: int
    bytes: int

    def take(self, other: _Range) -> bool:
        """Become one with `other` if it follows on both sides."""
        follows = (
            self.source_offset + self.bytes == other.source_offset
            and self.target_offset + self.bytes == other.target_offset
            and self.target == other.target
            and self.source == other.source
        )
        if follows:
            self.bytes += other.bytes
        return follows


class Copier:
    """Writes units into the target files of a folder. The files are there, in their full size; what is not written stays zero."""

    def __init__(self, targets: list[Path], pause: Callable[[], None]) -> None:
        """`targets`: by number. `pause` is called every few MiB; it may raise, or end the process."""
        self.targets = targets
        self.pause = pause
        self.sources = OpenFiles(os.O_RDONLY)
        self.outputs = OpenFiles(os.O_RDWR)
        self._unsure: set[Path] = set()
        self._band = memoryview(bytearray(BAND_BYTES))

    def close(self) -> None:
        """Close all files."""
        self.sources.close()
        self.outputs.close()

    def copy(self, unit: Unit) -> list[QuantizedRows]:
        """Write a unit; twice is as good as once.

        Raises:
            CheckpointError: a source that is shorter than its header said, or cannot be read.
            StorageError: the target's disk is full or fails.
            ConversionError: numbers that the wanted element type cannot hold.
        """
        sums: list[QuantizedRows] = []
        waiting: _Range | None = None
        for part in unit:
            fill = part.fill
            self._unsure.add(self.targets[fill.file])
            if fill.scales is not None:
                self._unsure.add(self.targets[fill.scales.file])
            if isinstance(fill.source, Blend) or fill.source.dtype != fill.dtype or fill.scales is not None:
                sums += self._change(part)
                continue
            for flat in self._ranges(part, fill.source):
                if waiting is not None and waiting.take(flat):
                    continue
                if waiting is not None:
                    self._copy_range(waiting)
                waiting = flat
        if waiting is not None:
            self._copy_range(waiting)
        return sums

    def begin_writeback(self, unit: Unit) -> None:
        """Let the kernel start to write a unit to the disk, so that little is left to wait for later."""
        for part in unit:
            os.posix_fadvise(
                self.outputs.descriptor(self.targets[part.fill.file]), part.offset, part.bytes, os.POSIX_FADV_DONTNEED
            )

    def sync(self) -> None:
        """Make last what was written since the last call."""
        for path in self._unsure:
            try:
                os.fdatasync(self.outputs.descriptor(path))
            except OSError as error:
                raise storage_error(error, path) from None
        self._unsure.clear()

    # ------------------------------------------------------------------ bytes that stay as they are
    def _ranges(self, part: Part, source: TensorRows) -> Iterator[_Range]:
        """The ranges of a part. Rows that are put together from columns, or cut out of wider rows, are written on the way."""
        fill, target = part.fill, self.targets[part.fill.file]
        runs = list(source.runs(fill.row + part.first, part.rows, fill.column, fill.columns))
        if all(run.stride == run.width == part.row_bytes for run in runs):
            for run in runs:
                if run.file is not None:
                    begin = part.offset + run.row * part.row_bytes
                    yield _Range(run.file, run.offset, target, begin, run.rows * run.width)
            return
        descriptor = self.outputs.descriptor(target)
        for first, count in bands(part.rows, part.row_bytes):
            self.pause()
            row = fill.row + part.first + first
            band = source.read_box(row, count, fill.column, fill.columns, self.sources)
            write_all(descriptor, band, part.offset + first * part.row_bytes, target)

    def _copy_range(self, flat: _Range) -> None:
        source, target = self.sources.descriptor(flat.source), self.outputs.descriptor(flat.target)
        if os.fstat(source).st_size < flat.source_offset + flat.bytes:
            raise CheckpointError("ended while it was read; it changed or is damaged", where=flat.source)
        shift = flat.target_offset - flat.source_offset
        for begin, end in _data(source, flat.source_offset, flat.source_offset + flat.bytes):
            at = begin
            if shift % _PAGE == 0:
                at = self._copy_in_kernel(source, target, begin, end, shift)
            while at < end:
                self.pause()
                # up to the end of a page of the target: whole pages cost half
                band = self._band[: min(end - at, len(self._band) - (at + shift) % min(_PAGE, len(self._band)))]
                read_into(source, [band], at, flat.source)
                write_all(target, band, at + shift, flat.target)
                at += len(band)

    def _copy_in_kernel(self, source: int, target: int, at: int, end: int, shift: int) -> int:
        """Copy [at, end) where pages lie on pages: the kernel need not build any, and some file systems share them. How far it came."""
        while at < end:
            self.pause()
            try:
                count = os.copy_file_range(source, target, min(end - at, _CALL_BYTES), at, at + shift)
            except OSError:  # other file systems, an old kernel, a full disk: the plain calls work, or say which file
                return at
            if not count:
                return at
            at += count
        return at

    # ------------------------------------------------------------------ numbers that change
    def _change(self, part: Part) -> list[QuantizedRows]:
        from mcore_longctx.convert.copying import cast  # with numpy, which the plain path does without

        fill, target = part.fill, self.targets[part.fill.file]
        descriptor = self.outputs.descriptor(target)
        sums = []
        step = max(part.row_bytes, fill.columns * 4)  # a band holds float32
        for first, count in bands(part.rows, step):
            self.pause()
            row = fill.row + part.first + first
            numbers = cast.numbers(fill.source, (row, count, fill.column, fill.columns), self.sources, name=fill.name)
            begin = part.offset + first * part.row_bytes
            if fill.scales is None:
                write_all(descriptor, cast.stored(numbers, fill.dtype, name=fill.name), begin, target)
                continue
            from mcore_longctx.convert.copying.fp8 import quantize_rows

            done = quantize_rows(numbers.reshape(count, fill.columns), name=fill.name, first_row=row)
            write_all(descriptor, done.bits.data, begin, target)
            scales = self.targets[fill.scales.file]
            place = fill.scales.offset + (part.first + first) * 4
            write_all(self.outputs.descriptor(scales), done.scales.astype("<f4", copy=False).data, place, scales)
            sums.append(QuantizedRows(fill.name, count, done.amax, done.squared, done.squared_error))
        return joined(sums)


def joined(sums: list[QuantizedRows]) -> list[QuantizedRows]:
    """One entry a tensor, added up in the order in which they stand."""
    whole: dict[str, QuantizedRows] = {}
    for new in sums:
        old = whole.get(new.name, QuantizedRows(new.name, 0, 0.0, 0.0, 0.0))
        whole[new.name] = QuantizedRows(
            new.name,
            old.rows + new.rows,
            max(old.amax, new.amax),
            old.squared + new.squared,
            old.squared_error + new.squared_error,
        )
    return list(whole.values())


def bands(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of bands of about BAND_BYTES."""
    step = max(1, BAND_BYTES // max(1, row_bytes))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _data(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of a file without its holes, which read as the zeros that the target has already."""
    while begin < end:
        if end - begin < _LEAST_HOLE:
            yield begin, end
            return
        try:
            begin = os.lseek(descriptor, begin, os.SEEK_DATA)
            hole = os.lseek(descriptor, begin, os.SEEK_HOLE) if begin < end else end
        except OSError as error:
            if error.errno != errno.ENXIO:  # a file system that knows no holes
                yield begin, end
            return  # nothing but a hole up to the end of the file
        if begin < end:
            yield begin, min(hole, end)
        begin = hole
