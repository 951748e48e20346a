"""Untie the Knots (arXiv 2409.04774, sections 3, 4.2, 5.3): documents cut at random points, their pieces shuffled, and tied together.

    <D> id </D>  [head of cut c-1]  tokens of piece c  [tail of cut c]          for every piece of a document that was cut
    <S> id <,> id <,> id </S>                                                   behind the piece of a document that comes last

The pieces of a document keep their order ("partial order"), and the last piece of the last document stays last. Labels, knots (the
tokens beside a cut) and `<S>` are not learned; the ids behind `<S>` are: to say them, the model must find the pieces again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import hash64
from mcore_longctx.data.methods.labels import LabelLayout
from mcore_longctx.data.methods.pieces import Pieces, Units, uniform

__all__ = ["Knots", "drawn_counts", "shuffled", "tied"]

IntArray = npt.NDArray[np.int64]

_COUNT, _ORDER, _LABEL, _STEP = 12, 13, 14, 15  # salts
_LABELS, _HEAD, _TAIL, _ASK, _BACKTRACE = 0, 1, 5, 6, 7  # kinds: what comes first beside a piece, whose own runs are 2 to 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Knots:
    """Literal runs of one kind that are added beside pieces."""

    kind: int
    piece: IntArray  # [runs]
    start: IntArray  # [runs] in the literals
    length: IntArray  # [runs]
    loss: bool


def drawn_counts(units: Units, chunks: Sequence[int], seed: int, first_sample: int) -> IntArray:
    """In how many pieces each unit is cut: one of `chunks`, each as likely as the others."""
    drawn = uniform(seed, _COUNT, first_sample + units.sample, units.ordinal)
    return np.array(chunks, np.int64)[(drawn * len(chunks)).astype(np.int64)]


def shuffled(
    units: Units, pieces: Pieces, chosen: npt.NDArray[np.bool_], seed: int, first_sample: int, *, keep_order: bool
) -> IntArray:
    """Order of the pieces: shuffled over their sample. chosen: units whose samples are shuffled, [units]."""
    sample = units.sample[pieces.unit]
    key = hash64(seed, _ORDER, first_sample + sample, units.ordinal[pieces.unit], pieces.number)
    is_last = np.append(np.diff(sample) > 0, np.ones(1, np.bool_))  # the last piece of the last document stays last
    if keep_order:  # each document's places, ascending
        own = np.lexsort((key, is_last, pieces.unit))
        key = key[own]
    key = np.where(chosen[pieces.unit], key, np.arange(len(key), dtype=np.uint64))
    return np.lexsort((key, is_last, sample))


def tied(
    units: Units, pieces: Pieces, place: IntArray, labels: LabelLayout, seed: int, first_sample: int, *, backtrace: bool
) -> list[Knots]:
    """Labels, knots and backtraces of all documents that were cut.

    Args:
        units: of the samples.
        pieces: of the units.
        place: of each piece in the new order, [pieces].
        labels: where they stand among the literals.
        seed: of the choice of labels.
        first_sample: number of the first sample.
        backtrace: whether the labels of a document follow behind its pieces.
    """
    cut = np.flatnonzero(pieces.count > 1)
    number = pieces.number[cut]
    label = _labels_of(units, pieces, cut, labels.count, seed, first_sample)
    heads, tails = cut[number > 0], cut[number < pieces.count[cut] - 1]
    found = [
        _constant(_LABELS, cut, labels.label(label), labels.label_length),
        _numbered(_HEAD, heads, labels, "head", pieces.number[heads]),
        _numbered(_TAIL, tails, labels, "tail", pieces.number[tails] + 1),
    ]
    if not backtrace or not len(cut):
        return found
    first = np.flatnonzero(number == 0)  # rows of `cut` at which units begin
    last_out = cut[first]  # of each unit, the piece that comes last in the new order
    order = np.lexsort((place[cut], pieces.unit[cut]))
    last_out = cut[order][first + pieces.count[cut[first]] - 1]
    ask, stop = labels.markers["ask"], labels.markers["stop"]
    behind = np.repeat(last_out, pieces.count[last_out])
    is_end = number == pieces.count[cut] - 1
    # the last id of a document has no <,> behind it but </S>
    start = np.where(is_end, labels.id(label), labels.id_next(label))
    length = np.where(is_end, labels.id_tokens, labels.id_tokens + labels.next_tokens)
    end = np.flatnonzero(is_end)
    ids = Knots(
        kind=_BACKTRACE,
        piece=np.insert(behind, end + 1, behind[end]),
        start=np.insert(start, end + 1, stop.start),
        length=np.insert(length, end + 1, stop.length),
        loss=True,
    )
    return [*found, _constant(_ASK, last_out, np.full(len(last_out), ask.start), ask.length), ids]


def _labels_of(units: Units, pieces: Pieces, cut: IntArray, count: int, seed: int, first_sample: int) -> IntArray:
    """A label for each piece of a document that was cut, different ones inside a sample. count: of labels, a power of two."""
    sample = units.sample[pieces.unit[cut]]
    nth = np.arange(len(cut)) - np.searchsorted(sample, sample)
    word = first_sample + sample
    first, step = hash64(seed, _LABEL, word), hash64(seed, _STEP, word) | np.uint64(1)  # an odd step reaches every label once
    return ((first + step * nth.astype(np.uint64)) & np.uint64(count - 1)).astype(np.int64)


def _constant(kind: int, piece: IntArray, start: IntArray, length: int) -> Knots:
    return Knots(kind=kind, piece=piece, start=start, length=np.full(len(piece), length), loss=False)


def _numbered(kind: int, piece: IntArray, labels: LabelLayout, name: str, number: IntArray) -> Knots:
    """Knots of cut `number` (from 1)."""
    markers = [labels.markers[f"{name}{cut + 1}"] for cut in range(labels.cuts)]
    starts, lengths = (np.array([getattr(marker, key) for marker in markers], np.int64) for key in ("start", "length"))
    return Knots(kind=kind, piece=piece, start=starts[number - 1], length=lengths[number - 1], loss=False)
