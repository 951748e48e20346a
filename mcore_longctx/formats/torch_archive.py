"""One item of a `.distcp` file: a complete torch.save archive (a zip of stored records) around one tensor.

    archive/data.pkl    pickle of `_rebuild_tensor_v2((storage, dtype, "0", "cpu", count), 0, size, stride, ...)`
    archive/byteorder   "little"
    archive/version     "3"
    archive/data/0      the elements, row-major, aligned to 64 bytes

Items that torch wrote hold more records, which are not needed. Nothing here is handed to an unpickler.

Sources: PyTorch caffe2/serialize/inline_container.cc (records, alignment), PKWARE APPNOTE 4.3 (zip, zip64).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import BY_TORCH, DType
from mcore_longctx.formats.pickle_data import Call, Global, PersistentId, PickleError, decode, encode

__all__ = ["locate_payload", "object_item", "tensor_frame"]

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_ZIP64_FROM = 0xFFFFFFFF  # sizes and offsets from here on stand in a zip64 extra field
_DATE = 0x21  # 1980-01-01: bytes are a function of the contents
_MAX_TAIL = 65536  # the directory of a torch archive is under 2 KiB
_MAX_SMALL = 65536

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_ORDERED_DICT = Global("collections", "OrderedDict")
_STORAGES = {Global("torch", dtype.storage): dtype for dtype in BY_TORCH.values() if dtype.storage}
_ALLOWED = frozenset({_REBUILD, _ORDERED_DICT, *_STORAGES})


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
    try:
        with path.open("rb") as file:
            item = _Item(file, offset, length)
            records = item.records()
            if "byteorder" in records and item.read_small(records["byteorder"]) != b"little":
                raise ValueError("is not little-endian")
            storage, first = _tensor_of(decode(item.read_small(records["data.pkl"]), _ALLOWED), dtype, shape)
            start, size = records[f"data/{storage}"]
            _, count = _row_major(shape)
            if (first + count) * dtype.itemsize > size:
                raise ValueError(f"holds {size:,} bytes, the tensor needs {(first + count) * dtype.itemsize:,}")
            return offset + start + first * dtype.itemsize
    except KeyError as error:
        raise CheckpointError(f"item of {tensor} has no record {error.args[0]!r}", where=path) from None
    except PickleError as error:
        raise CheckpointError(f"pickle of {tensor} {error}", where=path) from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"item of {tensor} {error}", where=path) from None


class _Item:
    """Bounded reads inside one item."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length

    def read(self, start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > self.length:
            raise ValueError("has a record outside itself")
        self.file.seek(self.offset + start)
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("is cut off")
        return data

    def read_small(self, record: tuple[int, int]) -> bytes:
        if record[1] > _MAX_SMALL:
            raise ValueError(f"has a record of {record[1]:,} bytes beside the tensor")
        return self.read(*record)

    def records(self) -> dict[str, tuple[int, int]]:
        """Name without its first folder -> (start of the data, size), from the zip's directory."""
        tail_start = max(0, self.length - _MAX_TAIL)
        tail = self.read(tail_start, self.length - tail_start)
        at = tail.rfind(b"PK\5\6")
        if at < 0:
            raise ValueError("has no zip directory")
        _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
        if start == _ZIP64_FROM:
            at = tail.rfind(b"PK\6\6")
            if at < 0:
                raise ValueError("has no zip64 directory")
            _, _, _, _, _, _, _, count, size, start = _END64.unpack_from(tail, at)
        if size > _MAX_TAIL:
            raise ValueError(f"has a zip directory of {size:,} bytes")
        directory = self.read(start, size)
        found: dict[str, tuple[int, int]] = {}
        position = 0
        while position < len(directory):
            name, record, position = self._record(directory, position, directory_start=start)
            if name in found:
                raise ValueError(f"has two records {name!r}")
            found[name] = record
        if len(found) != count:
            raise ValueError("has a zip directory that does not add up")
        return found

    def _record(self, directory: bytes, position: int, *, directory_start: int) -> tuple[str, tuple[int, int], int]:
        header = _CENTRAL.unpack_from(directory, position)
        magic, flags, method = header[0], header[3], header[4]
        packed, size, name_length, extra_length, comment_length, local = *header[8:13], header[16]
        name_end = position + _CENTRAL.size + name_length
        name = directory[position + _CENTRAL.size : name_end].decode()
        size, packed, local = _zip64_values(directory[name_end : name_end + extra_length], size, packed, local)
        if magic != b"PK\1\2":
            raise ValueError("has a damaged zip directory")
        if method != 0 or packed != size or flags & 1:
            raise ValueError(f"has a compressed or encrypted record {name!r}")
        local_header = _LOCAL.unpack(self.read(local, _LOCAL.size))
        data = local + _LOCAL.size + local_header[9] + local_header[10]
        if local_header[0] != b"PK\3\4" or data + size > directory_start:
            raise ValueError(f"has a record {name!r} outside itself")
        return name.partition("/")[2], (data, size), name_end + extra_length + comment_length


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


def _tensor_of(value: Any, dtype: DType, shape: tuple[int, ...]) -> tuple[str, int]:
    """(storage key, first element) of a pickled tensor, which must be row-major and of this dtype and shape."""
    match value:
        case Call(
            function=function,
            args=(PersistentId(value=("storage", storage, str(key), str(), int())), int(first), size, stride, bool(), *_),
        ) if function == _REBUILD and isinstance(storage, Global):
            found = _STORAGES.get(storage)
        case _:
            raise ValueError("is not a plain tensor")
    if found != dtype or size != shape:
        held = found.name if found else storage
        raise ValueError(f"holds {held} {_as_shape(size)}, .metadata says {dtype.name} {_as_shape(shape)}")
    if not isinstance(stride, tuple) or len(stride) != len(shape) or first < 0:
        raise ValueError("has a damaged stride")
    expected, _ = _row_major(shape)
    if any(got != want for got, want, count in zip(stride, expected, shape, strict=True) if count != 1):
        raise ValueError(f"has strides {stride}, expected row-major {expected}")
    return key, first


def _as_shape(size: Any) -> str:
    plain = isinstance(size, tuple) and len(size) <= 8 and all(isinstance(count, int) for count in size)
    return str(list(size)) if plain else "of no shape"


def _row_major(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(strides in elements, number of elements)."""
    strides: list[int] = []
    count = 1
    for size in reversed(shape):
        strides.insert(0, count)
        count *= size
    return tuple(strides), count
