"""Conversion between Hugging Face and Megatron torch_dist checkpoints by moving bytes: no torch, no model, nothing executed."""

from mcore_longctx.convert.checks.inspect import describe_folder, inspect_folder
from mcore_longctx.convert.checks.served import FolderReport, check_folder
from mcore_longctx.convert.checks.verify import Report, compare
from mcore_longctx.convert.copying.execute import Execution
from mcore_longctx.convert.hf_export import export_hf, plan_export
from mcore_longctx.convert.hf_import import import_hf, plan_import
from mcore_longctx.convert.merge import merge, plan_merge
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.convert.views import CheckpointView, open_checkpoint

__all__ = [
    "CheckpointView",
    "Execution",
    "FolderReport",
    "Plan",
    "Report",
    "check_folder",
    "compare",
    "describe_folder",
    "export_hf",
    "import_hf",
    "inspect_folder",
    "merge",
    "open_checkpoint",
    "plan_export",
    "plan_import",
    "plan_merge",
]
