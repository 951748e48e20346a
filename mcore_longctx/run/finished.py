"""Whether an earlier start has finished a conversion and was killed before it could note that.

An output appears whole under its name, a moment before the journal of the run says so. What stands there after a kill is taken only
where its contents prove that this step would make the same; a conversion refuses everything else that is in its way, and keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.convert import compare
from mcore_longctx.convert.sidecars import tokenizer_sha256
from mcore_longctx.errors import CheckpointError
from mcore_longctx.manifest import MANIFEST, read_manifest, sha256_file, verify_manifest
from mcore_longctx.recipe.card import read_card

__all__ = ["is_exported", "is_imported", "is_merged"]


def is_imported(model: Path, out: Path) -> bool:
    """Whether `out` is the whole checkpoint that an import of the Hugging Face folder `model` makes: each tensor, the rope, the tokenizer.

    Raises CheckpointError where it is no whole checkpoint of ours, or damaged.
    """
    manifest = _whole(out, "checkpoint")
    if manifest is None or (manifest.get("stage"), manifest.get("iteration")) != ("base", 0):
        return False
    return read_card(out).tokenizer_sha256 == tokenizer_sha256(model) and _same(model, out)


def is_merged(a: Path, b: Path, out: Path, *, weights: tuple[float, float]) -> bool:
    """Whether `out` is the whole sum of two checkpoints of ours by these weights: its manifest names theirs by their hashes.

    Raises CheckpointError where it is no whole checkpoint of ours, or damaged.
    """
    manifest = _whole(out, "checkpoint")
    if manifest is None or not all((path / MANIFEST).is_file() for path in (a, b)):
        return False
    made_from = {"weights": list(weights), "source_manifest_sha256": [sha256_file(path / MANIFEST) for path in (a, b)]}
    if manifest.get("merge") != made_from:
        return False
    return manifest.get("rope_fingerprint") == read_manifest(a, "checkpoint").get("rope_fingerprint")


def is_exported(checkpoint: Path, out: Path) -> bool:
    """Whether `out` is the whole export of a checkpoint of ours: its manifest names that by its hash, and the tensors are the same.

    Raises CheckpointError where it is no whole export of ours, or damaged.
    """
    manifest = _whole(out, "export")
    if manifest is None or manifest.get("source_manifest_sha256") != sha256_file(checkpoint / MANIFEST):
        return False
    return _same(checkpoint, out)


def _whole(out: Path, kind: str) -> Mapping[str, Any] | None:
    """The manifest of `out`, each of whose files is as it says; None where nothing of ours is there."""
    if out.is_symlink() or not (out / MANIFEST).is_file():
        return None
    try:
        return verify_manifest(out, kind)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, fix=f"move {out.name} away: the step makes it again") from None


def _same(first: Path, out: Path) -> bool:
    report = compare(first, out)
    return report.equal and not report.quantised
