"""Load model weights from a torch_dist folder, whoever wrote it, at any layout.

Only tensors are read. A torch_dist folder holds pickles in three places, and none of them is trusted: `.metadata` is decoded as inert
data (`formats.dcp_read`), checked, and handed to torch as the objects that torch's own reader would have made of it, so that nobody
unpickles the file; `common.pt` and the `_extra_state` objects are not read at all. So folders of megatron-core 0.16 (with a common.pt)
and 0.19 (without) load alike.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import METADATA, METADATA_JSON, TorchDist, read_torch_dist
from mcore_longctx.megatron_compat import device_context

__all__ = ["load_model_weights", "read_metadata"]

_EXTRA_STATE = "_extra_state"
_READ = FileSystemReader.read_metadata.__name__
_LAYERS = "decoder.layers."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded differently at each TP


def load_model_weights(model: Any, folder: Path) -> None:
    """Fill every parameter of `model` from `folder`. All ranks of the model must call it.

    Whatever dtype the folder holds is cast to the model's. Optimizer state in the folder is left alone. The vocabulary's padding
    may differ; whether the vocabulary is the model's own is for the checkpoint's card to say (`recipe.card`).

    Args:
        model: a model of `build_gpt_model` (not wrapped).
        folder: holds `.metadata` and `*.distcp`.

    Raises:
        CheckpointError: not a finished torch_dist folder, a tensor of the model is missing in it or has another shape, its layers
            have a tensor that the model's have not, or its metadata names something that a checkpoint has no use for.
    """
    folder = Path(folder)
    saved = _read_checked(folder)
    stored = _shapes(saved)
    with device_context():
        wanted = model.sharded_state_dict(metadata=_request_style(stored))
        wanted, _, factories = load_preprocess(wanted)
        wanted, _ = extract_matching_values(wanted, lambda leaf: isinstance(leaf, ShardedTensor))
        _check_stored(wanted, stored, model, folder)
        try:
            with warnings.catch_warnings(), _metadata_given(_as_torch_metadata(saved)):
                warnings.simplefilter("ignore")  # megatron-core calls torch by older names
                loaded = TorchDistLoadShardedStrategy().load(wanted, folder)
        except (CheckpointException, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"cannot be read: {_reason(error)}", where=folder, fix="use another copy") from error
        loaded = apply_factory_merges(loaded, factories)
        result = model.load_state_dict(loaded, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith(_EXTRA_STATE)]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"not loaded: {', '.join(missing + list(result.unexpected_keys))}", where=folder)


def read_metadata(folder: Path) -> dict[str, tuple[int, ...] | None]:
    """Names in a torch_dist folder: global shape of each tensor, None for an object.

    Raises:
        CheckpointError: nothing here, not finished, damaged, or naming Python objects outside the allow-list.
    """
    return _shapes(_read_checked(folder))


def _read_checked(folder: Path) -> TorchDist:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError("no checkpoint here", where=folder, fix="check the path")
    for name in (METADATA, METADATA_JSON):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name}: not a torch_dist checkpoint, or one that was not finished", where=folder)
    return read_torch_dist(folder)


def _shapes(saved: TorchDist) -> dict[str, tuple[int, ...] | None]:
    return {key: tensor.shape for key, tensor in saved.tensors.items()} | dict.fromkeys(saved.objects)


def _as_torch_metadata(saved: TorchDist) -> Metadata:
    """What torch's reader would have made of the `.metadata` that was checked."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, tensor in saved.tensors.items():
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype.name))
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
        entries[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for chunk, described in zip(tensor.chunks, chunks, strict=True):
            storage[MetadataIndex(key, described.offsets)] = _StorageInfo(chunk.file.name, chunk.offset, chunk.length)
    for key, item in saved.objects.items():
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(item.file.name, item.offset, item.length)
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


@contextmanager
def _metadata_given(metadata: Metadata) -> Iterator[None]:
    """Torch's readers take this instead of unpickling `.metadata`, whatever lies in the folder by now."""
    # megatron-core 0.19 keeps what was read under the folder's path, for the whole process
    forget = getattr(CachedMetadataFileSystemReader, "clear_metadata_cache", lambda: None)
    original = FileSystemReader.read_metadata
    forget()
    setattr(FileSystemReader, _READ, lambda *_, **__: metadata)
    try:
        yield
    finally:
        setattr(FileSystemReader, _READ, original)
        forget()


def _reason(error: BaseException) -> str:
    """First line of what went wrong; torch wraps the failures of all ranks into one exception."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _request_style(stored: dict[str, tuple[int, ...] | None]) -> dict[str, bool]:
    """How to ask: layers stacked on a leading axis (the usual way), or one key a layer, as the folder has them."""
    per_layer = any(key.startswith("decoder.layers.0.") for key in stored)
    return {"singleton_local_shards": False, "non_homogeneous_layers": per_layer}


def _check_stored(wanted: Any, stored: dict[str, tuple[int, ...] | None], model: Any, folder: Path) -> None:
    for tensor in nested_values(wanted):
        shape, asked = stored.get(tensor.key), tuple(tensor.global_shape)
        if shape is None:
            raise CheckpointError(f"holds no tensor {tensor.key}", where=folder, fix="use a checkpoint of this model")
        if tensor.key in _VOCABULARY and shape[0] >= model.real_vocab_size:
            shape = (asked[0], *shape[1:])
        if shape != asked:
            raise CheckpointError(
                f"{tensor.key} is {list(shape)}, the model has {list(asked)}", where=folder, fix="use a checkpoint of this model"
            )
    # Megatron ignores what it does not ask for: biases or norms of a layer would be dropped without a word. Every stage has layers, so
    # the tensors of one layer tell.
    of_a_layer = {_any_layer(tensor.key) for tensor in nested_values(wanted)}
    surplus = [key for key, shape in stored.items() if shape and key.startswith(_LAYERS) and _any_layer(key) not in of_a_layer]
    if surplus:
        raise CheckpointError(
            f"holds {surplus[0]}, which the model does not have", where=folder, fix="use a checkpoint of this model"
        )


def _any_layer(key: str) -> str:
    """`decoder.layers.3.mlp...` without its number, as stacked layers are called. Gate and up may be stored as two."""
    return re.sub(r"^decoder\.layers\.\d+\.", _LAYERS, key).removesuffix("_w").removesuffix("_v")
