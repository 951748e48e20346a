"""SwiGLU feed-forward that keeps nothing but its input: silu(x @ gate.T) * (x @ up.T) @ down.T, a tile of tokens at a time.

A bias of gate and up is added to their products. That of `down` is the caller's: it is added once, after the sum over ranks.

                    matrices of a tile          of these, GEMMs
    forward         gate, up, down              2
    backward        gate, up again              1   (the product with `down` is never made again)
                    gradients                   4   (of the product, of down, of gate and up, of x)

Inside a layer that is recomputed, forward runs once without a tape, and its second run (`skip_forward`) computes nothing: autograd
needs only somewhere to send the gradient. So a recomputed layer pays gate and up twice and down once, whatever the tile.

Notation: f feed-forward size, h hidden size, t ranks of the group. A rank holds f/t columns of gate and up and of `down`, as
Megatron's ColumnParallelLinear and RowParallelLinear do, and exchanges what they exchange, tile by tile: the exchange of a tile runs
while its neighbours are computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.attention import accumulator_dtype
from mcore_longctx.parallel.token_tiles import SummedProducts, TokenTiles
from mcore_longctx.parallel.weight_gradient import WeightGradient

__all__ = ["tiled_swiglu"]


def tiled_swiglu(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    tile: int | None = None,
    skip_forward: bool = False,
) -> Tensor:
    """Feed-forward of every token; its training memory beyond x, out and their gradients does not grow with tokens.

    Every rank of the group must call it, with the same tile.

    Args:
        x: [s, b, h], the norm's output; under sequence parallelism [s/t, b, h]. Any number of leading dimensions is fine.
        gate_up_weight: [2 f/t, h], this rank's part of gate above its part of up. If Megatron's DDP has given it a `main_grad`, its
            gradient is added there; so with `down_weight`.
        down_weight: [h, f/t].
        gate_up_bias: [2 f/t]; None: there is none.
        group: the ranks that share f; None: this rank has all of it.
        sequence_parallel: `x` and the result are split over the group too.
        tile: tokens of one GEMM, those of all ranks counted. None: all in one.
        skip_forward: return a tensor of the right shape that takes no memory and has no meaning (zeros), whose backward is the
            same: for the second run of a layer that is recomputed, where nothing reads this result.

    Returns:
        Like `x`.

    Raises:
        LayoutError: shapes that do not fit together, or a tile below 1.
    """
    hidden, inner = x.size(-1), down_weight.size(1)
    if tuple(gate_up_weight.shape) != (2 * inner, hidden) or down_weight.size(0) != hidden:
        raise LayoutError(
            f"x is {list(x.shape)}, gate and up are {list(gate_up_weight.shape)}, down is {list(down_weight.shape)};"
            " expected [..., h], [2 f, h] and [h, f]"
        )
    if gate_up_bias is not None and tuple(gate_up_bias.shape) != (2 * inner,):
        raise LayoutError(f"the bias of gate and up is {list(gate_up_bias.shape)}, expected {[2 * inner]}")
    if tile is not None and tile < 1:
        raise LayoutError(f"tile is {tile}, expected at least one token")
    tiles = TokenTiles.of(x.numel() // hidden, tile, group, sequence_parallel)
    out: Tensor = _TiledSwiglu.apply(x, gate_up_weight, down_weight, gate_up_bias, tiles, skip_forward)
    return out


class _TiledSwiglu(torch.autograd.Function):
    """apply(x, gate_up_weight, down_weight, gate_up_bias, tiles, skip_forward) -> out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None,
        tiles: TokenTiles,
        skip_forward: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, gate_up_weight, down_weight, gate_up_bias)
        # a saved tensor loses its attributes (main_grad) in saved_tensors_hooks
        ctx.parameters, ctx.tiles = (gate_up_weight, down_weight), tiles
        if skip_forward:
            return x.new_zeros(()).expand(x.shape)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        products = SummedProducts(out.view(tiles.rows, -1), tiles)
        gate_up = x.new_empty(tiles.tokens, gate_up_weight.size(0))
        for piece, (rows,) in tiles.gathered(tiles.pieces(), x.reshape(tiles.rows, -1)):
            gate, up = _gate_and_up(rows, gate_up_weight, gate_up_bias, gate_up[: rows.size(0)])
            products.put(piece, F.silu(gate, inplace=True).mul_(up), down_weight.t())
        products.wait()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        tiles: TokenTiles = ctx.tiles
        x, gate_up_weight, down_weight, gate_up_bias = ctx.saved_tensors
        gate_up_gradient, down_gradient = (
            WeightGradient(weight) if needed else None
            for weight, needed in zip(ctx.parameters, ctx.needs_input_grad[1:3], strict=True)
        )
        bias_gradient = None
        if ctx.needs_input_grad[3]:
            bias_gradient = gate_up_bias.new_zeros(gate_up_bias.shape, dtype=accumulator_dtype(gate_up_bias.dtype))
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        products = None if grad_x is None else SummedProducts(grad_x.view(tiles.rows, -1), tiles)
        gate_up, grad_gate_up = (x.new_empty(tiles.tokens, gate_up_weight.size(0)) for _ in range(2))
        grad_product = x.new_empty(tiles.tokens, down_weight.size(1))
        flat = x.reshape(tiles.rows, -1), grad_out.reshape(tiles.rows, -1)
        for piece, (rows, grad_rows) in tiles.gathered(tiles.pieces(), *flat):
            n = rows.size(0)
            gate, up = _gate_and_up(rows, gate_up_weight, gate_up_bias, gate_up[:n])
            grad_gate, grad_up = grad_gate_up[:n].chunk(2, dim=1)
            grad = torch.mm(grad_rows, down_weight, out=grad_product[:n])
            # rounded where autograd rounds; intermediates live in the memory of what comes after them
            silu = torch.ops.aten.silu.out(gate, out=grad_gate)
            if down_gradient is not None:
                down_gradient.add(grad_rows, torch.mul(silu, up, out=grad_up))
            torch.mul(grad, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
            if products is not None:
                products.put(piece, grad_gate_up[:n], gate_up_weight)
            if gate_up_gradient is not None:
                gate_up_gradient.add(grad_gate_up[:n], rows)
            if bias_gradient is not None:
                bias_gradient += grad_gate_up[:n].sum(0, dtype=bias_gradient.dtype)
        if products is not None:
            products.wait()
        weight_gradients = (gradient and gradient.finish() for gradient in (gate_up_gradient, down_gradient))
        # a vector: Megatron's DDP adds it to its buffer itself
        return grad_x, *weight_gradients, None if bias_gradient is None else bias_gradient.to(gate_up_bias.dtype), None, None


def _gate_and_up(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[Tensor, ...]:
    """Gate and up of rows [n, h], computed in `out` [n, 2 f/t]: two views [n, f/t]."""
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
    return out.chunk(2, dim=1)
