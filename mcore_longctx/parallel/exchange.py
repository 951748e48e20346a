"""Attention over one or more ranks behind one interface, and its two autograd Functions.

An exchange is made once from the process groups and then knows how queries, keys and values of different ranks meet. `attention`
is a differentiable step over it; `replayed_attention` gives back an output that was kept and computes nothing, while its backward
is that of the attention: both rest on the backward being called directly with the kept output and log-sum-exp.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.kernels.attention import attention_kernel
from mcore_longctx.parallel.all_gather import all_gather_backward, all_gather_forward
from mcore_longctx.parallel.ring import ring_backward, ring_forward

__all__ = ["CP_COMM_TYPES", "Exchange", "attention", "make_exchange", "replayed_attention"]

CP_COMM_TYPES = ("p2p", "all_gather")


class Exchange(Protocol):
    """Causal attention of this rank's rows over the rows of all ranks of a group.

    query and out are [b, n, t, d], key and value [b, g, t, d], all in the rows of this rank. The layout of lse belongs to the
    exchange: 4 bytes for each row and head of this rank (8 for float64), to be handed back to `backward` as it came.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pack: Any, scale: float) -> tuple[Tensor, Tensor]:
        """Return out (dtype of query) and lse."""

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pack: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""


def make_exchange(cp_comm_type: str, cp_group: dist.ProcessGroup, hierarchical_groups: Any = None) -> Exchange:
    """The exchange for one of Megatron's `cp_comm_type` over a context-parallel group."""
    if cp_comm_type not in CP_COMM_TYPES:
        raise ConfigError(f"cp_comm_type is {cp_comm_type!r}", fix=f"use one of {', '.join(CP_COMM_TYPES)}")
    if cp_group.size() == 1:
        return LocalExchange()
    return _GroupExchange(cp_comm_type, cp_group)


class LocalExchange:
    """One rank: nothing moves."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pack: Any, scale: float) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        return attention_kernel(query).forward(query, key, value, causal=True, scale=scale)

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pack: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange`."""
        return attention_kernel(query).backward(grad_out, query, key, value, out, lse, causal=True, scale=scale)


class _GroupExchange:
    def __init__(self, cp_comm_type: str, group: dist.ProcessGroup) -> None:
        self.group = group
        is_ring = cp_comm_type == "p2p"
        self._forward = ring_forward if is_ring else all_gather_forward
        self._backward = ring_backward if is_ring else all_gather_backward

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pack: Any, scale: float) -> tuple[Tensor, Tensor]:
        return self._forward(query, key, value, self.group, scale)

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pack: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backward(grad_out, query, key, value, out, lse, self.group, scale)


def attention(query: Tensor, key: Tensor, value: Tensor, exchange: Exchange, pack: Any, scale: float) -> Tensor:
    """`exchange.forward` as one differentiable step: out [b, n, t, d]."""
    return _Attention.apply(query, key, value, exchange, pack, scale)


def replayed_attention(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, exchange: Exchange, pack: Any, scale: float
) -> Tensor:
    """`out` as it was kept, with the gradients of `attention`. `out` and `lse` are those of an earlier `exchange.forward`."""
    return _ReplayedAttention.apply(query, key, value, out, lse, exchange, pack, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, exchange: Exchange, pack: Any, scale: float) -> Tensor:
        out, lse = exchange.forward(query, key, value, pack, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = (exchange, pack, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        exchange, pack, scale = ctx.call
        return (*exchange.backward(grad_outputs[0], *ctx.saved_tensors, pack, scale), None, None, None)


class _ReplayedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, exchange: Exchange, pack: Any, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = (exchange, pack, scale)
        return out.view_as(out)  # an input that is returned as it is would be marked as its own gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        exchange, pack, scale = ctx.call
        return (*exchange.backward(grad_outputs[0], *ctx.saved_tensors, pack, scale), None, None, None, None, None)
