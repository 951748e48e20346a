"""Which documents are taken, how often, and in which order: decided from the length table alone.

Length sampling after Fu et al. (arXiv 2402.10171), as the UltraLong recipe uses it: inside each source, short documents are kept
with a probability and long ones repeated, while the share of each source stays what it should be. Their code draws from an
unseeded generator; here every decision is a hash of (seed, source, document id, copy), so it is the same for any order of
reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.shards import DocumentTable, hash64
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import LengthSampling

__all__ = ["Plan", "document_copies", "plan_concatenated", "plan_single"]

IntArray = npt.NDArray[np.int64]

_COPIES, _SELECT, _ORDER = 1, 2, 3  # salts: the decisions must not depend on each other


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Stretches of documents in the order in which they are laid out."""

    document: IntArray  # [pieces] row of the table
    start: IntArray  # [pieces] tokens from the start of the document
    length: IntArray  # [pieces] tokens

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.document)


def document_copies(table: DocumentTable, sampling: LengthSampling, seed: int) -> IntArray:
    """How often each document is taken, int64 [documents].

    The weight w is keep_probability below `short_below` tokens, repetition above `long_above`, 1 between. Copies are
    floor(w) + [u < frac(w)] with u in [0, 1) from the hash of the document, so the expected number of copies is w.
    """
    weight = np.ones(len(table))
    weight[table.length < sampling.short_below] = sampling.keep_probability
    weight[table.length > sampling.long_above] = sampling.repetition
    whole = np.floor(weight)
    uniform = (hash64(seed, _COPIES, table.key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return whole.astype(np.int64) + (uniform < weight - whole)


def plan_concatenated(
    table: DocumentTable,
    sampling: LengthSampling,
    shares: Sequence[float] | None,
    *,
    seed: int,
    separator_length: int,
    token_budget: int | None,
) -> Plan:
    """Whole documents, one behind the other, for a stream with a separator between documents.

    Args:
        table: the documents.
        sampling: how often each is taken.
        shares: share of the tokens for each source (any positive scale), or None: by what each holds after length sampling,
            which keeps the mixture of the sources as it is.
        seed: of every decision.
        separator_length: tokens between two documents; they count for the document before them.
        token_budget: tokens of the stream, or None: all there is. The last document of a source is cut where its budget ends.
            If a source holds less than its share, the whole budget shrinks so that the shares stay as asked for.

    Raises:
        DataError: a source with a share has no document left.
    """
    document, copy = _copies(table, sampling, seed)
    cost = table.length[document] + separator_length
    # the stream has one separator less than documents
    budget = None if token_budget is None else token_budget + separator_length
    targets = _targets(table, document, cost, shares, budget)
    select = hash64(seed, _SELECT, table.key[document], copy)
    order = hash64(seed, _ORDER, table.key[document], copy)
    length = table.length[document]
    kept = []
    for group, target in targets:
        rows = group[np.lexsort((document[group], select[group]))]
        reached = np.cumsum(cost[rows])
        if target is not None and len(rows) and target < reached[-1]:
            rows = rows[: int(np.searchsorted(reached, target)) + 1 if target else 0]
            length[rows[-1:]] = np.maximum(1, length[rows[-1:]] - reached[len(rows) - 1] + target)
        kept.append(rows)
    rows = np.concatenate(kept)
    rows = rows[np.lexsort((copy[rows], document[rows], order[rows]))]
    return Plan(document=document[rows], start=np.zeros(len(rows), np.int64), length=length[rows])


def plan_single(
    table: DocumentTable,
    sampling: LengthSampling,
    shares: Sequence[float] | None,
    *,
    seed: int,
    seq_length: int,
    sample_budget: int | None,
) -> Plan:
    """Pieces of exactly `seq_length` tokens, each from one document; what is left of a document is dropped.

    The form of ProLong (arXiv 2410.02660). Arguments as in `plan_concatenated`; the budget counts samples.

    Raises:
        DataError: a source with a share has no document of `seq_length` tokens left.
    """
    document, copy = _copies(table, sampling, seed)
    pieces = table.length[document] // seq_length
    part = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    document, copy = np.repeat(document, pieces), np.repeat(copy, pieces)
    select = hash64(seed, _SELECT, table.key[document], copy, part)
    order = hash64(seed, _ORDER, table.key[document], copy, part)
    kept = []
    for rows, target in _targets(table, document, np.ones(len(document), np.int64), shares, sample_budget):
        kept.append(rows[np.lexsort((part[rows], document[rows], select[rows]))][:target])
    rows = np.concatenate(kept)
    rows = rows[np.lexsort((part[rows], copy[rows], document[rows], order[rows]))]
    return Plan(document=document[rows], start=part[rows] * seq_length, length=np.full(len(rows), seq_length, np.int64))


def _copies(table: DocumentTable, sampling: LengthSampling, seed: int) -> tuple[IntArray, IntArray]:
    """Document and number of each copy."""
    copies = document_copies(table, sampling, seed)
    document = np.repeat(np.arange(len(table)), copies)
    return document, np.arange(len(document)) - np.repeat(np.cumsum(copies) - copies, copies)


def _targets(
    table: DocumentTable, document: IntArray, cost: IntArray, shares: Sequence[float] | None, budget: int | None
) -> list[tuple[IntArray, int | None]]:
    """Groups of rows, and how much of each is wanted (None: all)."""
    groups = [np.flatnonzero(table.source[document] == index) for index in range(len(table.sources))]
    have = np.array([int(cost[rows].sum()) for rows in groups])
    if shares is None:
        if budget is None or budget >= have.sum():
            return [(rows, None) for rows in groups]
        fraction, total = have / have.sum(), budget
    else:
        for name, held in zip(table.sources, have, strict=True):
            if not held:
                raise DataError(
                    "nothing is left of this source after length sampling", where=f"source {name}", fix="change its share"
                )
        fraction = np.array(shares) / sum(shares)
        possible = int((have / fraction).min())
        total = possible if budget is None else min(budget, possible)
    exact = fraction * total
    wanted = np.floor(exact).astype(np.int64)
    # largest remainders first, so that the parts add up to the whole
    for index in np.argsort(wanted - exact, kind="stable")[: total - int(wanted.sum())]:
        wanted[index] += 1
    return [(rows, int(target)) for rows, target in zip(groups, np.minimum(wanted, have), strict=True)]
