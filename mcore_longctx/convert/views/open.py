"""Opens a checkpoint of either format."""

from __future__ import annotations

from pathlib import Path

from mcore_longctx.convert.views.hf import open_hf
from mcore_longctx.convert.views.locate import locate_checkpoint
from mcore_longctx.convert.views.torch_dist import open_torch_dist
from mcore_longctx.convert.views.view import CONFIG, CheckpointView
from mcore_longctx.errors import ConfigError
from mcore_longctx.formats.dcp_read import is_torch_dist

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path, *, config: Path | None = None, from_master: bool = False) -> CheckpointView:
    """Open a Hugging Face folder (safetensors or `.bin`), a torch_dist folder, or the folder around one of Megatron-LM's.

    `CheckpointView.folder` says which folder was opened.

    Args:
        path: the folder.
        config: config.json of the model, or a folder with one, for a torch_dist folder that does not carry its own.
        from_master: read the optimizer's float32 weights of a torch_dist folder.

    Raises:
        CheckpointError: there is none, or it is damaged or of a format that is not read.
        ConfigError: its config.json asks for something that is not supported, or an argument has no use here.
        ConversionError: it holds other tensors than its config.json says.
    """
    folder = locate_checkpoint(path)
    if is_torch_dist(folder):
        return open_torch_dist(folder, config=config, from_master=from_master)
    if config is not None:
        raise ConfigError(f"a Hugging Face folder has its own {CONFIG}", where=folder, fix="leave out --config")
    if from_master:
        raise ConfigError("a Hugging Face folder has no optimizer state", where=folder, fix="leave out --from-master")
    return open_hf(folder)
