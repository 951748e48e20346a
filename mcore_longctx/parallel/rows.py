"""Rows of a pack as tensors: the layout in memory that travels, and rows put into another order.

Attention tensors are [b, heads, rows, d]. What is sent and what is put in order is a block of whole rows, so tensors that are made
here lie in memory as [rows, b, heads, d], which is also how Megatron holds them: a prefix of the rows is one contiguous block.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mcore_longctx.layout.plans import GatherPlan, RingPlan

__all__ = ["as_rows", "empty_rows", "from_rows", "order_on", "put_rows", "take_rows"]

_ORDERS: WeakKeyDictionary[RingPlan | GatherPlan, dict[torch.device, Tensor]] = WeakKeyDictionary()


def as_rows(tensor: Tensor) -> Tensor:
    """[b, heads, rows, d] -> [rows, b, heads, d], contiguous; a view where it lies like this already."""
    return tensor.permute(2, 0, 1, 3).contiguous()


def from_rows(rows: Tensor) -> Tensor:
    """[rows, b, heads, d] -> [b, heads, rows, d], a view."""
    return rows.permute(1, 2, 0, 3)


def empty_rows(like: Tensor, *, rows: int | None = None, dtype: torch.dtype | None = None, zero: bool = False) -> Tensor:
    """A tensor [b, heads, rows, d] that lies in memory by rows; shape, dtype and device of `like` where they are not given."""
    batch, heads, own_rows, width = like.shape
    shape = (own_rows if rows is None else rows, batch, heads, width)
    return from_rows((torch.zeros if zero else torch.empty)(shape, dtype=dtype or like.dtype, device=like.device))


def take_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Row k of the result is row order[k]: [r, ...] -> [len(order), ...]."""
    return rows.index_select(0, order)


def put_rows(target: Tensor, order: Tensor, rows: Tensor) -> None:
    """Write row k of `rows` to row order[k] of `target`: the inverse of `take_rows`."""
    target.index_copy_(0, order, rows)


def order_on(plan: RingPlan | GatherPlan, device: torch.device) -> Tensor:
    """`plan.order` as an int64 tensor on a device, moved there once."""
    orders = _ORDERS.setdefault(plan, {})
    if device not in orders:
        assert plan.order is not None
        orders[device] = torch.from_numpy(plan.order).to(device)
    return orders[device]
