"""Which folder a path stands for: Megatron-LM keeps its checkpoints one level down, under a number or `release`."""

from __future__ import annotations

from pathlib import Path

from mcore_longctx.convert.views.view import CONFIG
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import METADATA, METADATA_JSON, is_torch_dist, read_metadata_names
from mcore_longctx.reading import is_there, regular_size

__all__ = ["TRACKER", "locate_checkpoint"]

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"


def locate_checkpoint(path: Path) -> Path:
    """The folder that holds the checkpoint: `path` itself, or the one that its `latest_checkpointed_iteration.txt` names.

    Takes a Hugging Face folder, a torch_dist folder (`iter_0000100`, `release` or any name) and the folder around those.

    Raises:
        CheckpointError: nothing here, a tracker that names no folder, or a format that is not read: legacy per-rank files,
            fsdp_dtensor.
    """
    if not path.is_dir():
        what = "is a file, expected a folder" if path.exists() else "no such folder"
        raise CheckpointError(what, where=path, fix="check the path")
    folder = path
    if not is_torch_dist(path) and not is_there(path / CONFIG) and is_there(path / TRACKER):
        folder = _newest(path)
    _refuse_other_formats(folder)
    if is_torch_dist(folder) or is_there(folder / CONFIG):
        return folder
    inside = sorted(child.name for child in folder.glob("iter_*") if is_torch_dist(child))
    if inside:
        raise CheckpointError(f"holds {inside[-1]} but no {TRACKER}", where=folder, fix=f"give {folder / inside[-1]}")
    raise CheckpointError(f"neither {CONFIG} nor {METADATA}: not a checkpoint", where=folder, fix="check the path")


def _newest(path: Path) -> Path:
    tracker = path / TRACKER
    regular_size(tracker)
    with tracker.open("rb") as file:
        text = file.read(64).decode("ascii", "replace").strip()
    if text != _RELEASE and not (text.isdecimal() and len(text) <= 12):
        raise CheckpointError(f"holds {text[:40]!r}, expected a number or {_RELEASE}", where=tracker)
    folder = path / (text if text == _RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"names {folder.name}, which is not there", where=tracker, fix="give one of the folders beside it")
    return folder


def _refuse_other_formats(folder: Path) -> None:
    """Refuse by name what looks like a checkpoint of Megatron and is in another format."""
    if any((rank / "model_optim_rng.pt").exists() for rank in folder.glob("mp_rank_*")):
        raise CheckpointError(
            "a legacy checkpoint, one file a rank (mp_rank_00)",
            where=folder,
            fix="load it with Megatron-LM and save it once with --ckpt-format torch_dist",
        )
    foreign = (folder / METADATA).exists() and not (folder / METADATA_JSON).exists()
    if foreign and any(name.startswith("model.") for name in read_metadata_names(folder)):
        raise CheckpointError(
            "an fsdp_dtensor checkpoint of Megatron-FSDP", where=folder, fix="save it once with --ckpt-format torch_dist"
        )
