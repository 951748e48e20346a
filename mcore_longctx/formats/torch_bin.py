"""Older Hugging Face folders: `pytorch_model.bin`, or its shards and their index.

Each file is one torch.save archive (a zip of stored records) of a dict of tensors, so its elements are byte ranges like those of
safetensors. `data.pkl` is decoded as inert records through an allow-list; nothing is handed to an unpickler.

Source: torch 2.13 `torch/_utils.py` (`_rebuild_tensor_v2`, `_rebuild_parameter`), `torch/serialization.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.pickle_data import Call, Global, PickleError
from mcore_longctx.formats.safetensors_io import MAX_TENSORS, StoredTensor, read_index, read_shards
from mcore_longctx.formats.torch_archive import TENSOR_NAMES, Archive, archive_errors, tensor_place
from mcore_longctx.reading import is_there, regular_size

__all__ = ["BIN_INDEX", "BIN_SINGLE", "is_bin_folder", "read_bin", "read_bin_folder"]

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
_LIMIT = 64 << 20  # of data.pkl and of the zip's directory; a shard of 1,000 tensors has 0.2 MB of both
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = Global("collections", "OrderedDict")
_ALLOWED = TENSOR_NAMES | {_PARAMETER}
_AGAIN = "download it again"


def is_bin_folder(folder: Path) -> bool:
    """Whether the folder's weights are `.bin` files."""
    return is_there(folder / BIN_SINGLE) or is_there(folder / BIN_INDEX)


def read_bin_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `pytorch_model.bin`, or of the shards of its index. Reads no tensor data.

    Raises:
        CheckpointError: both are there, a file that is missing, damaged or of the format before torch 1.6, a tensor that is not
            row-major, or an index that does not agree with its shards.
    """
    single, index = folder / BIN_SINGLE, folder / BIN_INDEX
    if is_there(single) and is_there(index):
        raise CheckpointError(f"holds both {BIN_SINGLE} and {BIN_INDEX}", where=folder, fix="remove the one that is not meant")
    if is_there(single):
        return read_bin(single)
    return read_shards(folder, read_index(index, ".bin"), read_bin, BIN_INDEX)


def read_bin(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one `.bin` file. Raises as `read_bin_folder`."""
    try:
        size = regular_size(path)
        with path.open("rb") as file, archive_errors(path, "the archive"):
            _check_start(file.read(8), path)
            archive = Archive(file, 0, size, limit=_LIMIT)
            return {name: _stored(archive, name, value, path) for name, value in _entries(archive.pickle(_ALLOWED))}
    except FileNotFoundError:
        raise CheckpointError("missing", where=path, fix=_AGAIN) from None


def _check_start(start: bytes, path: Path) -> None:
    if start == b"version ":
        raise CheckpointError("a Git LFS pointer, not the weights", where=path, fix="run `git lfs pull`")
    if not start.startswith(b"PK"):
        raise CheckpointError(
            "not a zip archive: torch before 1.6 wrote it, or it is damaged",
            where=path,
            fix="save the model as safetensors with transformers",
        )


def _entries(value: Any) -> list[tuple[str, Any]]:
    items = value.items if isinstance(value, Call) and value.function == _ORDERED_DICT else value
    if not isinstance(items, dict):
        raise PickleError("is not a dict of tensors")
    if len(items) > MAX_TENSORS:
        raise ValueError(f"has {len(items):,} tensors, more than {MAX_TENSORS:,}")
    if not all(isinstance(name, str) for name in items):
        raise ValueError("names a tensor by something that is not text")
    return list(items.items())


def _stored(archive: Archive, name: str, value: Any, path: Path) -> StoredTensor:
    with archive_errors(path, f"tensor {name[:200]!r}"):
        if isinstance(value, Call) and value.function == _PARAMETER and value.args:
            value = value.args[0]
        place = tensor_place(value)
        return StoredTensor(place.dtype, place.shape, path, archive.payload(place))
