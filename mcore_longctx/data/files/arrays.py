"""Numpy columns in one file: safetensors layout, memory-mapped, with a checksum over every byte.

Tables of documents, plans and sidecars are such files. Any safetensors reader opens them; reading runs no code. The last tensor,
`checksum`, is the CRC-32 of all bytes before it, so a flipped bit or a cut file ends in an error and not in other samples.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import DataError
from mcore_longctx.manifest import fsync_folder, partial_path, refusals_as

__all__ = ["Column", "file_crc32", "map_arrays", "map_file", "new_arrays", "write_arrays"]

Column = tuple[npt.DTypeLike, int]  # type and number of elements

_NAMES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype("u1"): "U8",
    np.dtype("<u2"): "U16",
    np.dtype("<i4"): "I32",
    np.dtype("<u4"): "U32",
    np.dtype("<i8"): "I64",
    np.dtype("<u8"): "U64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_CHECKSUM = "checksum"
_KEY = "mcore_longctx"  # of the one entry of __metadata__, whose values must be strings
_MAX_HEADER = 100_000_000  # bytes, as in safetensors
_FIX = "make room or choose another folder"
_BLOCK = 1 << 24  # bytes read at once for the checksum


@contextmanager
def new_arrays(path: Path, columns: Mapping[str, Column], metadata: Mapping[str, Any]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Columns to fill, mapped into a file that becomes `path` when the block ends without an exception.

    Equal columns and metadata give equal bytes. The space is reserved first, so a full disk is an error here and not a crash while
    the columns are filled.

    Args:
        path: replaced if it exists.
        columns: type and number of elements of each. They are zero at first.
        metadata: anything JSON.

    Raises:
        DataError: no space left, or the folder cannot be written.
    """
    layout: dict[str, Any] = {}
    at = 0
    ordered = sorted(columns, key=lambda name: -np.dtype(columns[name][0]).itemsize)  # keeps every column aligned
    for name in ordered:
        dtype, count = np.dtype(columns[name][0]), columns[name][1]
        layout[name] = {"dtype": _NAMES[dtype], "shape": [count], "data_offsets": [at, at + count * dtype.itemsize]}
        at += count * dtype.itemsize
    layout[_CHECKSUM] = {"dtype": "U32", "shape": [1], "data_offsets": [at, at + 4]}
    text = json.dumps({"__metadata__": {_KEY: json.dumps(metadata)}, **layout}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    aside = partial_path(path)
    try:
        with refusals_as(DataError, path, fix=_FIX):
            file = aside.open("w+b")
        with file:
            with refusals_as(DataError, path, fix=_FIX):
                os.posix_fallocate(file.fileno(), 0, len(header) + at + 4)
                file.write(header)
                file.flush()
                arrays = {
                    name: _new_column(file, columns[name], len(header) + layout[name]["data_offsets"][0]) for name in ordered
                }
            yield arrays
            with refusals_as(DataError, path, fix=_FIX):
                for array in arrays.values():
                    if isinstance(array, np.memmap):
                        array.flush()
                file.seek(0)
                checksum = _crc32(file, len(header) + at)
                file.seek(len(header) + at)
                file.write(checksum.to_bytes(4, "little"))
                file.flush()
                os.fsync(file.fileno())
        with refusals_as(DataError, path, fix=_FIX):
            aside.replace(path)
            fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write one-dimensional arrays and metadata to `path`, whole or not at all. Errors as in `new_arrays`."""
    with new_arrays(path, {name: (array.dtype, len(array)) for name, array in arrays.items()}, metadata) as columns:
        for name, array in arrays.items():
            columns[name][:] = array


def map_arrays(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Columns of a file, mapped read-only as in `map_file`, and its metadata. Every byte is compared with the checksum first.

    Raises:
        DataError: missing, cut, damaged, or no file of this kind.
    """
    damaged = DataError("damaged, or not written by mcore-longctx (its checksum differs)", where=path, fix="make it again")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 12:
                raise damaged
            checksum = _crc32(file, size - 4)
            if checksum.to_bytes(4, "little") != file.read(4):
                raise damaged
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER, size - 12):
                raise damaged
            layout = json.loads(file.read(length))
            metadata = json.loads(layout.pop("__metadata__")[_KEY])
            layout.pop(_CHECKSUM)
            columns = _map(file.fileno(), size)[8 + length : size - 4]
            arrays = {name: _column(columns, row) for name, row in layout.items()}
    except FileNotFoundError:
        raise DataError("no such file", where=path) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    return arrays, metadata


def file_crc32(path: Path) -> int:
    """CRC-32 of a whole file, read in blocks.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _crc32(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=path) from None


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """A whole file, mapped read-only, uint8 [bytes]. No descriptor stays open, so there may be as many of them as there are files.

    `mmap.mmap`, on which `np.memmap` rests, keeps a descriptor as long as its map (until Python 3.13 and its `trackfd`): one of each
    column of a few hundred shards is more than a process may have.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with path.open("rb", buffering=0) as file:
        return _map(file.fileno(), os.fstat(file.fileno()).st_size)


class _Map:
    """Pages of a file as numpy sees them. They are given back when the last array over them is gone."""

    def __init__(self, descriptor: int, size: int) -> None:
        libc = _libc()
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:  # MAP_FAILED
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, True)}  # True: read-only
        finalizer = weakref.finalize(self, libc.munmap, address, size)
        finalizer.atexit = False  # a thread may still read; the kernel cleans up behind the process


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    number, size = ctypes.c_int, ctypes.c_size_t
    libc.mmap.argtypes = (ctypes.c_void_p, size, number, number, number, ctypes.c_longlong)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    return libc


def _map(descriptor: int, size: int) -> npt.NDArray[np.uint8]:
    return np.asarray(_Map(descriptor, size)) if size else np.zeros(0, np.uint8)  # nothing cannot be mapped


def _column(columns: npt.NDArray[np.uint8], row: Any) -> npt.NDArray[Any]:
    """One column of the layout.

    Raises:
        ValueError, KeyError, TypeError: it lies outside of `columns`, or the row says something else than a column does.
    """
    dtype, (count,), (start, stop) = _DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
    if not 0 <= start <= stop <= len(columns) or stop - start != count * dtype.itemsize:
        raise ValueError("a column outside of the file")
    return columns[start:stop].view(dtype).reshape(count)


def _new_column(file: Any, column: Column, offset: int) -> npt.NDArray[Any]:
    dtype, count = np.dtype(column[0]), column[1]
    if not count:  # numpy refuses to map nothing
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "r+", offset, (count,))


def _crc32(file: Any, count: int) -> int:
    """CRC-32 of the next `count` bytes."""
    checksum = 0
    while count:
        block = file.read(min(_BLOCK, count))
        if not block:
            raise ValueError("cut")
        checksum, count = zlib.crc32(block, checksum), count - len(block)
    return checksum
