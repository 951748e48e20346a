"""Training steps of the real model with every living tensor counted, on one rank or on several over gloo.

Two things are put in the place of what a CPU does differently from a GPU, and nothing else:

- RMSNorm runs as one operator that keeps its input and one float32 number of a row, as torch's CUDA operator (`aten::_fused_rms_norm`)
  does. On a CPU torch takes F.rms_norm apart, and autograd keeps float32 copies of the rows.
- reduce-scatter works in place, as NCCL does. Gloo's first makes a copy of all that is sent.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))  # live_bytes

import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from mcore_longctx.families import ModelShape
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import build_gpt_model, init_process_groups
from mcore_longctx.model.norm import RMSNorm
from mcore_longctx.parallel import collectives, rows
from mcore_longctx.recipe.schema import Activations, Parallel, TokenCount
from mcore_longctx.rope import RopeScaling

__all__ = ["Case", "Counted", "counted"]


@dataclass(frozen=True)
class Case:
    """What runs: a model, a layout, what is kept. `lengths` are tokens of a whole sequence."""

    shape: ModelShape
    lengths: tuple[int, ...]
    parallel: Parallel = field(default_factory=Parallel)
    recompute: Any = "attention_kept"
    precision: Any = "fp32"
    mlp_tile: int | None = 64
    loss_chunk: int | None = 32


@dataclass(frozen=True)
class Counted:
    """Bytes above weights, gradients and batch: alive at the end of the forward pass, and the most of the whole step."""

    kept: int
    peak: int


def counted(case: Case) -> list[Counted]:
    """Run in each rank: one step for each length."""
    with _AsOnAGpu():
        init_process_groups(case.parallel, seed=1)
        return [_step(case, length) for length in case.lengths]


def _step(case: Case, length: int) -> Counted:
    shape, parallel = case.shape, case.parallel
    activations = Activations(
        recompute=case.recompute,
        mlp_tile=None if case.mlp_tile is None else TokenCount(case.mlp_tile),
        loss_chunk=None if case.loss_chunk is None else TokenCount(case.loss_chunk),
    )
    rope = RopeScaling(type="none", head_dim=shape.kv_channels, rope_theta=1e4)
    model = build_gpt_model(
        shape, rope, parallel, precision=case.precision, seq_length=length, seed=1, activations=activations
    ).train()
    size = parallel.context_parallel_size
    rank = torch.distributed.get_rank() // parallel.tensor_model_parallel_size % size
    positions = torch.from_numpy(zigzag_positions(length, size, rank))[None]
    ids, labels = (torch.randint(shape.vocab_size, positions.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    weights = torch.full(positions.shape, 1 / length)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    get_global_memory_buffer().buffer.clear()  # of the length before
    rows._ORDERS.clear()  # of the case before
    states = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), positions, ids, labels, weights]
    with device_context(), LiveBytes(states) as live:
        loss = model(ids, positions, None, labels=labels, loss_weights=weights)
        kept = live.now - live.at_start
        torch.autograd.backward(loss)
    # of the layers: a vocabulary shard may be padding alone
    assert all(parameter.grad.abs().max() > 0 for parameter in model.decoder.parameters())
    return Counted(kept, live.peak_above_start)


# ------------------------------------------------------------------------------------------------------- what a GPU does


class _AsOnAGpu:
    def __enter__(self) -> None:
        self.norm, self.scatter = RMSNorm.forward, collectives._REDUCE_SCATTER
        self.megatron = [(module, module.dist_reduce_scatter_func) for module in (layers, mappings)]
        RMSNorm.forward = lambda norm, x: _FusedNorm.apply(x, norm.weight, norm.eps)
        collectives._REDUCE_SCATTER = _reduce_scatter_in_place
        for module, _ in self.megatron:
            module.dist_reduce_scatter_func = _reduce_scatter_in_place

    def __exit__(self, *_: object) -> None:
        RMSNorm.forward, collectives._REDUCE_SCATTER = self.norm, self.scatter
        for module, function in self.megatron:
            module.dist_reduce_scatter_func = function


class _Done:
    def wait(self) -> bool:
        return True


def _reduce_scatter_in_place(output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> _Done:
    """What is sent may be overwritten: nobody here reads it afterwards."""
    parts = tensor.view(-1).chunk(group.size())
    for rank, part in enumerate(parts):
        dist.reduce(part, dst=dist.get_global_rank(group, rank), group=group)
    output.view(-1).copy_(parts[group.rank()])
    return _Done()


@torch.library.custom_op("mcore_longctx_test::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x.float() * rstd).to(x.dtype) * weight, rstd


@torch.library.custom_op("mcore_longctx_test::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    upstream, normed = grad.float() * weight.float(), x.float() * rstd
    of_x = (upstream - normed * (upstream * normed).mean(-1, keepdim=True)) * rstd
    return of_x.to(x.dtype), (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_rms_norm_backward(grads[0], *ctx.saved_tensors), None)


def with_layers(case: Case, layers_: int) -> Case:
    """The same with another depth."""
    return replace(case, shape=replace(case.shape, num_layers=layers_))
