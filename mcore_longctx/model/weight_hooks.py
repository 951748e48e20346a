"""Use a module's weight without calling the module."""

from __future__ import annotations

import torch

__all__ = ["run_forward_pre_hooks"]


def run_forward_pre_hooks(module: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """Do what a call of `module` would do before its forward. What the hooks return is dropped.

    With `overlap_param_gather` Megatron's DistributedDataParallel waits for a module's weights in such a hook; without it the weights
    of the last step, or half of the new ones, would be read.
    """
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            hook(module, inputs, {})
        else:
            hook(module, inputs)
