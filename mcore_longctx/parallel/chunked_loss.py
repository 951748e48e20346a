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

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.attention import accumulator_dtype
from mcore_longctx.kernels.matmul import matmul_into
from mcore_longctx.parallel.collectives import all_gather, start_all_gather, start_reduce_scatter
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
    """
    head = _Head.of(hidden, weight, labels, group, sequence_parallel, real_vocab_size, chunk)
    if loss_weights is None:
        losses: Tensor = _PerTokenLosses.apply(hidden, weight, labels, head)
        return losses
    if loss_weights.shape != labels.shape:
        raise LayoutError(f"loss_weights are {list(loss_weights.shape)}, labels {list(labels.shape)}: every token has one")
    needed = torch.is_grad_enabled()  # autograd does not tell a Function
    total, losses = _WeightedLoss.apply(hidden, weight, labels, loss_weights.to(head.dtype), head, needed)
    return total, losses


@dataclass(frozen=True)
class _Head:
    """What this rank holds of the head and of the tokens."""

    group: dist.ProcessGroup | None  # None: one rank
    gathers: bool  # hidden is split over the group
    rows: int  # of this rank's hidden
    step: int  # of them at once
    first: int  # word of this rank's first column
    columns: int  # words of this rank that are real, at least 1
    only_padding: bool  # that one is not real either
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
        gathers = sequence_parallel and size > 1
        parts = size if gathers else 1
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or hidden.dtype is not weight.dtype:
            raise LayoutError(
                f"hidden is {list(hidden.shape)} {hidden.dtype}, weight {list(weight.shape)} {weight.dtype};"
                " expected [rows, h] and [v, h] of one dtype"
            )
        if labels.dim() != 1 or labels.size(0) != hidden.size(0) * parts:
            split = f" x {parts} ranks" if gathers else ""
            raise LayoutError(
                f"labels are {list(labels.shape)} for {hidden.size(0):,}{split} rows of hidden: every token has one"
            )
        if chunk is None:
            chunk = default_chunk(weight.size(0), hidden.dtype)
        if chunk < 1:
            raise LayoutError(f"chunk is {chunk}, expected at least one token")
        first = rank * weight.size(0)
        real = weight.size(0)
        if real_vocab_size is not None:
            if not 0 < real_vocab_size <= size * weight.size(0):
                raise LayoutError(f"real_vocab_size is {real_vocab_size:,}, the weights have {size * weight.size(0):,} rows")
            real = min(max(real_vocab_size - first, 0), real)
        return cls(
            group=group if size > 1 else None,
            gathers=gathers,
            rows=hidden.size(0),
            step=max(1, min(chunk // parts, hidden.size(0))),
            first=first,
            columns=max(real, 1),
            only_padding=real == 0,
            dtype=accumulator_dtype(hidden.dtype),
        )

    @property
    def parts(self) -> int:
        """Ranks whose tokens are in a chunk."""
        return self.group.size() if self.gathers and self.group is not None else 1

    def pieces(self) -> list[slice]:
        """This rank's rows, chunk by chunk."""
        return [slice(i, min(i + self.step, self.rows)) for i in range(0, self.rows, self.step)]

    def per_rank(self, vector: Tensor) -> Tensor:
        """[rows in gathered order] as [parts, rows of a rank]: `[:, piece]` is what belongs to a chunk."""
        return vector.view(self.parts, self.rows)

    def chunks(self, hidden: Tensor, pieces: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """(piece, its rows of all parts [parts * piece, h]). The next chunk is gathered while the present one is used."""
        if not self.gathers:
            for piece in pieces:
                yield piece, hidden[piece]
            return
        assert self.group is not None
        under_way = start_all_gather(hidden[pieces[0]], self.group) if pieces else None
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            assert under_way is not None
            rows, work = under_way
            work.wait()
            if following is not None:
                under_way = start_all_gather(hidden[following], self.group)
            yield piece, rows.flatten(0, 1)

    def buffer(self, hidden: Tensor) -> Tensor:
        """Room for the logits of one chunk."""
        return hidden.new_empty((self.step * self.parts, self.columns), dtype=self.dtype)

    def logits(self, rows: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
        """[tokens, columns] in `buffer`, padding left out."""
        logits = matmul_into(buffer[: rows.size(0)], rows, weight[: self.columns].t())
        # smaller than any logit, and finite: -inf alone in its row would make a softmax of NaN
        return logits.fill_(torch.finfo(self.dtype).min) if self.only_padding else logits

    def own_labels(self, labels: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        """(column of each label, int64 [tokens, 1]; is it one of this rank's). Elsewhere the column is one that exists."""
        column = self.per_rank(labels)[:, piece].reshape(-1, 1) - self.first
        is_own = (column >= 0) & (column < self.columns) & (not self.only_padding)
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
    if head.group is None:
        return _Terms(own_lse - predicted, own_lse, own_lse)
    every_lse, every_predicted = all_gather(torch.stack((own_lse, predicted)), head.group).unbind(1)  # [t, tokens] each
    lse = every_lse.logsumexp(dim=0)
    return _Terms(lse - every_predicted.sum(dim=0), lse, own_lse)


@dataclass
class _Gradients:
    """Gradients of hidden and weight, chunk by chunk. At most one exchange is under way."""

    head: _Head
    weight: Tensor
    of_hidden: Tensor | None
    of_weight: WeightGradient | None
    low: Tensor | None = None  # room for a chunk's gradient of the logits in the dtype of the weights
    under_way: list[tuple[dist.Work, Tensor]] = field(default_factory=list)  # and what it reads

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, head: _Head, needs: tuple[bool, bool], into_main_grad: bool) -> _Gradients:
        return cls(
            head,
            weight,
            torch.empty_like(hidden) if needs[0] else None,
            WeightGradient(weight, rows=head.columns, into_main_grad=into_main_grad) if needs[1] else None,
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
            self._add_hidden(self.of_hidden[piece], of_logits)
        if self.of_weight is not None:
            self.of_weight.add(of_logits, rows)

    def _add_hidden(self, own: Tensor, of_logits: Tensor) -> None:
        """The exchange of this chunk runs during its weight gradient and the logits of the next."""
        head, weight = self.head, self.weight[: self.head.columns]
        self.wait()
        if head.group is None:
            torch.mm(of_logits, weight, out=own)
        elif head.gathers:
            summands = of_logits @ weight  # [t * tokens, h]
            self.under_way.append((start_reduce_scatter(summands, own, head.group), summands))
        else:
            torch.mm(of_logits, weight, out=own)
            work = dist.all_reduce(own, group=head.group, async_op=True)
            assert work is not None
            self.under_way.append((work, own))

    def wait(self) -> None:
        """Until the exchange under way is done."""
        while self.under_way:
            self.under_way.pop()[0].wait()


class _PerTokenLosses(torch.autograd.Function):
    """apply(hidden, weight, labels, head) -> losses [rows]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: _Head) -> Tensor:
        losses, lse = (hidden.new_empty(labels.size(0), dtype=head.dtype) for _ in range(2))
        buffer = head.buffer(hidden)
        for piece, rows in head.chunks(hidden, head.pieces()):
            logits = head.logits(rows, weight, buffer)
            terms = _softmax_(logits, *head.own_labels(labels, piece), head)
            head.per_rank(losses)[:, piece] = terms.losses.view(head.parts, -1)
            head.per_rank(lse)[:, piece] = terms.lse.view(head.parts, -1)
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
        for piece, rows in head.chunks(hidden, head.pieces()):
            factor = head.per_rank(upstream)[:, piece].reshape(-1)
            logits = head.logits(rows, weight, buffer)
            probabilities = logits.sub_(head.per_rank(lse)[:, piece].reshape(-1, 1)).exp_()
            gradients.add(piece, rows, probabilities, *head.own_labels(labels, piece), factor, factor)
        gradients.wait()
        return gradients.of_hidden, gradients.of_weight and gradients.of_weight.finish(), None, None


class _WeightedLoss(torch.autograd.Function):
    """apply(hidden, weight, labels, loss_weights, head, needed) -> (sum, losses [rows]); gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, head: _Head, needed: bool
    ) -> tuple[Tensor, Tensor]:
        losses = hidden.new_zeros(labels.size(0), dtype=head.dtype)
        total = hidden.new_zeros((), dtype=torch.float64)  # millions of losses: float32 would lose digits
        needs = (needed and hidden.requires_grad, needed and weight.requires_grad)
        gradients = _Gradients.of(hidden, weight, head, needs, into_main_grad=False)
        weights = head.per_rank(loss_weights.contiguous())
        pieces = head.pieces()
        counted = torch.stack([weights[:, piece].any() for piece in pieces]).tolist()  # one wait for the device
        buffer = head.buffer(hidden)
        for piece, rows in head.chunks(hidden, [piece for piece, any_weight in zip(pieces, counted, strict=True) if any_weight]):
            upstream = weights[:, piece].reshape(-1)
            labels_here = head.own_labels(labels, piece)
            logits = head.logits(rows, weight, buffer)
            terms = _softmax_(logits, *labels_here, head)
            token_losses = terms.losses.masked_fill_(upstream == 0, 0)
            total += (token_losses * upstream).sum(dtype=torch.float64)
            head.per_rank(losses)[:, piece] = token_losses.view(head.parts, -1)
            if any(needs):
                # softmax over this rank's columns -> over all of them
                factor = (terms.own_lse - terms.lse).exp_() * upstream
                gradients.add(piece, rows, logits, *labels_here, factor, upstream)
        gradients.wait()
        for piece, any_weight in zip(pieces, counted, strict=True):
            if gradients.of_hidden is not None and not any_weight:
                gradients.of_hidden[piece] = 0
        ctx.gradients = gradients
        ctx.mark_non_differentiable(losses)
        return total.to(head.dtype), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this weighted loss have been handed out; leave loss_weights out to go back twice"
            )
        of_hidden = gradients.of_hidden
        if of_hidden is not None:
            for rows in of_hidden.split(gradients.head.step):
                # in the dtype of `upstream`, which as a scalar would be rounded to that of the rows
                torch.mul(rows, upstream.view(1, 1), out=rows)
        return of_hidden, gradients.of_weight and gradients.of_weight.finish(upstream), None, None, None, None
