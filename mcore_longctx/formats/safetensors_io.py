"""Safetensors headers and index files: read with every check of the format, and written.

A file is 8 bytes little-endian header length, a JSON header `name -> {dtype, shape, data_offsets}`, then one data block.

Source: safetensors 0.8 (Rust, `tensor.rs`): header at most 100 MB, no holes, no overlaps, nothing after the last tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import BY_SAFETENSORS, DType
from mcore_longctx.reading import is_there, parse_json, read_json_object, regular_size

__all__ = [
    "INDEX",
    "SINGLE",
    "StoredTensor",
    "header_bytes",
    "index_text",
    "plan_shards",
    "read_folder",
    "read_header",
    "read_index",
    "read_json",
    "read_shards",
    "shard_names",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMS = 8
MAX_SIZE = 1 << 63
_AGAIN = "download it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's elements lie, row-major without gaps: `offset` bytes from the start of `file`."""

    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, no regular file, larger than 100 MB, not UTF-8 JSON, a repeated key, or not an object.
    """
    try:
        return read_json_object(path, MAX_JSON_BYTES, "a settings file")
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path) from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file. Reads the header only.

    Raises:
        CheckpointError: missing, truncated or damaged, or an element type that is not known.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            header = file.read(length) if len(prefix) == 8 and length <= MAX_HEADER_BYTES else b""
    except FileNotFoundError:
        raise CheckpointError("missing", where=path, fix=_AGAIN) from None
    if prefix == b"version ":
        raise CheckpointError("a Git LFS pointer, not the weights", where=path, fix="run `git lfs pull`")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"header length {length:,} is not one of a safetensors file", where=path, fix=_AGAIN)
    if len(prefix) < 8 or len(header) < length:
        raise CheckpointError(f"{size:,} bytes, shorter than its header", where=path, fix=_AGAIN)
    if not header.startswith(b"{"):
        raise CheckpointError("not a safetensors file", where=path)
    return _checked_entries(parse_json(header, path), path, data_start=8 + length, file_size=size)


def _checked_entries(header: dict[str, Any], path: Path, *, data_start: int, file_size: int) -> dict[str, StoredTensor]:
    notes = header.pop("__metadata__", None)
    if notes is not None and not (isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values())):
        raise CheckpointError("__metadata__ is not text by name", where=path, fix=_AGAIN)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{len(header):,} tensors, more than {MAX_TENSORS:,}", where=path)
    spans = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _checked_entry(name, entry, path)
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(dtype, shape, path, data_start + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"{'overlap' if begin < position else 'hole'} before tensor {name[:200]!r}", where=path, fix=_AGAIN
            )
        position = end
    rest = file_size - data_start - position
    if rest < 0:
        raise CheckpointError(f"{-rest:,} bytes shorter than its header says", where=path, fix=_AGAIN)
    if rest > 0:
        raise CheckpointError(f"{rest:,} bytes after the last tensor", where=path, fix=_AGAIN)
    return tensors


def _checked_entry(name: str, entry: Any, path: Path) -> tuple[DType, tuple[int, ...], int, int]:
    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"tensor {name[:200]!r}: {what}", where=path)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse("the entry is not dtype, shape and data_offsets")
    dtype = BY_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        refuse(f"dtype {str(entry['dtype'])[:40]!r} is not known")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_size_list(shape) or len(shape) > MAX_DIMS:
        refuse("shape is not a list of up to 8 sizes")
    if not _is_size_list(offsets) or len(offsets) != 2:
        refuse("data_offsets are not two offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        refuse(f"{end - begin:,} bytes, shape {shape} needs {math.prod(shape) * dtype.itemsize:,}")
    return dtype, tuple(shape), begin, end


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_SIZE for item in value)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder: `model.safetensors`, or the shards of its index.

    Raises:
        CheckpointError: neither or both are there, a shard that is missing or damaged, or an index that does not agree with them.
    """
    single, index = folder / SINGLE, folder / INDEX
    if is_there(single) and is_there(index):
        raise CheckpointError(f"holds both {SINGLE} and {INDEX}", where=folder, fix="remove the one that is not meant")
    if is_there(single):
        return read_header(single)
    if not is_there(index):
        other = sorted(path.name for path in folder.glob("*.bin"))
        found = f"; there is {other[0]}" if other else ""
        raise CheckpointError(f"no {SINGLE} and no {INDEX}{found}", where=folder, fix="save the model as safetensors")
    shard_of = read_index(index, ".safetensors")
    return read_shards(folder, shard_of, read_header, INDEX)


def read_shards(
    folder: Path, shard_of: Mapping[str, str], read_shard: Callable[[Path], Mapping[str, StoredTensor]], index: str
) -> dict[str, StoredTensor]:
    """Every tensor of the shards of an index. Raises CheckpointError unless each shard holds what the index says of it."""
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in read_shard(folder / shard).items():
            if shard_of.get(name) != shard:
                raise CheckpointError(f"holds {name[:200]!r}, which {index} does not place here", where=folder / shard)
            tensors[name] = tensor
    if missing := sorted(set(shard_of) - set(tensors)):
        first = missing[0]
        raise CheckpointError(
            f"{first[:200]!r} is not in {shard_of[first]} ({len(missing):,} such in all)", where=folder / index, fix=_AGAIN
        )
    return tensors


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> shard, from an index file. A shard is a file beside it whose name ends in `suffix`.

    Raises:
        CheckpointError: missing, damaged, or a shard that is elsewhere or of another kind.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map", where=path, fix=_AGAIN)
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{len(weight_map):,} tensors, more than {MAX_TENSORS:,}", where=path)
    for shard in set(map(str, weight_map.values())):
        if "/" in shard or "\\" in shard or "\0" in shard or len(shard) > 255:
            raise CheckpointError(f"shard name {shard[:80]!r} leaves the folder", where=path)
        if not shard.endswith(suffix):
            raise CheckpointError(f"shard name {shard[:80]!r} does not end in {suffix}", where=path)
    return {name: str(shard) for name, shard in weight_map.items()}


def header_bytes(tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> bytes:
    """Length and header of a file that holds these tensors one after the other; the data follows directly."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names: files of at most `shard_bytes` (a larger tensor stands alone), in the given order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return dict(zip(shard_names(len(groups)), groups, strict=True))


def shard_names(count: int) -> list[str]:
    """What `count` files of weights are called."""
    return [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(shards: Mapping[str, Iterable[str]], total_bytes: int) -> str:
    """Contents of `model.safetensors.index.json`. `total_bytes` counts tensor bytes, not file bytes."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
