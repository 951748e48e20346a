"""A sample before its size is known: what is said, what is asked, and how its context grows to a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from mcore_longctx.tasks.haystack import Haystack
from mcore_longctx.tasks.tokens import Lines, TextTokenizer, Tokens, encode_lines

__all__ = ["NOISE", "Body", "Draft", "Match", "fill_with_lines", "noise_haystack"]

Match = Literal["all", "any"]

NOISE = "The rain is soft. A gate swings in the wind. The carts go by. Bread cools on the sill. Evening comes again."
_NOISE_LINES = 64  # in the ring, so that a cut of millions of tokens takes few turns


@dataclass(frozen=True)
class Body:
    """The context of a sample.

    Attributes:
        tokens: int64 [n].
        starts: positions of the needles that are asked for, in the order asked.
        depths: of these, tokens of other text before each / tokens of other text.
        haystack_start: place in the haystack's ring; 0 where the context is made.
        unique_share: share of the text that is not a repetition of itself.
    """

    tokens: Tokens
    starts: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    haystack_start: int = 0
    unique_share: float = 1.0


@dataclass(frozen=True)
class Draft:
    """What a task has decided before it knows the room.

    Attributes:
        head: instruction, with an example where the task has one; ends in a newline.
        question: stands on a line of its own behind the context and ends in the answer's first words.
        answer: what comes next, with the space that it begins with.
        expected: the references, in the order asked.
        least: tokens that the context needs.
        fill: makes a context of at most that many tokens.
    """

    head: str
    question: str
    answer: str
    expected: tuple[str, ...]
    least: int
    fill: Callable[[int], Body]
    match: Match = "all"


def noise_haystack(tokenizer: TextTokenizer) -> tuple[Haystack, int]:
    """Five short sentences on a line, over and over, and the tokens of one line."""
    haystack = Haystack.from_documents([(NOISE + "\n") * _NOISE_LINES], tokenizer)
    return haystack, len(haystack.tokens) // _NOISE_LINES


def fill_with_lines(
    tokenizer: TextTokenizer, gold: Lines, others: Iterator[str], places: Callable[[int], Sequence[int]], room: int
) -> Body:
    """As many of the `others` as fit, with the gold lines between them.

    Args:
        tokenizer: encodes every line once.
        gold: lines that must be there.
        others: more lines, without end.
        places: for a number of other lines, how many of them stand before each gold line.
        room: tokens, at most.
    """
    pool = _lines_within(tokenizer, others, room - len(gold.tokens))
    borders = np.concatenate([np.zeros(1, np.int64), pool.ends])
    at = places(len(pool.ends))
    parts: list[Tokens] = []
    starts = [0] * len(at)
    done, written = 0, 0
    for i in sorted(range(len(at)), key=at.__getitem__):
        place = int(borders[at[i]])
        line = gold.tokens[gold.starts[i] : gold.ends[i]]
        parts += [pool.tokens[done:place], line]
        starts[i] = written + place - done
        written, done = starts[i] + len(line), place
    tokens = np.concatenate([*parts, pool.tokens[done:]])
    depths = tuple(int(borders[place]) / max(1, len(pool.tokens)) for place in at)
    return Body(tokens, tuple(starts), depths)


def _lines_within(tokenizer: TextTokenizer, lines: Iterator[str], room: int) -> Lines:
    """The first lines that fit in `room` tokens, and of the few that were tokenized beside them those that fill the rest best."""
    blocks: list[Lines] = []
    have, count = 0, 32
    while have < room:
        block = encode_lines(tokenizer, list(islice(lines, count)))
        blocks.append(Lines(block.tokens, block.ends + have))
        have += len(block.tokens)
        mean = have / sum(len(each.ends) for each in blocks)
        count = max(8, int((room - have) / mean * 1.01) + 8)
    if not blocks:
        return encode_lines(tokenizer, [])
    all_ = Lines(np.concatenate([block.tokens for block in blocks]), np.concatenate([block.ends for block in blocks]))
    fit = int(np.searchsorted(all_.ends, room, side="right"))
    chosen = list(range(fit))
    rest = room - (int(all_.ends[fit - 1]) if fit else 0)
    lengths = np.diff(all_.ends, prepend=0)
    left = sorted(range(fit, len(lengths)), key=lambda i: -int(lengths[i]))
    for i in left:
        if lengths[i] <= rest:
            chosen.append(i)
            rest -= int(lengths[i])
    tail = [all_.tokens[all_.starts[i] : all_.ends[i]] for i in chosen[fit:]]
    tokens = np.concatenate([all_.tokens[: int(all_.ends[fit - 1]) if fit else 0], *tail])
    return Lines(tokens, np.cumsum(lengths[chosen]))
