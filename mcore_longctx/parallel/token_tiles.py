"""Tokens of a tensor-parallel group, a tile at a time: gathered from all ranks, and products summed over the ranks put back.

These are the exchanges of Megatron's ColumnParallelLinear and RowParallelLinear, cut into tiles. One is under way while the
neighbouring tiles are computed; each holds one tile of memory.

Notation: t ranks, h hidden size. Under sequence parallelism a rank holds the r-th of t equal blocks of the rows; a tile takes the same
rows of every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.parallel.collectives import start_all_gather, start_reduce_scatter

__all__ = ["SummedProducts", "TokenTiles"]


@dataclass(frozen=True)
class TokenTiles:
    """How the rows of this rank are cut."""

    group: dist.ProcessGroup | None  # None: one rank
    parts: int  # ranks whose rows are in a tile: t under sequence parallelism, else 1
    rows: int  # of this rank
    step: int  # of them in a tile

    @classmethod
    def of(cls, rows: int, tokens: int | None, group: dist.ProcessGroup | None, sequence_parallel: bool) -> TokenTiles:
        """Tiles of about `tokens` rows, those of all ranks counted; None: one tile."""
        size = 1 if group is None else group.size()
        parts = size if sequence_parallel else 1
        step = rows if tokens is None else min(tokens // parts, rows)
        return cls(group if size > 1 else None, parts, rows, max(1, step))

    @property
    def tokens(self) -> int:
        """Rows of the largest tile."""
        return self.step * self.parts

    def pieces(self) -> list[slice]:
        """This rank's rows, tile by tile."""
        return [slice(i, min(i + self.step, self.rows)) for i in range(0, self.rows, self.step)]

    def gathered(self, pieces: list[slice], *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """(piece, its rows of all parts [parts * piece, h] of each tensor), for tensors of [rows, h]."""
        if self.parts == 1:
            for piece in pieces:
                yield piece, [tensor[piece] for tensor in tensors]
            return
        under_way = self._gather(pieces[0], tensors) if pieces else []
        for number, piece in enumerate(pieces, start=1):
            arriving = under_way
            for _, work in arriving:
                work.wait()
            if number < len(pieces):
                under_way = self._gather(pieces[number], tensors)
            yield piece, [blocks.flatten(0, 1) for blocks, _ in arriving]

    def _gather(self, piece: slice, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, dist.Work]]:
        assert self.group is not None
        return [start_all_gather(tensor[piece], self.group) for tensor in tensors]


@dataclass
class SummedProducts:
    """left @ right of each tile, summed over the ranks, as rows of `out` [rows, h]. At most one exchange is under way."""

    out: Tensor
    tiles: TokenTiles
    under_way: list[tuple[dist.Work, Tensor]] = field(default_factory=list)  # and the memory it works on

    def put(self, piece: slice, left: Tensor, right: Tensor) -> None:
        """Left [tile, k], right [k, h]; under sequence parallelism each rank gets the rows of its own block."""
        # detached: a view would keep `out` in use after the exchange, and autograd copies a gradient that is in use
        own, group = self.out.detach()[piece], self.tiles.group
        self.wait()
        if group is None:
            torch.mm(left, right, out=own)
        elif self.tiles.parts > 1:
            summands = left @ right
            self.under_way.append((start_reduce_scatter(summands, own, group), summands))
        else:
            torch.mm(left, right, out=own)
            work = dist.all_reduce(own, group=group, async_op=True)
            assert work is not None
            self.under_way.append((work, own))

    def wait(self) -> None:
        """Until `out` may be read."""
        while self.under_way:
            self.under_way.pop()[0].wait()
