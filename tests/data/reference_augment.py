"""`augment` again in plain Python, sample by sample and token by token, from the words of the documentation."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from tests.data.reference_plan import split_mix

Token = tuple[Any, ...]  # ("document", number, position, loss), ("literal", place, loss) or ("padding",)

CHOSEN, CUTS, COUNT, ORDER, LABEL, STEP = 10, 11, 12, 13, 14, 15


def uniform(*words: int) -> float:
    return (split_mix(*words) >> 11) / 2**53


def parts_of(sample: list[Token], begin: int) -> tuple[list[Token], list[dict[str, list[Token]]], list[Token], int]:
    """Tokens before all documents, the documents with what begins and ends them, tokens behind all, and padding."""
    front: list[Token] = []
    units: list[dict[str, list[Token]]] = []
    waiting: list[Token] = []
    padding = 0
    for token in sample:
        if token[0] == "padding":
            padding += 1
        elif token[0] == "document":
            last = units[-1]["body"][-1] if units else None
            if units and not waiting and not units[-1]["end"] and last[1] == token[1] and last[2] + 1 == token[2]:
                units[-1]["body"].append(token)
            else:
                units.append({"begin": waiting, "body": [token], "end": []})
                waiting = []
        elif token[1] < begin:
            waiting.append(token)
        elif units:
            units[-1]["end"].append(token)
        else:
            front.append(token)
    return front, units, waiting, padding


def cut(body: list[Token], borders: list[int]) -> list[list[Token]]:
    edges = [0, *borders, len(body)]
    return [body[a:b] for a, b in pairwise(edges)]


def reference_augment(
    sample: list[Token], number: int, how: Any, *, seed: int, begin: int, seq_length: int, labels: Any
) -> list[Token]:
    """One sample."""
    front, units, back, _ = parts_of(sample, begin)
    if uniform(seed, CHOSEN, number) >= how.probability or not units:
        return sample
    found = cip(units, how) if how.type == "cip" else utk(units, number, how, seed, labels)
    found = (front + found + back)[:seq_length]
    return found + [("padding",)] * (seq_length - len(found))


def whole(unit: dict[str, list[Token]], pieces: list[list[Token]], number: int) -> list[Token]:
    """A piece with what begins or ends its document."""
    return (unit["begin"] if number == 0 else []) + pieces[number] + (unit["end"] if number == len(pieces) - 1 else [])


def cip(units: list[dict[str, list[Token]]], how: Any) -> list[Token]:
    size = how.documents_per_group or len(units)
    found: list[Token] = []
    for low in range(0, len(units), size):
        group = units[low : low + size]
        cuts = []
        for unit in group:
            n = len(unit["body"])
            k = min(how.chunks[0], n)
            cuts.append(cut(unit["body"], [n * i // k for i in range(1, k)]))
        for turn in range(how.chunks[0]):
            for unit, pieces in zip(group, cuts, strict=True):
                if turn < len(pieces):
                    found += whole(unit, pieces, turn)
    return found


def utk(units: list[dict[str, list[Token]]], number: int, how: Any, seed: int, labels: Any) -> list[Token]:
    cuts, names, keys = [], {}, {}
    for u, unit in enumerate(units):
        n = len(unit["body"])
        k = min(how.chunks[int(uniform(seed, COUNT, number, u) * len(how.chunks))], n)
        drawn = sorted(int(uniform(seed, CUTS, number, u, i) * (n - k + 1)) for i in range(k - 1))
        cuts.append(cut(unit["body"], [place + i + 1 for i, place in enumerate(drawn)]))
        if k > 1:
            for c in range(k):
                step = split_mix(seed, STEP, number) | 1
                names[u, c] = (split_mix(seed, LABEL, number) + step * len(names)) % 2**64 % labels.count
    last = (len(units) - 1, len(cuts[-1]) - 1)
    for u, pieces in enumerate(cuts):
        drawn = [split_mix(seed, ORDER, number, u, c) for c in range(len(pieces)) if (u, c) != last]
        if how.keep_order:
            drawn.sort()
        keys |= {(u, c): key for c, key in enumerate(drawn)}
    order = [*sorted(keys, key=lambda piece: (keys[piece], piece)), last]
    found: list[Token] = []
    out = [0] * len(units)

    def say(start: int, length: int, loss: bool) -> None:
        found.extend(("literal", start + i, loss) for i in range(length))

    def mark(name: str, loss: bool = False) -> None:
        say(labels.markers[name].start, labels.markers[name].length, loss)

    for u, c in order:
        is_cut = len(cuts[u]) > 1
        if is_cut:
            opening, closing = labels.markers["open"].length, labels.markers["close"].length
            block = labels.first + names[u, c] * (opening + 2 * labels.id_tokens + closing + labels.markers["next"].length)
            say(block, opening + labels.id_tokens + closing, False)
        if c > 0:
            mark(f"head{c}")
        found += whole(units[u], cuts[u], c)
        if c < len(cuts[u]) - 1:
            mark(f"tail{c + 1}")
        out[u] += 1
        if is_cut and how.backtrace and out[u] == len(cuts[u]):
            mark("ask")
            for i in range(len(cuts[u])):
                block = labels.first + names[u, i] * (opening + 2 * labels.id_tokens + closing + labels.markers["next"].length)
                if i < len(cuts[u]) - 1:
                    say(block + opening + labels.id_tokens + closing, labels.id_tokens + labels.markers["next"].length, True)
                else:
                    say(block + opening, labels.id_tokens, True)
                    mark("stop", True)
    return found


def gaps_of(units: int, pieces: int, length: int) -> int:
    """CIP of equal documents: tokens from the end of a piece to the next piece of its document."""
    return (units - 1) * math.ceil(length / pieces)
