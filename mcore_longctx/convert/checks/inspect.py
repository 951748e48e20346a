"""What is in a checkpoint folder, in words."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from mcore_longctx.convert.disk import io_errors
from mcore_longctx.convert.views import CheckpointView, is_training_state, open_checkpoint
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import is_torch_dist, read_torch_dist
from mcore_longctx.manifest import MANIFEST, verify_manifest
from mcore_longctx.recipe import CARD

__all__ = ["describe_folder", "inspect_folder"]


@io_errors()
def inspect_folder(folder: Path) -> dict[str, Any]:
    """Facts about a Hugging Face or torch_dist folder, as JSON values. Verifies the manifest by reading every file.

    A torch_dist folder of another program, without a card, is described as far as its own format goes.

    Raises:
        CheckpointError, ConfigError, ConversionError: as `open_checkpoint`.
    """
    if folder.is_dir() and is_torch_dist(folder) and not (folder / CARD).exists():
        return {"path": str(folder), "format": "torch_dist", **_torch_dist_facts(folder), "manifest": _manifest_state(folder)}
    view = open_checkpoint(folder)
    facts: dict[str, Any] = {
        "path": str(folder),
        "format": view.format,
        "model_type": view.config.get("model_type"),
        "parameters": view.num_parameters,
        "weight_bytes": sum(tensor.nbytes for tensor in view.tensors.values()),
        "tensors": len(view.tensors),
        "dtypes": view.dtypes,
        "sizes": view.shape.as_dict(),
        "rope": view.rope.as_dict(),
        "rope_in_words": view.rope.describe(),
        "rope_fingerprint": view.rope.fingerprint(),
        "context": view.rope.resolved_max_position_embeddings,
        "stage": view.card.stage if view.card else None,
        "iteration": view.card.iteration if view.card else None,
        "tokenizer_sha256": view.card.tokenizer_sha256 if view.card else None,
        "files": _weight_files(view),
        "left_out": list(view.dropped),
        "warnings": _warnings(view),
    }
    if view.format == "torch_dist":
        facts |= {key: value for key, value in _torch_dist_facts(folder).items() if key not in facts}
        facts["padded_vocab_size"] = view.shape.vocab_size + max((rows.rows for rows in view.padding.values()), default=0)
    return facts | {"manifest": _manifest_state(folder)}


def _torch_dist_facts(folder: Path) -> dict[str, Any]:
    saved = read_torch_dist(folder)
    weights = {key: tensor for key, tensor in saved.tensors.items() if not is_training_state(key)}
    training = {key: tensor for key, tensor in saved.tensors.items() if is_training_state(key)}
    return {
        "parameters": sum(math.prod(tensor.shape) for tensor in weights.values()),
        "weight_bytes": sum(tensor.nbytes for tensor in weights.values()),
        "tensors": len(weights),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in weights.values())),
        "chunks": sum(len(tensor.chunks) for tensor in weights.values()),
        "optimizer_bytes": sum(tensor.nbytes for tensor in training.values()),
        "objects": len(saved.objects),
        "files": len({chunk.file for tensor in saved.tensors.values() for chunk in tensor.chunks}),
        "common_state": "common.pt" if (folder / "common.pt").exists() else "inside the .distcp files",
        "keys": sorted(weights),
    }


def _weight_files(view: CheckpointView) -> int:
    return len({piece.file for tensor in view.tensors.values() for piece in tensor.pieces})


def _warnings(view: CheckpointView) -> list[str]:
    warnings = []
    if view.card is not None and view.format == "hf" and view.card.rope.fingerprint() != view.rope.fingerprint():
        warnings.append(f"config.json's rope is not the one in {CARD}: {view.card.rope.describe()}")
    if len(view.dtypes) > 1:
        warnings.append("weights of more than one dtype")
    return warnings


def _manifest_state(folder: Path) -> str:
    if not (folder / MANIFEST).exists():
        return "none"
    try:
        verify_manifest(folder, "checkpoint", "export")
    except CheckpointError as error:
        return f"BROKEN: {error}"
    return "holds"


def describe_folder(facts: dict[str, Any]) -> str:
    """The facts of `inspect_folder` as text for people."""
    dtypes = ", ".join(f"{name}" if len(facts["dtypes"]) == 1 else f"{count} x {name}" for name, count in facts["dtypes"].items())
    kind = {"hf": "Hugging Face folder", "torch_dist": "Megatron torch_dist checkpoint"}[facts["format"]]
    lines = [f"{facts['path']}: {kind}"]
    rows: list[tuple[str, str]] = []
    if "sizes" in facts:
        rows.append(("model", _model_in_words(facts)))
    rows.append(
        (
            "weights",
            f"{facts['parameters']:,} parameters, {dtypes}, {facts['weight_bytes']:,} bytes, {facts['tensors']:,} tensors",
        )
    )
    rows.append(("files", f"{facts['files']:,} with weights"))
    if facts["format"] == "torch_dist":
        rows.append(("", f"{facts['chunks']:,} chunks, {facts['objects']:,} objects, common state {facts['common_state']}"))
        rows.append(("optimizer", f"{facts['optimizer_bytes']:,} bytes" if facts["optimizer_bytes"] else "none"))
    if "rope" in facts:
        context = facts["context"]
        rows.append(("rope", facts["rope_in_words"]))
        rows.append(("context", f"{context:,} tokens" if context else "not known"))
        rows.append(("fingerprint", facts["rope_fingerprint"]))
        if facts["stage"] is not None:
            rows.append(("stage", f"{facts['stage']}, iteration {facts['iteration']:,}"))
    else:
        rows.append(("rope", f"not known: no {CARD}"))
    rows.append(("manifest", facts["manifest"]))
    if left_out := facts.get("left_out"):
        rows.append(("left out", f"{len(left_out):,} tensors (first: {left_out[0]})"))
    rows += [("warning", warning) for warning in facts.get("warnings", ())]
    return "\n".join([*lines, *(f"  {label:<12}{text}" for label, text in rows)])


def _model_in_words(facts: dict[str, Any]) -> str:
    sizes = facts["sizes"]
    vocabulary = f"vocabulary {sizes['vocab_size']:,}"
    if facts.get("padded_vocab_size", sizes["vocab_size"]) != sizes["vocab_size"]:
        vocabulary += f" (padded to {facts['padded_vocab_size']:,})"
    return (
        f"{facts['model_type']}, {sizes['num_layers']} layers, hidden {sizes['hidden_size']:,}, ffn {sizes['ffn_hidden_size']:,}, "
        f"{sizes['num_attention_heads']} heads of {sizes['kv_channels']} in {sizes['num_query_groups']} groups, {vocabulary}, "
        f"{'tied' if sizes['tie_word_embeddings'] else 'untied'} embeddings"
    )
