"""Megatron's DistributedOptimizer on torch's Adam, with state that survives a checkpoint of Megatron-LM.

megatron-core without apex and TransformerEngine falls back to torch.optim. What goes wrong then with `--save` and `--load` is told in
`mcore_longctx.train.optimizer`, which solves it for our own trainer; here the calls are Megatron-LM's, and a subclass answers them.
"""

from __future__ import annotations

from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

__all__ = ["resumable"]


def resumable(optimizer: Any) -> Any:
    """Make each DistributedOptimizer on torch's Adam in `optimizer` one that can be resumed. Others are left as they are."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(one) is DistributedOptimizer and isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW):
            # get_megatron_optimizer names its class literally; the subclass adds no state of its own
            one.__class__ = _OnTorchAdam
    return optimizer


class _OnTorchAdam(DistributedOptimizer):
    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A fresh Adam has no state to describe: give it some before it is asked."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter].update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                    )
        return super().sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any) -> None:
        """One `step` tensor is put into the state of all parameters, and Adam would count it up once for each."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Any) -> None:
        """`step` is not among the tensors, and the parameters that are copied into require gradients."""
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step")
        with torch.no_grad():
            super()._set_main_param_and_optimizer_states(model_param, tensors)
        state["step"] = step
