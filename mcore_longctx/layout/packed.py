"""Packed documents under context parallelism: which rows of a pack each rank holds, and what each rank computes with them.

A pack is several documents that do not see each other. `c` ranks hold it in equal numbers of rows:

    zigzag    the document is padded at its end to 2c equal chunks and rank r holds chunks r and 2c-1-r (the rule of Megatron and
              TransformerEngine): its causal work is the same on every rank, and its keys must travel
    whole     the document lies on one rank: nothing of it travels

On every rank the zigzagged documents come first, one after the other, then the rank's whole documents, then padding. So the keys that
travel are one contiguous prefix. Padding is at the end of a document and the mask is causal: **the real rows of a document on a rank
are always a prefix of its rows there**, and kernels are called on real rows alone. A plain batch is a pack of one document.

Two splits are built here. `split="zigzag"` zigzags every document. `split="hybrid"` zigzags the longest ones only: each candidate
number of them (0, 1, 2, 4, ... all) is laid out and the cheapest taken, in units of one query-key pair of one layer:

    max(pairs of the slowest rank, 3,500 x keys received) + 17,000 x rows + 50,000 x kernel calls of a rank

The three constants are the ratios of an 8B Llama on H100 with a 400 Gb/s network (40 GB/s usable): a ring step of t rows hides
behind t^2/2 pairs from t = 7,100 on; a row's linear layers take as long as 17,000 pairs; a kernel launch as 50,000. They decide
how a pack is split and nothing else. Where nothing has to be balanced (`a2a`: every rank computes all documents for some of the
heads) the same rule counts rows and calls alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import LayoutError
from mcore_longctx.layout.zigzag import check_seq_length

__all__ = ["PackLayout", "PackSplit", "PackedDocument", "pack_from_cu_seqlens", "pack_layout", "plain_layout"]

PackSplit = Literal["hybrid", "zigzag"]
Indices = npt.NDArray[np.int64]

PAIRS_PER_KEY = 3_500
PAIRS_PER_ROW = 17_000
PAIRS_PER_CALL = 50_000


class PackedDocument(NamedTuple):
    """Where one document lies: its first row on the rank or ranks that hold it, and the rows of each of its two chunks there.

    A whole document has a rank and no chunks.
    """

    length: int
    first: int
    chunk: int = 0
    rank: int | None = None


@dataclass(frozen=True, eq=False)
class PackLayout:
    """Where the rows of a pack lie on `cp_size` ranks of `rows` rows each; the first `split_rows` belong to zigzagged documents.

    `documents` are in the order in which the user gave them, documents without a token left out; `starts` are their first rows in
    the pack as the user has it, without any padding.
    """

    cp_size: int
    rows: int
    split_rows: int
    documents: tuple[PackedDocument, ...]
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Real tokens of the pack."""
        return sum(document.length for document in self.documents)

    @property
    def fingerprint(self) -> int:
        """A number of 56 bits that two ranks share exactly if they mean the same layout (but for chance)."""
        meant = repr((self.cp_size, self.rows, self.split_rows, [tuple(d) for d in self.documents]))
        return int.from_bytes(hashlib.sha256(meant.encode()).digest()[:7])

    def positions(self, rank: int) -> Indices:
        """Position inside its document of every row of a rank, int64 [rows]; padding behind all documents has position 0."""
        return self._rows_of(rank)[1]

    def real(self, rank: int) -> npt.NDArray[np.bool_]:
        """Whether a row of a rank is a token, not padding, bool [rows]."""
        return self._rows_of(rank)[0] >= 0

    def source(self, rank: int) -> Indices:
        """Row of the user's unpadded pack that lies at each row of a rank, int64 [rows]; -1: padding."""
        document, position = self._rows_of(rank)
        starts = np.array((*self.starts, 0), dtype=np.int64)
        return np.where(document >= 0, starts[document] + position, -1)

    def has_next(self, rank: int) -> npt.NDArray[np.bool_]:
        """Whether the token after a row belongs to the same document, bool [rows]: only these rows have a label."""
        document, position = self._rows_of(rank)
        lengths = np.array([*(d.length for d in self.documents), 0], dtype=np.int64)
        return (document >= 0) & (position + 1 < lengths[document])

    def _rows_of(self, rank: int) -> tuple[Indices, Indices]:
        """Document of every row (-1: padding) and position inside it."""
        document = np.full(self.rows, -1, dtype=np.int64)
        position = np.zeros(self.rows, dtype=np.int64)
        for index, d in enumerate(self.documents):
            if d.rank is None:
                rows = slice(d.first, d.first + 2 * d.chunk)
                early, late = rank * d.chunk, (2 * self.cp_size - 1 - rank) * d.chunk
                position[rows] = np.concatenate([np.arange(early, early + d.chunk), np.arange(late, late + d.chunk)])
                document[rows] = np.where(position[rows] < d.length, index, -1)
            elif d.rank == rank:
                rows = slice(d.first, d.first + d.length)
                position[rows], document[rows] = np.arange(d.length), index
        return document, position

    def attention_work(self, inner: int = 1) -> Indices:
        """Causal query-key pairs that each rank computes per head of its own, int64 [cp_size / inner].

        Neighbouring ranks that share the heads of their documents (`inner` of them, `a2a`) have the same work and count once.
        """
        ring = self.cp_size // inner
        work = np.zeros(ring, dtype=np.int64)
        ranks = np.arange(ring)
        for d in self.documents:
            if d.rank is not None:
                work[d.rank // inner] += d.length * (d.length + 1) // 2
            else:
                for chunk in (ranks, 2 * ring - 1 - ranks):
                    low = np.minimum(chunk * d.chunk * inner, d.length)
                    high = np.minimum((chunk + 1) * d.chunk * inner, d.length)
                    work += (high - low) * (high + low + 1) // 2
        return work

    def imbalance(self, inner: int = 1) -> float:
        """Attention work of the slowest rank over the mean: 1 is perfect."""
        work = self.attention_work(inner)
        return float(work.max() / work.mean()) if work.any() else 1.0

    def keys_received(self, inner: int = 1) -> int:
        """Rows whose key and value a rank receives in the forward pass of a layer from outside its `inner` neighbours.

        Counted in full rows: neighbours that share heads receive `inner` times as many rows of 1/inner of the heads.
        """
        return self.split_rows * (self.cp_size // inner - 1)

    def describe(self, inner: int = 1) -> str:
        """One line for a log: documents, padding, how they are split, balance, what travels."""
        padding = 1 - self.tokens / (self.rows * self.cp_size)
        split = [d.length for d in self.documents if d.rank is None]
        shortest = f" of {min(split):,} tokens or more" if split else ""
        return (
            f"{len(self.documents):,} documents, {self.tokens:,} tokens in {self.cp_size} x {self.rows:,} rows ({padding:.1%} padding);"
            f" {len(split):,}{shortest} in zigzag over the ranks, {len(self.documents) - len(split):,} whole;"
            f" attention work max/mean {self.imbalance(inner):.2f}, {self.keys_received(inner):,} keys received by each rank"
        )


@lru_cache(maxsize=16)
def plain_layout(seq_length: int, cp_size: int) -> PackLayout:
    """A batch without document boundaries: one document of `seq_length` tokens, zigzagged.

    Raises:
        LayoutError: `seq_length` is not a multiple of 2 x `cp_size`.
    """
    check_seq_length(seq_length, cp_size)
    return pack_from_cu_seqlens((0, seq_length), (0, seq_length), cp_size)


def pack_from_cu_seqlens(
    cu_seqlens: Sequence[int], cu_seqlens_padded: Sequence[int], cp_size: int, *, where: object = None
) -> PackLayout:
    """The layout that Megatron and TransformerEngine mean by a pair of cu_seqlens: every document in zigzag.

    Args:
        cu_seqlens: real lengths, summed up from 0, before the split over ranks.
        cu_seqlens_padded: where the documents lie in the padded pack, each padded length a multiple of 2 x `cp_size`.
        cp_size: ranks.
        where: for the error.

    Raises:
        LayoutError: sums that do not begin with 0 or descend, a document longer than its padded length, a padded length that does
            not divide.
    """
    unit = 2 * cp_size if cp_size > 1 else 1
    for name, sums in (("cu_seqlens", cu_seqlens), ("cu_seqlens_padded", cu_seqlens_padded)):
        if len(sums) < 2 or sums[0] != 0:
            raise LayoutError(f"{name} are {_some(sums)}; they begin with 0 and have one more entry than documents", where=where)
        falls = [i for i, (a, b) in enumerate(pairwise(sums)) if b < a]
        if falls:
            i = falls[0]
            raise LayoutError(f"{name} fall from {sums[i]:,} to {sums[i + 1]:,} at entry {i + 1}; they are sums", where=where)
    if len(cu_seqlens) != len(cu_seqlens_padded):
        raise LayoutError(
            f"cu_seqlens have {len(cu_seqlens):,} entries, cu_seqlens_padded {len(cu_seqlens_padded):,}; both have one for each"
            " document and one more",
            where=where,
        )
    documents, starts = [], []
    for i, ((start, end), (first, last)) in enumerate(zip(pairwise(cu_seqlens), pairwise(cu_seqlens_padded), strict=True)):
        length, padded = end - start, last - first
        if padded % unit:
            raise LayoutError(
                f"document {i} is padded to {padded:,} rows, not a multiple of 2 x context_parallel_size ({unit})",
                where=where,
                fix=f"pad each document at its end, here to {-(-length // unit) * unit:,}, and give these sums as cu_seqlens_padded",
            )
        if length > padded:
            raise LayoutError(f"document {i} has {length:,} tokens in {padded:,} rows", where=where)
        if length and cp_size == 1:
            documents.append(PackedDocument(length, first, rank=0))
        elif length:
            documents.append(PackedDocument(length, first // cp_size, padded // unit))
        if length:
            starts.append(start)
    rows = cu_seqlens_padded[-1] // cp_size
    return PackLayout(cp_size, rows, rows if cp_size > 1 else 0, tuple(documents), tuple(starts))


def pack_layout(
    lengths: Sequence[int],
    cp_size: int,
    *,
    inner: int = 1,
    split: PackSplit = "hybrid",
    limit: int | None = None,
    multiple: int = 1,
    rows: int | None = None,
) -> PackLayout:
    """Lay out a pack of documents of any lengths; the user pads nothing.

    Args:
        lengths: tokens of each document, in the order of the pack.
        cp_size: context-parallel ranks.
        inner: neighbouring ranks that share heads: 1 for `p2p` and `all_gather`, `cp_size` for `a2a`, the first of the hierarchical
            sizes for `a2a+p2p`. It decides what has to be balanced.
        split: see the module.
        limit: hybrid: documents of at least so many tokens are zigzagged. None: chosen by the rule of the module.
        multiple: rows of a rank are a multiple of this (the tensor-parallel size under sequence parallelism).
        rows: rows of a rank; None: as few as the documents need. Pipeline stages want the same number for every pack.

    Raises:
        LayoutError: no tokens, a negative length, or documents that need more than `rows`.
    """
    if min(lengths, default=0) < 0 or not sum(lengths):
        raise LayoutError(f"document lengths are {_some(lengths)}; a pack has at least one token and no negative length")
    if cp_size % inner:
        raise LayoutError(f"{inner} neighbours that share heads do not divide {cp_size} context-parallel ranks")
    if cp_size == 1:
        layout = _placed(lengths, 1, 1, 0)
    elif split == "zigzag":
        layout = _placed(lengths, cp_size, inner, len(lengths))
    elif limit is not None:
        layout = _placed(lengths, cp_size, inner, sum(length >= limit for length in lengths))
    else:
        counts = {0, *(2**k for k in range(len(lengths).bit_length())), len(lengths)}
        candidates = [_placed(lengths, cp_size, inner, count) for count in sorted(counts) if count <= len(lengths)]
        layout = min(candidates, key=lambda candidate: _cost(candidate, inner))
    needed = -(-layout.rows // multiple) * multiple
    if rows is None:
        rows = needed
    elif rows < needed or rows % multiple:
        raise LayoutError(
            f"{len(layout.documents):,} documents of {layout.tokens:,} tokens need {needed:,} rows on each of {cp_size} ranks, "
            f"{rows:,} are given",
            fix="give more rows or fewer documents" if rows < needed else f"give a multiple of {multiple}",
        )
    return PackLayout(cp_size, rows, layout.split_rows, layout.documents, layout.starts)


def _placed(lengths: Sequence[int], cp_size: int, inner: int, split_count: int) -> PackLayout:
    """Zigzag the `split_count` longest documents; the rest lies whole on the ring rank with least work that has room, longest first.

    Room ends where all ranks would be equally full. A document that has none is zigzagged too, unless that takes more rows.
    """
    unit, ring = 2 * cp_size, cp_size // inner
    by_length = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i))
    split = set(by_length[:split_count]) if cp_size > 1 else set()
    split_rows = sum(2 * -(-lengths[i] // unit) for i in split)
    room = split_rows + -(-sum(lengths[i] for i in by_length if i not in split) // cp_size)
    filled = np.zeros(cp_size, dtype=np.int64)  # rows of whole documents on each rank
    work = np.zeros(ring, dtype=np.int64)
    owner: dict[int, int] = {}
    for i in (i for i in by_length if i not in split):
        length, chunks = lengths[i], 2 * -(-lengths[i] // unit)
        emptiest = filled.reshape(ring, inner).min(axis=1)
        fits = np.flatnonzero(split_rows + emptiest + length <= room)
        if not len(fits) and split_rows + emptiest.min() + length > room + chunks and cp_size > 1:
            split.add(i)
            split_rows += chunks
            room += chunks - length // cp_size
            continue
        choice = fits[work[fits].argmin()] if len(fits) else emptiest.argmin()
        rank = int(choice * inner + filled[choice * inner : (choice + 1) * inner].argmin())
        owner[i] = rank
        filled[rank] += length
        work[choice] += length * (length + 1) // 2
    documents, starts = [], []
    split_at, whole_at, start = 0, np.full(cp_size, split_rows, dtype=np.int64), 0
    for i, length in enumerate(lengths):
        if i in split:
            chunk = -(-length // unit)
            documents.append(PackedDocument(length, split_at, chunk))
            split_at += 2 * chunk
        elif length:
            rank = owner[i]
            documents.append(PackedDocument(length, int(whole_at[rank]), rank=rank))
            whole_at[rank] += length
        if length:
            starts.append(start)
        start += length
    return PackLayout(cp_size, int(whole_at.max()), split_rows, tuple(documents), tuple(starts))


def _cost(layout: PackLayout, inner: int) -> float:
    """Time of a layer on the slowest rank, in query-key pairs: see the module."""
    ring = layout.cp_size // inner
    whole = np.bincount([d.rank // inner for d in layout.documents if d.rank is not None], minlength=ring)
    calls = int(whole.max()) + ring * sum(d.rank is None for d in layout.documents)
    pairs = int(layout.attention_work(inner).max()) / inner
    keys = layout.keys_received(inner)
    return max(pairs, PAIRS_PER_KEY * keys) + PAIRS_PER_ROW * layout.rows + PAIRS_PER_CALL * calls


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:,}" for number in list(numbers)[:6])
    return f"[{shown}{', ...' if len(numbers) > 6 else ''}]"
