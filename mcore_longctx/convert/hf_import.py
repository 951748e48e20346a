"""Hugging Face folder -> torch_dist checkpoint that megatron-core loads at any tensor- and pipeline-parallel size."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from mcore_longctx.convert.disk import check_free_space, io_errors
from mcore_longctx.convert.sidecars import copy_sidecars, tokenizer_sha256
from mcore_longctx.convert.views import CONFIG, HF_FOLDER, CheckpointView, open_hf
from mcore_longctx.convert.views.rows import Piece, TensorRows
from mcore_longctx.errors import ConversionError
from mcore_longctx.families import MappedTensor, extra_state_keys, model_tensors
from mcore_longctx.formats.dcp_write import TorchDistWriter
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.manifest import MANIFEST, staged_folder, verify_manifest, write_manifest
from mcore_longctx.recipe import CheckpointCard, write_card

__all__ = ["import_hf"]


@io_errors()
def import_hf(hf: Path, out: Path) -> None:
    """Convert the Llama in `hf` to the torch_dist checkpoint `out`, bit for bit.

    The weights keep their element type and the rope that they were trained with. The embedding is padded with zero rows to
    Megatron's multiple of 128. `out` also gets `hf/` (config and tokenizer), a card and, last, a manifest.

    Raises:
        CheckpointError: `hf` is missing or damaged, or the disk is full.
        ConfigError: config.json asks for something that is not supported, or `out` exists.
        ConversionError: tensors that are missing, left over, or of another shape or type than config.json says.
    """
    view = open_hf(hf)
    if view.card is not None and view.card.rope.fingerprint() != view.rope.fingerprint():
        raise ConversionError(
            f"the rope in {CONFIG} ({view.rope.describe()}) is not the one these weights were trained with "
            f"({view.card.rope.describe()}, says mcore_longctx.json)",
            where=hf,
            fix=f"restore {CONFIG}, or remove mcore_longctx.json if the change is meant",
        )
    if view.card is not None and (hf / MANIFEST).exists():  # an export of ours: nothing else notices a flipped bit
        verify_manifest(hf, "export")
    mapped = model_tensors(view.shape)
    dtypes = _megatron_dtypes(view, mapped)
    with staged_folder(out) as folder:
        check_free_space(folder, sum(tensor.nbytes for tensor in view.tensors.values()), out)
        _write_weights(view, mapped, dtypes, folder)
        (folder / HF_FOLDER).mkdir()
        copy_sidecars(hf, folder / HF_FOLDER)
        shutil.copyfile(hf / CONFIG, folder / HF_FOLDER / CONFIG)
        write_card(folder, CheckpointCard(shape=view.shape, rope=view.rope, tokenizer_sha256=tokenizer_sha256(hf)))
        write_manifest(folder, "checkpoint", rope_fingerprint=view.rope.fingerprint(), stage="base", iteration=0)


def _megatron_dtypes(view: CheckpointView, mapped: list[MappedTensor]) -> dict[str, DType]:
    """Megatron key -> element type. Layers are stacked into one tensor, so they must agree."""
    dtypes: dict[str, DType] = {}
    for tensor in mapped:
        for block in tensor.blocks:
            dtype = view.tensors[block.hf_name].dtype
            if dtypes.setdefault(tensor.key, dtype) != dtype:
                raise ConversionError(
                    f"dtype {dtype.name}, but its neighbours in {tensor.key} have {dtypes[tensor.key].name}",
                    where=f"{view.folder}: {block.hf_name}",
                    fix="save the model with one dtype",
                )
    return dtypes


def _write_weights(view: CheckpointView, mapped: list[MappedTensor], dtypes: dict[str, DType], folder: Path) -> None:
    writer = TorchDistWriter(folder)
    try:
        for tensor in mapped:
            _write_tensor(writer, tensor, _megatron_rows(view, tensor, dtypes[tensor.key]), view.shape.num_layers)
        for key in extra_state_keys(view.shape.num_layers):
            writer.add_empty_object(key)
        writer.finish({"checkpoint_version": 3.0, "iteration": 0})
    finally:
        writer.close()


def _megatron_rows(view: CheckpointView, tensor: MappedTensor, dtype: DType) -> TensorRows:
    pieces: list[Piece] = []
    for block in tensor.blocks:
        pieces += view.tensors[block.hf_name].pieces_of(block.hf_row, block.rows, at=block.row)
    columns, rows = tensor.columns or 1, tensor.rows
    if tensor.is_vocabulary:
        rows = view.shape.padded_vocab_size()
        pieces.append(Piece(tensor.rows, rows - tensor.rows, 0, columns, None, 0))  # zeros
    return TensorRows(dtype, rows, columns, tensor.columns is None, tuple(pieces))


def _write_tensor(writer: TorchDistWriter, tensor: MappedTensor, rows: TensorRows, num_layers: int) -> None:
    is_layer = tensor.layer is not None
    stack = (num_layers,) if is_layer else ()
    part_rows = rows.rows // tensor.parts
    for part in range(tensor.parts):
        first = part * part_rows
        box = rows.rows_between(first, part_rows)
        offsets = ((tensor.layer,) if tensor.layer is not None else ()) + ((first,) if rows.is_vector else (first, 0))
        writer.add_chunk(
            tensor.key, rows.dtype, stack + rows.shape, offsets, ((1,) if is_layer else ()) + box.shape, _payload(box)
        )


def _payload(rows: TensorRows) -> Iterator[bytearray]:
    for _, band in rows.bands():
        yield band
