"""All rows for some heads instead of some rows for all heads (`a2a`, after DeepSpeed-Ulysses), and back.

`a` neighbouring ranks exchange: each gives the others its rows of their heads. What a rank then holds are the rows of all of them,
put in the order in which they join (`mcore_longctx.layout.plans`), for 1/a of the heads. Tensors that go the same way go in one
message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from mcore_longctx.parallel.collectives import all_to_all
from mcore_longctx.parallel.rows import from_rows, put_rows, take_rows

__all__ = ["heads_to_rows", "rows_to_heads"]


def rows_to_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup, order: Tensor) -> list[Tensor]:
    """[b, h, t, d] of this rank's rows -> [b, h / a, a * t, d]: all rows of the group, for this rank's heads."""
    size, first = group.size(), tensors[0]
    batch, _, rows, width = first.shape
    heads = [tensor.size(1) // size for tensor in tensors]  # of each rank
    sent = first.new_empty((size, rows, batch, sum(heads), width))
    for tensor, part in zip(tensors, sent.split(heads, dim=3), strict=True):
        part.copy_(tensor.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4))
    joined = take_rows(all_to_all(sent, group).flatten(0, 1), order)  # [a * t, b, heads, d]
    return [from_rows(part) for part in joined.split(heads, dim=2)]


def heads_to_rows(tensors: Sequence[Tensor], group: dist.ProcessGroup, order: Tensor) -> list[Tensor]:
    """[b, h / a, a * t, d] of this rank's heads -> [b, h, t, d]: all heads, for this rank's rows."""
    size, first = group.size(), tensors[0]
    batch, _, rows, width = first.shape
    heads = [tensor.size(1) for tensor in tensors]
    sent = first.new_empty((rows, batch, sum(heads), width))
    for tensor, part in zip(tensors, sent.split(heads, dim=2), strict=True):
        put_rows(part, order, tensor.permute(2, 0, 1, 3))
    received = all_to_all(sent.unflatten(0, (size, -1)), group)  # [a, t, b, heads, d]
    return [from_rows(part.permute(1, 2, 0, 3, 4).flatten(2, 3)) for part in received.split(heads, dim=3)]
