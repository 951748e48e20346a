"""The plan again in plain Python, token by token, from the words of the documentation: slow, and sharing no code with the builder."""

import math
from dataclasses import dataclass, field

import numpy as np

from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import LITERAL, PADDING, Runs
from mcore_longctx.data.planning.layout import Separator
from mcore_longctx.recipe.schema import DataSection, LengthSampling

COPIES, SELECT, ORDER, CHATS, SAMPLES = 1, 2, 3, 4, 5
MASK = (1 << 64) - 1

Token = tuple[object, int, bool]  # key of a document, "literal" or "padding"; position or id; loss flag


@dataclass
class Doc:
    """One document: `segments` are (tokens, loss) from its start."""

    key: int
    source: int
    length: int
    segments: list[tuple[int, bool]] = field(default_factory=list)

    def tokens(self) -> list[Token]:
        flags = [loss for length, loss in self.segments for _ in range(length)] or [True] * self.length
        return [(self.key, at, flags[at]) for at in range(self.length)]


def split_mix(*words: int) -> int:
    state = 0
    for word in words:
        state = ((state ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def make_docs(lengths: list[int], sources: list[int] | None = None, segments: dict[int, list[tuple[int, bool]]] | None = None):
    """Documents with made-up keys."""
    found = []
    for number, length in enumerate(lengths):
        source = sources[number] if sources else 0
        found.append(Doc(split_mix(99, number), source, length, (segments or {}).get(number, [])))
    return found


def make_table(docs: list[Doc], order: list[int] | None = None, sources: int = 1) -> DocumentTable:
    """Rows in `order`, the sources one behind the other, as shards give them."""
    rows = sorted((docs[i] for i in (order if order is not None else range(len(docs)))), key=lambda doc: doc.source)
    document, stop, flag = [], [], []
    for row, doc in enumerate(rows):
        if not all(loss for _, loss in doc.segments):
            ends = np.cumsum([length for length, _ in doc.segments]).tolist()
            document += [row] * len(ends)
            stop += ends
            flag += [loss for _, loss in doc.segments]
    return DocumentTable(
        sources=tuple(f"source{index}" for index in range(sources)),
        source=np.array([doc.source for doc in rows], np.uint16),
        key=np.array([doc.key for doc in rows], np.uint64),
        length=np.array([doc.length for doc in rows], np.int64),
        loss_document=np.array(document, np.int64),
        loss_stop=np.array(stop, np.int64),
        loss_flag=np.array(flag, np.bool_),
        shard_first=np.array([0, len(rows)]),
    )


def read_tokens(runs: Runs, table: DocumentTable) -> list[list[Token]]:
    """Every token of every sample of a plan."""
    samples = []
    for index in range(len(runs)):
        tokens: list[Token] = []
        for row in range(int(runs.first_run[index]), int(runs.first_run[index + 1])):
            document, start, length = int(runs.document[row]), int(runs.start[row]), int(runs.length[row])
            loss = bool(runs.loss[row])
            if document == PADDING:
                assert start == 0
                tokens += [("padding", 0, loss)] * length
            elif document == LITERAL:
                tokens += [("literal", int(each), loss) for each in runs.literals[start : start + length]]
                assert start + length <= len(runs.literals)
            else:
                tokens += [(int(table.key[document]), at, loss) for at in range(start, start + length)]
        samples.append(tokens)
    return samples


def copies_of(doc: Doc, how: LengthSampling, seed: int) -> int:
    if doc.length < how.min_length or (how.max_length is not None and doc.length > how.max_length):
        return 0
    weight = how.keep_probability if doc.length < how.short_below else how.repetition if doc.length > how.long_above else 1.0
    uniform = (split_mix(seed, COPIES, doc.key) >> 11) / 2**53
    return math.floor(weight) + (uniform < weight - math.floor(weight))


def in_samples(pieces: list[list[Token]], separator: Separator, packing: str, seq_length: int) -> list[list[Token]]:
    """Pieces in order into samples. `pieces` are wrapped already."""
    after = [("literal", token, separator.loss) for token in separator.after] if not separator.before else []
    if packing == "concatenate":
        stream = [token for number, piece in enumerate(pieces) for token in (after if number else []) + piece]
        return [stream[at : at + seq_length] for at in range(0, len(stream) - seq_length + 1, seq_length)]
    bins: list[list[int]] = []
    if packing == "intact":
        for number, piece in enumerate(pieces):
            used = sum(len(pieces[other]) + len(after) for other in bins[-1]) if bins else seq_length
            if used + len(piece) > seq_length:
                bins.append([])
            bins[-1].append(number)
    elif packing == "first_fit":
        for number, piece in enumerate(pieces):
            for each in bins:
                if sum(len(pieces[other]) + len(after) for other in each) + len(piece) <= seq_length:
                    each.append(number)
                    break
            else:
                bins.append([number])
    else:
        free: list[list[int]] = []  # room, when it got it, bin
        for clock, number in enumerate(sorted(range(len(pieces)), key=lambda number: -len(pieces[number]))):
            size = len(pieces[number]) + len(after)
            fitting = [row for row in free if row[0] >= size]
            if fitting:
                row = min(fitting, key=lambda row: (row[0], -row[1]))
            else:
                row = [seq_length + len(after), 0, len(bins)]
                free.append(row)
                bins.append([])
            bins[row[2]].append(number)
            row[0], row[1] = row[0] - size, clock
        bins = [sorted(each) for each in bins]
    samples = []
    for each in bins:
        tokens = [token for place, number in enumerate(each) for token in (after if place else []) + pieces[number]]
        samples.append(tokens + [("padding", 0, False)] * (seq_length - len(tokens)))
    return samples


def packed(docs: list[list[Token]], separator: Separator, packing: str, seq_length: int) -> list[list[Token]]:
    """Documents in order, each a list of its tokens, packed."""
    before = [("literal", token, separator.loss) for token in separator.before]
    after = [("literal", token, separator.loss) for token in separator.after] if before else []
    pieces = [before + tokens + after for tokens in docs]
    if packing == "best_fit":
        pieces = [piece[at : at + seq_length] for piece in pieces for at in range(0, len(piece), seq_length)]
    return in_samples(pieces, separator, packing, seq_length)


def reference_plan(docs: list[Doc], section: DataSection, seed: int, seq_length: int, separator: Separator) -> list[list[Token]]:
    """All samples of a plan without shares and without budget."""
    streams: list[list[list[Token]]] = []
    whole: list[tuple[int, int, list[Token]]] = []
    for index, source in enumerate(section.sources):
        mine = [
            (doc, copy) for doc in docs if doc.source == index for copy in range(copies_of(doc, section.length_sampling, seed))
        ]
        classes = sorted((chunk.length for chunk in source.chunks), reverse=True)
        if not classes and section.packing == "single":
            classes = [seq_length]
        if not classes:
            whole += [(split_mix(seed, ORDER, doc.key, copy), copy, doc.tokens()) for doc, copy in mine]
        for length in classes:
            cut = []
            for doc, copy in mine:
                if next((c for c in classes if doc.length >= c), None) == length:
                    for part in range(doc.length // length):
                        words = (doc.key, copy, part)
                        tokens = doc.tokens()[part * length : (part + 1) * length]
                        cut.append((split_mix(seed, SELECT, *words), split_mix(seed, ORDER, *words), tokens))
            cut.sort(key=lambda row: row[0])
            cut = cut[: len(cut) // (seq_length // length) * (seq_length // length)]
            stream = [token for row in sorted(cut, key=lambda row: row[1]) for token in row[2]]
            streams.append([stream[at : at + seq_length] for at in range(0, len(stream), seq_length)])
    if section.packing != "single":
        room = seq_length - (len(separator.before) + len(separator.after) if separator.before else 0)
        texts = [
            tokens[:room] if section.packing == "intact" else tokens for _, _, tokens in sorted(whole, key=lambda row: row[:2])
        ]
        streams.append(packed(texts, separator, section.packing, seq_length))
    samples = [
        (split_mix(seed, SAMPLES, number, within), sample)
        for number, stream in enumerate(streams)
        for within, sample in enumerate(stream)
    ]
    if len(streams) > 1 or section.packing in ("single", "best_fit"):
        samples.sort(key=lambda row: row[0])
    return [sample for _, sample in samples]
