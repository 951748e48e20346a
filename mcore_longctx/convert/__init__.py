"""Conversion between Hugging Face and Megatron torch_dist checkpoints by moving bytes: no torch, no model, nothing executed.

A name is imported when it is first used, so that a plain copy does not pay for the checks (numpy's casts, JSON reports).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_longctx.convert.checks.inspect import describe_folder, inspect_folder
    from mcore_longctx.convert.checks.served import FolderReport, check_folder
    from mcore_longctx.convert.checks.verify import Report, compare
    from mcore_longctx.convert.copying.execute import Execution
    from mcore_longctx.convert.hf_export import export_hf, plan_export
    from mcore_longctx.convert.hf_import import import_hf, plan_import
    from mcore_longctx.convert.merging import merge, plan_merge
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

_HOMES = {
    "checks.inspect": ("describe_folder", "inspect_folder"),
    "checks.served": ("FolderReport", "check_folder"),
    "checks.verify": ("Report", "compare"),
    "copying.execute": ("Execution",),
    "hf_export": ("export_hf", "plan_export"),
    "hf_import": ("import_hf", "plan_import"),
    "merging": ("merge", "plan_merge"),
    "plans.plan": ("Plan",),
    "views": ("CheckpointView", "open_checkpoint"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
