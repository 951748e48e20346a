"""A torch_dist folder as rows of Hugging Face tensors: of Megatron-LM, Megatron-Bridge, our trainer or our import, at any TP and PP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.convert.views.locate import locate_checkpoint
from mcore_longctx.convert.views.rows import Piece, TensorRows
from mcore_longctx.convert.views.saved_settings import check_padding, check_saved_settings
from mcore_longctx.convert.views.stored_layers import StoredLayers
from mcore_longctx.convert.views.training_state import is_training_state, master_weights
from mcore_longctx.convert.views.view import CONFIG, HF_FOLDER, CheckpointView
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.families import ModelShape, hf_shapes, model_tensors, read_shape
from mcore_longctx.formats.common_state import read_common_state
from mcore_longctx.formats.dcp_read import METADATA, TorchDist, is_torch_dist, read_torch_dist
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.formats.safetensors_io import read_json
from mcore_longctx.reading import is_there
from mcore_longctx.recipe import CARD, CheckpointCard, read_card
from mcore_longctx.rope import RopeScaling, read_hf_rope

__all__ = ["open_torch_dist"]


def open_torch_dist(path: Path, *, config: Path | None = None, from_master: bool = False) -> CheckpointView:
    """Open a torch_dist checkpoint.

    Args:
        path: its folder, or the folder around it (`locate_checkpoint`).
        config: config.json of the model, or a folder with one, for a checkpoint that does not carry its own.
        from_master: read the optimizer's float32 weights in place of the model's (`training_state` says where they are).

    Raises:
        CheckpointError: there is none, it is damaged or of a format that is not read, or it has no masters.
        ConfigError: no config, one too many, or one that asks for what is not supported.
        ConversionError: it holds other tensors, or was trained with other settings, than the config says.
    """
    folder = locate_checkpoint(path)
    if not is_torch_dist(folder):
        raise CheckpointError("not a torch_dist checkpoint", where=folder, fix=f"expected {METADATA} and *.distcp files")
    model = _model_of(folder, config)
    saved = read_torch_dist(folder)
    weights = {key: tensor for key, tensor in saved.tensors.items() if not is_training_state(key)}
    if not weights and saved.tensors:
        raise CheckpointError("holds optimizer state and no weights", where=folder, fix="use the checkpoint of the model")
    common = _common_state(folder, saved, model)
    notes = [] if model.card else check_saved_settings(common, model.shape, model.rope, model.path)
    if from_master:
        weights = master_weights(saved, folder)
    tensors, padding = _tensors(folder, weights, model, common)
    dropped = tuple(key for key in saved.tensors if key not in weights or is_training_state(key))
    return CheckpointView(
        folder,
        "torch_dist",
        model.config,
        model.shape,
        model.rope,
        tensors,
        model.card,
        padding,
        dropped,
        model.path.parent,
        tuple(notes),
    )


@dataclass(frozen=True)
class _Model:
    config: Mapping[str, Any]
    path: Path  # of the config
    shape: ModelShape
    rope: RopeScaling
    card: CheckpointCard | None


def _model_of(folder: Path, given: Path | None) -> _Model:
    """The model that the folder says it holds, or the one that the user says it holds."""
    own = folder / HF_FOLDER / CONFIG
    card = read_card(folder) if is_there(folder / CARD) else None
    carries_config = card is not None and is_there(own)
    if given is not None and carries_config:
        raise ConfigError(f"this checkpoint carries its own {HF_FOLDER}/{CONFIG}", where=folder, fix="leave out --config")
    if given is None and not carries_config:
        raise ConfigError(
            f"no {CARD} and no {HF_FOLDER}/{CONFIG}: its model and rope are not known",
            where=folder,
            fix="give the model's config.json with --config",
        )
    path = own if given is None else (given / CONFIG if given.is_dir() else given)
    config = read_json(path)
    shape = read_shape(config, where=path)
    if card is not None and shape != card.shape:
        raise CheckpointError(f"sizes differ from those in {CARD}", where=path, fix="use another copy of the checkpoint")
    return _Model(config, path, shape, card.rope if card else read_hf_rope(config, where=path), card)


def _common_state(folder: Path, saved: TorchDist, model: _Model) -> Mapping[str, Any] | None:
    """Only a checkpoint without a card has to tell by it what it is."""
    return None if model.card else read_common_state(folder, saved)


def _tensors(
    folder: Path, weights: Mapping[str, Any], model: _Model, common: Mapping[str, Any] | None
) -> tuple[dict[str, TensorRows], dict[str, TensorRows]]:
    """(Hugging Face name -> rows, Megatron key -> rows of vocabulary padding)."""
    mapped = model_tensors(model.shape)
    stored = StoredLayers(folder, weights, mapped, model.shape.num_layers, model.path)
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, DType] = {}
    padding = {}
    for tensor in mapped:
        rows = stored.rows(tensor)
        for block in tensor.blocks:
            pieces.setdefault(block.hf_name, []).extend(rows.pieces_of(block.row, block.rows, at=block.hf_row))
            dtypes[block.hf_name] = rows.dtype
        if tensor.is_vocabulary and model.card is None:
            check_padding(rows.rows, model.shape, common, f"{folder}: {tensor.key}")
        if rows.rows > tensor.rows:
            surplus = rows.rows - tensor.rows
            moved = tuple(rows.pieces_of(tensor.rows, surplus, at=0))
            padding[tensor.key] = TensorRows(rows.dtype, surplus, rows.columns, False, moved)
    tensors = {
        name: TensorRows(dtypes[name], wanted[0], wanted[1] if len(wanted) == 2 else 1, len(wanted) == 1, tuple(pieces[name]))
        for name, wanted in hf_shapes(mapped).items()
    }
    return tensors, padding
