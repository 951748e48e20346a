"""Where every byte of a torch_dist checkpoint will stand.

A tensor is saved in chunks, each an item of its own (a torch.save archive). Megatron's loader reads whole items, so the chunks
are what one rank of the chosen tensor-parallel size owns: that rank then reads no byte for nothing. Any other size loads too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.plans.plan import Blend, Fill, TargetFile, first_rows
from mcore_longctx.convert.views import TensorRows
from mcore_longctx.errors import ConfigError, ConversionError
from mcore_longctx.families import MappedTensor, ModelShape, extra_state_keys, model_tensors
from mcore_longctx.formats.dcp_write import StoredItem, write_description
from mcore_longctx.formats.dtypes import DType
from mcore_longctx.formats.torch_archive import object_item, tensor_frame

__all__ = ["TorchDistLayout", "padded_vocab_size", "plan_torch_dist"]

FILE_BYTES = 4 << 30  # a new .distcp file is begun after this many bytes
MOST_VOCAB_MULTIPLE = 1 << 20  # more rows than any vocabulary has
NO_STATE = [None]  # the object that megatron-core stores for a module without extra state


@dataclass(frozen=True)
class TorchDistLayout:
    """The weight files of a torch_dist folder.

    Attributes:
        files: `__0_0.distcp` and so on.
        fills: where rows of the sources go.
        tensors: Megatron's name -> element type and global shape.
        items: every chunk and object in the order of the files.
    """

    files: tuple[TargetFile, ...]
    fills: tuple[Fill, ...]
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]]
    items: tuple[StoredItem, ...]

    def small(self) -> Iterator[tuple[int, int, bytes]]:
        """(file, offset, bytes) of the frames around the chunks and of the objects."""
        number = {file.name: index for index, file in enumerate(self.files)}
        frames = _Frames()
        for item in self.items:
            file = number[item.file]
            if item.box is None:
                yield file, item.offset, frames.empty_object
                continue
            head, tail = frames.around(self.tensors[item.key][0], item.box[1])
            yield file, item.offset, head
            yield file, item.offset + item.length - len(tail), tail

    def describe(self, folder: Path) -> None:
        """Write `common.pt`, `.metadata` and `metadata.json` for the finished weight files in `folder`."""
        write_description(folder, self.tensors, self.items, {"checkpoint_version": 3.0, "iteration": 0})


class _Frames:
    """Chunks have few different shapes: one frame each."""

    def __init__(self) -> None:
        self.empty_object = object_item(NO_STATE)
        self._known: dict[tuple[DType, tuple[int, ...]], tuple[bytes, bytes]] = {}

    def around(self, dtype: DType, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
        if (dtype, sizes) not in self._known:
            self._known[dtype, sizes] = tensor_frame(dtype, sizes)
        return self._known[dtype, sizes]


def padded_vocab_size(shape: ModelShape, multiple: int, chunks_for_tp: int) -> int:
    """Rows of the embedding as Megatron pads it: the next multiple of `multiple` x TP (make_vocab_size_divisible_by).

    Raises:
        ConfigError: a multiple or a size that is not positive, or a multiple beyond any vocabulary.
    """
    if not 1 <= multiple <= MOST_VOCAB_MULTIPLE:
        raise ConfigError(
            f"a vocabulary multiple of {multiple:,}; expected 1 to {MOST_VOCAB_MULTIPLE:,}", where="--vocab-multiple"
        )
    if chunks_for_tp < 1:
        raise ConfigError(f"chunks for {chunks_for_tp} tensor-parallel ranks; expected 1 or more", where="--chunks-for-tp")
    step = multiple * chunks_for_tp
    return -(-shape.vocab_size // step) * step


def plan_torch_dist(
    shape: ModelShape,
    tensors: Mapping[str, TensorRows | Blend],
    *,
    dtype: DType | None,
    chunks_for_tp: int,
    stacked: bool,
    vocab_rows: int,
    where: object,
) -> TorchDistLayout:
    """Lay out every tensor of a model, from headers alone.

    Args:
        shape: the model.
        tensors: Hugging Face name -> rows.
        dtype: of everything that is written; None: each tensor keeps its own.
        chunks_for_tp: tensor-parallel size whose ranks find a chunk each (1: one chunk a tensor and layer, gate and up apart).
        stacked: one tensor over all layers (Megatron-LM's default), else one a layer.
        vocab_rows: rows of the embedding and the head; those beyond the vocabulary are zero (nothing writes them).
        where: the source, for messages.

    Raises:
        LayoutError: the heads or the feed-forward size do not divide by `chunks_for_tp`.
        ConversionError: tensors that are stacked into one have different element types.
    """
    shape.check_layout(chunks_for_tp, 1, where=where)
    layout = _Layout(shape.num_layers, tensors, dtype, chunks_for_tp, stacked=stacked)
    for tensor in model_tensors(shape):
        layout.add_tensor(tensor, vocab_rows if tensor.is_vocabulary else tensor.rows, where)
    for key in extra_state_keys(shape.num_layers, stacked=stacked):
        layout.add_empty_object(key)
    return layout.finished()


class _Layout:
    """Puts item after item."""

    def __init__(
        self,
        num_layers: int,
        sources: Mapping[str, TensorRows | Blend],
        dtype: DType | None,
        chunks_for_tp: int,
        *,
        stacked: bool,
    ) -> None:
        self.num_layers, self.sources, self.dtype = num_layers, sources, dtype
        self.chunks_for_tp, self.stacked = chunks_for_tp, stacked
        self.sizes: list[int] = [0]  # of the files
        self.fills: list[Fill] = []
        self.tensors: dict[str, tuple[DType, tuple[int, ...]]] = {}
        self.items: list[StoredItem] = []
        self.frames = _Frames()

    def add_tensor(self, tensor: MappedTensor, rows: int, where: object) -> None:
        """Add one layer of a tensor (or one without layers), `rows` of them with padding."""
        key = tensor.key if self.stacked else tensor.layer_key
        in_stack = self.stacked and tensor.layer is not None
        dtype = self._dtype(key, tensor, where)
        shape = (rows,) if tensor.columns is None else (rows, tensor.columns)
        self.tensors[key] = (dtype, (self.num_layers, *shape) if in_stack else shape)
        for first, count, column, columns in _chunks(tensor, rows, self.chunks_for_tp):
            offsets, sizes = ((first,), (count,)) if tensor.columns is None else ((first, column), (count, columns))
            if in_stack:
                assert tensor.layer is not None
                offsets, sizes = (tensor.layer, *offsets), (1, *sizes)
            elements = self._place(key, dtype, offsets, sizes)
            for block in tensor.blocks:
                begin, end = max(first, block.row), min(first + count, block.row + block.rows)
                if begin < end:
                    at = elements + (begin - first) * columns * dtype.itemsize
                    source, row = self.sources[block.hf_name], block.hf_row + begin - block.row
                    fill = Fill(len(self.sizes) - 1, at, source, row, end - begin, column, columns, dtype, block.hf_name)
                    self.fills.append(fill)

    def _dtype(self, key: str, tensor: MappedTensor, where: object) -> DType:
        if self.dtype is not None:
            return self.dtype
        found = [(block.hf_name, first_rows(self.sources[block.hf_name]).dtype) for block in tensor.blocks]
        dtype = self.tensors[key][0] if key in self.tensors else found[0][1]
        for name, own in found:
            if own != dtype:
                raise ConversionError(
                    f"dtype {own.name}, but its neighbours in {key} have {dtype.name}",
                    where=f"{where}: {name}",
                    fix="choose one with --dtype",
                )
        return dtype

    def _place(self, key: str, dtype: DType, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> int:
        """Add the item of a chunk; where its elements begin."""
        head, tail = self.frames.around(dtype, sizes)
        size = math.prod(sizes) * dtype.itemsize
        return self._add(key, (offsets, sizes), len(head) + size + len(tail)) + len(head)

    def add_empty_object(self, key: str) -> None:
        """Add the object of a module without extra state."""
        self._add(key, None, len(self.frames.empty_object))

    def _add(self, key: str, box: tuple[tuple[int, ...], tuple[int, ...]] | None, length: int) -> int:
        if self.sizes[-1] >= FILE_BYTES:
            self.sizes.append(0)
        offset = self.sizes[-1]
        self.items.append(StoredItem(key, box, _file_name(len(self.sizes) - 1), offset, length))
        self.sizes[-1] += length
        return offset

    def finished(self) -> TorchDistLayout:
        files = tuple(TargetFile(_file_name(number), size) for number, size in enumerate(self.sizes))
        return TorchDistLayout(files, tuple(self.fills), self.tensors, tuple(self.items))


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"


def _chunks(tensor: MappedTensor, rows: int, tp: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, columns) of each chunk: gate and up apart, each cut for every rank."""
    row_cuts = tensor.parts * (tp if tensor.tp == 0 else 1)
    column_cuts = tp if tensor.tp == 1 else 1
    width = tensor.columns or 1
    for row in range(row_cuts):
        for column in range(column_cuts):
            yield row * (rows // row_cuts), rows // row_cuts, column * (width // column_cuts), width // column_cuts
