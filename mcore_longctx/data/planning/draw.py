"""Which documents are taken, how often, and in which order: decided from the table of documents alone.

Length sampling after Fu et al. (arXiv 2402.10171), as the UltraLong recipe uses it: inside each source, short documents are kept
with a probability and long ones repeated. Their code draws from an unseeded generator; here every decision is a hash of (seed, key
of the document, copy, part), so it is the same for any order of reading. Rows of the table decide nothing.

    group        what has a share of its own: a source, or the chunks of one length of a source
    item         one copy of a document, or one piece of it where it is cut in pieces of a fixed length
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import DocumentTable, hash64
from mcore_longctx.data.planning.lengths import source_borders
from mcore_longctx.data.planning.shares import Group, targets
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import DataSection, LengthSampling

__all__ = ["Chunks", "Drawn", "document_copies", "draw", "hash_order"]

IntArray = npt.NDArray[np.int64]
Rows = npt.NDArray[Any]  # rows of the table, int32 while they fit: 10^8 documents are 0.4 GB less

_COPIES, _SELECT, _ORDER = 1, 2, 3  # salts: the decisions must not depend on each other
_BLOCK = 1 << 18  # documents at once: temporary columns stay in the cache and cost no memory


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """Pieces of exactly `length` tokens of one group, in the order in which they are laid out."""

    group: int
    length: int
    document: Rows  # [pieces]
    part: IntArray  # [pieces] number of the piece in its document


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """What was chosen."""

    groups: tuple[Group, ...]
    document: Rows  # [items] whole documents in the order in which they are laid out
    length: IntArray  # [items] tokens taken, from the start of the document
    chunks: tuple[Chunks, ...]
    sources: tuple[dict[str, int], ...]  # for each source where its documents and tokens went


@dataclass(frozen=True, eq=False)
class _Items:
    document: Rows
    copy: npt.NDArray[np.int32]
    part: IntArray | None = None

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, rows: Any) -> _Items:
        return _Items(self.document[rows], self.copy[rows], None if self.part is None else self.part[rows])


def document_copies(table: DocumentTable, sampling: LengthSampling, seed: int) -> npt.NDArray[np.int32]:
    """How often each document is taken, int32 [documents].

    The weight w is 0 outside `min_length` to `max_length`, keep_probability below `short_below`, repetition above `long_above`,
    else 1. Copies are floor(w) + [u < frac(w)] with u in [0, 1) from the hash of the document, so their expected number is w.
    """
    copies = np.empty(len(table), np.int32)
    for block in _blocks(0, len(table)):
        length = table.length[block]
        weight = np.ones(len(length))
        weight[length < sampling.short_below] = sampling.keep_probability
        weight[length > sampling.long_above] = sampling.repetition
        weight[length < sampling.min_length] = 0.0
        if sampling.max_length is not None:
            weight[length > sampling.max_length] = 0.0
        whole = np.floor(weight)
        uniform = (hash64(seed, _COPIES, table.key[block]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        copies[block] = whole + (uniform < weight - whole)
    return copies


def draw(
    table: DocumentTable,
    section: DataSection,
    *,
    seed: int,
    seq_length: int,
    wrapping: int,
    between: int,
    token_budget: int | None,
) -> Drawn:
    """Choose documents and pieces so that the shares hold.

    Args:
        table: of the documents.
        section: mode, shares, length sampling, packing.
        seed: of every decision.
        seq_length: tokens of a sample.
        wrapping: separator tokens that every document takes with it; they count for its source.
        between: of these, those that the last document of the stream does without.
        token_budget: tokens of the samples, without padding; or None: as many as the shares allow. The last document of a source
            is cut where its budget ends.

    Raises:
        DataError: a source with a share has nothing left, or too little for its share, or seq_length is no multiple of a chunk.
    """
    copies = document_copies(table, section.length_sampling, seed)
    largest = seq_length - (wrapping - between) if section.packing == "intact" else None
    groups = _groups(section, table, seq_length)
    drawer = _Drawer(table, copies, seed, wrapping, largest)
    for group in groups:
        group.held, group.pieces = drawer.held(group)
        if group.chunk is not None:  # only whole samples can be laid out
            group.held = group.pieces * group.chunk // seq_length * seq_length
        group.before = int(table.length[group.rows].sum())
    wanted = targets(groups, section, seq_length=seq_length, between=between, budget=token_budget)
    packed, cuts, chunks, first = [], [], [], 0
    for number, (group, want) in enumerate(zip(groups, wanted, strict=True)):
        group.wanted = want
        if group.chunk is None:
            items, cut = drawer.whole(group, want)
            if cut is not None:
                cuts.append((first + cut[0], cut[1]))
            first += len(items)
            packed.append(items)
        else:
            items = drawer.pieces(group, want, seq_length)
            items = items[drawer.order(items)]
            assert items.part is not None
            chunks.append(Chunks(group=number, length=group.chunk, document=items.document, part=items.part))
    items = _joined(packed)
    packed.clear()
    order = drawer.order(items)
    document = items.document[order]
    length = np.empty(len(document), np.int64)
    for block in _blocks(0, len(document)):
        length[block] = drawer.usable(table.length[document[block]])
    for item, kept in cuts:
        length[np.flatnonzero(order == item)] = kept
    facts = _account(table, section.length_sampling, copies, groups, drawer)
    for block in _blocks(0, len(document)):
        taken = np.bincount(table.source[document[block]], length[block], len(facts)).astype(np.int64)
        for found, tokens in zip(facts, taken.tolist(), strict=True):
            found["taken_tokens"] += tokens
    for piece in chunks:
        facts[groups[piece.group].source]["taken_tokens"] += len(piece.document) * piece.length
    return Drawn(groups=tuple(groups), document=document, length=length, chunks=tuple(chunks), sources=tuple(facts))


def hash_order(count: int, hash_of: Callable[[Any], npt.NDArray[np.uint64]], *ties: npt.NDArray[Any]) -> IntArray:
    """Order of items by their hash, int64 [items]; equal hashes by the columns `ties`.

    Keys of documents are distinct and every step of `hash64` is a bijection, so that items of equal hash differ in copy or part:
    with these as ties, no row of the table decides. The upper bits of the hash and the item's number are sorted together in place,
    which needs half the memory of an argsort; the few items whose upper bits are equal are then put in order by all bits.

    Args:
        count: of items.
        hash_of: hashes of the items of a slice or of an array of numbers.
        *ties: columns, the most significant first.
    """
    bits = np.uint64(max(1, (count - 1).bit_length()))
    packed = np.empty(count, np.uint64)
    for block in _blocks(0, count):
        packed[block] = hash_of(block) >> bits << bits | np.arange(block.start, block.stop, dtype=np.uint64)
    packed.sort()
    equal = [np.zeros(0, np.int64)]  # places whose right neighbour has the same upper bits
    for block in _blocks(0, count - 1):
        upper = packed[block.start : block.stop + 1] >> bits
        equal.append(np.flatnonzero(upper[1:] == upper[:-1]) + block.start)
    places = np.concatenate(equal)
    places = np.unique(np.concatenate([places, places + 1]))
    upper = packed[places] >> bits
    packed &= (np.uint64(1) << bits) - np.uint64(1)
    order = packed.view(np.int64)
    if len(places):
        items = order[places]
        order[places] = items[np.lexsort((*(column[items] for column in reversed(ties)), hash_of(items), upper))]
    return order


class _Drawer:
    """Items of groups, from the copies of their documents."""

    def __init__(
        self, table: DocumentTable, copies: npt.NDArray[np.int32], seed: int, wrapping: int, largest: int | None
    ) -> None:
        self.table, self.copies, self.seed, self.wrapping, self.largest = table, copies, seed, wrapping, largest
        self.row_type = np.int32 if len(table) < 2**31 else np.int64

    def usable(self, length: IntArray) -> IntArray:
        """Tokens that packing can take of documents of these lengths."""
        return length if self.largest is None else np.minimum(length, self.largest)

    def held(self, group: Group) -> tuple[int, int]:
        """Tokens (with separators), and pieces, of all copies of the group's documents."""
        tokens = pieces = 0
        for block in _blocks(group.rows.start, group.rows.stop):
            copies, length = self.copies[block].astype(np.int64), self.table.length[block]
            if group.chunk is None:
                tokens += int((copies * (self.usable(length) + self.wrapping)).sum())
            else:
                pieces += int((copies * group.pieces_of(length)).sum())
        return tokens, pieces

    def whole(self, group: Group, wanted: int | None) -> tuple[_Items, tuple[int, int] | None]:
        """Copies of whole documents for `wanted` tokens, and which of them is cut to how many tokens."""
        base = self._base(group)
        if wanted is None or not group.held:
            return base, None
        rounds, rest = divmod(wanted, group.held)
        whole = [self._round(base, number) for number in range(rounds)]
        if not rest:
            return _joined(whole), None
        partial = self._round(base, rounds)
        chosen = self._sorted(_SELECT, partial)
        reached = np.empty(len(chosen), np.int64)
        for block in _blocks(0, len(chosen)):
            reached[block] = self.usable(self.table.length[partial.document[chosen[block]]])
        reached += self.wrapping
        np.cumsum(reached, out=reached)
        last = int(np.searchsorted(reached, rest))
        kept = int(self.usable(self.table.length[partial.document[chosen[last : last + 1]]])[0]) - int(reached[last]) + rest
        items = _joined([*whole, partial[chosen[: last + 1]]])
        return items, (len(items) - 1, max(1, kept))

    def pieces(self, group: Group, wanted: int | None, seq_length: int) -> _Items:
        """Pieces for `wanted` tokens: whole samples, or all there are."""
        assert group.chunk is not None
        base = self._base(group)
        count = group.pieces_of(self.table.length[base.document])
        part = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        base = _Items(np.repeat(base.document, count), np.repeat(base.copy, count), part)
        if wanted is None:
            wanted = group.held
        rounds, rest = divmod(wanted // group.chunk, len(base)) if len(base) else (0, 0)
        partial = self._round(base, rounds)
        chosen = self._sorted(_SELECT, partial)[:rest]
        return _joined([*(self._round(base, number) for number in range(rounds)), partial[chosen]])

    def order(self, items: _Items) -> IntArray:
        """The order in which items are laid out."""
        return self._sorted(_ORDER, items)

    def _base(self, group: Group) -> _Items:
        """All copies of the group's documents, once."""
        rows: Rows = np.flatnonzero(self.copies[group.rows]).astype(self.row_type)
        rows += group.rows.start
        if group.chunk is not None:
            rows = rows[group.pieces_of(self.table.length[rows]) > 0]
        copies = self.copies[rows]
        if not len(rows) or int(copies.max()) == 1:
            return _Items(rows, np.zeros(len(rows), np.int32))
        copy = np.arange(int(copies.sum())) - np.repeat(np.cumsum(copies) - copies, copies)
        return _Items(np.repeat(rows, copies), copy.astype(np.int32))

    def _round(self, base: _Items, number: int) -> _Items:
        """The same items taken again; their copies are numbered on."""
        if not number:
            return base
        return _Items(base.document, base.copy + np.int32(number) * self.copies[base.document], base.part)

    def _sorted(self, salt: int, items: _Items) -> IntArray:
        def hash_of(rows: Any) -> npt.NDArray[np.uint64]:
            words: list[Any] = [self.table.key[items.document[rows]], items.copy[rows]]
            if items.part is not None:
                words.append(items.part[rows])
            return hash64(self.seed, salt, *words)

        return hash_order(len(items), hash_of, items.copy, *([] if items.part is None else [items.part]))


def _groups(section: DataSection, table: DocumentTable, seq_length: int) -> list[Group]:
    """The groups of all sources, in their order, the longest chunks of a source first."""
    border = source_borders(table)
    groups = []
    for index, source in enumerate(section.sources):
        rows = slice(border[index], border[index + 1])
        if section.packing == "single" and not source.chunks:
            groups.append(Group(source.name, index, rows, source.share, chunk=seq_length))
        elif not source.chunks:
            groups.append(Group(source.name, index, rows, source.share))
        longer = None
        for chunk in sorted(source.chunks, key=lambda chunk: -chunk.length):
            if chunk.length < 1 or seq_length % chunk.length:
                raise DataError(
                    f"seq_length {seq_length:,} is no multiple of the chunk length {chunk.length:,}",
                    where=f"source {source.name}",
                    fix="choose chunks that fill a sample",
                )
            groups.append(Group(source.name, index, rows, chunk.share, chunk=int(chunk.length), longer=longer, is_class=True))
            longer = int(chunk.length)
    return groups


def _account(
    table: DocumentTable, sampling: LengthSampling, copies: npt.NDArray[np.int32], groups: Sequence[Group], drawer: _Drawer
) -> list[dict[str, int]]:
    """For each source: what was read, what length sampling left out, what it drew, and what of that packing can take."""
    border = source_borders(table)
    facts = []
    for index in range(len(table.sources)):
        mine = [group for group in groups if group.source == index]
        found = dict.fromkeys(
            ("documents", "tokens", "short", "short_tokens", "long", "long_tokens", "not_drawn", "not_drawn_tokens", "drawn"), 0
        ) | {"drawn_tokens": 0, "usable_tokens": 0, "taken_tokens": 0}
        for block in _blocks(border[index], border[index + 1]):
            length, drawn = table.length[block], copies[block].astype(np.int64)
            short = length < sampling.min_length
            long = length > sampling.max_length if sampling.max_length is not None else np.zeros(len(length), np.bool_)
            missed = (drawn == 0) & ~short & ~long
            for name, mask in (("short", short), ("long", long), ("not_drawn", missed)):
                found[name] += int(mask.sum())
                found[f"{name}_tokens"] += int(length[mask].sum())
            found["documents"] += len(length)
            found["tokens"] += int(length.sum())
            found["drawn"] += int(drawn.sum())
            found["drawn_tokens"] += int((drawn * length).sum())
            for group in mine:
                whole = drawer.usable(length) if group.chunk is None else group.pieces_of(length) * group.chunk
                found["usable_tokens"] += int((drawn * whole).sum())
        facts.append(found)
    return facts


def _joined(parts: Sequence[_Items]) -> _Items:
    if not parts:
        return _Items(np.zeros(0, np.int32), np.zeros(0, np.int32))
    parts = [part for part in parts if len(part)] or parts[:1]
    if len(parts) == 1:  # 10^8 of them are not copied
        return parts[0]
    part = None if parts[0].part is None else np.concatenate([each.part for each in parts if each.part is not None])
    return _Items(np.concatenate([each.document for each in parts]), np.concatenate([each.copy for each in parts]), part)


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for low in range(start, stop, _BLOCK):
        yield slice(low, min(low + _BLOCK, stop))
