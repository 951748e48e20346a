"""Documents of samples cut into pieces, many samples at once: what the methods that rearrange a sample share.

A *unit* is what one sample holds of one document without a gap: a document that crosses the border of two samples is one unit in
each. Literal tokens stay with their unit: what ends a document (a separator, EOS) goes with its last piece, what begins one (BOS) with
its first. What belongs to no unit (the rest of a separator at the beginning of a sample, a BOS at its end, padding) stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import hash64
from mcore_longctx.data.files.sidecar import LITERAL, PADDING

__all__ = ["Columns", "Cuts", "Pieces", "Units", "cut_units", "equal_cuts", "random_cuts", "uniform", "units_of"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Columns = tuple[npt.NDArray[Any], ...]  # document, start, length, loss, each [runs]

_CUTS = 11  # salt; those of this room do not meet those of `data/planning`


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """The units of a block of samples, in order, and where each run belongs."""

    sample: IntArray  # [units] sample of the block
    ordinal: IntArray  # [units] number in its sample
    length: IntArray  # [units] tokens of its document, at least 1
    of_run: IntArray  # [runs] unit, -1: none
    is_document: BoolArray  # [runs]
    is_begin: BoolArray  # [runs] literals that begin a document
    run_sample: IntArray  # [runs] sample of the block

    def __len__(self) -> int:
        """Number of units."""
        return len(self.sample)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cuts:
    """Where units are cut: ascending for each unit, the units in order."""

    unit: IntArray  # [cuts]
    at: IntArray  # [cuts] tokens from the start of the unit, 1 to length - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Pieces of all units in the order of the text, and the runs that they hold."""

    unit: IntArray  # [pieces]
    number: IntArray  # [pieces] 0 to count - 1 in its unit
    count: IntArray  # [pieces] pieces of its unit
    body: Columns  # runs of documents, cut where pieces end
    body_piece: IntArray  # [runs of body] piece of each


def units_of(columns: Columns, first_run: IntArray, begin_tokens: int) -> Units:
    """Find the units of samples.

    Args:
        columns: runs of whole samples.
        first_run: rows at which the samples begin, and the number of all rows, [samples + 1].
        begin_tokens: literals before this one begin a document.
    """
    document, start, length, _ = columns
    run_sample = np.repeat(np.arange(len(first_run) - 1), np.diff(first_run))
    is_document = document >= 0
    is_begin = (document == LITERAL) & (start < begin_tokens)
    goes_on = np.zeros(len(document), np.bool_)
    goes_on[1:] = (
        is_document[1:]
        & (document[1:] == document[:-1])
        & (start[1:] == start[:-1] + length[:-1])
        & (run_sample[1:] == run_sample[:-1])
    )
    is_first = is_document & ~goes_on
    row = np.flatnonzero(is_first)
    of_run = np.cumsum(is_first) - 1 + is_begin  # literals behind a unit belong to it, those that begin one to the next
    sample = run_sample[row]
    inside = (of_run >= 0) & (of_run < len(row)) & (document != PADDING)
    inside[inside] = sample[of_run[inside]] == run_sample[inside]
    of_run = np.where(inside, of_run, -1)
    tokens = np.bincount(of_run[is_document], length[is_document], len(row)).astype(np.int64)
    first_unit = np.searchsorted(sample, np.arange(len(first_run) - 1))
    return Units(
        sample=sample,
        ordinal=np.arange(len(row)) - first_unit[sample],
        length=tokens,
        of_run=of_run,
        is_document=is_document,
        is_begin=is_begin,
        run_sample=run_sample,
    )


def uniform(*words: Any) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from the hash of columns of words."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def equal_cuts(units: Units, count: IntArray) -> Cuts:
    """Each unit in `count` pieces whose lengths differ by one token at most."""
    unit, number = _numbered(count - 1)
    return Cuts(unit=unit, at=units.length[unit] * (number + 1) // count[unit])


def random_cuts(units: Units, count: IntArray, seed: int, first_sample: int) -> Cuts:
    """Each unit in `count` pieces of random lengths, each at least one token."""
    unit, number = _numbered(count - 1)
    drawn = uniform(seed, _CUTS, first_sample + units.sample[unit], units.ordinal[unit], number)
    # sorted draws from 0 to n - k, the i-th shifted by i + 1, are different places from 1 to n - 1
    place = np.minimum((drawn * (units.length - count + 1)[unit]).astype(np.int64), (units.length - count)[unit])
    return Cuts(unit=unit, at=place[np.lexsort((place, unit))] + number + 1)


def cut_units(columns: Columns, units: Units, cuts: Cuts) -> Pieces:
    """The pieces between cuts. A run over a cut becomes two runs; pieces of runs with other loss flags keep them."""
    document, start, length, loss = (column[units.is_document] for column in columns)
    stops = np.cumsum(length)
    begins = stops - length  # of runs, in the stream of all documents' tokens
    unit_begin = np.cumsum(units.length) - units.length
    count = 1 + np.bincount(cuts.unit, minlength=len(units))
    unit, number = _numbered(count)
    piece_begin = unit_begin[unit]
    piece_begin[number > 0] += cuts.at
    borders = np.unique(np.concatenate([begins, piece_begin]))
    row = np.searchsorted(begins, borders, side="right") - 1
    sizes = np.diff(borders, append=stops[-1:])
    body = (document[row], start[row] + borders - begins[row], sizes, loss[row])
    of_piece = np.searchsorted(piece_begin, borders, side="right") - 1
    return Pieces(unit=unit, number=number, count=count[unit], body=body, body_piece=of_piece)


def _numbered(count: IntArray) -> tuple[IntArray, IntArray]:
    """Each row so often, and the number of each among its likes."""
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
