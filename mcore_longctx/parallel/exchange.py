"""Attention over the ranks of a context-parallel group, one interface for every `cp_comm_type`, and its two autograd Functions.

An exchange is made once from the process groups and then knows how queries, keys and values of different ranks meet:

    cp_comm_type   inner (a2a)   outer (ring)
    p2p            -             all ranks
    a2a            all ranks     -
    a2a+p2p        neighbours    strided ranks (Megatron's hierarchical groups, in this order)
    all_gather     keys and values of all ranks are gathered

`attention` is a differentiable step over an exchange. `replayed_attention` gives back an output that was kept and computes nothing,
while its backward is that of the attention: both rest on the backward being called directly with the kept output and log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.kernels.attention import KERNEL_NAMES, attention_kernel
from mcore_longctx.kernels.interface import AttentionKernel, expand_groups, sum_groups
from mcore_longctx.layout.heads import key_head_replicas
from mcore_longctx.layout.packed import PackLayout
from mcore_longctx.layout.plans import RingPlan, gather_plan, ring_plan
from mcore_longctx.parallel.all_gather import all_gather_backward, all_gather_forward
from mcore_longctx.parallel.ring import ring_backward, ring_forward
from mcore_longctx.parallel.rows import order_on
from mcore_longctx.parallel.ulysses import heads_to_rows, rows_to_heads

__all__ = ["CP_COMM_TYPES", "Exchange", "attention", "make_exchange", "replayed_attention"]

CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
_WITHOUT_PLANS = tuple(name for name in KERNEL_NAMES if name != "cudnn")


class Exchange(Protocol):
    """Causal attention of this rank's rows over the rows of all ranks of a group.

    query and out are [b, n, t, d], key and value [b, g, t, d], all in the rows of this rank, which `pack` describes (b = 1 unless it is
    a plain batch). Rows of padding are never read, and are 0 in out and in all gradients. The layout of lse belongs to the exchange:
    4 bytes for each row and head of this rank (8 for float64), to be handed back to `backward` as it came.

    inner: neighbouring ranks that share heads, which decides what has to be balanced (`pack_layout`).
    """

    inner: int

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pack: PackLayout, scale: float) -> tuple[Tensor, Tensor]:
        """Return out (dtype of query) and lse."""

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        pack: PackLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""


def make_exchange(
    cp_comm_type: str,
    group: dist.ProcessGroup,
    hierarchical_groups: Sequence[dist.ProcessGroup] | None = None,
    kernels: tuple[str, ...] = (),
) -> Exchange:
    """The exchange for one of Megatron's `cp_comm_type` over a context-parallel group.

    Args:
        cp_comm_type: one of CP_COMM_TYPES.
        group: the context-parallel group.
        hierarchical_groups: for `a2a+p2p`: this rank's group of neighbours, then its group of strided ranks.
        kernels: names of the attention kernels to choose among; empty: all.

    Raises:
        ConfigError: another name, or `a2a+p2p` without its two groups.
        LayoutError: the sizes of the two groups do not multiply to that of the group, or they are not neighbours and strided ranks.
    """
    if cp_comm_type not in CP_COMM_TYPES:
        raise ConfigError(f"cp_comm_type is {cp_comm_type!r}", fix=f"use one of {', '.join(CP_COMM_TYPES)}")
    if cp_comm_type == "all_gather" and group.size() > 1:
        return _AllGatherExchange(group, kernels)
    inner, outer = {"p2p": (None, group), "a2a": (group, None)}.get(cp_comm_type, (None, group))
    if cp_comm_type == "a2a+p2p" and group.size() > 1:
        if hierarchical_groups is None or len(hierarchical_groups) != 2:
            raise ConfigError(
                "cp_comm_type a2a+p2p without its two groups: ranks would attend to their own rows only",
                fix="set hierarchical_context_parallel_sizes to [a2a ranks, p2p ranks], in the config and in initialize_model_parallel",
            )
        inner, outer = hierarchical_groups
        _check_hierarchy(inner, outer, group)
    return _RingExchange(inner, outer, kernels)


def _check_hierarchy(inner: dist.ProcessGroup, outer: dist.ProcessGroup, group: dist.ProcessGroup) -> None:
    """Neighbours first, strided ranks second: in the other order every rank would take its rows for those of another."""
    size, rank = inner.size(), group.rank()
    if size * outer.size() != group.size():
        raise LayoutError(
            f"hierarchical context-parallel groups of {size} x {outer.size()} ranks do not make {group.size()}",
            fix="the product of hierarchical_context_parallel_sizes is context_parallel_size",
        )
    ranks = dist.get_process_group_ranks(group)
    neighbours, strided = ranks[rank // size * size :][:size], ranks[rank % size :: size]
    if dist.get_process_group_ranks(inner) != neighbours or dist.get_process_group_ranks(outer) != strided:
        raise LayoutError(
            f"the hierarchical context-parallel groups of rank {rank} are not its {size} neighbours, then every {size}th rank",
            fix="the first group is for a2a, the second for p2p",
        )


class _RingExchange:
    """`a2a` over neighbours, then a ring over strided ranks; either may be missing."""

    def __init__(self, inner: dist.ProcessGroup | None, outer: dist.ProcessGroup | None, kernels: tuple[str, ...]) -> None:
        self.neighbours = inner if inner is not None and inner.size() > 1 else None
        self.ring = outer if outer is not None and outer.size() > 1 else None
        self.inner = self.neighbours.size() if self.neighbours is not None else 1
        self.kernels = kernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pack: PackLayout, scale: float) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        plan, kernel = self._plan(pack), _kernel(query, pack, self.kernels)
        if self.neighbours is None:
            return ring_forward(query, key, value, plan, self.ring, kernel, scale)
        replicas, order = key_head_replicas(query.size(1), key.size(1), self.inner), order_on(plan, query.device)
        rows = (query, expand_groups(key, replicas), expand_groups(value, replicas))
        q, k, v = rows_to_heads(rows, self.neighbours, order)
        out, lse = ring_forward(q, k, v, plan, self.ring, kernel, scale)
        return heads_to_rows((out,), self.neighbours, order)[0], lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        pack: PackLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange`."""
        plan, kernel = self._plan(pack), _kernel(query, pack, self.kernels)
        if self.neighbours is None:
            return ring_backward(grad_out, query, key, value, out, lse, plan, self.ring, kernel, scale)
        replicas, order = key_head_replicas(query.size(1), key.size(1), self.inner), order_on(plan, query.device)
        rows = (grad_out, query, expand_groups(key, replicas), expand_groups(value, replicas), out)
        of_out, q, k, v, o = rows_to_heads(rows, self.neighbours, order)
        gradients = ring_backward(of_out, q, k, v, o, lse, plan, self.ring, kernel, scale)
        grad_query, grad_key, grad_value = heads_to_rows(gradients, self.neighbours, order)
        return grad_query, sum_groups(grad_key, replicas), sum_groups(grad_value, replicas)

    def _plan(self, pack: PackLayout) -> RingPlan:
        return ring_plan(pack, self.inner, self.ring.rank() if self.ring is not None else 0)


class _AllGatherExchange:
    inner = 1

    def __init__(self, group: dist.ProcessGroup, kernels: tuple[str, ...]) -> None:
        self.group, self.kernels = group, kernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pack: PackLayout, scale: float) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        plan, kernel = gather_plan(pack, self.group.rank()), _kernel(query, pack, self.kernels)
        return all_gather_forward(query, key, value, plan, self.group, kernel, scale)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        pack: PackLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange`."""
        plan, kernel = gather_plan(pack, self.group.rank()), _kernel(query, pack, self.kernels)
        return all_gather_backward(grad_out, query, key, value, out, lse, plan, self.group, kernel, scale)


def _kernel(query: Tensor, pack: PackLayout, kernels: tuple[str, ...]) -> AttentionKernel:
    """The kernel for a pack. Unless it is asked for, cuDNN does not compute several documents, whose lengths are new in each step.

    It builds a plan for every new shape, which takes half a second in each direction and device memory that is never given back
    (modelscope/FunASR#3704, and the message of its failure in torch's cudnn/MHA.cpp).
    """
    if not kernels and len(pack.documents) > 1:
        kernels = _WITHOUT_PLANS
    return attention_kernel(query, kernels)


def attention(query: Tensor, key: Tensor, value: Tensor, exchange: Exchange, pack: PackLayout, scale: float) -> Tensor:
    """`exchange.forward` as one differentiable step: out [b, n, t, d]."""
    return _Attention.apply(query, key, value, exchange, pack, scale)


def replayed_attention(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, exchange: Exchange, pack: PackLayout, scale: float
) -> Tensor:
    """`out` as it was kept, with the gradients of `attention`. `out` and `lse` are those of an earlier `exchange.forward`."""
    return _ReplayedAttention.apply(query, key, value, out, lse, exchange, pack, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, exchange: Exchange, pack: PackLayout, scale: float
    ) -> Tensor:
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
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        exchange: Exchange,
        pack: PackLayout,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = (exchange, pack, scale)
        return out.view_as(out)  # an input that is returned as it is would be marked as its own gradient

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        exchange, pack, scale = ctx.call
        return (*exchange.backward(grad_outputs[0], *ctx.saved_tensors, pack, scale), None, None, None, None, None)
