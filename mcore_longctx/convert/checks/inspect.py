"""What is in a checkpoint folder, in words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.convert.checks.quantised import is_quantised, open_quantised
from mcore_longctx.convert.disk import io_errors
from mcore_longctx.convert.views import CheckpointView, is_training_state, locate_checkpoint, open_checkpoint
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.formats.common_state import COMMON, read_common_state
from mcore_longctx.formats.dcp_read import TorchDist, is_torch_dist, read_torch_dist
from mcore_longctx.manifest import MANIFEST, verify_manifest
from mcore_longctx.recipe import CARD
from mcore_longctx.rope import merge_hf_rope, misreadings

__all__ = ["describe_folder", "inspect_folder"]

# what Megatron-LM's own flags tell about a model, where nothing else does
_ARGUMENTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "padded_vocab_size",
    "max_position_embeddings", "seq_length", "position_embedding_type", "rotary_base", "rotary_percent",
    "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor", "untie_embeddings_and_output_weights",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "normalization", "norm_epsilon", "swiglu", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "context_parallel_size",
)  # fmt: skip
_Row = tuple[str, tuple[int, ...], str]  # name, shape, dtype


@io_errors()
def inspect_folder(path: Path) -> dict[str, Any]:
    """Facts about a Hugging Face or torch_dist folder, as JSON values. Verifies the manifest by reading every file with a hash.

    A torch_dist folder of another program, without a card, is described as far as its own format goes, with the flags that
    Megatron-LM left in it. Of the folder around `iter_*` folders, the newest is described.

    Raises:
        CheckpointError, ConfigError, ConversionError: as `open_checkpoint`.
    """
    folder = locate_checkpoint(path)
    if is_torch_dist(folder) and not (folder / CARD).exists():
        return _located(path, folder) | {"format": "torch_dist"} | _foreign_facts(folder) | {"manifest": _manifest_state(folder)}
    view = open_quantised(folder)[0] if is_quantised(folder) else open_checkpoint(folder)
    facts: dict[str, Any] = {
        **_located(path, folder),
        "format": view.format,
        "model_type": view.config.get("model_type"),
        "parameters": view.num_parameters,
        "weight_bytes": sum(tensor.nbytes for tensor in view.tensors.values()),
        "tensors": len(view.tensors),
        "dtypes": view.dtypes,
        "table": _folded((name, rows.shape, rows.dtype.name) for name, rows in view.tensors.items()),
        "sizes": view.shape.as_dict(),
        "rope": view.rope.as_dict(),
        "rope_in_words": view.rope.describe(),
        "rope_fingerprint": view.rope.fingerprint(),
        "rope_readers": _readers(view),
        "context": view.rope.resolved_max_position_embeddings,
        "stage": view.card.stage if view.card else None,
        "iteration": view.card.iteration if view.card else None,
        "tokenizer_sha256": view.card.tokenizer_sha256 if view.card else None,
        "files": _weight_files(view),
        "left_out": list(view.dropped),
        "warnings": _warnings(view),
    }
    if view.format == "torch_dist":
        stored = _torch_dist_facts(folder, read_torch_dist(folder))
        facts |= {key: value for key, value in stored.items() if key not in facts or key == "table"}
        facts["padded_vocab_size"] = view.shape.vocab_size + max((rows.rows for rows in view.padding.values()), default=0)
    return facts | {"manifest": _manifest_state(folder)}


def _located(path: Path, folder: Path) -> dict[str, Any]:
    return {"path": str(folder)} if folder == path else {"path": str(folder), "newest_in": str(path)}


def _foreign_facts(folder: Path) -> dict[str, Any]:
    saved = read_torch_dist(folder)
    common = read_common_state(folder, saved) or {}
    arguments = common.get("args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    return {
        **_torch_dist_facts(folder, saved),
        "iteration": common.get("iteration") if isinstance(common.get("iteration"), int) else None,
        "arguments": {key: arguments[key] for key in _ARGUMENTS if key in arguments},
    }


def _torch_dist_facts(folder: Path, saved: TorchDist) -> dict[str, Any]:
    weights = {key: tensor for key, tensor in saved.tensors.items() if not is_training_state(key)}
    training = {key: tensor for key, tensor in saved.tensors.items() if is_training_state(key)}
    return {
        "parameters": sum(math.prod(tensor.shape) for tensor in weights.values()),
        "weight_bytes": sum(tensor.nbytes for tensor in weights.values()),
        "tensors": len(weights),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in weights.values())),
        "table": _folded((key, tensor.shape, tensor.dtype.name) for key, tensor in weights.items()),
        "chunks": sum(len(tensor.chunks) for tensor in weights.values()),
        "optimizer_bytes": sum(tensor.nbytes for tensor in training.values()),
        "objects": len(saved.objects),
        "files": len({chunk.file for tensor in saved.tensors.values() for chunk in tensor.chunks}),
        "common_state": COMMON if (folder / COMMON).exists() else "inside the .distcp files",
        "keys": sorted(weights),
    }


def _folded(tensors: Iterable[_Row]) -> list[dict[str, Any]]:
    """Tensors that differ in the number of their layer alone become one row, `layers.{0..31}`; in the order they come."""
    layers: dict[_Row, list[int]] = {}
    for name, shape, dtype in tensors:
        match = re.search(r"(?<=layers\.)\d+(?=\.)", name)
        pattern = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
        layers.setdefault((pattern, shape, dtype), []).append(0 if match is None else int(match[0]))
    return [
        {"name": pattern.replace("{}", f"{{{_ranges(numbers)}}}"), "shape": list(shape), "dtype": dtype, "count": len(numbers)}
        for (pattern, shape, dtype), numbers in layers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """`0..31`, or `0..3,7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in parts)


def _readers(view: CheckpointView) -> list[dict[str, str]]:
    """Who would read the rope wrongly: that of config.json; of a Megatron checkpoint, as an export would write it."""
    config = view.config
    if view.format == "torch_dist":
        try:
            config = merge_hf_rope(config, view.rope)
        except ConfigError as error:
            return [{"program": "everybody", "does": f"an export is refused: {error.what}", "source": "docs/rope.md"}]
    return [{"program": one.program, "does": one.does, "source": one.source} for one in misreadings(config)]


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
        manifest = verify_manifest(folder, "checkpoint", "export")
    except CheckpointError as error:
        return f"BROKEN: {error}"
    unhashed = sum(row["sha256"] is None for row in manifest["files"].values())
    return f"holds; of {unhashed:,} files the size alone is known" if unhashed else "holds"


def describe_folder(facts: dict[str, Any]) -> str:
    """The facts of `inspect_folder` as text for people."""
    dtypes = ", ".join(f"{name}" if len(facts["dtypes"]) == 1 else f"{count} x {name}" for name, count in facts["dtypes"].items())
    kind = {"hf": "Hugging Face folder", "torch_dist": "Megatron torch_dist checkpoint"}[facts["format"]]
    lines = [f"{facts['path']}: {kind}" + (f", the newest in {facts['newest_in']}" if "newest_in" in facts else "")]
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
        rows += [("misread by", f"{one['program']}: {one['does']}") for one in facts["rope_readers"]]
    else:
        rows.append(("rope", f"not known: no {CARD}; give --config to convert it"))
        if facts.get("iteration") is not None:
            rows.append(("iteration", f"{facts['iteration']:,}"))
        rows += [("flags", f"{key} {value}") for key, value in facts["arguments"].items()]
    rows.append(("manifest", facts["manifest"]))
    if left_out := facts.get("left_out"):
        rows.append(("left out", f"{len(left_out):,} tensors (first: {left_out[0]})"))
    rows += [("warning", warning) for warning in facts.get("warnings", ())]
    return "\n".join([*lines, *(f"  {label:<12}{text}" for label, text in rows), *_table_in_words(facts["table"])])


def _table_in_words(table: list[dict[str, Any]]) -> list[str]:
    cells = [(row["name"], " x ".join(f"{size:,}" for size in row["shape"]), row["dtype"], f"{row['count']:,}") for row in table]
    heads = ("tensor", "shape", "dtype", "count")
    widths = [max(len(cell[i]) for cell in [heads, *cells]) for i in range(3)]
    return ["  " + "  ".join([*(cell[i].ljust(widths[i]) for i in range(3)), cell[3]]) for cell in [heads, *cells]]


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
