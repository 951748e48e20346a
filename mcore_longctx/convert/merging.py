"""The weighted sum of two checkpoints of one model, tensor by tensor."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.copying.execute import Execution, Written, execute, failures_told_to_rank_0
from mcore_longctx.convert.disk import io_errors, refuse_nested
from mcore_longctx.convert.outputs import (
    LAYOUT,
    check_manifest,
    settings_folder,
    source_files,
    write_checkpoint_files,
    write_output_manifest,
)
from mcore_longctx.convert.plans.hf_layout import HfLayout, plan_hf
from mcore_longctx.convert.plans.plan import Blend, Plan
from mcore_longctx.convert.plans.torch_dist_layout import TorchDistLayout, plan_torch_dist
from mcore_longctx.convert.sidecars import export_config, tokenizer_sha256, write_hf_sidecars
from mcore_longctx.convert.views import CONFIG, HF_FOLDER, CheckpointView, locate_checkpoint, open_checkpoint
from mcore_longctx.errors import ConfigError, ConversionError
from mcore_longctx.families import model_tensors
from mcore_longctx.formats.dcp_read import is_torch_dist, read_torch_dist
from mcore_longctx.formats.safetensors_io import shard_names
from mcore_longctx.manifest import MANIFEST, sha256_file
from mcore_longctx.recipe import CARD, CheckpointCard, write_card

__all__ = ["merge", "plan_merge"]


@io_errors()
def merge(
    a: Path,
    b: Path,
    out: Path,
    *,
    weights: tuple[float, float] = (0.5, 0.5),
    config: Path | None = None,
    any_rope: bool = False,
    how: Execution | None = None,
) -> bool:
    """Write `weights[0]` x A + `weights[1]` x B, computed in float32, in the format, layout and element types of A.

    Config, tokenizer and card are A's; config.json of a Hugging Face folder is written as an export's. Optimizer state is left out; rows of vocabulary padding become zero.

    Args:
        a: Hugging Face folder, or torch_dist folder.
        b: another of the same format, shape, rope and tokenizer.
        out: folder to make.
        weights: of A and of B; finite in float32. They need not add up to 1.
        config: config.json of the model, or its folder, for a torch_dist folder that brings none.
        any_rope: B may have another rope than A, whose rope the sum has. LongRecipe (arXiv 2409.00509 section 4.3) merges a model that
            was trained under a raised base with the original.
        how: workers, fsync, checksums; None: one process.

    Returns:
        Whether this process finished the output: True, but under srun for one task alone.

    Raises:
        CheckpointError: one is missing, damaged or not what its manifest says.
        ConversionError: they are not of one format, model, rope or tokenizer, or a sum is too large for float32 or for A's type.
        ConfigError: a weight that is not finite, `out` exists, no `config` where one is needed, or one where none is.
        StorageError: the disk is full or failed.
    """
    how = how or Execution()
    with failures_told_to_rank_0(out, how):
        job = _prepare(a, b, weights, config, hashes=how.checksum, any_rope=any_rope)
        for view in job.views:
            refuse_nested(out, view.folder)

    def finish(folder: Path, written: Written) -> None:
        manifests = [sha256_file(view.folder / MANIFEST) if (view.folder / MANIFEST).exists() else None for view in job.views]
        merged = {"weights": list(weights), "source_manifest_sha256": manifests}
        notes = list(dict.fromkeys(note for view in job.views for note in view.notes))
        unchecked = {"notes": notes} if notes else {}
        card, model_folder = _card(job), settings_folder(job.views[0])
        if isinstance(job.layout, TorchDistLayout):
            write_checkpoint_files(folder, job.layout, card, model_folder, written, merge=merged, **unchecked)
            return
        view = job.views[0]
        write_hf_sidecars(view, folder, source=model_folder, rope=view.rope, dtype=_config_dtype(view))
        write_card(folder, card)
        job.layout.describe(folder)
        facts = {"rope_fingerprint": card.rope.fingerprint(), "merge": merged}
        write_output_manifest(folder, "export", job.layout.files, written, **facts)

    return execute(job.plan, out, finish, how)


@io_errors()
def plan_merge(a: Path, b: Path, *, weights: tuple[float, float] = (0.5, 0.5), config: Path | None = None) -> Plan:
    """What `merge` would write. Reads headers only. Raises as `merge`."""
    return _prepare(a, b, weights, config, hashes=False).plan


@dataclass(frozen=True)
class _Job:
    views: tuple[CheckpointView, CheckpointView]
    layout: HfLayout | TorchDistLayout
    plan: Plan


def _prepare(
    a: Path, b: Path, weights: tuple[float, float], config: Path | None, *, hashes: bool, any_rope: bool = False
) -> _Job:
    if not all(_is_finite_float32(weight) for weight in weights):
        what = f"weights {weights[0]} and {weights[1]}; expected two numbers that are finite in float32"
        raise ConfigError(what, where="--weights")
    carried = [_brings_config(path) for path in (a, b)]
    if config is not None and all(carried):
        raise ConfigError("both checkpoints bring their own config.json", where="--config", fix="leave it out")
    first, second = (open_checkpoint(path, config=None if own else config) for path, own in zip((a, b), carried, strict=True))
    _check_alike(first, second, any_rope=any_rope)
    for view in (first, second):
        check_manifest(view, hashes=hashes)
    blends = {name: Blend(((rows, weights[0]), (second.tensors[name], weights[1]))) for name, rows in first.tensors.items()}
    layout = _hf_layout(first, blends) if first.format == "hf" else _torch_dist_layout(first, blends)
    files = {file.path: file for view in (first, second) for file in source_files(view)}
    settings = {"layout": LAYOUT, "weights": list(weights), "shape": first.shape.as_dict(), "rope": first.rope.as_dict()}
    if first.format == "hf":
        settings["config"] = export_config(first, rope=first.rope, dtype=_config_dtype(first))
    plan = Plan("merge", settings, tuple(files.values()), layout.files, layout.fills, layout.small)
    return _Job((first, second), layout, plan)


def _brings_config(path: Path) -> bool:
    folder = locate_checkpoint(path)
    return not is_torch_dist(folder) or ((folder / CARD).exists() and (folder / HF_FOLDER / CONFIG).exists())


def _config_dtype(view: CheckpointView) -> str:
    """What config.json says of weights of several element types."""
    dtypes = view.dtypes
    return max(dtypes, key=lambda found: dtypes[found])


def _is_finite_float32(number: float) -> bool:
    try:
        return math.isfinite(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return False


def _check_alike(first: CheckpointView, second: CheckpointView, *, any_rope: bool) -> None:
    def refuse(what: str, fix: str = "") -> None:
        raise ConversionError(f"{what} than {first.folder}", where=second.folder, fix=fix)

    if first.format != second.format:
        refuse(f"another format ({second.format})", "convert one of them first")
    if first.shape != second.shape:
        ours, theirs = first.shape.as_dict(), second.shape.as_dict()
        key = next(key for key, value in ours.items() if theirs[key] != value)
        refuse(f"another model ({key} {theirs[key]}, not {ours[key]})")
    if not any_rope and first.rope.fingerprint() != second.rope.fingerprint():
        refuse(f"another rope ({second.rope.describe()}, not {first.rope.describe()})")
    if tokenizer_sha256(settings_folder(first)) != tokenizer_sha256(settings_folder(second)):
        refuse("another tokenizer", "a token must mean the same in both")


def _hf_layout(view: CheckpointView, blends: dict[str, Blend]) -> HfLayout:
    """The files of A: the same tensors in each."""
    places = {name: rows.pieces[0] for name, rows in view.tensors.items()}
    shards: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: (str(places[name].file), places[name].offset)):
        file = places[name].file
        assert file is not None
        shards.setdefault(file.name, []).append(name)
    if not all(name.endswith(".safetensors") for name in shards):  # A's are .bin
        shards = dict(zip(shard_names(len(shards)), shards.values(), strict=True))
    return plan_hf(blends, dtype=None, shard_bytes=shards)


def _torch_dist_layout(view: CheckpointView, blends: dict[str, Blend]) -> TorchDistLayout:
    """Stacked or not, chunks and vocabulary padding as A has them."""
    saved = read_torch_dist(view.folder).tensors
    mapped = model_tensors(view.shape)
    down = next(tensor for tensor in mapped if tensor.layer is not None and tensor.tp == 1)
    stacked = down.key in saved
    chunk = saved[down.key if stacked else down.layer_key].chunks[0]
    chunks_for_tp = max(1, (down.columns or 1) // max(1, chunk.sizes[-1]))
    vocab_rows = next(saved[tensor.key].shape[0] for tensor in mapped if tensor.is_vocabulary)
    return plan_torch_dist(
        view.shape,
        blends,
        dtype=None,
        chunks_for_tp=chunks_for_tp,
        stacked=stacked,
        vocab_rows=vocab_rows,
        where=view.folder,
    )


def _card(job: _Job) -> CheckpointCard:
    view = job.views[0]
    stage, iteration = ("base", 0) if view.card is None else (view.card.stage, view.card.iteration)
    tokenizer = tokenizer_sha256(settings_folder(view))
    return CheckpointCard(shape=view.shape, rope=view.rope, tokenizer_sha256=tokenizer, stage=stage, iteration=iteration)
