"""Where every byte of the weights of a Hugging Face folder will stand: safetensors files and their index."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.plans.plan import Blend, Fill, Scales, TargetFile, first_rows
from mcore_longctx.convert.views import TensorRows
from mcore_longctx.formats.dtypes import BY_TORCH, DType
from mcore_longctx.formats.safetensors_io import INDEX, SINGLE, header_bytes, index_text, plan_shards

__all__ = ["HfLayout", "plan_hf", "scale_name"]

_FP8, _FLOAT32 = BY_TORCH["float8_e4m3fn"], BY_TORCH["float32"]

Entries = Mapping[str, tuple[DType, tuple[int, ...]]]


@dataclass(frozen=True)
class HfLayout:
    """The weight files of a Hugging Face folder.

    Attributes:
        files: the shards.
        fills: where rows of the sources go.
        shards: for each file its tensors in the order of their bytes: name -> element type and shape.
    """

    files: tuple[TargetFile, ...]
    fills: tuple[Fill, ...]
    shards: Sequence[Entries]

    def small(self) -> Iterator[tuple[int, int, bytes]]:
        """(file, offset, bytes) of the headers."""
        for number, entries in enumerate(self.shards):
            yield number, 0, header_bytes(entries)

    def describe(self, folder: Path) -> None:
        """Write the index, if there are several files or one that is not `model.safetensors`."""
        names = {file.name: list(entries) for file, entries in zip(self.files, self.shards, strict=True)}
        if list(names) != [SINGLE]:
            headers = sum(len(header_bytes(entries)) for entries in self.shards)
            total = sum(file.bytes for file in self.files) - headers
            (folder / INDEX).write_text(index_text(names, total), encoding="utf-8")


def scale_name(name: str) -> str:
    """Where compressed-tensors looks for the scales [rows, 1] of a quantised weight."""
    return f"{name}_scale"


def plan_hf(
    tensors: Mapping[str, TensorRows | Blend],
    *,
    dtype: DType | None,
    shard_bytes: int | Mapping[str, Sequence[str]],
    quantized: Container[str] = (),
) -> HfLayout:
    """Lay out the files of a model, from headers alone.

    Args:
        tensors: Hugging Face name -> rows, in the order in which they are to stand.
        dtype: of everything that is written and not quantised; None: each tensor keeps its own.
        shard_bytes: a file holds at most this many bytes of tensors (a larger tensor stands alone); or which tensors go into
            which file.
        quantized: names of matrices that become float8_e4m3fn with a scale a row, `scale_name(name)` [rows, 1] float32.
    """
    entries: dict[str, dict[str, tuple[DType, tuple[int, ...]]]] = {}
    for name, source in tensors.items():
        rows = first_rows(source)
        if name in quantized:
            entries[name] = {name: (_FP8, rows.shape), scale_name(name): (_FLOAT32, (rows.rows, 1))}
        else:
            entries[name] = {name: (dtype or rows.dtype, rows.shape)}
    if isinstance(shard_bytes, int):
        groups: Mapping[str, Sequence[str]] = plan_shards(
            {name: sum(_bytes(*entry) for entry in parts.values()) for name, parts in entries.items()}, shard_bytes
        )
    else:
        groups = shard_bytes
    files, fills, shards = [], [], []
    for number, (file, names) in enumerate(groups.items()):
        shard = _aligned({part: entry for name in names for part, entry in entries[name].items()})
        places, size = _places(shard)
        files.append(TargetFile(file, size))
        shards.append(shard)
        for name in (name for name in shard if name in tensors):
            rows = first_rows(tensors[name])
            scales = Scales(number, places[scale_name(name)]) if name in quantized else None
            box = (0, rows.rows, 0, rows.columns)
            fills.append(Fill(number, places[name], tensors[name], *box, shard[name][0], name, scales))
    return HfLayout(tuple(files), tuple(fills), shards)


def _bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for count in shape:
        size *= count
    return size


def _aligned(entries: Entries) -> Entries:
    """Wide elements first, so that every tensor begins at a multiple of its element size; readers that map files need it."""
    return dict(sorted(entries.items(), key=lambda item: -item[1][0].itemsize))  # keeps the order among equals


def _places(entries: Entries) -> tuple[dict[str, int], int]:
    """Where each tensor begins in the file, and the size of the file."""
    places = {}
    position = len(header_bytes(entries))
    for name, entry in entries.items():
        places[name] = position
        position += _bytes(*entry)
    return places, position
