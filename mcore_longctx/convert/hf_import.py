"""Hugging Face folder -> torch_dist checkpoint that megatron-core loads at any tensor- and pipeline-parallel size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.convert.copying.execute import Execution, Written, execute, failures_told_to_rank_0
from mcore_longctx.convert.disk import io_errors, refuse_nested
from mcore_longctx.convert.outputs import (
    LAYOUT,
    check_manifest,
    dtype_option,
    source_files,
    target_dtype,
    write_checkpoint_files,
)
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.convert.plans.torch_dist_layout import TorchDistLayout, padded_vocab_size, plan_torch_dist
from mcore_longctx.convert.sidecars import tokenizer_sha256
from mcore_longctx.convert.views import CONFIG, CheckpointView, open_hf
from mcore_longctx.errors import ConfigError, ConversionError
from mcore_longctx.families.shape import VOCAB_MULTIPLE
from mcore_longctx.recipe import CheckpointCard
from mcore_longctx.rope import RopeScaling

__all__ = ["import_hf", "plan_import"]


@io_errors()
def import_hf(
    hf: Path,
    out: Path,
    *,
    rope: RopeScaling | None = None,
    dtype: str | None = None,
    chunks_for_tp: int = 1,
    stacked: bool = True,
    vocab_multiple: int = VOCAB_MULTIPLE,
    how: Execution | None = None,
) -> bool:
    """Convert the model in `hf` to the torch_dist checkpoint `out`, bit for bit.

    `out` also gets `hf/` (config and tokenizer), a card and, last, a manifest.

    Args:
        hf: Hugging Face folder.
        out: folder to make.
        rope: the card's, so that training and export follow it; weights and `hf/config.json` stay as they are. None: the model's.
        dtype: torch's name of the element type to cast to; None: each tensor keeps its own.
        chunks_for_tp: tensor-parallel size whose ranks find a chunk of each tensor; any size loads it.
        stacked: one tensor over all layers, else one a layer.
        vocab_multiple: embedding and head are padded with zero rows to a multiple of this x `chunks_for_tp`.
        how: workers, fsync, checksums; None: one process.

    Returns:
        Whether this process finished the output: True, but under srun for one task alone.

    Raises:
        CheckpointError: `hf` is missing, damaged or not what its manifest says.
        ConfigError: config.json asks for something that is not supported, or `out` exists.
        ConversionError: tensors that are missing, left over, or of another shape or type than config.json says.
        LayoutError: the model does not divide by `chunks_for_tp`.
        StorageError: the disk is full or failed.
    """
    how = how or Execution()
    with failures_told_to_rank_0(out, how):
        job = _prepare(hf, rope, dtype, chunks_for_tp, vocab_multiple, stacked=stacked, hashes=how.checksum)
        refuse_nested(out, job.view.folder)

    def finish(folder: Path, written: Written) -> None:
        card = CheckpointCard(shape=job.view.shape, rope=job.rope, tokenizer_sha256=tokenizer_sha256(hf))
        was = job.view.rope
        changed = {} if rope is None else {"source_rope": {"fingerprint": was.fingerprint(), "in_words": was.describe()}}
        write_checkpoint_files(folder, job.layout, card, hf, written, **changed)

    return execute(job.plan, out, finish, how)


@io_errors()
def plan_import(
    hf: Path,
    *,
    rope: RopeScaling | None = None,
    dtype: str | None = None,
    chunks_for_tp: int = 1,
    stacked: bool = True,
    vocab_multiple: int = VOCAB_MULTIPLE,
) -> Plan:
    """What `import_hf` would write. Reads headers only. Raises as `import_hf`."""
    return _prepare(hf, rope, dtype, chunks_for_tp, vocab_multiple, stacked=stacked, hashes=False).plan


@dataclass(frozen=True)
class _Job:
    view: CheckpointView
    rope: RopeScaling
    layout: TorchDistLayout
    plan: Plan


def _prepare(
    hf: Path,
    rope: RopeScaling | None,
    dtype: str | None,
    chunks_for_tp: int,
    vocab_multiple: int,
    *,
    stacked: bool,
    hashes: bool,
) -> _Job:
    view = open_hf(hf)
    _check_source(view, hashes=hashes)
    if rope is not None and rope.head_dim != view.shape.kv_channels:
        raise ConfigError(f"a rope of head_dim {rope.head_dim}, the model has {view.shape.kv_channels}", where=hf)
    vocab_rows = padded_vocab_size(view.shape, vocab_multiple, chunks_for_tp)
    target = target_dtype(dtype)
    layout = plan_torch_dist(
        view.shape,
        view.tensors,
        dtype=target,
        chunks_for_tp=chunks_for_tp,
        stacked=stacked,
        vocab_rows=vocab_rows,
        where=hf,
    )
    settings = {
        "layout": LAYOUT,
        "dtype": dtype_option(dtype),
        "chunks-for-tp": chunks_for_tp,
        "vocab-multiple": vocab_multiple,
        "layer-keys": "stacked" if stacked else "per-layer",
        "rope": (rope or view.rope).as_dict(),
        "rope given": rope is not None,
        "shape": view.shape.as_dict(),
    }
    plan = Plan("import", settings, source_files(view), layout.files, layout.fills, layout.small)
    return _Job(view, rope or view.rope, layout, plan)


def _check_source(view: CheckpointView, *, hashes: bool) -> None:
    """An export of ours must be what its card and its manifest say."""
    if view.card is None:
        return
    if view.card.rope.fingerprint() != view.rope.fingerprint():
        raise ConversionError(
            f"the rope in {CONFIG} ({view.rope.describe()}) is not the one these weights were trained with "
            f"({view.card.rope.describe()}, says mcore_longctx.json)",
            where=view.folder,
            fix=f"restore {CONFIG}, or remove mcore_longctx.json if the change is meant",
        )
    check_manifest(view, hashes=hashes)
