"""Opens a checkpoint of either format."""

from __future__ import annotations

from pathlib import Path

from mcore_longctx.convert.views.hf import open_hf
from mcore_longctx.convert.views.torch_dist import open_torch_dist
from mcore_longctx.convert.views.view import CONFIG, CheckpointView
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import METADATA, is_torch_dist

__all__ = ["open_checkpoint"]


def open_checkpoint(folder: Path) -> CheckpointView:
    """Open a Hugging Face or a torch_dist folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: its config.json asks for something that is not supported.
        ConversionError: it holds other tensors than its config.json says.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=folder, fix="check the path")
    if is_torch_dist(folder):
        return open_torch_dist(folder)
    if (folder / CONFIG).exists():
        return open_hf(folder)
    raise CheckpointError(f"neither {CONFIG} nor {METADATA}: not a checkpoint", where=folder, fix="check the path")
