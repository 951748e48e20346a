"""A checkpoint of either format as Hugging Face names and rows, so that import, export and verify read both alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mcore_longctx.convert.views.rows import TensorRows
from mcore_longctx.errors import ConversionError
from mcore_longctx.families import ModelShape
from mcore_longctx.formats.dtypes import WEIGHT_DTYPES, DType
from mcore_longctx.recipe import CheckpointCard
from mcore_longctx.rope import RopeScaling

__all__ = ["CONFIG", "HF_FOLDER", "CheckpointView", "check_dtype", "count", "nonzero_padding"]

HF_FOLDER = "hf"  # inside a torch_dist folder: config.json and tokenizer files of the model
CONFIG = "config.json"


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint as it would be in Hugging Face form. No tensor data is read before it is asked for.

    Attributes:
        folder: where it really lies, for a path that stood for the folder around it.
        format: `hf` or `torch_dist`.
        config: its `config.json`; for torch_dist that of the model it was imported from, whose rope may be older than `rope`.
        shape: sizes of the model.
        rope: the rope that belongs to the weights.
        tensors: Hugging Face name -> rows, without vocabulary padding and without a tied `lm_head.weight`.
        card: `mcore_longctx.json`, if there is one.
        padding: Megatron key -> rows of vocabulary padding (torch_dist only).
        dropped: stored names that are knowingly left out: values that follow from others, optimizer state.
        settings_folder: where config.json and the tokenizer files lie; None stands for `folder`.
        notes: what could not be checked, in words for the user.
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
    settings_folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied matrix counts once."""
        return sum(tensor.rows * tensor.columns for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Element type -> how many tensors have it."""
        return dict(Counter(tensor.dtype.name for tensor in self.tensors.values()))


def nonzero_padding(view: CheckpointView) -> list[str]:
    """Megatron keys whose vocabulary padding is not zero, as training leaves it: an export drops these rows. Reads them."""
    return [key for key, rows in view.padding.items() if any(any(band) for _, band in rows.bands())]


def check_dtype(dtype: DType, where: str) -> None:
    """Raise ConversionError unless this is an element type of unquantised weights."""
    if dtype.name not in WEIGHT_DTYPES:
        raise ConversionError(
            f"dtype {dtype.name}: quantised or integer weights cannot be converted", where=where, fix="use the bf16 model"
        )


def count(number: int, noun: str) -> str:
    """`1 tensor`, `2,403 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
