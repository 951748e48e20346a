"""Describes a torch_dist folder so that megatron-core 0.16.1 and 0.19.2 load it.

The items themselves stand in `.distcp` files (`torch_archive.tensor_frame`, `object_item`); here are the three files beside
them. `common.pt` is written in the 0.16.1 style; 0.19.2 reads both styles. `metadata.json` comes last: megatron takes a
folder without it for an unfinished save. The bytes are a function of the arguments alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.formats.dcp_read import METADATA, METADATA_JSON
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.formats.pickle_data import Call, Global, Instance, encode
from mcore_longctx.formats.torch_archive import object_item

__all__ = ["COMMON", "StoredItem", "write_description"]

COMMON = "common.pt"

_META = "torch.distributed.checkpoint.metadata"
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_INDEX = Global(_META, "MetadataIndex")


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One chunk of a tensor, or an object, and where it is stored: `length` bytes from `offset` of `file`.

    `box` is the chunk's (offsets, sizes) in its tensor; None for an object.
    """

    key: str
    box: tuple[tuple[int, ...], tuple[int, ...]] | None
    file: str
    offset: int
    length: int


def write_description(
    folder: Path,
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    items: Iterable[StoredItem],
    common: Mapping[str, object],
) -> None:
    """Write `common.pt`, `.metadata` and, last, `metadata.json`.

    Args:
        folder: where the `.distcp` files lie.
        tensors: name -> element type and global shape.
        items: all that is stored. The chunks of each tensor cover it once.
        common: plain values that belong to no tensor: `iteration`, `checkpoint_version`.
    """
    (folder / COMMON).write_bytes(object_item(dict(common)))
    (folder / METADATA).write_bytes(encode(_metadata(tensors, items)))
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / METADATA_JSON).write_text(json.dumps(backend), encoding="utf-8")


def _metadata(tensors: Mapping[str, tuple[DType, tuple[int, ...]]], items: Iterable[StoredItem]) -> Instance:
    chunks: dict[str, list[Instance]] = {key: [] for key in tensors}
    entries: dict[str, Instance] = {}
    storage: dict[Instance, Instance] = {}
    for item in items:
        index: dict[str, object] = {"fqn": item.key, "index": None}
        if item.box is None:  # torch's own pickles leave the offset of an object out, too
            entries[item.key] = Instance(Global(_META, "BytesStorageMetadata"))
        else:
            offsets, sizes = (_size(values) for values in item.box)
            index = {"fqn": item.key, "offset": offsets, "index": None}
            box = {"offsets": offsets, "sizes": sizes}
            chunks[item.key].append(Instance(Global(_META, "ChunkStorageMetadata"), (), box))
        place = {"relative_path": item.file, "offset": item.offset, "length": item.length}
        storage[Instance(_INDEX, (), index)] = Instance(_INFO, (), place)
    described = {key: _tensor_metadata(dtype, shape, chunks[key]) for key, (dtype, shape) in tensors.items()}
    fields = {
        "state_dict_metadata": {**described, **entries},
        "planner_data": None,
        "storage_data": storage,
        "storage_meta": None,  # torch's holds a path and a random number; its readers accept None
    }
    return Instance(Global(_META, "Metadata"), (), fields)


def _tensor_metadata(dtype: DType, shape: tuple[int, ...], chunks: list[Instance]) -> Instance:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_META, "_MEM_FORMAT_ENCODING"), (0,))
    properties = Instance(
        Global(_META, "TensorProperties"), (), (Global("torch", dtype.name), layout, False, memory_format, False)
    )
    return Instance(
        Global(_META, "TensorStorageMetadata"), (), {"properties": properties, "size": _size(shape), "chunks": chunks}
    )


def _size(values: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (values,))
