"""Writes a torch_dist folder that megatron-core 0.16.1 and 0.19.2 load.

`common.pt` is written in the 0.16.1 style; 0.19.2 reads both styles. `metadata.json` comes last: megatron takes a folder
without it for an unfinished save. The bytes are a function of the contents alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mcore_longctx.formats.dcp_read import METADATA, METADATA_JSON
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.formats.pickle_data import Call, Global, Instance, encode
from mcore_longctx.formats.torch_archive import write_object_item, write_tensor_item

__all__ = ["TorchDistWriter"]

FILE_BYTES = 4 << 30  # a new .distcp file is begun after this many bytes

_META = "torch.distributed.checkpoint.metadata"
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_INDEX = Global(_META, "MetadataIndex")


@dataclass
class _Entry:
    dtype: DType
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


class TorchDistWriter:
    """Appends chunks and objects to `.distcp` files, then writes what describes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, _Entry] = {}
        self._objects: list[str] = []
        self._items: list[tuple[str, tuple[int, ...] | None, str, int, int]] = []
        self._file: BinaryIO | None = None
        self._file_number = -1

    def add_chunk(
        self,
        key: str,
        dtype: DType,
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        payload: Iterable[bytes | bytearray],
    ) -> None:
        """Write one box of the tensor `key` of global `shape`. `payload` is its elements in row-major order."""
        file, name = self._open()
        begin = file.tell()
        length = write_tensor_item(file, dtype, sizes, payload)
        self._tensors.setdefault(key, _Entry(dtype, shape)).chunks.append((offsets, sizes))
        self._items.append((key, offsets, name, begin, length))

    def add_empty_object(self, key: str) -> None:
        """Write the object `[None]` that megatron-core stores for a module without extra state."""
        file, name = self._open()
        begin = file.tell()
        self._items.append((key, None, name, begin, write_object_item(file, [None])))
        self._objects.append(key)

    def finish(self, common: dict[str, object]) -> None:
        """Close the files and write `common.pt`, `.metadata` and, last, `metadata.json`."""
        self.close()
        with (self.folder / "common.pt").open("wb") as file:
            write_object_item(file, common)
        (self.folder / METADATA).write_bytes(encode(self._metadata()))
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self.folder / METADATA_JSON).write_text(json.dumps(backend))

    def close(self) -> None:
        """Close the open file, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> tuple[BinaryIO, str]:
        if self._file is not None and self._file.tell() >= FILE_BYTES:
            self.close()
        if self._file is None:
            self._file_number += 1
            self._file = (self.folder / self._name()).open("wb")
        return self._file, self._name()

    def _name(self) -> str:
        return f"__{self._file_number}_0.distcp"

    def _metadata(self) -> Instance:
        entries: dict[str, Instance] = {key: _tensor_metadata(entry) for key, entry in self._tensors.items()}
        entries |= {key: Instance(Global(_META, "BytesStorageMetadata")) for key in self._objects}
        storage = {}
        for key, offsets, file, begin, length in self._items:
            # torch's own pickles leave the offset of an object out, too
            index = {"fqn": key, "index": None} if offsets is None else {"fqn": key, "offset": _size(offsets), "index": None}
            storage[Instance(_INDEX, (), index)] = Instance(_INFO, (), {"relative_path": file, "offset": begin, "length": length})
        fields = {"state_dict_metadata": entries, "planner_data": None, "storage_data": storage, "storage_meta": None}
        return Instance(Global(_META, "Metadata"), (), fields)


def _tensor_metadata(entry: _Entry) -> Instance:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_META, "_MEM_FORMAT_ENCODING"), (0,))
    properties = Instance(
        Global(_META, "TensorProperties"), (), (Global("torch", entry.dtype.name), layout, False, memory_format, False)
    )
    chunks = [
        Instance(Global(_META, "ChunkStorageMetadata"), (), {"offsets": _size(offsets), "sizes": _size(sizes)})
        for offsets, sizes in entry.chunks
    ]
    fields = {"properties": properties, "size": _size(entry.shape), "chunks": chunks}
    return Instance(Global(_META, "TensorStorageMetadata"), (), fields)


def _size(values: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (values,))
