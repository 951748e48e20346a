"""torch_dist checkpoint -> Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcore_longctx.convert.disk import check_free_space, io_errors
from mcore_longctx.convert.sidecars import copy_sidecars, tokenizer_sha256
from mcore_longctx.convert.views import CONFIG, HF_FOLDER, CheckpointView, open_torch_dist
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import is_torch_dist
from mcore_longctx.formats.safetensors_io import INDEX, header_bytes, index_text, plan_shards, read_json
from mcore_longctx.manifest import MANIFEST, sha256_file, staged_folder, verify_manifest, write_manifest
from mcore_longctx.recipe import CARD, CheckpointCard, write_card
from mcore_longctx.rope import merge_hf_rope

__all__ = ["SHARD_BYTES", "export_hf"]

SHARD_BYTES = 5_000_000_000
# would send a reader to code or a place that does not come along
_DROPPED_SETTINGS = ("auto_map", "_name_or_path")


@io_errors()
def export_hf(checkpoint: Path, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Convert the torch_dist `checkpoint` to the Hugging Face folder `out`, bit for bit. Optimizer state is left out.

    config.json is that of the imported model with the rope that the checkpoint was trained with, in both spellings, and its
    maximum length. Files of more than `shard_bytes` are split.

    Raises:
        CheckpointError: `checkpoint` is missing, foreign, unfinished, damaged or changed since it was written, or the disk is full.
        ConfigError: the rope has no name in a Hugging Face config, or `out` exists.
        ConversionError: it holds other tensors than its model.
    """
    _check_source(checkpoint)
    view = open_torch_dist(checkpoint)
    where = checkpoint / HF_FOLDER
    config = _config(view)
    length = view.rope.resolved_max_position_embeddings
    with staged_folder(out) as folder:
        check_free_space(folder, sum(tensor.nbytes for tensor in view.tensors.values()), out)
        _write_shards(view, folder, shard_bytes)
        copy_sidecars(where, folder)
        _write_json(folder / CONFIG, config)
        _set_length(folder / "tokenizer_config.json", "model_max_length", length)
        old_length = view.config.get("max_position_embeddings")
        _set_length(folder / "generation_config.json", "max_length", length, only_if=old_length)
        _write_card_of(view, folder)
        write_manifest(
            folder,
            "export",
            rope_fingerprint=view.rope.fingerprint(),
            source_manifest_sha256=sha256_file(checkpoint / MANIFEST),
        )


def _check_source(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise CheckpointError("no such folder", where=checkpoint, fix="check the path")
    if is_torch_dist(checkpoint) and not (checkpoint / CARD).exists():
        raise CheckpointError(
            f"a torch_dist folder without {CARD}: its model and rope are not known",
            where=checkpoint,
            fix="only checkpoints of `convert import` and `train` can be exported",
        )
    verify_manifest(checkpoint, "checkpoint")


def _config(view: CheckpointView) -> dict[str, Any]:
    kept = {key: value for key, value in view.config.items() if key not in _DROPPED_SETTINGS}
    dtypes = view.dtypes
    dtype = max(dtypes, key=lambda name: dtypes[name])
    # transformers 4 and vLLM read torch_dtype, transformers 5 dtype
    return {**merge_hf_rope(kept, view.rope), "torch_dtype": dtype, "dtype": dtype}


def _write_shards(view: CheckpointView, folder: Path, shard_bytes: int) -> None:
    shards = plan_shards({name: tensor.nbytes for name, tensor in view.tensors.items()}, shard_bytes)
    for file_name, names in shards.items():
        with (folder / file_name).open("wb") as file:
            file.write(header_bytes({name: (view.tensors[name].dtype, view.tensors[name].shape) for name in names}))
            for name in names:
                for _, band in view.tensors[name].bands():
                    file.write(band)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in view.tensors.values())
        (folder / INDEX).write_text(index_text(shards, total), encoding="utf-8")


def _set_length(path: Path, key: str, length: int | None, *, only_if: object = None) -> None:
    """Set `key` of a JSON file, if the file is there (and, with `only_if`, if it has that value)."""
    if length is None or not path.exists():
        return
    settings = read_json(path)
    if only_if is None or settings.get(key) == only_if:
        _write_json(path, {**settings, key: length})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_card_of(view: CheckpointView, folder: Path) -> None:
    assert view.card is not None
    card = view.card
    write_card(
        folder,
        CheckpointCard(
            shape=card.shape,
            rope=card.rope,
            tokenizer_sha256=tokenizer_sha256(folder),
            stage=card.stage,
            iteration=card.iteration,
        ),
    )
