"""Conversion between Hugging Face and Megatron torch_dist checkpoints by moving bytes: no torch, no model, nothing executed."""

from mcore_longctx.convert.checkpoint_view import CheckpointView, open_checkpoint
from mcore_longctx.convert.hf_export import export_hf
from mcore_longctx.convert.hf_import import import_hf
from mcore_longctx.convert.inspect import describe_folder, inspect_folder
from mcore_longctx.convert.verify import Report, compare

__all__ = [
    "CheckpointView",
    "Report",
    "compare",
    "describe_folder",
    "export_hf",
    "import_hf",
    "inspect_folder",
    "open_checkpoint",
]
