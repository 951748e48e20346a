"""`augment`: the documents of a sample cut into pieces that are spread over the sample, as a function from runs to runs.

    cip   chunk-interleaved pretraining of LongSkywork (arXiv 2406.00605): D1.1 D2.1 D3.1 ... D1.2 D2.2 D3.2 ...
    utk   Untie the Knots (arXiv 2409.04774): `data/methods/utk.py`

Every decision is a hash of (seed, number of the sample, ...), so a sample is the same whatever is computed beside it. Samples are
handled in blocks, column by column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.sidecar import LITERAL, PADDING
from mcore_longctx.data.methods.labels import LabelLayout
from mcore_longctx.data.methods.pieces import Columns, Pieces, Units, cut_units, equal_cuts, random_cuts, uniform, units_of
from mcore_longctx.data.methods.utk import Knots, drawn_counts, shuffled, tied
from mcore_longctx.recipe.data import AugmentSection

__all__ = ["Augmenter", "is_chosen"]

IntArray = npt.NDArray[np.int64]

_CHOSEN = 10  # salt


def is_chosen(seed: int, samples: IntArray, probability: float) -> npt.NDArray[np.bool_]:
    """Which samples are changed."""
    return uniform(seed, _CHOSEN, samples) < probability


@dataclass(frozen=True, kw_only=True, eq=False)
class Augmenter:
    """Spreads the documents of samples over them.

    Args:
        how: the section of the recipe.
        seed: of every decision.
        seq_length: tokens of a sample, before and after.
        begin_tokens: literals before this one begin a document.
        labels: where markers and labels stand among the literals; type utk only.
    """

    how: AugmentSection
    seed: int
    seq_length: int
    begin_tokens: int = 0
    labels: LabelLayout | None = None

    def __call__(self, columns: Columns, first_run: IntArray, first_sample: int) -> tuple[Columns, IntArray]:
        """The runs of some samples, rearranged, and the rows at which each sample begins now.

        Every token of the documents and of the separators is kept once; type utk adds tokens, takes their room from the padding, and
        cuts each sample back to its length.

        Args:
            columns: runs of whole samples: document, start, length, loss.
            first_run: rows at which the samples begin, and the number of all rows, [samples + 1].
            first_sample: number of the first of them in the data set.
        """
        document, start, length, loss = columns
        columns = (document.astype(np.int64), start.astype(np.int64), length.astype(np.int64), loss.astype(np.bool_))
        units = units_of(columns, first_run, self.begin_tokens)
        chosen = is_chosen(self.seed, first_sample + np.arange(len(first_run) - 1), self.how.probability)[units.sample]
        if not len(units) or not chosen.any():
            return columns, first_run
        added: list[Knots] = []
        if self.how.type == "cip":
            count = np.where(chosen, np.minimum(self.how.chunks[0], units.length), 1)
            pieces = cut_units(columns, units, equal_cuts(units, count))
            order = self._interleaved(units, pieces, chosen)
        else:
            assert self.labels is not None
            count = np.where(chosen, np.minimum(drawn_counts(units, self.how.chunks, self.seed, first_sample), units.length), 1)
            pieces = cut_units(columns, units, random_cuts(units, count, self.seed, first_sample))
            order = shuffled(units, pieces, chosen, self.seed, first_sample, keep_order=self.how.keep_order)
            place = np.empty(len(order), np.int64)
            place[order] = np.arange(len(order))
            added = tied(units, pieces, place, self.labels, self.seed, first_sample, backtrace=self.how.backtrace)
        return self._assembled(columns, first_run, units, pieces, order, added)

    def _interleaved(self, units: Units, pieces: Pieces, chosen: npt.NDArray[np.bool_]) -> IntArray:
        """Pieces round robin over the documents of each group: all first pieces, all second ones, ..."""
        group = np.zeros(len(units), np.int64)
        if self.how.documents_per_group is not None:
            group = units.ordinal // self.how.documents_per_group
        turn = np.where(chosen[pieces.unit], pieces.number, 0)
        return np.lexsort((pieces.unit, turn, group[pieces.unit], units.sample[pieces.unit]))

    def _assembled(
        self,
        columns: Columns,
        first_run: IntArray,
        units: Units,
        pieces: Pieces,
        order: IntArray,
        added: list[Knots],
    ) -> tuple[Columns, IntArray]:
        """Pieces in their new order with what belongs to them, cut to the length of a sample and filled with the padding that is left."""
        samples = len(first_run) - 1
        before = np.searchsorted(units.sample[pieces.unit], np.arange(samples + 1))  # pieces of earlier samples
        rank = np.empty(len(order), np.int64)  # places, with one in front of each sample's pieces and one behind them
        rank[order] = np.arange(len(order)) + 2 * units.sample[pieces.unit][order] + 1
        first_piece = np.flatnonzero(pieces.number == 0)
        last_piece = first_piece + pieces.count[first_piece] - 1
        document, start, length, loss = columns
        is_literal = document == LITERAL
        parts: list[tuple[Columns, IntArray]] = []  # runs, and place * 8 + kind of each: those of equal keys keep their order

        def add(rows: npt.NDArray[np.bool_], key: IntArray) -> None:
            parts.append(((document[rows], start[rows], length[rows], loss[rows]), key))

        in_unit = is_literal & (units.of_run >= 0)
        rows = in_unit & units.is_begin
        add(rows, rank[first_piece[units.of_run[rows]]] * 8 + 2)
        parts.append((pieces.body, rank[pieces.body_piece] * 8 + 3))
        rows = in_unit & ~units.is_begin
        add(rows, rank[last_piece[units.of_run[rows]]] * 8 + 4)
        loose = is_literal & (units.of_run < 0)
        rows = loose & ~units.is_begin
        add(rows, (before[units.run_sample[rows]] + 2 * units.run_sample[rows]) * 8)
        rows = loose & units.is_begin
        add(rows, (before[units.run_sample[rows] + 1] + 2 * units.run_sample[rows] + 1) * 8)
        for knots in added:
            size = len(knots.piece)
            parts.append(
                (
                    (np.full(size, LITERAL, np.int64), knots.start, knots.length, np.full(size, knots.loss)),
                    rank[knots.piece] * 8 + knots.kind,
                )
            )
        joined = tuple(np.concatenate([part[0][number] for part in parts]) for number in range(4))
        key = np.concatenate([part[1] for part in parts])
        order = np.argsort(key, kind="stable")
        place = key[order] // 8
        sample = np.searchsorted(before + 2 * np.arange(samples + 1), place, side="right") - 1
        return _fitted(tuple(column[order] for column in joined), sample, samples, self.seq_length)


def _fitted(columns: Columns, sample: IntArray, samples: int, seq_length: int) -> tuple[Columns, IntArray]:
    """Samples cut to their length, or filled with padding. sample: of each run, ascending."""
    document, start, length, loss = columns
    stops = np.cumsum(length)
    first = np.searchsorted(sample, np.arange(samples + 1))
    base = np.concatenate([np.zeros(1, np.int64), stops])[first]  # tokens before each sample
    stops = np.minimum(stops - base[sample], seq_length)
    begins = np.minimum(np.cumsum(length) - length - base[sample], seq_length)
    free = np.maximum(seq_length - np.diff(base), 0)
    padded = np.flatnonzero(free)
    at = first[padded + 1]
    kept = np.insert(stops - begins, at, free[padded])
    document = np.insert(document, at, PADDING)
    start, loss, sample = np.insert(start, at, 0), np.insert(loss, at, False), np.insert(sample, at, padded)
    there = kept > 0
    first_run = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(sample[there], minlength=samples))])
    return (document[there], start[there], kept[there], loss[there]), first_run
