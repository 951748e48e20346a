"""Which samples make up which step, and this rank's share of them as tensors.

The samples of step i are a pure function of (seed, i): stopping, resuming and another layout change nothing (`train/order.py`).
Data-parallel ranks take disjoint micro-batches, context-parallel ranks their zigzag slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_longctx.data.methods.positions import jumping_positions, segment_lengths
from mcore_longctx.data.samples import ReadAhead
from mcore_longctx.errors import DataError
from mcore_longctx.layout import PackLayout, pack_layout
from mcore_longctx.recipe import Stage
from mcore_longctx.train.order import SampleOrder

__all__ = ["MicroBatch", "Samples", "StepData"]

IntArray = npt.NDArray[np.int64]
_Share = tuple[IntArray, IntArray, npt.NDArray[np.bool_], IntArray]  # tokens, labels, loss mask, positions


class Samples(Protocol):
    """What is needed of a data set: `mcore_longctx.data.PackedSamples` is one."""

    seq_length: int

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def tokens(self, index: int) -> npt.NDArray[Any]:
        """The stored ids of a sample, [seq_length]."""
        ...

    def gather(self, index: int, places: IntArray) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_]]:
        """Tokens, labels and loss mask at some places of a sample, each [places]; place -1 is a filler."""
        ...

    def document_lengths(self, index: int) -> list[int]:
        """Tokens of each document of a sample, in order; padding at its end belongs to none."""
        ...

    def cp_slice(self, index: int, cp_size: int, cp_rank: int) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], IntArray]:
        """Tokens, labels, loss mask and positions of one context-parallel rank, each [seq_length / cp_size]."""
        ...

    def sequence_weights(
        self, index: int, places: IntArray, loss_mask: npt.NDArray[np.bool_], *, apart: bool
    ) -> tuple[npt.NDArray[np.float32], int]:
        """1/N for each learned label at some places, N the learned tokens of its conversation, and the sample's conversations."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank. Tensors are [micro_batch_size, seq_length / cp_size] on the training device.

    With a cross-document mask they are [1, layout.rows]: this rank's rows of one sample, each document padded as the layout says.
    """

    sample_ids: tuple[int, ...]
    tokens: Tensor  # int64
    labels: Tensor  # int64
    loss_mask: Tensor  # bool
    positions: Tensor  # int64, global; with a cross-document mask inside the document; with jumps if the stage asks for them
    layout: PackLayout | None = None  # where the documents of the sample lie; None: they see each other
    weights: Tensor | None = None  # float32, of each label's loss; None: 1 where the loss mask is set
    weight: int | None = (
        None  # this rank's part of the sum of the weights of the step, by which the losses are divided; None: tokens
    )


@dataclass(frozen=True)
class _Rows:
    """A micro-batch before it becomes tensors."""

    sample_ids: tuple[int, ...]
    columns: tuple[npt.NDArray[Any], ...]  # tokens, labels, loss mask, positions: each [samples, tokens]
    layout: PackLayout | None
    weights: npt.NDArray[np.float32] | None = None  # [samples, tokens]
    weight: int | None = None


class StepData:
    """The samples of every step, and one rank's share of them.

    Args:
        samples: the data set.
        stage: sequence length, batch sizes and layout.
        seed: of the order.
        vocab_size: ids must be below it.
        dp_rank: this rank among the data-parallel ones.
        cp_rank: this rank among the context-parallel ones.
        device: where the tensors go.
        where: the data's path, for messages.
        sentence_ends: token ids that end a sentence; positions of type segments only.

    Raises:
        DataError: the samples have another length than the stage, or there are none.
    """

    def __init__(
        self,
        samples: Samples,
        stage: Stage,
        *,
        seed: int,
        vocab_size: int,
        dp_rank: int,
        cp_rank: int,
        device: torch.device,
        where: object = None,
        sentence_ends: Sequence[int] = (),
    ) -> None:
        if samples.seq_length != stage.seq_length:
            raise DataError(
                f"samples have {samples.seq_length:,} tokens, stage {stage.name} trains on {stage.seq_length:,}",
                where=where,
                fix="build the data again",
            )
        if len(samples) == 0:
            raise DataError("no samples", where=where, fix="build the data again with more documents")
        self.samples, self.stage, self.vocab_size = samples, stage, vocab_size
        self.dp_rank, self.cp_rank, self.device, self.where = dp_rank, cp_rank, device, where
        self.seed, self.sentence_ends = seed, np.array(sentence_ends, np.int64)
        costs = None if stage.balance == "none" else np.array([self._cost(index) for index in range(len(samples))])
        self.order = SampleOrder(len(samples), seed=seed, costs=costs, step=stage.global_batch_size)
        self._ahead: ReadAhead[tuple[int, int], _Rows] = ReadAhead(self._read)

    def sample_ids(self, iteration: int) -> list[int]:
        """Ids of all samples of a step, in order. The first step is 0."""
        size = self.stage.global_batch_size
        return [self.order[index] for index in range(iteration * size, (iteration + 1) * size)]

    def heaviest(self, iteration: int, numbers: Iterable[int]) -> float:
        """Query-key pairs of the heaviest sample of some micro-batches of a step, over all data-parallel ranks. Above 0.

        Without a mask between documents all samples cost the same: 1.
        """
        if not self.stage.cross_document_mask:
            return 1.0
        ids, size = self.sample_ids(iteration), self.stage.micro_batch_size * self.stage.parallel.data_parallel_size
        chosen = (index for number in numbers for index in ids[number * size : (number + 1) * size])
        return max(1.0, *(self._cost(index) for index in chosen))

    def _cost(self, index: int) -> float:
        """Query-key pairs of a sample whose documents do not see each other, twice."""
        return float(sum(n * n for n in self.samples.document_lengths(index)))

    def passes_begun(self, iteration: int) -> int:
        """How many passes over the data have begun when a step is done."""
        return ((iteration + 1) * self.stage.global_batch_size - 1) // len(self.samples) + 1

    def micro_batches(self, iteration: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step. Each is read from disk while the one before it is trained on, to the stage's last."""
        count = self.stage.num_microbatches
        for number in range(count):
            following: tuple[int, int] | None = (iteration, number + 1)
            if number + 1 == count:
                following = (iteration + 1, 0) if iteration + 1 < self.stage.iterations else None
            rows = self._ahead.get((iteration, number), following)
            yield self._as_tensors(rows)

    def _as_tensors(self, rows: _Rows) -> MicroBatch:
        tokens, labels, loss_mask, positions = (
            torch.from_numpy(column).to(self.device, non_blocking=True) for column in rows.columns
        )
        weights = None if rows.weights is None else torch.from_numpy(rows.weights).to(self.device, non_blocking=True)
        return MicroBatch(rows.sample_ids, tokens, labels, loss_mask, positions, rows.layout, weights, rows.weight)

    def _read(self, place: tuple[int, int]) -> _Rows:
        """The rows of one micro-batch: step, number in it. Runs in a thread: numpy only."""
        iteration, number = place
        size, dp_size = self.stage.micro_batch_size, self.stage.parallel.data_parallel_size
        first = (number * dp_size + self.dp_rank) * size
        ids = tuple(self.sample_ids(iteration)[first : first + size])
        layout: PackLayout | None = None
        if self.stage.cross_document_mask:
            (index,) = ids
            layout = self._layout(index)
            rows = [self._share_of_documents(index, layout)]
        else:
            rows = [self.samples.cp_slice(index, self.stage.parallel.context_parallel_size, self.cp_rank) for index in ids]
        for index, (read, following, _, _) in zip(ids, rows, strict=True):
            # Megatron's embedding turns an id beyond its table into a zero row, or takes one of the padding, without a word
            largest, smallest = max(read.max(), following.max()), min(read.min(), following.min())
            if largest >= self.vocab_size or smallest < 0:
                raise DataError(
                    f"sample {index} holds token {largest if smallest >= 0 else smallest}, the vocabulary has {self.vocab_size:,}",
                    where=self.where,
                    fix="build the data again with the model's tokenizer",
                )
        weights, weight = self._weights(ids, rows, layout)
        if self.stage.positions is not None:
            begin = iteration * self.stage.global_batch_size + first
            rows = [
                (*row[:3], self._jumping(index, begin + i, row[3])) for i, (index, row) in enumerate(zip(ids, rows, strict=True))
            ]
        return _Rows(ids, tuple(np.stack(column) for column in zip(*rows, strict=True)), layout, weights, weight)

    def _jumping(self, index: int, place: int, mine: IntArray) -> IntArray:
        """Positions with jumps at this rank's places `mine` of a sample, which comes at a place of the order."""
        how, segments = self.stage.positions, None
        assert how is not None
        if how.type == "segments":
            segments = segment_lengths(self.samples.tokens(index), self.sentence_ends)
        number, length = self.order.pass_of(place), self.samples.seq_length
        return jumping_positions(how, length, seed=self.seed, sample=index, number=number, segments=segments)[mine]

    def _weights(
        self, ids: tuple[int, ...], rows: Sequence[_Share], layout: PackLayout | None
    ) -> tuple[npt.NDArray[np.float32] | None, int | None]:
        """Weights of this rank's labels and its part of their sum over the step; None where every token counts the same.

        The weights of a conversation add up to 1 over the context-parallel ranks that share it. Megatron adds up whole numbers:
        the first of these ranks counts the conversation, the others count none.
        """
        if self.stage.loss_reduction == "token_mean":
            return None, None
        weights, total = [], 0
        for index, (_, _, loss_mask, positions) in zip(ids, rows, strict=True):
            places = positions if layout is None else layout.source(self.cp_rank)
            of_labels, conversations = self.samples.sequence_weights(index, places, loss_mask, apart=layout is not None)
            weights.append(of_labels)
            total += conversations
        return np.stack(weights), total if self.cp_rank == 0 else 0

    def _layout(self, index: int) -> PackLayout:
        """How the documents of a sample are split over the context-parallel ranks: the same on all of them."""
        parallel = self.stage.parallel
        return pack_layout(
            self.samples.document_lengths(index),
            parallel.context_parallel_size,
            inner=parallel.attention_neighbours,
            multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        )

    def _share_of_documents(self, index: int, layout: PackLayout) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], IntArray]:
        """Tokens, labels, loss mask and positions of this rank's rows. The last token of a document has no label: 0 and no loss."""
        has_next = layout.has_next(self.cp_rank)
        tokens, labels, loss_mask = self.samples.gather(index, layout.source(self.cp_rank))
        return tokens, np.where(has_next, labels, 0), loss_mask & has_next, layout.positions(self.cp_rank)
