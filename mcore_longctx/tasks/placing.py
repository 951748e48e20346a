"""Sentences put into a cut of a haystack as runs of tokens, at starts of lines and of sentences.

    ... the end of one. The secret number of kelo is 4829137. The next sentence ...     behind a full stop: " SENTENCE"
    ... the end of a line.\\nThe secret number of kelo is 4829137.\\nThe next line ...    at the start of a line: "SENTENCE\\n"

Where a full stop is a token of its own and the next one begins with a space, tokenizers of the Llama 3 kind end a word at both, so the
tokens with the run are those of the text with the sentence. The decoded text is right everywhere, and is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcore_longctx.errors import DataError
from mcore_longctx.tasks.haystack import Haystack, HaystackCut
from mcore_longctx.tasks.tokens import TextTokenizer, Tokens, encode_after

__all__ = ["Insert", "Placed", "place_sentences"]

_NEAR_TOKENS, _NEAR_SHARE = 64, 0.01  # a start of a sentence this near to the wanted depth goes before a start of a line


@dataclass(frozen=True)
class Insert:
    """A sentence and its tokens at the start of a line, and behind a full stop where it may stand there."""

    text: str
    at_line: Tokens
    at_sentence: Tokens | None = None

    @classmethod
    def of(cls, tokenizer: TextTokenizer, text: str) -> Insert:
        """A sentence that may stand anywhere."""
        return cls(text, encode_after(tokenizer, "\n", text + "\n"), encode_after(tokenizer, ".", " " + text))

    @property
    def most(self) -> int:
        """Tokens, at most."""
        return max(len(self.at_line), 0 if self.at_sentence is None else len(self.at_sentence))


@dataclass(frozen=True)
class Placed:
    """Text with sentences in it.

    Attributes:
        tokens: int64 [room].
        starts: position of each sentence's first token, in the order in which they were given.
        depths: tokens of text before each / tokens of text.
        text_tokens: tokens of text, without the sentences.
    """

    tokens: Tokens
    starts: tuple[int, ...]
    depths: tuple[float, ...]
    text_tokens: int


def place_sentences(
    haystack: Haystack, tokenizer: TextTokenizer, inserts: Sequence[Insert], depths: Sequence[float], *, start: int, room: int
) -> Placed:
    """`room` tokens of the haystack from about `start`, with `inserts[i]` at the border nearest to `depths[i]`.

    Args:
        haystack: text; the cut ends where a line ends.
        tokenizer: decodes the neighbourhood of every sentence.
        inserts: sentences. Those that come to one place stay in this order.
        depths: 0 (start) to 1 (end).
        start: place in the haystack's ring.
        room: tokens of text and sentences; more than the sentences need.

    Raises:
        DataError: a sentence does not read as it should in its place.
    """
    text_room = room - sum(insert.most for insert in inserts)
    assert text_room > 0
    cut = haystack.cut(start, text_room)
    chosen = [_border(cut, insert, depth) for insert, depth in zip(inserts, depths, strict=True)]
    runs = [insert.at_line if run is None else run for insert, (_, run) in zip(inserts, chosen, strict=True)]

    # the kind of border decides over a token more or less: what is left is filled with text in front
    left = room - text_room - sum(len(run) for run in runs)
    if left:
        cut = haystack.cut((start - left) % len(haystack.tokens), text_room + left)
    text = cut.tokens
    places = [place + left if place else 0 for place, _ in chosen]

    parts: list[Tokens] = []
    starts = [0] * len(inserts)
    done, written = 0, 0
    for i in sorted(range(len(inserts)), key=places.__getitem__):
        parts += [text[done : places[i]], runs[i]]
        starts[i] = written + places[i] - done
        written, done = starts[i] + len(runs[i]), places[i]
    tokens = np.concatenate([*parts, text[done:]])
    assert len(tokens) == room
    for insert, at, run in zip(inserts, starts, runs, strict=True):
        _check_reads(tokenizer, tokens[max(0, at - 4) : at + len(run) + 4], insert.text)
    return Placed(tokens, tuple(starts), tuple(place / len(text) for place in places), len(text))


def _border(cut: HaystackCut, insert: Insert, depth: float) -> tuple[int, Tokens | None]:
    """Place in the cut, and the run for it where that is not the one for lines."""
    wanted = depth * len(cut.tokens)
    line = int(cut.line_starts[np.argmin(np.abs(cut.line_starts - wanted))])
    if insert.at_sentence is None or not len(cut.sentence_starts) or line == wanted:
        return line, None
    sentence = int(cut.sentence_starts[np.argmin(np.abs(cut.sentence_starts - wanted))])
    away = abs(sentence - wanted)
    if away <= max(_NEAR_TOKENS, _NEAR_SHARE * len(cut.tokens)) or away < abs(line - wanted):
        return sentence, insert.at_sentence
    return line, None


def _check_reads(tokenizer: TextTokenizer, tokens: Tokens, text: str) -> None:
    around = tokenizer.decode(tokens.tolist())
    if text not in around:
        raise DataError(f"the tokenizer reads {around!r} where {text!r} was put", where="tokenizer")
