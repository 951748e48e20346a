"""torch_dist checkpoint -> Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mcore_longctx.convert.copying.execute import Execution, Written, execute, failures_told_to_rank_0
from mcore_longctx.convert.disk import io_errors, refuse_nested
from mcore_longctx.convert.outputs import (
    LAYOUT,
    check_manifest,
    dtype_option,
    settings_folder,
    source_files,
    target_dtype,
    write_output_manifest,
)
from mcore_longctx.convert.plans.hf_layout import HfLayout, plan_hf
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.convert.quantization import quantization_config, quantized_weights, write_quantize_report
from mcore_longctx.convert.sidecars import export_config, tokenizer_sha256, write_hf_sidecars
from mcore_longctx.convert.views import CheckpointView, open_torch_dist
from mcore_longctx.errors import ConfigError
from mcore_longctx.manifest import MANIFEST, sha256_file
from mcore_longctx.recipe import CheckpointCard, write_card
from mcore_longctx.rope import RopeScaling

__all__ = ["SHARD_BYTES", "export_hf", "plan_export"]

SHARD_BYTES = 5_000_000_000


@io_errors()
def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    config: Path | None = None,
    rope: RopeScaling | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    from_master: bool = False,
    quantize: Literal["fp8"] | None = None,
    how: Execution | None = None,
) -> bool:
    """Convert the torch_dist `checkpoint` to the Hugging Face folder `out`, bit for bit. Optimizer state is left out.

    config.json is that of the imported model with the rope that the checkpoint was trained with, in both spellings, and its
    maximum length.

    Args:
        checkpoint: torch_dist folder, or the folder around `iter_*` and `release` of Megatron-LM.
        out: folder to make.
        config: config.json of the model, or its folder, for a checkpoint that brings none.
        rope: written in place of the checkpoint's; the weights stay as they are.
        dtype: torch's name of the element type to cast to; None: each tensor keeps its own.
        shard_bytes: files hold at most this many bytes of tensors.
        from_master: take the optimizer's float32 weights in place of the model's.
        quantize: `fp8`: the linear weights of the layers become float8_e4m3fn with a scale a row.
        how: workers, fsync, checksums; None: one process.

    Returns:
        Whether this process finished the output: True, but under srun for one task alone.

    Raises:
        CheckpointError: `checkpoint` is missing, foreign, unfinished, damaged or changed since it was written.
        ConfigError: the rope has no name in a Hugging Face config, or `out` exists.
        ConversionError: it holds other tensors than its model.
        StorageError: the disk is full or failed.
    """
    how = how or Execution()
    with failures_told_to_rank_0(out, how):
        job = _prepare(checkpoint, config, rope, dtype, shard_bytes, from_master, quantize, hashes=how.checksum)
        refuse_nested(out, job.view.folder)

    def finish(folder: Path, written: Written) -> None:
        _write_files(job, folder)
        if quantize:
            write_quantize_report(folder, written.quantized)
        manifest = job.view.folder / MANIFEST
        made_of = {"source_manifest_sha256": sha256_file(manifest)} if manifest.exists() else {}
        unchecked = {"notes": list(job.view.notes)} if job.view.notes else {}
        facts = {"rope_fingerprint": job.rope.fingerprint(), **made_of, **unchecked}
        write_output_manifest(folder, "export", job.layout.files, written, **facts)

    return execute(job.plan, out, finish, how)


@io_errors()
def plan_export(
    checkpoint: Path,
    *,
    config: Path | None = None,
    rope: RopeScaling | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    from_master: bool = False,
    quantize: Literal["fp8"] | None = None,
) -> Plan:
    """What `export_hf` would write. Reads headers only. Raises as `export_hf`."""
    return _prepare(checkpoint, config, rope, dtype, shard_bytes, from_master, quantize, hashes=False).plan


@dataclass(frozen=True)
class _Job:
    view: CheckpointView
    rope: RopeScaling
    dtype: str  # what config.json says
    quantization: Mapping[str, Any] | None
    layout: HfLayout
    plan: Plan


def _prepare(
    checkpoint: Path,
    config: Path | None,
    rope: RopeScaling | None,
    dtype: str | None,
    shard_bytes: int,
    from_master: bool,
    quantize: Literal["fp8"] | None,
    *,
    hashes: bool,
) -> _Job:
    if shard_bytes < 1:
        raise ConfigError(f"files of {shard_bytes:,} bytes", where="--shard-size")
    view = open_torch_dist(checkpoint, config=config, from_master=from_master)
    check_manifest(view, hashes=hashes)
    if rope is not None and rope.head_dim != view.shape.kv_channels:
        raise ConfigError(f"a rope of head_dim {rope.head_dim}, the model has {view.shape.kv_channels}", where=checkpoint)
    target = target_dtype(dtype)
    quantized = quantized_weights(view.shape) if quantize else frozenset()
    layout = plan_hf(view.tensors, dtype=target, shard_bytes=shard_bytes, quantized=quantized)
    quantization = quantization_config() if quantize else None
    dtypes = view.dtypes
    name = dtype or max(dtypes, key=lambda found: dtypes[found])
    settings = {
        "layout": LAYOUT,
        "dtype": dtype_option(dtype),
        "shard-size": shard_bytes,
        "from-master": from_master,
        "quantize": quantize,
        "rope": (rope or view.rope).as_dict(),
        "config": export_config(view, rope=rope or view.rope, dtype=name, quantization=quantization),
    }
    plan = Plan("export", settings, source_files(view), layout.files, layout.fills, layout.small)
    return _Job(view, rope or view.rope, name, quantization, layout, plan)


def _write_files(job: _Job, folder: Path) -> None:
    view = job.view
    write_hf_sidecars(view, folder, source=settings_folder(view), rope=job.rope, dtype=job.dtype, quantization=job.quantization)
    stage, iteration = ("base", 0) if view.card is None else (view.card.stage, view.card.iteration)
    tokenizer = tokenizer_sha256(folder)
    write_card(
        folder, CheckpointCard(shape=view.shape, rope=job.rope, tokenizer_sha256=tokenizer, stage=stage, iteration=iteration)
    )
    job.layout.describe(folder)
