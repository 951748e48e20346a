"""Cross entropy of a language model's head without its logits: a chunk of tokens at a time, over any split of the vocabulary.

For 4M tokens and 128,256 words the logits are 5e11 numbers. Here at most `chunk` rows of them exist. Two ways, one set of formulas:

                        per-token losses                      weighted sum (`loss_weights`)
    forward             losses                                losses and both gradients
    backward            logits again, then both gradients     multiply the gradients by the upstream scalar
    GEMMs a chunk       4 (8 v h t)                           3 (6 v h t)
    kept meanwhile      hidden, weight, lse [rows]            gradient of hidden (in its dtype) and of the weight (float32)

Notation: v rows of vocabulary, h hidden size, t ranks of the group, rows = s * b tokens in s-major order. A rank holds v/t rows of
the weight. Under sequence parallelism it holds rows/t tokens, the r-th block of the gathered order; a chunk of these is gathered from
all ranks, and its gradient reduce-scattered, while its neighbours are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.kernels.attention import accumulator_dtype
from mcore_longctx.kernels.matmul import matmul_into
from mcore_longctx.parallel.collectives import all_gather
from mcore_longctx.parallel.token_tiles import SummedProducts, TokenTiles
from mcore_longctx.parallel.weight_gradient import WeightGradient

__all__ = ["chunked_linear_cross_entropy", "default_chunk"]

LOGIT_BYTES = 256 * 2**20
"""What the logits of one chunk may take on a rank (bf16 models: half as much again for their gradient in bf16)."""
_ROW_MULTIPLE = 128  # of a default chunk: whole GEMM tiles


def default_chunk(columns: int, dtype: torch.dtype) -> int:
    """Tokens whose logits fill `LOGIT_BYTES`, rounded down to a multiple of 128.

    Args:
        columns: v/t, rows of the vocabulary on one rank.
        dtype: of hidden states; logits are float32 (float64 for float64).
    """
    itemsize = accumulator_dtype(dtype).itemsize
    return max(1, LOGIT_BYTES // (itemsize * columns) // _ROW_MULTIPLE) * _ROW_MULTIPLE


@overload
def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    real_vocab_size: int | None = None,
    loss_weights: None = None,
    chunk: int | None = None,
) -> Tensor: ...


@overload
def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    real_vocab_size: int | None = None,
    loss_weights: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    real_vocab_size: int | None = None,
    loss_weights: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden @ weight.T) against labels; gradients of hidden and weight.

    Every rank of the group must call it, with the same labels, loss weights and chunk. A label that is not a token (padding) is
    fine where its weight, or upstream gradient, is 0: its loss is a finite number without meaning.

    Args:
        hidden: [rows, h], under sequence parallelism [rows/t, h]; bf16, float32 or float64.
        weight: [v/t, h], of the dtype of `hidden`. If Megatron's DDP has given it a `main_grad`, its gradient is added there.
        labels: int64 [rows], in gathered order.
        group: the ranks that share the vocabulary; None: this rank has all of it.
        sequence_parallel: `hidden` is split over the group too.
        real_vocab_size: rows of the whole vocabulary that stand for a token; the rest (padding, at its end) takes no part in the
            softmax and gets no gradient. None: all.
        loss_weights: float [rows], in gathered order: the factor of each token in the sum, final. Rows of weight 0 get exactly zero
            gradients, and a chunk of nothing else is skipped.
        chunk: rows of logits held at once. None: `default_chunk`. The result does not depend on it but for rounding.

    Returns:
        Without `loss_weights` the losses, float32 (float64 for float64) [rows], differentiable for any upstream gradient. Under
        `no_grad` nothing is kept.
        With `loss_weights` (sum of weight * loss, losses): a float32 (float64) scalar and the losses as above, not differentiable,
        0 where the weight is 0. Its backward can be called once.

    Raises:
        LayoutError: shapes that do not fit together, or a chunk below 1.
        ConfigError: `loss_weights` with float16.
    """
    labels = labels.contiguous()
    head = _Head.of(hidden, weight, labels, group, sequence_parallel, real_vocab_size, chunk)
    if loss_weights is None:
        losses: Tensor = _PerTokenLosses.apply(hidden, weight, labels, head)
        return losses
    if loss_weights.shape != labels.shape:
        raise LayoutError(f"loss_weights are {list(loss_weights.shape)}, labels {list(labels.shape)}: every token has one")
    if hidden.dtype is torch.float16:
        raise ConfigError(
            "loss_weights with float16: the gradients would be made before the loss scale is known", fix="leave loss_weights out"
        )
    needed = torch.is_grad_enabled()  # autograd does not tell a Function
    total, losses = _WeightedLoss.apply(hidden, weight, labels, loss_weights.to(head.dtype).contiguous(), head, needed)
    return total, losses


@dataclass(frozen=True)
class _Head:
    """What this rank holds of the head and of the tokens."""

    tiles: TokenTiles
    first: int  # word of this rank's first column
    columns: int  # v/t
    words: int  # of these columns: the first ones; the others are padding
    dtype: torch.dtype  # of logits and losses

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        real_vocab_size: int | None,
        chunk: int | None,
    ) -> _Head:
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        parts = size if sequence_parallel else 1
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or hidden.dtype is not weight.dtype:
            raise LayoutError(
                f"hidden is {list(hidden.shape)} {hidden.dtype}, weight {list(weight.shape)} {weight.dtype};"
                " expected [rows, h] and [v, h] of one dtype"
            )
        if labels.dim() != 1 or labels.size(0) != hidden.size(0) * parts:
            split = f" x {parts} ranks" if parts > 1 else ""
            raise LayoutError(
                f"labels are {list(labels.shape)} for {hidden.size(0):,}{split} rows of hidden: every token has one"
            )
        if chunk is None:
            chunk = default_chunk(weight.size(0), hidden.dtype)
        if chunk < 1:
            raise LayoutError(f"chunk is {chunk}, expected at least one token")
        columns = weight.size(0)
        first = rank * columns
        if real_vocab_size is None:
            real_vocab_size = size * columns
        if not 0 < real_vocab_size <= size * columns:
            raise LayoutError(f"real_vocab_size is {real_vocab_size:,}, the weights have {size * columns:,} rows")
        return cls(
            tiles=TokenTiles.of(hidden.size(0), chunk, group, sequence_parallel),
            first=first,
            columns=columns,
            words=min(max(real_vocab_size - first, 0), columns),
            dtype=accumulator_dtype(hidden.dtype),
        )

    def take(self, vector: Tensor, piece: slice) -> Tensor:
        """What belongs to a chunk of a vector [rows] in gathered order."""
        return vector.view(self.tiles.parts, self.tiles.rows)[:, piece].reshape(-1)

    def put(self, vector: Tensor, piece: slice, values: Tensor) -> None:
        """The reverse of `take`."""
        vector.view(self.tiles.parts, self.tiles.rows)[:, piece] = values.view(self.tiles.parts, -1)

    def buffer(self, hidden: Tensor) -> Tensor:
        """Room for the logits of one chunk."""
        return hidden.new_empty((self.tiles.tokens, self.columns), dtype=self.dtype)

    def logits(self, rows: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
        """[tokens, columns] in `buffer`."""
        logits = matmul_into(buffer[: rows.size(0)], rows, weight.t())
        if self.words < self.columns:
            # Less than any logit, so that padding gets a probability of exactly 0, and with it a gradient of 0. Finite, because a
            # rank may hold nothing else, and a softmax of -inf alone is NaN.
            logits[:, self.words :] = torch.finfo(self.dtype).min
        return logits

    def own_labels(self, labels: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        """(column of each label, int64 [tokens, 1]; is it one of this rank's). Elsewhere the column is one that exists."""
        column = self.take(labels, piece).unsqueeze(1) - self.first
        is_own = (column >= 0) & (column < self.words)
        return column.clamp_(0, self.columns - 1), is_own


@dataclass
class _Terms:
    """Of one chunk: losses and log-sum-exp over the whole vocabulary, and over this rank's part of it, [tokens] each."""

    losses: Tensor
    lse: Tensor
    own_lse: Tensor


def _softmax_(logits: Tensor, column: Tensor, is_own: Tensor, head: _Head) -> _Terms:
    """Turn the logits into the softmax over this rank's columns, in place; merge what losses need over the ranks."""
    predicted = torch.where(is_own, logits.gather(1, column), 0).squeeze(1)
    largest = logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    own_lse = largest - logits.amax(dim=1).log()  # the largest of a softmax is 1 / sum(exp(logit - largest))
    if head.tiles.group is None:
        return _Terms(own_lse - predicted, own_lse, own_lse)
    every_lse, every_predicted = all_gather(torch.stack((own_lse, predicted)), head.tiles.group).unbind(1)  # [t, tokens] each
    lse = every_lse.logsumexp(dim=0)
    return _Terms(lse - every_predicted.sum(dim=0), lse, own_lse)


@dataclass
class _Gradients:
    """Gradients of hidden and weight, chunk by chunk; None where one is not wanted."""

    weight: Tensor
    of_hidden: SummedProducts | None
    of_weight: WeightGradient | None
    low: Tensor | None = None  # room for a chunk's gradient of the logits in the dtype of the weights

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, head: _Head, needs: tuple[bool, bool], into_main_grad: bool) -> _Gradients:
        return cls(
            weight,
            SummedProducts(torch.empty_like(hidden, memory_format=torch.contiguous_format), head.tiles) if needs[0] else None,
            WeightGradient(weight, into_main_grad=into_main_grad) if needs[1] else None,
        )

    def add(
        self, piece: slice, rows: Tensor, probabilities: Tensor, column: Tensor, is_own: Tensor, factor: Tensor, upstream: Tensor
    ) -> None:
        """One chunk: the gradient of its logits is factor * probabilities - upstream at the label, [tokens] each."""
        at_label = probabilities.gather(1, column) * factor.unsqueeze(1) - upstream.unsqueeze(1) * is_own
        if probabilities.dtype is rows.dtype:
            of_logits = probabilities.mul_(factor.unsqueeze(1))
        else:
            if self.low is None:
                self.low = torch.empty_like(probabilities, dtype=rows.dtype)
            of_logits = torch.mul(probabilities, factor.unsqueeze(1), out=self.low[: rows.size(0)])
        of_logits.scatter_(1, column, at_label.to(of_logits.dtype))
        if self.of_hidden is not None:
            self.of_hidden.put(piece, of_logits, self.weight)
        if self.of_weight is not None:
            self.of_weight.add(of_logits, rows)

    def finish(self) -> tuple[Tensor | None, WeightGradient | None]:
        """The gradient of hidden, and the sum for the weight."""
        if self.of_hidden is None:
            return None, self.of_weight
        self.of_hidden.wait()
        return self.of_hidden.out, self.of_weight


class _PerTokenLosses(torch.autograd.Function):
    """apply(hidden, weight, labels, head) -> losses [rows]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: _Head) -> Tensor:
        losses, lse = (hidden.new_empty(labels.size(0), dtype=head.dtype) for _ in range(2))
        buffer = head.buffer(hidden)
        for piece, (rows,) in head.tiles.gathered(head.tiles.pieces(), hidden):
            logits = head.logits(rows, weight, buffer)
            terms = _softmax_(logits, *head.own_labels(labels, piece), head)
            head.put(losses, piece, terms.losses)
            head.put(lse, piece, terms.lse)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.head, ctx.parameter = head, weight  # a saved tensor loses its attributes (main_grad) in saved_tensors_hooks
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        head: _Head = ctx.head
        hidden, weight, labels, lse = ctx.saved_tensors
        gradients = _Gradients.of(hidden, ctx.parameter, head, ctx.needs_input_grad[:2], into_main_grad=True)
        upstream, buffer = upstream.contiguous(), head.buffer(hidden)
        for piece, (rows,) in head.tiles.gathered(head.tiles.pieces(), hidden):
            factor = head.take(upstream, piece)
            probabilities = head.logits(rows, weight, buffer).sub_(head.take(lse, piece).unsqueeze(1)).exp_()
            gradients.add(piece, rows, probabilities, *head.own_labels(labels, piece), factor, factor)
        of_hidden, of_weight = gradients.finish()
        return of_hidden, of_weight and of_weight.finish(), None, None


class _WeightedLoss(torch.autograd.Function):
    """apply(hidden, weight, labels, loss_weights, head, needed) -> (sum, losses [rows]); gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, head: _Head, needed: bool
    ) -> tuple[Tensor, Tensor]:
        losses = hidden.new_zeros(labels.size(0), dtype=head.dtype)
        total = hidden.new_zeros((), dtype=torch.float64)  # millions of losses: float32 would lose digits
        needs = (needed and ctx.needs_input_grad[0], needed and ctx.needs_input_grad[1])
        gradients = _Gradients.of(hidden, weight, head, needs, into_main_grad=False)
        counted, skipped = _by_weight(head, loss_weights)
        buffer = head.buffer(hidden)
        for piece, (rows,) in head.tiles.gathered(counted, hidden):
            upstream, own_labels = head.take(loss_weights, piece), head.own_labels(labels, piece)
            logits = head.logits(rows, weight, buffer)
            terms = _softmax_(logits, *own_labels, head)
            token_losses = terms.losses.masked_fill_(upstream == 0, 0)
            total += (token_losses * upstream).sum(dtype=torch.float64)
            head.put(losses, piece, token_losses)
            if any(needs):
                # from a softmax over this rank's columns to one over all of them
                factor = (terms.own_lse - terms.lse).exp_() * upstream
                gradients.add(piece, rows, logits, *own_labels, factor, upstream)
        ctx.of_hidden, ctx.of_weight = gradients.finish()
        if ctx.of_hidden is not None:
            for piece in skipped:
                ctx.of_hidden[piece] = 0
        ctx.is_spent, ctx.step = False, head.tiles.step
        ctx.mark_non_differentiable(losses)
        return total.to(head.dtype), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        if ctx.is_spent:
            raise RuntimeError(
                "the gradients of this weighted loss have been handed out; to go back twice, leave loss_weights out"
            )
        of_hidden, of_weight = ctx.of_hidden, ctx.of_weight
        ctx.is_spent, ctx.of_hidden, ctx.of_weight = True, None, None
        if of_hidden is not None:
            for rows in of_hidden.split(ctx.step):
                # as a scalar `upstream` would be rounded to the dtype of the rows first
                torch.mul(rows, upstream.view(1, 1), out=rows)
        return of_hidden, of_weight and of_weight.finish(upstream), None, None, None, None


def _by_weight(head: _Head, loss_weights: Tensor) -> tuple[list[slice], list[slice]]:
    """Pieces with a weight that is not 0, and the others: the same on all ranks. Waits for the device once."""
    pieces = head.tiles.pieces()
    if not pieces:
        return [], []
    is_counted = torch.stack([head.take(loss_weights, piece).any() for piece in pieces]).tolist()
    pairs = list(zip(pieces, is_counted, strict=True))
    return [piece for piece, counts in pairs if counts], [piece for piece, counts in pairs if not counts]
