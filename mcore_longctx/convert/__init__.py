"""Conversion between Hugging Face and Megatron torch_dist checkpoints by moving bytes: no torch, no model, nothing executed."""

from mcore_longctx.convert.checks.inspect import describe_folder, inspect_folder
from mcore_longctx.convert.checks.verify import Report, compare
from mcore_longctx.convert.hf_export import export_hf
from mcore_longctx.convert.hf_import import import_hf
from mcore_longctx.convert.views import CheckpointView, open_checkpoint

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
