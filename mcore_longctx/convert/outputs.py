"""What import, export and merge have in common: their sources, and what stands beside the weights of an output."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mcore_longctx.convert.copying.execute import Written
from mcore_longctx.convert.plans.plan import SourceFile, TargetFile
from mcore_longctx.convert.plans.torch_dist_layout import TorchDistLayout
from mcore_longctx.convert.sidecars import carried_files, check_sidecars, copy_sidecars
from mcore_longctx.convert.views import CONFIG, HF_FOLDER, CheckpointView
from mcore_longctx.convert.views.view import count
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.formats.dcp_read import METADATA, METADATA_JSON
from mcore_longctx.formats.dtypes import BY_TORCH, WEIGHT_DTYPES, DType
from mcore_longctx.formats.safetensors_io import INDEX
from mcore_longctx.formats.torch_bin import BIN_INDEX
from mcore_longctx.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest
from mcore_longctx.reading import is_there
from mcore_longctx.recipe import CARD, CheckpointCard, write_card

__all__ = [
    "LAYOUT",
    "check_manifest",
    "dtype_option",
    "settings_folder",
    "source_files",
    "target_dtype",
    "write_checkpoint_files",
    "write_output_manifest",
]

LAYOUT = 1  # in every plan's settings: a program that lays out otherwise does not go on with this one's unfinished output


def target_dtype(name: str | None) -> DType | None:
    """The element type `float32`, `bfloat16`, ...; None stays None. Raises ConfigError for one that weights cannot have."""
    if name is None:
        return None
    if name not in WEIGHT_DTYPES:
        raise ConfigError(f"dtype {name!r} is none of {', '.join(WEIGHT_DTYPES)}", where="--dtype")
    return BY_TORCH[name]


def dtype_option(name: str | None) -> str:
    """`--dtype` as the user writes it: `keep`, `bf16`, ..., for the settings of a plan."""
    return {None: "keep", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, str(name))


def check_manifest(view: CheckpointView, *, hashes: bool) -> None:
    """Compare the files of a checkpoint of ours with its manifest: sizes always, hashes if asked for.

    A folder of another program has no manifest: there is nothing to compare with, and nothing is.

    Raises:
        CheckpointError: they differ; a torch_dist folder with our card has no manifest, it was not finished; or hashes are asked for
            and the manifest has none of the weights.
    """
    if view.card is None or (view.format == "hf" and not is_there(view.folder / MANIFEST)):
        return
    kind = "export" if view.format == "hf" else "checkpoint"
    if hashes:
        _check_hashes_known(view, kind)
    verify_manifest(view.folder, kind, hashes=hashes)


def _check_hashes_known(view: CheckpointView, kind: str) -> None:
    listed = read_manifest(view.folder, kind)["files"]
    unknown = sum(listed.get(name, {}).get("sha256") is None for name in {path.name for path in _weights(view)})
    if unknown:
        raise CheckpointError(
            f"{count(unknown, 'weight file')} without a sha256 (written without --checksum): nothing to compare with",
            where=view.folder / MANIFEST,
            fix="write that folder again with --checksum, or leave the option out here",
        )


def _weights(view: CheckpointView) -> set[Path]:
    return {piece.file for rows in view.tensors.values() for piece in rows.pieces if piece.file is not None}


def settings_folder(view: CheckpointView) -> Path:
    """Where its config.json and tokenizer files lie."""
    return view.settings_folder or view.folder


def source_files(view: CheckpointView) -> tuple[SourceFile, ...]:
    """Every file that a conversion of `view` reads.

    Raises:
        CheckpointError: one that is carried beside the weights and cannot be: better now than when all weights are written.
    """
    settings = [view.folder / name for name in (CARD, MANIFEST, INDEX, BIN_INDEX, METADATA, METADATA_JSON)]
    beside = settings_folder(view)
    check_sidecars(beside)
    settings += [beside / name for name in (CONFIG, *carried_files(beside))]
    return tuple(_as_it_is(path) for path in (*sorted(_weights(view)), *settings) if path.is_file())


def _as_it_is(path: Path) -> SourceFile:
    state = path.stat()
    return SourceFile(path, state.st_size, state.st_mtime_ns)


def write_checkpoint_files(
    folder: Path,
    layout: TorchDistLayout,
    card: CheckpointCard,
    model_folder: Path,
    written: Written,
    **facts: Any,
) -> None:
    """Write all that a torch_dist folder has beside its weights: `hf/`, the card, torch's own files, and last the manifest."""
    _remove_torn(folder)
    (folder / HF_FOLDER).mkdir(exist_ok=True)
    copy_sidecars(model_folder, folder / HF_FOLDER)
    shutil.copyfile(model_folder / CONFIG, folder / HF_FOLDER / CONFIG)
    write_card(folder, card)
    layout.describe(folder)
    facts = {"rope_fingerprint": card.rope.fingerprint(), "stage": card.stage, "iteration": card.iteration, **facts}
    write_output_manifest(folder, "checkpoint", layout.files, written, **facts)


def write_output_manifest(folder: Path, kind: str, weights: Iterable[TargetFile], written: Written, **facts: Any) -> None:
    """Write the manifest over everything in `folder`; hashes of `weights` only if they were taken while writing."""
    _remove_torn(folder)
    sizes_only = [file.name for file in weights if file.name not in written.sha256]
    write_manifest(folder, kind, sha256=written.sha256, sizes_only=sizes_only, **facts)


def _remove_torn(folder: Path) -> None:
    """Remove what a run that was killed here left of a small file that it wrote aside."""
    for path in folder.rglob("*.partial-*"):
        path.unlink()
