"""Each rank's own part of the optimizer, as tensors of a checkpoint, without bringing the parts together first.

megatron-core's `fully_reshardable` state gathers all shards of a data- and context-parallel group in the host memory of each of its ranks
before it writes them: 12 GB a rank for an 8B model with TP 8, 96 GB with TP 1. The tensors that lie on the disk need that for nothing: what
a rank holds is a range of a flattened parameter, and a range of a matrix is three rectangles at most:

    . . . . .            the rest of its first row
    . . # # #
    # # # # #            whole rows
    # # # # #
    # . . . .            the beginning of its last row

`dist_checkpointing` stores rectangles of any size and loads from them at any layout. Names, shapes and values in the checkpoint are those
of `fully_reshardable`, and megatron-core itself loads it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

__all__ = ["own_shards", "rectangles"]

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths, one of each an axis."""


def rectangles(shape: tuple[int, ...], start: int, end: int) -> list[Rectangle]:
    """The rectangles that make up the elements [start, end) of a flattened tensor of one or two axes, in order.

    >>> rectangles((5, 5), 7, 21)
    [((1, 2), (1, 3)), ((2, 0), (2, 5)), ((4, 0), (1, 1))]
    """
    if len(shape) == 1:
        return [((start,), (end - start,))] if end > start else []
    _, columns = shape
    found: list[Rectangle] = []
    while start < end:
        row, column = divmod(start, columns)
        rows = (end - start) // columns if column == 0 else 0
        size = (rows, columns) if rows else (1, min(columns - column, end - start))
        found.append(((row, column), size))
        start += size[0] * size[1]
    return found


def own_shards(optimizer: Any, model: Any) -> dict[str, Any]:
    """What `optimizer.sharded_state_dict(model)` gives to a save, with this rank's own shards. No rank sends anything.

    Args:
        optimizer: Megatron's chain of one DistributedOptimizer.
        model: the model's sharded state dict.
    """
    (distributed,) = optimizer.chained_optimizers
    # the form of DistributedOptimizer.sharded_state_dict in megatron-core 0.16 and 0.19: its param groups, and the tensors beside them
    return {
        **distributed.state_dict(),
        "param_state": _tensors(distributed, model),
        "param_state_sharding_type": "fully_reshardable",
    }


def _tensors(distributed: Any, model: Any) -> dict[int, Any]:
    sharded, _ = extract_sharded_tensors_and_factories(model)
    of_parameter = {base.data: base for base in nested_values(sharded)}
    found: dict[int, Any] = {}
    for by_dtype in distributed.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    states = distributed._get_main_param_and_optimizer_states(parameter)
                    begin, parts = ranges["param"].start, _parts(of_parameter[parameter])
                    found[len(found)] = {
                        name: [piece for part in parts for piece in _pieces(part, parameter, name, state.detach(), begin)]
                        for name, state in states.items()
                        if name in ("param", "exp_avg", "exp_avg_sq")
                    }
    return found


def _parts(base: Any) -> list[ShardedTensor]:
    """The stored tensors of a parameter: one, or those that a factory makes of it (gate and up of a SwiGLU)."""
    return list(nested_values(base.build())) if isinstance(base, ShardedTensorFactory) else [base]


def _pieces(part: ShardedTensor, parameter: torch.Tensor, name: str, state: torch.Tensor, begin: int) -> list[ShardedTensor]:
    """What `state`, the elements of `parameter` from `begin` on, holds of one stored tensor, a block of rows of `parameter`."""
    first = part.data.storage_offset() - parameter.storage_offset()  # of the part, in the parameter
    start, end = max(begin, first), min(begin + state.numel(), first + part.data.numel())
    found = []
    for offsets, size in rectangles(tuple(part.local_shape), start - first, end - first):
        count, prepended = torch.Size(size).numel(), part.prepend_axis_num
        whole, inside = (1,) * prepended + size, (0,) * prepended + offsets
        found.append(
            replace(
                part,
                key=f"optimizer.state.{name}.{part.key}",
                data=state[start - begin : start - begin + count].view(whole),
                dtype=state.dtype,
                local_shape=whole,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, inside, strict=True)),
                axis_fragmentations=None,  # no grid
                prepend_axis_num=0,  # megatron-core prepends axes (of the layers) to pieces of a grid alone
                # the last number tells data- and context-parallel replicas apart: this range has one holder
                replica_id=(*part.replica_id[:-1], 0),
            )
        )
        start += count
    return found
