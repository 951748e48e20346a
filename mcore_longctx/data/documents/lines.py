r"""Lines of a byte range of a file, plain or compressed, in memory that is bounded by the longest line.

A line belongs to the range in which it starts, so ranges that follow one another give every line exactly once. Lines end in `\n`
alone. A line is handed on as a view into the block that was read, without a copy.
"""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from mcore_longctx.errors import DataError

__all__ = ["BLOCK", "Tally", "optional_module", "read_lines", "unpacked"]

BLOCK = 1 << 20  # bytes; larger blocks leave the processor's cache and are slower
_ZSTD_FEED = 1 << 14  # compressed bytes at once: text that repeats may unpack to thousands of times as much
_NO_LIMIT = 1 << 63
_ZSTD_WINDOW = 1 << 31  # bytes; the most that `zstd --long=31` asks a reader to keep

Item = TypeVar("Item")


class Readable(Protocol):
    """What can be read into a buffer."""

    def readinto(self, target: Any, /) -> int | None:
        """Fill the buffer from its start; bytes read, 0 at the end."""


class Tally:
    """Bytes that were read, and their CRC-32."""

    def __init__(self) -> None:
        self.bytes, self.crc32 = 0, 0

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """Take in the next bytes."""
        self.bytes += len(piece)
        self.crc32 = zlib.crc32(piece, self.crc32)


def read_lines(
    file: Readable,
    parse: Callable[[bytearray | memoryview, int, int, bool], Item | None],
    *,
    start: int = 0,
    stop: int | None = None,
    tally: Tally | None = None,
) -> Iterator[Item]:
    """What `parse` makes of every line that starts in bytes start..stop-1 and is not empty; None is left out.

    Args:
        file: at byte `start - 1` (0 if start is 0): the byte before a range tells whether a line starts with it.
        parse: called with the line without its newline, its offset, its number (from 1, counted from the first line of the range)
            and whether it is ASCII alone. The buffer is used again afterwards.
        start: first byte.
        stop: end of the range. None: end of the file.
        tally: takes the bytes of the range; not those of the last line beyond it.

    Raises:
        DataError: the file ends before `stop`. It has no place.
    """
    block = bytearray(BLOCK)
    view = memoryview(block)
    begun, begun_at = bytearray(), 0  # a line whose end is not read yet; it grows in place
    number, base, limit = 0, start, _NO_LIMIT if stop is None else stop
    foreign = start > 0 and not (file.readinto(view[:1]) and block[0] == ord("\n"))  # the rest of a line of an earlier range
    while (base < limit or begun) and (count := file.readinto(view)):
        if tally is not None and base < limit:
            tally.add(view[: min(count, limit - base)])
        at, is_ascii = 0, block.isascii()
        while base + at < limit or begun:
            end = block.find(b"\n", at, count)
            if end < 0:
                if not (foreign or begun):
                    begun_at = base + at
                begun += view[at : 0 if foreign else count]
                break
            number += 1
            item = None
            if foreign:
                foreign = False
            elif begun:
                begun += view[at:end]
                item, begun = parse(begun, begun_at, number, begun.isascii()), bytearray()
            elif end > at:
                item = parse(view[at:end], base + at, number, is_ascii)
            if item is not None:
                yield item
            at = end + 1
        base += count
    if base < limit < _NO_LIMIT:
        raise DataError(f"ends at byte {base:,}, {limit:,} are expected", fix="it changed while it was read; start again")
    if begun and (item := parse(begun, begun_at, number + 1, begun.isascii())) is not None:
        del begun
        yield item


@contextmanager
def unpacked(raw: io.FileIO, kind: str, tally: Tally) -> Iterator[Readable]:
    """The bytes of a gzip or zstd file with any number of members, to its end. `tally` takes the compressed bytes.

    Raises:
        DataError: truncated, damaged, or zstandard is not installed. It has no place.
    """
    packed = io.BufferedReader(_Counted(raw, tally), BLOCK)
    try:
        if kind == "gzip":
            with gzip.GzipFile(fileobj=packed) as file:
                yield file
        else:
            yield _ZstdFile(packed)
    except EOFError:
        raise DataError(f"truncated: the {kind} stream has no end", fix="copy or pack it again") from None
    except (gzip.BadGzipFile, zlib.error, _DamagedError) as error:
        raise DataError(f"damaged {kind} stream ({error})", fix="copy or pack it again") from None


class _Counted(io.RawIOBase):
    """A raw file whose bytes go into a tally on their way."""

    def __init__(self, raw: io.FileIO, tally: Tally) -> None:
        self._raw, self._tally = raw, tally

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view = memoryview(target)
        count = self._raw.readinto(view)
        self._tally.add(view[:count])
        return count


class _DamagedError(Exception):
    """A zstd stream that cannot be unpacked."""


class _ZstdFile(io.RawIOBase):
    """Frames of a zstd file one after the other. zstandard's own reader ends without an error where the file is truncated."""

    def __init__(self, packed: io.BufferedIOBase) -> None:
        zstandard = optional_module("zstandard")
        self._packed, self._error = packed, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        self._frame: Any = None  # None between two frames
        self._rest = b""  # read, not yet unpacked
        self._ready = memoryview(b"")  # unpacked, not yet asked for

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view, count = memoryview(target), 0
        while count < len(view) and (self._ready or self._unpack()):
            piece = self._ready[: len(view) - count]
            view[count : count + len(piece)] = piece
            self._ready, count = self._ready[len(piece) :], count + len(piece)
        return count

    def _unpack(self) -> bool:
        """Unpack until something is ready; False at the end of the file."""
        while not self._ready:
            packed = self._rest or self._packed.read(_ZSTD_FEED)
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return False
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise _DamagedError(str(error)) from None
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return True


def optional_module(name: str) -> Any:
    """A library that only some inputs need.

    Raises:
        DataError: it is not installed. It has no place.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        library = name.partition(".")[0]
        raise DataError(f"{library} is not installed", fix="pip install 'mcore-longctx[data]'") from None
