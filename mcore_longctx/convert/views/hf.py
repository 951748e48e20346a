"""A Hugging Face folder as rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mcore_longctx.convert.views.rows import TensorRows
from mcore_longctx.convert.views.view import CONFIG, CheckpointView, check_dtype, count
from mcore_longctx.errors import CheckpointError, ConversionError
from mcore_longctx.families import ModelShape, hf_shapes, model_tensors, read_shape
from mcore_longctx.formats.safetensors_io import INDEX, SINGLE, StoredTensor, read_folder, read_json
from mcore_longctx.formats.torch_bin import is_bin_folder, read_bin_folder
from mcore_longctx.reading import is_there
from mcore_longctx.recipe import CARD, read_card
from mcore_longctx.rope import read_hf_rope

__all__ = ["open_hf"]


def open_hf(folder: Path) -> CheckpointView:
    """Open a Hugging Face folder of a model of a known family. Raises as `open_checkpoint`."""
    if not folder.is_dir():
        what = "is a file, expected a folder" if folder.exists() else "no such folder"
        raise CheckpointError(what, where=folder, fix="download the model first and give its folder")
    config = read_json(folder / CONFIG)
    shape = read_shape(config, where=folder / CONFIG)
    rope = read_hf_rope(config, where=folder / CONFIG)
    stored = read_bin_folder(folder) if _is_bin(folder) else read_folder(folder)
    expected = hf_shapes(model_tensors(shape))
    dropped = _derived_tensors(stored, shape)
    _check_names(set(stored) - set(dropped), set(expected), folder, shape.family)
    tensors = {}
    for name, wanted in expected.items():
        tensor = stored[name]
        if tensor.shape != wanted:
            raise ConversionError(f"shape {list(tensor.shape)}, {CONFIG} implies {list(wanted)}", where=f"{folder}: {name}")
        check_dtype(tensor.dtype, f"{folder}: {name}")
        tensors[name] = TensorRows.stored(tensor.dtype, tensor.shape, tensor.file, tensor.offset)
    card = read_card(folder) if is_there(folder / CARD) else None
    return CheckpointView(folder, "hf", config, shape, rope, tensors, card, dropped=tuple(dropped))


def _is_bin(folder: Path) -> bool:
    """Whether only `.bin` files are there; where both are, safetensors count, as for transformers."""
    return is_bin_folder(folder) and not is_there(folder / SINGLE) and not is_there(folder / INDEX)


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


def _check_names(found: set[str], expected: set[str], folder: Path, family: str) -> None:
    if missing := sorted(expected - found):
        raise ConversionError(
            f"{count(len(missing), 'tensor')} missing (first: {missing[0]})",
            where=folder,
            fix=f"use a complete copy, or mend {CONFIG}",
        )
    if surplus := sorted(found - expected):
        raise ConversionError(
            f"{count(len(surplus), 'tensor')} without a place in a {family} of this {CONFIG} (first: {surplus[0][:200]})",
            where=folder,
            fix="biases that the family has not, experts, adapters and other heads are not supported",
        )
