"""What one rank does with its rows of a pack: which kernel calls, in which step, and in which order rows of several ranks join.

Under a ring of n ranks each holds the zigzag chunks o and 2n-1-o of 2n of every zigzagged document, its early and its late half.
In step i ring rank o works on the keys of rank j = o - i:

    j = o   its own: causal over the two halves laid together (they are in order, because o < 2n-1-o)
    j < o   all its queries see the early half of j's keys, and none of the late half
    j > o   the late half of its queries sees all of j's keys

so no call needs a mask but the first, and every later step has the same work on every rank.

Neighbours that share heads (`a2a` over `inner` ranks) together hold what one rank of a ring of cp / inner ranks would hold: their
chunks join to the two larger chunks of that rank, the early ones in order of rank and the late ones in reverse. With inner = cp they
join to whole documents in natural order, which is also what `all_gather` collects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from mcore_longctx.layout.packed import PackedDocument, PackLayout

__all__ = ["GatherPlan", "KernelCall", "RingPlan", "gather_plan", "ring_plan"]


class KernelCall(NamedTuple):
    """Attention of some rows over some keys; causal calls have as many of both and see themselves."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True, eq=False)
class RingPlan:
    """What ring rank `o` computes.

    rows        rows of the ring rank: those of `inner` ranks together
    split_rows  its rows of zigzagged documents, a prefix: the keys that travel
    whole       row ranges that see themselves alone, causally
    steps       calls on zigzagged documents in each step of the ring; empty where nothing travels
    order       row k of the ring rank is row order[k] of its ranks' rows laid one after the other; None: it is one rank
    """

    rows: int
    split_rows: int
    whole: tuple[slice, ...]
    steps: tuple[tuple[KernelCall, ...], ...]
    order: npt.NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """What a rank computes once it has the travelling keys of all ranks.

    split_rows  this rank's rows of zigzagged documents
    whole       row ranges that see themselves alone, causally
    chunks      calls on each chunk of this rank; keys are rows of the joined documents in natural order
    order       row k of the joined documents is row order[k] of the ranks' first `split_rows` rows laid one after the other
    """

    split_rows: int
    whole: tuple[slice, ...]
    chunks: tuple[tuple[KernelCall, ...], ...]
    order: npt.NDArray[np.int64]


_RING_PLANS: WeakKeyDictionary[PackLayout, dict[tuple[int, int], RingPlan]] = WeakKeyDictionary()
_GATHER_PLANS: WeakKeyDictionary[PackLayout, dict[int, GatherPlan]] = WeakKeyDictionary()


def ring_plan(layout: PackLayout, inner: int, ring_rank: int) -> RingPlan:
    """The plan of a rank of the ring of `cp_size / inner` ranks; made once for each layout."""
    plans = _RING_PLANS.setdefault(layout, {})
    if (inner, ring_rank) not in plans:
        plans[inner, ring_rank] = _make_ring_plan(layout, inner, ring_rank)
    return plans[inner, ring_rank]


def gather_plan(layout: PackLayout, rank: int) -> GatherPlan:
    """The plan of a rank that gathers keys; made once for each layout."""
    plans = _GATHER_PLANS.setdefault(layout, {})
    if rank not in plans:
        split = [d for d in layout.documents if d.rank is None]
        plans[rank] = GatherPlan(
            split_rows=layout.split_rows,
            whole=tuple(slice(d.first, d.first + d.length) for d in layout.documents if d.rank == rank),
            chunks=tuple(calls for d in split for calls in _calls_of_chunks(d, layout.cp_size, rank)),
            order=_joined_order(split, layout.cp_size, layout.split_rows, layout.split_rows),
        )
    return plans[rank]


def _make_ring_plan(layout: PackLayout, inner: int, ring_rank: int) -> RingPlan:
    ring = layout.cp_size // inner
    tail = layout.rows - layout.split_rows
    whole = []
    for d in layout.documents:
        if d.rank is None:
            first = d.first * inner
        elif d.rank // inner == ring_rank:
            first = layout.split_rows * inner + d.rank % inner * tail + d.first - layout.split_rows
        else:
            continue
        if d.rank is not None or ring == 1:  # a ring of one holds all chunks of a document, in order
            whole.append(slice(first, first + d.length))
    split = [d for d in layout.documents if d.rank is None] if ring > 1 else []
    steps = (
        [tuple(call for d in split if (call := _ring_call(d, inner, ring, ring_rank, i))) for i in range(ring)] if split else []
    )
    return RingPlan(
        rows=layout.rows * inner,
        split_rows=layout.split_rows * inner if split else 0,
        whole=tuple(whole),
        steps=tuple(steps),
        order=_joined_order([d for d in layout.documents if d.rank is None], inner, layout.rows, layout.split_rows)
        if inner > 1
        else None,
    )


def _ring_call(d: PackedDocument, inner: int, ring: int, rank: int, step: int) -> KernelCall | None:
    """The call on a document in a step; None where no real row sees a real key."""
    owner, chunk, first = (rank - step) % ring, d.chunk * inner, d.first * inner

    def real_rows(holder: int) -> int:
        return _clamp(d.length - holder * chunk, chunk) + _clamp(d.length - (2 * ring - 1 - holder) * chunk, chunk)

    begin = chunk if owner > rank else 0
    queries, keys = real_rows(rank), real_rows(owner)
    if owner < rank:
        keys = min(keys, chunk)
    if queries <= begin or not keys:
        return None
    return KernelCall(slice(first + begin, first + queries), slice(first, first + keys), step == 0)


def _calls_of_chunks(d: PackedDocument, cp_size: int, rank: int) -> Iterator[tuple[KernelCall, ...]]:
    """For each of the two chunks: all earlier keys of the document, then its own block.

    Two calls, because kernels differ in how they place a causal mask on a rectangle (CPU: top left, CUDA flash: bottom right).
    """
    start = d.first * cp_size  # of the document among the joined ones
    for row, index in ((d.first, rank), (d.first + d.chunk, 2 * cp_size - 1 - rank)):
        real = _clamp(d.length - index * d.chunk, d.chunk)
        queries, own = slice(row, row + real), start + index * d.chunk
        calls = (KernelCall(queries, slice(start, own), False), KernelCall(queries, slice(own, own + real), True))
        if real:
            yield calls if index else calls[1:]


def _joined_order(split: list[PackedDocument], ranks: int, rows: int, split_rows: int) -> npt.NDArray[np.int64]:
    """Rows of `ranks` neighbours (`rows` each, laid one after the other) in the order in which they join."""
    offsets = np.arange(ranks, dtype=np.int64)[:, None] * rows
    pieces = []
    for d in split:
        early = np.arange(d.first, d.first + d.chunk)
        pieces += [(offsets + early).ravel(), (offsets[::-1] + early + d.chunk).ravel()]
    behind = (offsets + np.arange(sum(2 * d.chunk for d in split), split_rows)).ravel()  # padding behind the last document
    pieces += [behind, (offsets + np.arange(split_rows, rows)).ravel()]
    return np.concatenate(pieces)


def _clamp(value: int, limit: int) -> int:
    return max(0, min(value, limit))
