"""One item of a `.distcp` file: a complete torch.save archive (a zip of stored records) around one tensor.

    archive/data.pkl    pickle of `_rebuild_tensor_v2((storage, dtype, "0", "cpu", count), 0, size, stride, ...)`
    archive/byteorder   "little"
    archive/version     "3"
    archive/data/0      the elements, row-major, aligned to 64 bytes

Items that torch wrote hold more records, which are not needed. Nothing here is handed to an unpickler.

Sources: PyTorch caffe2/serialize/inline_container.cc (records, alignment), PKWARE APPNOTE 4.3 (zip, zip64).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import BY_TORCH, DType
from mcore_longctx.formats.pickle_data import Call, Global, PersistentId, PickleError, decode, encode

__all__ = [
    "TENSOR_NAMES",
    "Archive",
    "TensorPlace",
    "archive_errors",
    "locate_payload",
    "object_item",
    "tensor_frame",
    "tensor_place",
]

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_ZIP64_FROM = 0xFFFFFFFF  # sizes and offsets from here on stand in a zip64 extra field
_DATE = 0x21  # 1980-01-01: bytes are a function of the contents
_TAILS = (1024, 1 << 17)  # how far from the end its directory is looked for: a torch archive has no comment
_MAX_SMALL = 65536
_MAX_DIMS = 8
_MAX_SIZE = 1 << 63

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_ORDERED_DICT = Global("collections", "OrderedDict")
_STORAGES = {Global("torch", dtype.storage): dtype for dtype in BY_TORCH.values() if dtype.storage}
TENSOR_NAMES: frozenset[Global] = frozenset({_REBUILD, _ORDERED_DICT, *_STORAGES})


# ---------------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class _Record:
    name: bytes
    crc: int
    size: int
    start: int  # of the local header, from the start of the item


def tensor_frame(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands before and after the elements of a tensor in its archive: (head, tail).

    Item = head + elements (row-major, little-endian) + tail. The head is a multiple of 64 bytes long, so that the elements
    are aligned from the start of the item. Both are a function of the arguments alone: whoever knows where an item begins
    can write its elements at any time and in any order.

    The elements' checksum stands as 0: it is not known before they are. torch's reader does not compare it (its miniz is
    built with MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS, and torch itself may leave it out, `torch.serialization.set_crc32_options`);
    Python's zipfile would complain.

    Raises:
        ValueError: torch has no storage class for this element type.
    """
    if dtype.storage is None:
        raise ValueError(f"torch has no storage of {dtype.name}")
    stride, count = _row_major(shape)
    storage = PersistentId(("storage", Global("torch", dtype.storage), "0", "cpu", count))
    pickle = encode(Call(_REBUILD, (storage, 0, shape, stride, False, Call(_ORDERED_DICT, ()))))
    head, records = _small_records(pickle)
    elements = _Record(b"archive/data/0", 0, count * dtype.itemsize, len(head))
    head += _local_header(elements)
    return bytes(head), _directory([*records, elements], start=len(head) + elements.size)


def object_item(value: Any) -> bytes:
    """A torch.save archive of a plain value without tensors: an item, or a whole file."""
    body, records = _small_records(encode(value))
    return bytes(body) + _directory(records, start=len(body))


def _small_records(pickle: bytes) -> tuple[bytearray, list[_Record]]:
    out = bytearray()
    records = []
    for name, data in ((b"archive/data.pkl", pickle), (b"archive/byteorder", b"little"), (b"archive/version", b"3\n")):
        records.append(_Record(name, zlib.crc32(data), len(data), len(out)))
        out += _local_header(records[-1]) + data
    return out, records


def _local_header(record: _Record) -> bytes:
    """Padded so that the data that follows is aligned."""
    zip64 = struct.pack("<HHQQ", 1, 16, record.size, record.size) if record.size >= _ZIP64_FROM else b""
    unpadded = record.start + _LOCAL.size + len(record.name) + len(zip64) + 4
    padding = -unpadded % ALIGNMENT
    extra = zip64 + struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", torch's own padding field
    size = min(record.size, _ZIP64_FROM)
    version = 45 if zip64 else 0
    return (
        _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, _DATE, record.crc, size, size, len(record.name), len(extra))
        + record.name
        + extra
    )


def _directory(records: list[_Record], *, start: int) -> bytes:
    """The zip's directory and its end, which stand `start` bytes into the item."""
    directory = b"".join(_central_header(record) for record in records)
    end = b""
    if start >= _ZIP64_FROM:
        end = _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, len(records), len(records), len(directory), start)
        end += _LOCATOR64.pack(b"PK\6\7", 0, start + len(directory), 1)
    end += _END.pack(b"PK\5\6", 0, 0, len(records), len(records), len(directory), min(start, _ZIP64_FROM), 0)
    return directory + end


def _central_header(record: _Record) -> bytes:
    # no record begins beyond 4 GiB: the large one is the last
    extra = struct.pack("<HHQQ", 1, 16, record.size, record.size) if record.size >= _ZIP64_FROM else b""
    version, size = (45 if extra else 0), min(record.size, _ZIP64_FROM)
    sizes = (record.crc, size, size, len(record.name), len(extra), 0, 0, 0, 0, record.start)
    return _CENTRAL.pack(b"PK\1\2", version, version, 0, 0, 0, _DATE, *sizes) + record.name + extra


# ---------------------------------------------------------------------------------------------------------- reading
def locate_payload(path: Path, offset: int, length: int, dtype: DType, shape: tuple[int, ...], *, tensor: str) -> int:
    """Where the elements of the item at `offset` begin in the file.

    Reads the ends of the item only. `tensor` names it in errors.

    Raises:
        CheckpointError: damaged, compressed, or not the row-major tensor of this dtype and shape.
    """
    with archive_errors(path, f"item of {tensor}"), path.open("rb") as file:
        archive = Archive(file, offset, length)
        held = tensor_place(archive.pickle(TENSOR_NAMES))
        if (held.dtype, held.shape) != (dtype, shape):
            raise ValueError(f"holds {held.dtype.name} {list(held.shape)}, .metadata says {dtype.name} {list(shape)}")
        return offset + archive.payload(held)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor as its pickle describes it: `shape` elements, row-major, from element `first` of record `data/<storage>`."""

    dtype: DType
    shape: tuple[int, ...]
    storage: str
    first: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@contextmanager
def archive_errors(path: Path, what: str) -> Iterator[None]:
    """Turn what a damaged archive raises into a CheckpointError about `what`."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{what} has no record {str(error.args[0])[:80]!r}", where=path) from None
    except PickleError as error:
        raise CheckpointError(f"pickle of {what} {error}", where=path) from None
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{what} {error}", where=path) from None


class Archive:
    """Bounded reads inside one torch.save archive: an item of a `.distcp`, or a whole file.

    Args:
        file: open for reading.
        offset, length: where the archive lies.
        limit: largest zip directory and largest record that are read whole, in bytes.

    Raises (each method):
        ValueError, KeyError, struct.error: damaged; `archive_errors` makes one line of them.
    """

    def __init__(self, file: BinaryIO, offset: int, length: int, *, limit: int = _MAX_SMALL) -> None:
        self.file, self.offset, self.length, self.limit = file, offset, length, limit
        self.count, self.directory_size, self.directory = self._end()
        if self.directory_size > limit:
            raise ValueError(f"has a zip directory of {self.directory_size:,} bytes")
        self.records = self._records()

    def pickle(self, allowed: Container[Global]) -> Any:
        """What `data.pkl` holds, as inert records."""
        if "byteorder" in self.records and self.read_small("byteorder") != b"little":
            raise ValueError("is not little-endian")
        return decode(self.read_small("data.pkl"), allowed)

    def payload(self, tensor: TensorPlace) -> int:
        """Where its elements begin, from the start of the archive."""
        start, size = self._data(f"data/{tensor.storage}")
        end = (tensor.first + tensor.count) * tensor.dtype.itemsize
        if end > size:
            raise ValueError(f"holds {size:,} bytes, the tensor needs {end:,}")
        return start + tensor.first * tensor.dtype.itemsize

    def read_small(self, name: str) -> bytes:
        """A whole record that is no tensor."""
        start, size = self._data(name)
        if size > self.limit:
            raise ValueError(f"has a record of {size:,} bytes beside the tensor")
        return self._read(start, size)

    def _read(self, start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > self.length:
            raise ValueError("has a record outside itself")
        self.file.seek(self.offset + start)
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("is cut off")
        return data

    def _data(self, name: str) -> tuple[int, int]:
        """(start, size) of a record's data."""
        local, size = self.records[name]
        header = _LOCAL.unpack(self._read(local, _LOCAL.size))
        start = local + _LOCAL.size + header[9] + header[10]
        if header[0] != b"PK\3\4" or start + size > self.directory:
            raise ValueError(f"has a record {name[:80]!r} outside itself")
        return start, size

    def _end(self) -> tuple[int, int, int]:
        """(records, size, start) of the zip's directory."""
        for size in _TAILS:
            start = max(0, self.length - size)
            tail = self._read(start, self.length - start)
            at = tail.rfind(b"PK\5\6")
            if at < 0:
                continue
            _, _, _, _, count, length, begin, _ = _END.unpack_from(tail, at)
            if begin != _ZIP64_FROM:
                return count, length, begin
            at = tail.rfind(b"PK\6\6")
            if at >= 0:
                _, _, _, _, _, _, _, count, length, begin = _END64.unpack_from(tail, at)
                return count, length, begin
        raise ValueError("has no zip directory")

    def _records(self) -> dict[str, tuple[int, int]]:
        """Name without its first folder -> (start of the local header, size)."""
        directory = self._read(self.directory, self.directory_size)
        found: dict[str, tuple[int, int]] = {}
        position = 0
        while position < len(directory):
            name, record, position = _directory_entry(directory, position)
            if name in found:
                raise ValueError(f"has two records {name[:80]!r}")
            found[name] = record
        if len(found) != self.count:
            raise ValueError("has a zip directory that does not add up")
        return found


def _directory_entry(directory: bytes, position: int) -> tuple[str, tuple[int, int], int]:
    header = _CENTRAL.unpack_from(directory, position)
    magic, flags, method = header[0], header[3], header[4]
    packed, size, name_length, extra_length, comment_length, local = *header[8:13], header[16]
    name_end = position + _CENTRAL.size + name_length
    name = directory[position + _CENTRAL.size : name_end].decode()
    size, packed, local = _zip64_values(directory[name_end : name_end + extra_length], size, packed, local)
    if magic != b"PK\1\2":
        raise ValueError("has a damaged zip directory")
    if method != 0 or packed != size or flags & 1:
        raise ValueError(f"has a compressed or encrypted record {name[:80]!r}")
    return name.partition("/")[2], (local, size), name_end + extra_length + comment_length


def _zip64_values(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            values = [next(wide, _ZIP64_FROM) if value == _ZIP64_FROM else value for value in (size, packed, local)]
            return values[0], values[1], values[2]
        position += 4 + length
    return size, packed, local


def tensor_place(value: Any) -> TensorPlace:
    """What a pickled tensor says of itself.

    Raises:
        ValueError: not a plain tensor, an element type that is not known, or one that is not row-major.
    """
    match value:
        case Call(
            function=function,
            args=(PersistentId(value=("storage", Global() as storage, str(key), str(), int())), int(first), size, stride, *_),
        ) if function == _REBUILD:
            dtype = _STORAGES.get(storage)
        case _:
            raise ValueError("is not a plain tensor")
    if dtype is None:
        raise ValueError(f"holds {str(storage)[:80]}, an element type that is not known")
    if not isinstance(size, tuple) or len(size) > _MAX_DIMS or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in size):
        raise ValueError("has a damaged shape")
    if not isinstance(stride, tuple) or len(stride) != len(size) or not 0 <= first < _MAX_SIZE:
        raise ValueError("has a damaged stride")
    expected, _ = _row_major(size)
    if any(got != want for got, want, count in zip(stride, expected, size, strict=True) if count != 1):
        raise ValueError(f"has strides {str(stride)[:80]}, expected row-major {expected}")
    return TensorPlace(dtype, size, key, first)


def _row_major(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(strides in elements, number of elements)."""
    strides: list[int] = []
    count = 1
    for size in reversed(shape):
        strides.insert(0, count)
        count *= size
    return tuple(strides), count
