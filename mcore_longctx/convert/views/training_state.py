"""Optimizer state in a torch_dist folder: what it is called, and the float32 master weights in it.

Keys that megatron-core 0.16.1 and 0.19.2 write, dumped from saves of both (bf16 model, Adam), by the optimizer's sharding type:

    fully_reshardable            optimizer.state.param.<key>         model space: shape and chunks of the weight, stacked or not
    no distributed optimizer     optimizer.state.fp32_param.<key>    model space
    dp_reshardable (0.19's       optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(...).bucket_idx_0.param
      default of Megatron-LM)                                        one vector a bucket and TP x PP rank: no names, no shapes
    dp_zero_gather_scatter       object optimizer.distributed.dp_group_idx_0.param_state/shard_0_1, a pickle
    fully_sharded_model_space    refused at save by both ("flattened_range is not supported"); up to 0.13 it wrote
                                 optimizer.state.fp32_param.<key> with flattened shards

Beside each of the first three stand `exp_avg` and `exp_avg_sq`. Several optimizers (ChainedOptimizer) put `chained_0.` before each key,
unless `chained_optim_avoid_prefix` is set. A model that is trained in float32 without the distributed optimizer has no masters.
"""

from __future__ import annotations

import re
from pathlib import Path

from mcore_longctx.errors import CheckpointError, ConversionError
from mcore_longctx.formats.dcp_read import SavedTensor, TorchDist

__all__ = ["is_training_state", "master_weights"]

_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")
_WITHOUT = "leave out --from-master"
_RESAVE = f"load it and save it once with --dist-ckpt-optim-fully-reshardable, or {_WITHOUT}"


def is_training_state(key: str) -> bool:
    """Whether a tensor of a torch_dist folder belongs to the optimizer, not to the model."""
    return key.startswith(("optimizer.", "chained_"))


def master_weights(saved: TorchDist, folder: Path) -> dict[str, SavedTensor]:
    """The optimizer's float32 copies of the weights, under the keys of the weights.

    Raises:
        CheckpointError: there are none, or they lie in flat buckets without names.
        ConversionError: one that is not float32, or two of one weight.
    """
    masters: dict[str, SavedTensor] = {}
    for key, tensor in saved.tensors.items():
        match = _MASTER.fullmatch(key)
        if match is None:
            continue
        if match[1] in masters:
            raise ConversionError(f"two master weights of {match[1]}", where=folder, fix=_WITHOUT)
        if tensor.dtype.name != "float32":
            raise ConversionError(f"{key} is {tensor.dtype.name}, expected float32", where=folder, fix=_WITHOUT)
        masters[match[1]] = tensor
    if masters:
        return masters
    if any(is_training_state(key) and ".bucket_idx_" in key for key in saved.tensors):
        raise CheckpointError(
            "the optimizer's float32 weights lie in flat buckets (sharding type dp_reshardable)", where=folder, fix=_RESAVE
        )
    if any(is_training_state(key) and ".param_state/" in key for key in saved.objects):
        raise CheckpointError(
            "the optimizer's float32 weights lie in a pickle (sharding type dp_zero_gather_scatter)", where=folder, fix=_RESAVE
        )
    has_state = any(is_training_state(key) for key in saved.tensors)
    what = "optimizer state without float32 copies of the weights" if has_state else "no optimizer state"
    raise CheckpointError(f"holds {what}", where=folder, fix=_WITHOUT)
