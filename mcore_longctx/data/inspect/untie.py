"""Samples that `augment` rearranged, untied again from their sidecar: is every piece there once, in order, and learned as it should be?

It follows the runs of a sample as a reader would: labels name the pieces, knots count them, and each piece of a document goes on
where the one before it ended. Nothing of it is shared with the code that rearranges (`data/methods`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mcore_longctx.data.files.sidecar import LITERAL, PADDING, Runs
from mcore_longctx.data.methods.labels import LabelLayout

__all__ = ["untie"]

_Row = tuple[int, int, int, bool]  # document, start, length, loss


@dataclass(eq=False)
class _Piece:
    """A stretch of one document in one sample."""

    document: int
    start: int
    stop: int
    place: int  # among the pieces of the sample
    label: int | None = None
    head: int = 0  # number of the knot in front of it, 0: none
    tail: int = 0  # and behind it


@dataclass
class _Sample:
    """What a sample of type utk says."""

    pieces: list[_Piece] = field(default_factory=list)
    traces: list[list[int]] = field(default_factory=list)  # labels that stand behind each <S>
    ended: list[bool] = field(default_factory=list)  # and whether </S> follows
    faults: list[str] = field(default_factory=list)
    is_full: bool = False  # no padding: its end may be cut off


def untie(runs: Runs, sample: int) -> Iterator[str]:
    """What is wrong with a sample that `augment` has handled; nothing if it can be untied.

    cip: the stretches of a document follow each other without a gap and in the order of the text. utk: the same by labels and knots,
    and the backtrace behind a document names the labels of its pieces in their order. What the end of the sample cut off may be
    missing. One document of a sample at most begins before the sample (the first one, with cip); every other is there from its first
    token (or, cut by packing `best_fit`, from a whole number of samples). Labels, knots and `<S>` are never learned, the ids of a backtrace always, and
    documents that are learned whole are.
    """
    facts: Mapping[str, Any] = runs.facts["augment"]
    rows = runs.rows(sample)
    columns = (runs.document[rows], runs.start[rows], runs.length[rows], runs.loss[rows])
    table: list[_Row] = list(zip(*(column.tolist() for column in columns), strict=True))
    if facts["documents_learned_whole"]:
        for document, start, _, loss in table:
            if document >= 0 and not loss:
                yield f"token {start:,} of a document is not learned"
                break
    if facts["type"] == "cip":
        firsts = _chained(_stretches(table))
    else:
        said = _Reader(LabelLayout.from_dict(facts["labels"])).read(table)
        yield from said.faults
        yield from _utk_faults(said, keep_order=facts["keep_order"], backtrace=facts["backtrace"])
        firsts = [piece for piece in said.pieces if not piece.head]
    begin = int(runs.facts.get("begin_tokens", 0))
    inside = [piece for piece in firsts if piece.start and (piece.start + begin) % runs.seq_length]
    if len(inside) > 1 or (inside and facts["type"] == "cip" and inside[0].place > 0):
        yield f"a stretch of a document from token {inside[-1].start:,}: a piece is missing, twice there, or not in order"


# ------------------------------------------------------------------ cip: by order alone
def _stretches(table: list[_Row]) -> list[_Piece]:
    """Stretches of documents; runs that follow each other are one."""
    pieces: list[_Piece] = []
    goes_on = False
    for document, start, length, _ in table:
        if document >= 0:
            if goes_on and (pieces[-1].document, pieces[-1].stop) == (document, start):
                pieces[-1].stop += length
            else:
                pieces.append(_Piece(document, start, start + length, len(pieces)))
        goes_on = document >= 0
    return pieces


def _chained(pieces: list[_Piece]) -> list[_Piece]:
    """Pieces that go on where none before them ended."""
    ends: Counter[tuple[int, int]] = Counter()  # document, token: pieces that wait for the next one
    firsts = []
    for piece in pieces:
        if ends[piece.document, piece.start]:
            ends[piece.document, piece.start] -= 1
        else:
            firsts.append(piece)
        ends[piece.document, piece.stop] += 1
    return firsts


# ------------------------------------------------------------------ utk: by labels and knots
def _utk_faults(said: _Sample, *, keep_order: bool, backtrace: bool) -> Iterator[str]:
    labelled = {piece.label: piece for piece in said.pieces if piece.label is not None}
    if len(labelled) < sum(piece.label is not None for piece in said.pieces):
        yield "two pieces have one label"
    for piece in said.pieces:
        is_tied = piece.head or piece.tail or (said.is_full and piece.place == len(said.pieces) - 1)
        if (piece.label is None) if piece.head or piece.tail else (piece.label is not None and not is_tied):
            yield f"a piece from token {piece.start:,} has a label and no knot, or a knot and no label"
    cut_off: list[_Piece] = []  # the last pieces that a backtrace could name
    for number, (labels, is_ended) in enumerate(zip(said.traces, said.ended, strict=True)):
        chain = [labelled.pop(label) for label in labels if label in labelled]
        if fault := _trace_fault(chain, len(labels), keep_order=keep_order):
            yield f"backtrace {number} {fault}"
        if is_ended and (not chain or chain[-1].tail):
            yield f"backtrace {number} leaves out the last piece of its document"
        elif not is_ended and not (said.is_full and number == len(said.traces) - 1):
            yield f"backtrace {number} does not end"
        elif not is_ended:
            cut_off += chain[-1:]
    if backtrace and labelled and not said.is_full:
        yield f"{len(labelled)} pieces are in no backtrace"
    if keep_order:
        yield from _broken(list(labelled.values()), cut_off, is_full=said.is_full)


def _trace_fault(chain: list[_Piece], labels: int, *, keep_order: bool) -> str | None:
    """What is wrong with the pieces that a backtrace of so many labels names."""
    if len(chain) < labels:
        return "names a label that no piece has"
    if any(piece.document != chain[0].document or piece.head != place for place, piece in enumerate(chain)):
        return "does not name the pieces of one document in their order"
    if any(a.stop != b.start for a, b in pairwise(chain)):
        return "names pieces that leave a gap or overlap"
    if keep_order and any(a.place > b.place for a, b in pairwise(chain)):
        return "names pieces that are not in order"
    return None


def _broken(pieces: list[_Piece], before: list[_Piece], *, is_full: bool) -> Iterator[str]:
    """Pieces that no backtrace names, chained by their knots. before: pieces that one names, but not those that follow."""
    # document, token, knot: pieces that wait for the next one
    ends: Counter[tuple[int, int, int]] = Counter((piece.document, piece.stop, piece.tail) for piece in before if piece.tail)
    for piece in pieces:
        key = (piece.document, piece.start, piece.head)
        if piece.head and not ends[key]:
            yield f"the piece from token {piece.start:,} of a document goes on where no piece ended"
            return
        if piece.head:
            ends[key] -= 1
        if piece.tail:
            ends[piece.document, piece.stop, piece.tail] += 1
    if not is_full and any(ends.values()):
        yield "a piece of a document is missing"


class _Reader:
    """Reads the runs of a sample in order."""

    def __init__(self, layout: LabelLayout) -> None:
        self.said = _Sample()
        self._layout = layout
        self._label: int | None = None
        self._head = 0
        self._goes_on = self._in_trace = False

    def read(self, table: list[_Row]) -> _Sample:
        """Pieces with their labels and knots, backtraces, and faults of loss flags and of what stands where."""
        self.said.is_full = bool(table) and table[-1][0] != PADDING
        for document, start, length, loss in table:
            if document >= 0:
                self._document(document, start, length)
            elif document == LITERAL:
                self._goes_on = False
                kind, number = self._layout.kind(start)
                if kind != "separator":  # which belongs to the piece that it ends, or begins
                    self._added(kind, number, loss)
        return self.said

    def _document(self, document: int, start: int, length: int) -> None:
        pieces = self.said.pieces
        if self._goes_on and (pieces[-1].document, pieces[-1].stop) == (document, start):
            pieces[-1].stop += length
        else:
            pieces.append(_Piece(document, start, start + length, len(pieces), self._label, self._head))
        self._label, self._head, self._goes_on, self._in_trace = None, 0, True, False

    def _added(self, kind: str, number: int, loss: bool) -> None:
        if loss != (kind in ("id", "stop")):
            self.said.faults.append(f"loss flag {loss} on a run of kind {kind}")
        if kind == "label":
            self._label, self._in_trace = number, False
        elif kind.startswith("head") and self._label is not None:
            self._head = int(kind[4:])
        elif kind.startswith("tail") and self.said.pieces and not self.said.pieces[-1].tail:
            self.said.pieces[-1].tail = int(kind[4:])
        elif kind == "ask":
            self.said.traces.append([])
            self.said.ended.append(False)
            self._in_trace = True
        elif kind in ("id", "stop") and self._in_trace:
            self.said.traces[-1] += [number] if kind == "id" else []
            self.said.ended[-1] = kind == "stop"
        else:
            self.said.faults.append(f"a run of kind {kind} where none can be")
