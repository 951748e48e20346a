"""A torch_dist folder as rows of Hugging Face tensors, layers stacked or one by one, at any TP and PP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mcore_longctx.convert.views.rows import Piece, TensorRows
from mcore_longctx.convert.views.view import CONFIG, HF_FOLDER, CheckpointView, check_dtype, count
from mcore_longctx.errors import CheckpointError, ConversionError
from mcore_longctx.families import MappedTensor, hf_shapes, model_tensors, read_shape
from mcore_longctx.formats.dcp_read import METADATA, Chunk, SavedTensor, read_torch_dist
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.formats.safetensors_io import read_json
from mcore_longctx.formats.torch_archive import locate_payload
from mcore_longctx.recipe import CARD, read_card

__all__ = ["is_training_state", "open_torch_dist"]


def is_training_state(key: str) -> bool:
    """Whether a tensor of a torch_dist folder belongs to the optimizer, not to the model."""
    return key.startswith(("optimizer.", "chained_"))


def open_torch_dist(folder: Path) -> CheckpointView:
    """Open a torch_dist folder that carries its card and `hf/config.json`. Raises as `open_checkpoint`."""
    card = read_card(folder)
    config_path = folder / HF_FOLDER / CONFIG
    config = read_json(config_path)
    shape = read_shape(config, where=config_path)
    if shape != card.shape:
        raise CheckpointError(f"sizes differ from those in {CARD}", where=config_path, fix="use another copy of the checkpoint")
    saved = read_torch_dist(folder).tensors
    mapped = model_tensors(shape)
    stored = _StoredLayers(folder, saved, mapped, shape.num_layers)
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, DType] = {}
    padding = {}
    for tensor in mapped:
        rows = stored.rows(tensor)
        for block in tensor.blocks:
            pieces.setdefault(block.hf_name, []).extend(rows.pieces_of(block.row, block.rows, at=block.hf_row))
            dtypes[block.hf_name] = rows.dtype
        if rows.rows > tensor.rows:
            surplus = rows.rows - tensor.rows
            moved = tuple(rows.pieces_of(tensor.rows, surplus, at=0))
            padding[tensor.key] = TensorRows(rows.dtype, surplus, rows.columns, False, moved)
    tensors = {
        name: TensorRows(dtypes[name], wanted[0], wanted[1] if len(wanted) == 2 else 1, len(wanted) == 1, tuple(pieces[name]))
        for name, wanted in hf_shapes(mapped).items()
    }
    dropped = tuple(key for key in saved if is_training_state(key))
    return CheckpointView(folder, "torch_dist", config, shape, card.rope, tensors, card, padding, dropped)


class _StoredLayers:
    """Finds the rows of each mapped tensor in a torch_dist folder, layers stacked or one by one."""

    def __init__(self, folder: Path, saved: Mapping[str, SavedTensor], mapped: Iterable[MappedTensor], num_layers: int) -> None:
        self.path = folder / METADATA
        self.saved = saved
        self.num_layers = num_layers
        self.payloads: dict[tuple[str, tuple[int, ...]], int] = {}
        self.chunks_by_layer: dict[tuple[str, int], list[Chunk]] = {}
        mapped = list(mapped)
        weights = {key for key in saved if not is_training_state(key)}
        known = {tensor.key for tensor in mapped} | {tensor.layer_key for tensor in mapped}
        if surplus := sorted(weights - known):
            raise ConversionError(
                f"{count(len(surplus), 'tensor')} without a place in a Llama of hf/{CONFIG} (first: {surplus[0][:200]})",
                where=folder,
            )
        for key in weights:
            self._index(key, saved[key])

    def _index(self, key: str, tensor: SavedTensor) -> None:
        if not tensor.is_covered_once():
            raise CheckpointError(
                f"chunks of {key} do not cover its shape {list(tensor.shape)} exactly once",
                where=self.path,
                fix="use another copy of the checkpoint",
            )
        check_dtype(tensor.dtype, f"{self.path}: {key}")
        for chunk in tensor.chunks:
            layers = range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if chunk.offsets else ()
            for layer in layers if len(chunk.offsets) > 1 and key.startswith("decoder.layers.") else ():
                self.chunks_by_layer.setdefault((key, layer), []).append(chunk)

    def rows(self, tensor: MappedTensor) -> TensorRows:
        """The tensor's rows as stored, vocabulary padding included.

        Raises:
            CheckpointError: missing, or of another shape than the config says.
        """
        stacked = tensor.layer is not None and tensor.key in self.saved
        key = tensor.key if stacked else tensor.layer_key
        if key not in self.saved:
            raise ConversionError(f"tensor {key} is missing", where=self.path, fix="use a complete checkpoint of this model")
        saved = self.saved[key]
        body = saved.shape[1:] if stacked else saved.shape
        wanted = (tensor.rows,) if tensor.columns is None else (tensor.rows, tensor.columns)
        fits = len(body) == len(wanted) and body[1:] == wanted[1:] and (not stacked or saved.shape[0] == self.num_layers)
        if not fits or (body[0] < wanted[0] if tensor.is_vocabulary else body[0] != wanted[0]):
            layers = [self.num_layers] if stacked else []
            raise ConversionError(
                f"{key} has shape {list(saved.shape)}, hf/{CONFIG} implies {[*layers, *wanted]}", where=self.path
            )
        columns = 1 if tensor.columns is None else tensor.columns
        chunks = self.chunks_by_layer.get((key, tensor.layer), ()) if stacked and tensor.layer is not None else saved.chunks
        layer = tensor.layer if stacked else None
        pieces = tuple(self._piece(key, saved.dtype, chunk, layer, is_vector=tensor.columns is None) for chunk in chunks)
        return TensorRows(saved.dtype, body[0], columns, tensor.columns is None, pieces)

    def _piece(self, key: str, dtype: DType, chunk: Chunk, layer: int | None, *, is_vector: bool) -> Piece:
        skipped = 0 if layer is None else layer - chunk.offsets[0]
        offsets, sizes = (chunk.offsets, chunk.sizes) if layer is None else (chunk.offsets[1:], chunk.sizes[1:])
        rows, columns = (sizes[0], 1) if is_vector else (sizes[0], sizes[1])
        payload = self._payload(key, dtype, chunk) + skipped * rows * columns * dtype.itemsize
        return Piece(offsets[0], rows, 0 if is_vector else offsets[1], columns, chunk.file, payload)

    def _payload(self, key: str, dtype: DType, chunk: Chunk) -> int:
        place = (key, chunk.offsets)
        if place not in self.payloads:
            self.payloads[place] = locate_payload(chunk.file, chunk.offset, chunk.length, dtype, chunk.sizes, tensor=key)
        return self.payloads[place]
