"""The tensors of a torch_dist folder as rows of Megatron's tensors, layer by layer, however they were keyed and sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mcore_longctx.convert.views.rows import Piece, TensorRows
from mcore_longctx.convert.views.view import check_dtype, count
from mcore_longctx.errors import CheckpointError, ConversionError
from mcore_longctx.families import MappedTensor
from mcore_longctx.formats.dcp_read import METADATA, Chunk, SavedTensor
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.formats.torch_archive import locate_payload

__all__ = ["StoredLayers"]

_LAYERS = "decoder.layers."
_HALVES = ("_w", "_v")  # gate and up under keys of their own, where metadata says singleton_local_shards
# what a name says about a model that has no table here
_REASONS = (
    ("experts", "mixture of experts is not supported"),
    ("router", "mixture of experts is not supported"),
    ("quantizer", "quantised weights are not supported; export the model before it was quantised"),
    ("_scale_inv", "quantised weights are not supported; export the model before it was quantised"),
    ("vision", "multimodal models are not supported"),
    ("language_model.", "multimodal models are not supported"),
    ("mixer.", "state-space layers are not supported"),
    ("mtp.", "multi-token prediction is not supported"),
    ("linear_q_down", "multi-latent attention is not supported"),
    ("linear_kv_down", "multi-latent attention is not supported"),
    ("adapter", "merge the adapter first"),
    ("lora", "merge the adapter first"),
    (".bias", "the model's config has no such bias"),
    ("_layernorm.", "the model's config has no such norm"),
    ("output_layer", "the model's config ties the embeddings"),
)


class StoredLayers:
    """Finds the rows of each mapped tensor.

    Three ways of keying are read: layers stacked on a leading axis (Megatron-LM), a key a layer, and a key a layer with gate and
    up apart (`linear_fc1.weight_w` and `_v`). Tensor-parallel shards are chunks; pipeline stages leave no trace.

    Args:
        folder: torch_dist folder, for messages.
        weights: key -> tensor, without optimizer state (or the masters, under the keys of the weights).
        mapped: the tensors of the model.
        num_layers: of the model.
        config: where its sizes come from, for messages.

    Raises:
        ConversionError: a weight without a place in the model, or of an element type that weights cannot have.
        CheckpointError: chunks that do not cover their tensor exactly once.
    """

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, SavedTensor],
        mapped: Iterable[MappedTensor],
        num_layers: int,
        config: Path,
    ) -> None:
        self.path = folder / METADATA
        self.weights = weights
        self.num_layers = num_layers
        self.config = config
        self.payloads: dict[tuple[str, tuple[int, ...]], int] = {}
        self.chunks_by_layer: dict[tuple[str, int], list[Chunk]] = {}
        self._check_names(list(mapped))
        for key, tensor in weights.items():
            self._index(key, tensor)

    def _check_names(self, mapped: list[MappedTensor]) -> None:
        known = {key for tensor in mapped for key in (tensor.key, tensor.layer_key)}
        known |= {
            key + half for tensor in mapped if tensor.parts == 2 for key in (tensor.key, tensor.layer_key) for half in _HALVES
        }
        if surplus := sorted(set(self.weights) - known):
            reason = next((reason for mark, reason in _REASONS if any(mark in key for key in surplus)), "")
            raise ConversionError(
                f"{count(len(surplus), 'tensor')} without a place in the model of {self.config} (first: {surplus[0][:200]})",
                where=self.path.parent,
                fix=reason or "use the config.json of this model",
            )

    def _index(self, key: str, tensor: SavedTensor) -> None:
        check_dtype(tensor.dtype, f"{self.path}: {key}")
        if not tensor.is_covered_once():
            raise CheckpointError(
                f"chunks of {key} do not cover its shape {list(tensor.shape)} exactly once",
                where=self.path,
                fix="use another copy of the checkpoint",
            )
        if not key.startswith(_LAYERS) or len(tensor.shape) < 2 or tensor.shape[0] != self.num_layers:
            return
        for chunk in tensor.chunks:
            for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                self.chunks_by_layer.setdefault((key, layer), []).append(chunk)

    def rows(self, tensor: MappedTensor) -> TensorRows:
        """The tensor's rows as stored, vocabulary padding included.

        Raises:
            ConversionError: missing, or of another shape than the config says.
            CheckpointError: an item that is damaged.
        """
        for key in dict.fromkeys((tensor.key, tensor.layer_key)):
            stacked = tensor.layer is not None and key == tensor.key
            if key in self.weights:
                return self._stored(tensor, key, tensor.rows, stacked=stacked)
            if tensor.parts == 2 and all(key + half in self.weights for half in _HALVES):
                gate, up = (self._stored(tensor, key + half, tensor.rows // 2, stacked=stacked) for half in _HALVES)
                if gate.dtype != up.dtype:
                    raise ConversionError(f"{key}_w and {key}_v have different element types", where=self.path)
                pieces = (*gate.pieces, *up.pieces_of(0, up.rows, at=gate.rows))
                return TensorRows(gate.dtype, gate.rows + up.rows, gate.columns, gate.is_vector, pieces)
        raise ConversionError(
            f"tensor {tensor.layer_key} is missing", where=self.path, fix="use a complete checkpoint of this model"
        )

    def _stored(self, tensor: MappedTensor, key: str, rows: int, *, stacked: bool) -> TensorRows:
        saved = self.weights[key]
        body = saved.shape[1:] if stacked else saved.shape
        wanted = (rows,) if tensor.columns is None else (rows, tensor.columns)
        fits = len(body) == len(wanted) and body[1:] == wanted[1:] and (not stacked or saved.shape[0] == self.num_layers)
        if not fits or (body[0] < rows if tensor.is_vocabulary else body[0] != rows):
            layers = [self.num_layers] if stacked else []
            raise ConversionError(
                f"{key} has shape {list(saved.shape)}, {self.config} implies {[*layers, *wanted]}", where=self.path
            )
        layer = tensor.layer if stacked else None
        chunks = saved.chunks if layer is None else self.chunks_by_layer.get((key, layer), ())
        is_vector = tensor.columns is None
        pieces = tuple(self._piece(key, saved.dtype, chunk, layer, is_vector=is_vector) for chunk in chunks)
        return TensorRows(saved.dtype, body[0], tensor.columns or 1, is_vector, pieces)

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
