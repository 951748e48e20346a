"""What a torch_dist folder holds: its `.metadata` read as plain data, with the geometry of every chunk checked.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: the shape and chunks of each tensor, and where
the item of each chunk lies. Chunks are joined to items by (name, chunk offsets). Values that are not tensors are "objects".

Sources: torch 2.13 `distributed/checkpoint/{metadata,filesystem}.py`; megatron-core 0.16.1 and 0.19.2
`dist_checkpointing/strategies/torch.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeGuard

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import BY_TORCH, DType
from mcore_longctx.formats.pickle_data import Call, Global, Instance, PickleError, decode
from mcore_longctx.reading import is_there, read_bounded, read_json_object, regular_size

__all__ = [
    "METADATA",
    "METADATA_JSON",
    "Chunk",
    "Item",
    "SavedTensor",
    "TorchDist",
    "is_torch_dist",
    "read_metadata_names",
    "read_torch_dist",
]

METADATA = ".metadata"
METADATA_JSON = "metadata.json"
MAX_METADATA_BYTES = (
    64 << 20
)  # Llama-3.1-405B saved at TP 8 with its optimizer has 6.4 MB; decoding takes 25 times as much memory
_MAX_METADATA_JSON = 1 << 20  # megatron-core writes 100 bytes
MAX_DIMS = 8
MAX_SIZE = 1 << 63

_MAX_CUTS = 16  # nested cuts: layers, gate and up, tensor-parallel rows or columns are four

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes

_Items: TypeAlias = "dict[tuple[str, tuple[int, ...] | None], Item]"  # (name, chunk offsets; None for an object)

_META, _FILES, _PLANNER = (f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
_SIZE = Global("torch", "Size")
_DTYPES = {Global("torch", name): dtype for name, dtype in BY_TORCH.items()}
_ALLOWED = frozenset(
    {_SIZE, Global("torch.serialization", "_get_layout"), Global("collections", "OrderedDict"), *_DTYPES}
    | {
        Global(_META, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {Global(_FILES, name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {Global(_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")}
    # written by megatron-core up to 0.15
    | {Global("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}
    | {Global(module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "PurePosixPath")}
)


class Item(NamedTuple):
    """`length` bytes from `offset` of `file`: one torch.save archive."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the item that holds it: `length` bytes from `offset` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a torch_dist folder: its global shape and the chunks that it was saved in."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def is_covered_once(self) -> bool:
        """Whether every element lies in exactly one chunk."""
        boxes = [(chunk.offsets, chunk.sizes) for chunk in self.chunks]
        return sum(math.prod(sizes) for _, sizes in boxes) == math.prod(self.shape) and boxes_are_disjoint(boxes)


@dataclass(frozen=True)
class TorchDist:
    """Tensors of a torch_dist folder, and where its objects (pickles, not read) lie."""

    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    objects: dict[str, Item] = field(default_factory=dict)


def is_torch_dist(folder: Path) -> bool:
    """Whether the folder looks like a torch_dist checkpoint."""
    return is_there(folder / METADATA) or is_there(folder / METADATA_JSON)


def read_torch_dist(folder: Path) -> TorchDist:
    """Read `.metadata` and check it against the files beside it. Reads no tensor data.

    Raises:
        CheckpointError: unfinished, another backend, damaged, a chunk outside its tensor or an item outside its file, or a
            name in the pickle that no checkpoint needs.
    """
    _check_backend(folder)
    return _Reader(folder / METADATA).read(_decoded(folder / METADATA))


def read_metadata_names(folder: Path) -> list[str]:
    """The names in `.metadata` alone, whatever program wrote it, to say what a folder is that cannot be read. Raises as above."""
    reader = _Reader(folder / METADATA)
    entries = reader.state(_decoded(folder / METADATA), "Metadata", "MCoreMetadata").get("state_dict_metadata")
    return [name for name in entries if isinstance(name, str)] if isinstance(entries, dict) else []


def _decoded(path: Path) -> Any:
    try:
        return decode(read_bounded(path, MAX_METADATA_BYTES, "a .metadata"), _ALLOWED)
    except FileNotFoundError:
        raise CheckpointError("missing", where=path, fix="use another copy of the checkpoint") from None
    except PickleError as error:
        raise CheckpointError(str(error), where=path) from None


def _check_backend(folder: Path) -> None:
    path = folder / METADATA_JSON
    try:
        backend = read_json_object(path, _MAX_METADATA_JSON, f"a {METADATA_JSON}")["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(
            f"no {METADATA_JSON}: the save was not finished", where=folder, fix="use another checkpoint"
        ) from None
    except KeyError:
        raise CheckpointError("names no sharded_backend", where=path, fix="use another copy of the checkpoint") from None
    if backend != "torch_dist":
        raise CheckpointError(
            f"sharded_backend is {str(backend)[:40]!r}, only torch_dist is supported",
            where=path,
            fix="load it with the megatron-core that wrote it and save it with --ckpt-format torch_dist",
        )


class _Reader:
    """Turns the decoded pickle into a TorchDist, or says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self.size: Global | None = None  # torch.Size as this file names it
        self.files: dict[str, tuple[Path, int]] = {}  # name -> (path, size or -1)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(what, where=self.path, fix="use another copy of the checkpoint")

    def read(self, root: Any) -> TorchDist:
        fields = self.state(root, "Metadata", "MCoreMetadata")
        entries, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            self.refuse("has no state_dict_metadata or no storage_data")
        items = self.items(storage)
        tensors: dict[str, SavedTensor] = {}
        objects: dict[str, Item] = {}
        for name, entry in entries.items():
            if not isinstance(name, str):
                self.refuse("names a tensor by something that is not text")
            if isinstance(entry, Instance) and entry.cls == Global(_META, "BytesStorageMetadata"):
                if (name, None) not in items:
                    self.refuse(f"object {name[:200]} has no stored item")
                objects[name] = items[name, None]
            else:
                tensors[name] = self.tensor(name, entry, items)
        return TorchDist(tensors, objects)

    def state(self, value: Any, *classes: str) -> dict[str, Any]:
        if not isinstance(value, Instance) or value.cls.name not in classes or not isinstance(value.state, dict):
            self.refuse(f"holds something else where a {classes[0]} belongs")
        return value.state

    def items(self, storage: dict[Any, Any]) -> _Items:
        items: _Items = {}
        for key, value in storage.items():
            index, info = self.state(key, "MetadataIndex"), self.state(value, "_StorageInfo")
            name = index.get("fqn")
            if not isinstance(name, str):
                self.refuse("stores an item without a name")
            offsets = None if index.get("offset") is None else self.sizes(index["offset"], name)
            if info.get("transform_descriptors"):
                self.refuse(f"{name[:200]} is stored compressed or encrypted")
            if (name, offsets) in items:
                self.refuse(f"{name[:200]} at {offsets} is stored twice")
            items[name, offsets] = self.place(name, info)
        return items

    def place(self, name: str, info: dict[str, Any]) -> Item:
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        known = self.files.get(file) if isinstance(file, str) else None
        path, size = known if known is not None else self.file(file, name)
        if not _is_size(offset) or not _is_size(length):
            self.refuse(f"offset or length of {name[:200]} is not a size")
        if offset + length > size:
            raise CheckpointError(
                f"{size:,} bytes, but {name[:200]} ends at byte {offset + length:,}",
                where=path,
                fix="use another copy of the checkpoint",
            )
        return Item(path, offset, length)

    def file(self, file: Any, name: str) -> tuple[Path, int]:
        """A file that is named for the first time, and its size."""
        if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\\0") or len(file) > 255:
            self.refuse(f"file name {str(file)[:80]!r} of {name[:200]} leaves the folder")
        path = self.folder / file
        try:
            self.files[file] = path, regular_size(path)
        except FileNotFoundError:
            raise CheckpointError("missing", where=path, fix="use another copy of the checkpoint") from None
        return self.files[file]

    def tensor(self, name: str, entry: Any, items: _Items) -> SavedTensor:
        fields = self.state(entry, "TensorStorageMetadata")
        dtype, shape, listed = (
            self.dtype(name, fields.get("properties")),
            self.sizes(fields.get("size"), name),
            fields.get("chunks"),
        )
        if not isinstance(listed, list) or len(listed) > len(items):
            self.refuse(f"{name[:200]} has no list of chunks")
        chunks: dict[tuple[int, ...], Chunk] = {}
        for value in listed:
            chunk = self.state(value, "ChunkStorageMetadata")
            offsets, sizes = self.sizes(chunk.get("offsets"), name), self.sizes(chunk.get("sizes"), name)
            if not len(offsets) == len(sizes) == len(shape):
                self.refuse(f"chunk of {name[:200]} has other dimensions than the tensor")
            if any(start + size > total for start, size, total in zip(offsets, sizes, shape, strict=True)):
                self.refuse(f"chunk of {name[:200]} at {list(offsets)} leaves the tensor {list(shape)}")
            if (name, offsets) not in items:
                self.refuse(f"chunk of {name[:200]} at {list(offsets)} has no stored item")
            if offsets in chunks:
                self.refuse(f"two chunks of {name[:200]} at {list(offsets)}")
            chunks[offsets] = Chunk(offsets, sizes, *items[name, offsets])
        return SavedTensor(dtype, shape, tuple(chunks.values()))

    def dtype(self, name: str, properties: Any) -> DType:
        state = properties.state if isinstance(properties, Instance) else None
        first = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(first, Global) or first not in _DTYPES:
            self.refuse(f"{name[:200]} has no element type")
        return _DTYPES[first]

    def sizes(self, value: Any, name: str) -> tuple[int, ...]:
        if type(value) is Call and value.function is self.size and len(value.args) == 1:
            value = value.args[0]
        elif type(value) is Call and value.function == _SIZE and len(value.args) == 1:
            self.size, value = value.function, value.args[0]
        if not isinstance(value, tuple | list) or len(value) > MAX_DIMS:
            self.refuse(f"a shape or offset of {name[:200]} is not a list of sizes")
        for item in value:
            if type(item) is not int or not 0 <= item < MAX_SIZE:
                self.refuse(f"a shape or offset of {name[:200]} is not a list of sizes")
        return tuple(value)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MAX_SIZE


def boxes_are_disjoint(boxes: Sequence[Box]) -> bool:
    """Whether no two boxes (offsets, sizes) share an element, for boxes that straight cuts can part.

    Tensors are sharded by straight cuts, so boxes that cannot be parted by them (a pinwheel) count as overlapping.

    >>> boxes_are_disjoint([((0, 0), (2, 4)), ((2, 0), (2, 4))]), boxes_are_disjoint([((0, 0), (2, 4)), ((1, 3), (2, 1))])
    (True, False)
    """
    return _can_be_parted([box for box in boxes if all(box[1])], _MAX_CUTS)


def _can_be_parted(boxes: list[Box], cuts_left: int) -> bool:
    if len(boxes) < 2:
        return True
    if cuts_left == 0:
        return False
    for axis in range(len(boxes[0][0])):
        groups = _part(boxes, axis)
        if len(groups) > 1:
            return all(_can_be_parted(group, cuts_left - 1) for group in groups)
    return False


def _part(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Groups of boxes with an empty cut between them on this axis."""
    groups: list[list[Box]] = []
    end = 0
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        if not groups or box[0][axis] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box[0][axis] + box[1][axis])
    return groups
