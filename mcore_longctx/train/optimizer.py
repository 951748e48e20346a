"""AdamW on Megatron's DistributedOptimizer, its schedule, and its state across a stop.

megatron-core without apex and TransformerEngine falls back to torch.optim.AdamW, and the state of that optimizer does not survive
a checkpoint as it is. Seen in 0.16.1 and 0.19.2, `optimizer/distrib_optimizer.py`, and handled here without changing Megatron:

1. `state_dict` of a fresh optimizer asserts: torch's Adam has no state before its first step.
2. Loading `fully_reshardable` state fails on `step` (KeyError), which is not among the tensors.
3. It copies into leaves that require gradients, outside no_grad.
4. `load_state_dict` puts one `step` tensor into the state of all parameters. Adam then counts it up once per parameter, and from the
   second step after a resume on the bias correction is wrong, without an error.
"""

from __future__ import annotations

from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe import OptimizerSection, Stage

__all__ = [
    "build_optimizer",
    "build_schedule",
    "keep_settings",
    "learning_rate",
    "load_optimizer_state",
    "prepare_optimizer_state",
    "wrap_model",
]


def wrap_model(model: Any) -> DistributedDataParallel:
    """The model with Megatron's gradient buffers: fp32, reduce-scattered to the shards of the DistributedOptimizer."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        # losses are sums over tokens, divided once: an average inside the collective would divide twice
        average_in_collective=False,
    )
    wrapped = DistributedDataParallel(model.config, config, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(wrapped: DistributedDataParallel, stage: Stage) -> Any:
    """AdamW over fp32 main parameters, sharded over the data- and context-parallel ranks. Norms get no weight decay."""
    section, bf16 = stage.optimizer, stage.precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, [wrapped])


def build_schedule(optimizer: Any, section: OptimizerSection, iterations: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then cosine to `min_lr` or constant. One step of the schedule is one iteration."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_iters,
        lr_decay_steps=iterations,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=iterations,
        wd_incr_style="constant",
    )


def learning_rate(optimizer: Any) -> float:
    """The rate of the next step."""
    return float(optimizer.param_groups[0]["lr"])


def prepare_optimizer_state(optimizer: Any) -> None:
    """Give the inner torch Adam of a fresh optimizer its state, so that state can be loaded into it (1)."""
    inner = _inner(optimizer)
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                )


def keep_settings(optimizer: Any, state: dict[str, Any]) -> None:
    """Put the settings of `optimizer`, prepared, in place of those in `state`, another stage's: of that one only Adam's step count is left.

    Its moments are averages since that count began: with a count from 0, bias correction would make the first updates several times
    too large. megatron-core finds groups again by their settings, so they must be these before anything is loaded.
    """
    (distributed,) = optimizer.chained_optimizers
    groups = distributed.state_dict()["optimizer"]["param_groups"]
    (count,) = {group["step"] for group in state["optimizer"]["param_groups"]}
    state["optimizer"] = {**state["optimizer"], "param_groups": [{**group, "step": count} for group in groups]}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `optimizer.sharded_state_dict` (fully_reshardable) gave and a checkpoint has filled.

    Args:
        optimizer: prepared by `prepare_optimizer_state`.
        state: param groups, `param_state` and `param_state_sharding_type`.
    """
    state = dict(state)
    tensors = state.pop("param_state")
    state.pop("param_state_sharding_type")
    optimizer.load_state_dict(state)
    states = _inner(optimizer).state.values()
    steps = [one.pop("step") for one in states]  # (2)
    with torch.no_grad():  # (3)
        (distributed,) = optimizer.chained_optimizers
        distributed.load_parameter_state_from_fully_reshardable(tensors)
    for one, step in zip(states, steps, strict=True):
        one["step"] = step.clone()  # (4)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Megatron's chain of one."""
    (distributed,) = optimizer.chained_optimizers
    inner: torch.optim.Optimizer = distributed.optimizer
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        raise ConfigError(
            f"a stage cannot be resumed with {type(inner).__name__}: only torch's AdamW, not the fused one of apex or TransformerEngine",
            where="optimizer",
            fix="uninstall apex and transformer-engine here, or train the stage in one go",
        )
    return inner
