"""A checkpoint of either format as Hugging Face names and rows, so that import, export and verify read both alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mcore_longctx.convert.dcp_read import METADATA, Chunk, SavedTensor, is_torch_dist, read_torch_dist
from mcore_longctx.convert.dtypes import WEIGHT_DTYPES, DType
from mcore_longctx.convert.families import MappedTensor, hf_shapes, llama_tensors
from mcore_longctx.convert.safetensors_io import StoredTensor, read_folder, read_json
from mcore_longctx.convert.tensor_rows import Piece, TensorRows
from mcore_longctx.convert.torch_archive import locate_payload
from mcore_longctx.errors import CheckpointError, ConversionError
from mcore_longctx.recipe import CARD, CheckpointCard, ModelShape, read_card
from mcore_longctx.rope import RopeScaling, read_hf_rope

__all__ = ["CONFIG", "HF_FOLDER", "CheckpointView", "is_training_state", "open_checkpoint", "open_hf", "open_torch_dist"]

HF_FOLDER = "hf"  # inside a torch_dist folder: config.json and tokenizer files of the model
CONFIG = "config.json"


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint as it would be in Hugging Face form. No tensor data is read before it is asked for.

    Attributes:
        folder: where it lies.
        format: `hf` or `torch_dist`.
        config: its `config.json`; for torch_dist that of the model it was imported from, whose rope may be older than `rope`.
        shape: sizes of the model.
        rope: the rope that belongs to the weights.
        tensors: Hugging Face name -> rows, without vocabulary padding and without a tied `lm_head.weight`.
        card: `mcore_longctx.json`, if there is one.
        padding: Megatron key -> rows of vocabulary padding (torch_dist only).
        dropped: stored names that are knowingly left out: values that follow from others, optimizer state.
    """

    folder: Path
    format: Literal["hf", "torch_dist"]
    config: Mapping[str, Any]
    shape: ModelShape
    rope: RopeScaling
    tensors: Mapping[str, TensorRows]
    card: CheckpointCard | None = None
    padding: Mapping[str, TensorRows] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied matrix counts once."""
        return sum(tensor.rows * tensor.columns for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Element type -> how many tensors have it."""
        return dict(Counter(tensor.dtype.name for tensor in self.tensors.values()))


def open_checkpoint(folder: Path) -> CheckpointView:
    """Open a Hugging Face or a torch_dist folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: its config.json asks for something that is not supported.
        ConversionError: it holds other tensors than its config.json says.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=folder, fix="check the path")
    if is_torch_dist(folder):
        return open_torch_dist(folder)
    if (folder / CONFIG).exists():
        return open_hf(folder)
    raise CheckpointError(f"neither {CONFIG} nor {METADATA}: not a checkpoint", where=folder, fix="check the path")


# ------------------------------------------------------------------------------------------------------ Hugging Face
def open_hf(folder: Path) -> CheckpointView:
    """Open a Hugging Face folder of a Llama. Raises as `open_checkpoint`."""
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=folder, fix="download the model first and give its folder")
    config = read_json(folder / CONFIG)
    shape = ModelShape.from_hf_config(config, where=folder / CONFIG)
    rope = read_hf_rope(config, where=folder / CONFIG)
    stored = read_folder(folder)
    expected = hf_shapes(llama_tensors(shape))
    dropped = _derived_tensors(stored, shape)
    _check_names(set(stored) - set(dropped), set(expected), folder)
    tensors = {}
    for name, wanted in expected.items():
        tensor = stored[name]
        if tensor.shape != wanted:
            raise ConversionError(f"shape {list(tensor.shape)}, {CONFIG} implies {list(wanted)}", where=f"{folder}: {name}")
        _check_dtype(tensor.dtype, f"{folder}: {name}")
        tensors[name] = TensorRows.stored(tensor.dtype, tensor.shape, tensor.file, tensor.offset)
    card = read_card(folder) if (folder / CARD).exists() else None
    return CheckpointView(folder, "hf", config, shape, rope, tensors, card, dropped=tuple(dropped))


def _derived_tensors(stored: Mapping[str, StoredTensor], shape: ModelShape) -> list[str]:
    """Stored tensors that follow from others: rotary frequencies of old files, and the head of a tied model.

    Raises:
        ConversionError: the head of a model that is said to be tied differs from its embedding.
    """
    derived = [name for name in stored if name.endswith("self_attn.rotary_emb.inv_freq")]
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if shape.tie_word_embeddings and head is not None and embedding is not None:
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and len(head.shape) == 2
        if not same or not _equal_bytes(head, embedding):
            raise ConversionError(
                f"differs from model.embed_tokens.weight, but {CONFIG} says tie_word_embeddings",
                where=f"{head.file}: lm_head.weight",
                fix="set tie_word_embeddings to false if the model has a head of its own",
            )
        derived.append("lm_head.weight")
    return derived


def _equal_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    rows, others = (TensorRows.stored(tensor.dtype, tensor.shape, tensor.file, tensor.offset) for tensor in (first, second))
    return all(band == other for (_, band), (_, other) in zip(rows.bands(), others.bands(), strict=True))


def _check_names(found: set[str], expected: set[str], folder: Path) -> None:
    if missing := sorted(expected - found):
        raise ConversionError(
            f"{_count(len(missing), 'tensor')} missing (first: {missing[0]})",
            where=folder,
            fix=f"use a complete copy, or mend {CONFIG}",
        )
    if surplus := sorted(found - expected):
        raise ConversionError(
            f"{_count(len(surplus), 'tensor')} without a place in a Llama of this {CONFIG} (first: {surplus[0][:200]})",
            where=folder,
            fix="biases, experts, adapters and other heads are not supported",
        )


def _check_dtype(dtype: DType, where: str) -> None:
    if dtype.name not in WEIGHT_DTYPES:
        raise ConversionError(
            f"dtype {dtype.name}: quantised or integer weights cannot be converted", where=where, fix="use the bf16 model"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# --------------------------------------------------------------------------------------------------------- torch_dist
def is_training_state(key: str) -> bool:
    """Whether a tensor of a torch_dist folder belongs to the optimizer, not to the model."""
    return key.startswith(("optimizer.", "chained_"))


def open_torch_dist(folder: Path) -> CheckpointView:
    """Open a torch_dist folder that carries its card and `hf/config.json`. Raises as `open_checkpoint`."""
    card = read_card(folder)
    config_path = folder / HF_FOLDER / CONFIG
    config = read_json(config_path)
    shape = ModelShape.from_hf_config(config, where=config_path)
    if shape != card.shape:
        raise CheckpointError(f"sizes differ from those in {CARD}", where=config_path, fix="use another copy of the checkpoint")
    saved = read_torch_dist(folder).tensors
    mapped = llama_tensors(shape)
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
                f"{_count(len(surplus), 'tensor')} without a place in a Llama of hf/{CONFIG} (first: {surplus[0][:200]})",
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
        _check_dtype(tensor.dtype, f"{self.path}: {key}")
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
