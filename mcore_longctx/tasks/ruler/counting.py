"""Counting tasks: the most frequent words of a numbered list, and of a text of coded words.

A list of millions of words is made of few pieces: every word and every number is tokenized once, the size follows from their counts,
and the tokens are gathered. Stretches are tokenized again as text and compared.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from mcore_longctx.errors import DataError
from mcore_longctx.tasks.ruler.draft import Body, Draft
from mcore_longctx.tasks.ruler.texts import RulerTexts
from mcore_longctx.tasks.ruler.words import coded_word, distinct_words
from mcore_longctx.tasks.tokens import Lines, TextTokenizer, Tokens, encode_after, encode_lines

__all__ = ["draft_coded", "draft_common", "solve_coded", "solve_common"]

_CHECKED = 24  # words of a stretch that is tokenized again

# ------------------------------------------------------------------------------------------------------------------ common words

_COMMON = 10  # words asked for
_OFTEN, _SELDOM = 30, 3  # times that a common and another word occur, as in RULER
_SMALL_OFTEN, _SMALL_SELDOM = 6, 1  # where little fits
_LEAST_OTHERS = 20
_EXAMPLE = (3, 1, 10)  # times of the common words, of the others, number of others
_LIST = "Now the list to count.\n"


def draft_common(rng: random.Random, texts: RulerTexts, tokenizer: TextTokenizer, index: int) -> Draft:
    """Ten words that occur more often than all others in a numbered list, behind a small worked example. Texts are not used."""
    words = distinct_words(rng)
    shown, others = list(islice(words, _COMMON)), list(islice(words, _EXAMPLE[2]))
    listed = shown * _EXAMPLE[0] + others * _EXAMPLE[1]
    rng.shuffle(listed)
    example = "\n".join(f"{i} {word}" for i, word in enumerate(listed, 1))
    head = f"Count words in a list. First an example.\n{example}\n{_COMMON_QUESTION} {', '.join(sorted(shown))}.\n\n{_LIST}"
    common = list(islice(words, _COMMON))

    def fill(room: int) -> Body:
        return _fill_list(rng, tokenizer, common, words, room)

    expected = tuple(sorted(common))
    least_lines = [f"{9 * i} {word}" for i, word in enumerate(common * _SMALL_OFTEN + shown * (_LEAST_OTHERS // _COMMON), 1)]
    least = len(encode_lines(tokenizer, least_lines).tokens)
    return Draft(head, _COMMON_QUESTION, " " + ", ".join(expected), expected, least, fill)


_COMMON_QUESTION = (
    f"Which {_COMMON} words are the most frequent in the list above? Name them in the order of the alphabet.\nAnswer:"
)


def _fill_list(rng: random.Random, tokenizer: TextTokenizer, common: list[str], words: Iterator[str], room: int) -> Body:
    pieces = _WordLines(tokenizer)
    pieces.add_words(common)
    while True:
        # the most other words that fit: their number decides how far the numbers go
        lengths = np.diff(pieces.words.ends, prepend=0)
        often, seldom = _times(pieces, lengths, room)
        others = np.arange(len(lengths) - _COMMON + 1)
        lines = _COMMON * often + seldom * others
        pieces.number_to(int(lines[-1]))
        totals = pieces.numbers.ends[lines - 1] + often * lengths[:_COMMON].sum()
        totals = totals + seldom * np.concatenate([[0], np.cumsum(lengths[_COMMON:])])
        fit = int(np.searchsorted(totals, room, side="right")) - 1
        if fit < len(others) - 1:
            break
        missing = (room - int(totals[-1])) / (seldom * (float(lengths.mean()) + pieces.tokens_of_number(room)))
        pieces.add_words(list(islice(words, int(missing * 1.01) + 8)))
    assert fit >= 0
    order = np.repeat(np.arange(_COMMON + fit), [often] * _COMMON + [seldom] * fit).tolist()
    rng.shuffle(order)
    return Body(pieces.gather(order))


def _times(pieces: _WordLines, lengths: Tokens, room: int) -> tuple[int, int]:
    """How often common and other words occur: as in RULER where that takes at most half of the room."""
    least = _COMMON * _OFTEN * (float(lengths[:_COMMON].mean()) + pieces.tokens_of_number(room))
    return (_OFTEN, _SELDOM) if 2 * least <= room else (_SMALL_OFTEN, _SMALL_SELDOM)


class _WordLines:
    """Tokens of the lines `17 word`, as numbers and words apart."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._number = encode_after(tokenizer, "\n", "1")
        self._word = encode_after(tokenizer, "\n1", " x\n")
        self.texts: list[str] = []
        self.words = self.numbers = Lines(np.empty(0, np.int64), np.empty(0, np.int64))

    def tokens_of_number(self, room: int) -> int:
        """Of about the last number of a list of `room` tokens."""
        return len(encode_after(self._tokenizer, "\n", str(room // 6)))

    def add_words(self, words: list[str]) -> None:
        whole = encode_lines(self._tokenizer, [f"1 {word}" for word in words])
        self.texts += words
        self.words = _joined(self.words, _without(whole, len(self._number), 0))

    def number_to(self, last: int) -> None:
        first = len(self.numbers.ends) + 1
        if last < first:
            return
        whole = encode_lines(self._tokenizer, [f"{number} x" for number in range(first, last + 1)])
        self.numbers = _joined(self.numbers, _without(whole, 0, len(self._word)))

    def gather(self, order: list[int]) -> Tokens:
        """Tokens of the numbered list of words `order`; some stretches are compared with the text's."""
        words = np.array(order)
        starts = np.stack([self.numbers.starts[: len(order)], self.words.starts[words] + len(self.numbers.tokens)], axis=1)
        ends = np.stack([self.numbers.ends[: len(order)], self.words.ends[words] + len(self.numbers.tokens)], axis=1)
        pool = np.concatenate([self.numbers.tokens, self.words.tokens])
        for first in {0, len(order) // 3, max(0, len(order) - _CHECKED)}:
            last = min(len(order), first + _CHECKED)
            text = "".join(f"{i + 1} {self.texts[order[i]]}\n" for i in range(first, last))
            whole = encode_after(self._tokenizer, "\n", text)
            _check_equal(_gathered(pool, starts[first:last].ravel(), ends[first:last].ravel()), whole, text)
        return _gathered(pool, starts.ravel(), ends.ravel())


def _joined(first: Lines, second: Lines) -> Lines:
    return Lines(np.concatenate([first.tokens, second.tokens]), np.concatenate([first.ends, second.ends + len(first.tokens)]))


def _without(lines: Lines, before: int, behind: int) -> Lines:
    """Lines without their first and last tokens."""
    starts, ends = lines.starts + before, lines.ends - behind
    return Lines(_gathered(lines.tokens, starts, ends), np.cumsum(ends - starts))


def _gathered(pool: Tokens, starts: Tokens, ends: Tokens) -> Tokens:
    """`pool[starts[0]:ends[0]]`, `pool[starts[1]:ends[1]]` ... one behind the other."""
    lengths = ends - starts
    assert len(lengths) == 0 or lengths.min() >= 0
    shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    shift += np.arange(len(shift))
    gathered: Tokens = pool[shift]
    return gathered


def _check_equal(pieces: Tokens, whole: Tokens, text: str) -> None:
    if not np.array_equal(pieces, whole):
        raise DataError(f"the tokenizer joins words of {text[:60]!r}: the list cannot be made of pieces", where="tokenizer")


def solve_common(prompt: str) -> tuple[str, ...]:
    """The ten most frequent words of the last list, by the alphabet."""
    text = prompt[prompt.rindex(_LIST) :]
    if not prompt.endswith("\n" + _COMMON_QUESTION):
        raise ValueError("the prompt does not end in the question")
    rows = re.findall(r"^(\d+) ([a-z]+)$", text, re.MULTILINE)
    if [int(number) for number, _ in rows] != list(range(1, len(rows) + 1)):
        raise ValueError("the list is not numbered from 1 on")
    return tuple(sorted(_most_frequent([word for _, word in rows], _COMMON)))


# ------------------------------------------------------------------------------------------------------------------ coded words

_ASKED = 3  # ranks 2 to 4: the first is filler
_FILLER = "..."
_LEAST_WORDS = 80  # from here on the counts of ranks 4 and 5 differ: n / zeta(2) (1/16 - 1/25) >= 1
_ZETA_2 = math.pi**2 / 6
_CODED_HEAD = "Here is a text of coded words. Dots mean nothing.\nCoded text:"
_CODED_QUESTION = (
    f"Which {_ASKED} coded words are the most frequent in the text above, dots aside? Name the most frequent first.\nAnswer:"
)


def draft_coded(rng: random.Random, texts: RulerTexts, tokenizer: TextTokenizer, index: int) -> Draft:
    """Coded words whose counts fall with the square of their rank. Texts are not used."""
    asked: list[str] = []
    while len(asked) < _ASKED:
        word = coded_word(rng)
        if word not in asked:
            asked.append(word)

    def fill(room: int) -> Body:
        return _fill_coded(rng, tokenizer, asked, room)

    # a line of its own behind words of letters
    least = len(encode_after(tokenizer, ":", f" {_FILLER} {asked[0]}" * (_LEAST_WORDS // 2) + "\n"))
    return Draft(_CODED_HEAD, _CODED_QUESTION, " " + ", ".join(asked), tuple(asked), least, fill)


def _fill_coded(rng: random.Random, tokenizer: TextTokenizer, asked: list[str], room: int) -> Body:
    words = dict.fromkeys(asked)
    while len(words) < math.isqrt(int(room / _ZETA_2)) + 2:  # no rank beyond this one occurs, as a word takes a token at least
        words[coded_word(rng)] = None
    vocabulary = [_FILLER, *words]
    runs = [encode_after(tokenizer, "a", f" {word}") for word in vocabulary]
    lengths = np.array([len(run) for run in runs])
    end = encode_after(tokenizer, asked[0], "\n")

    low, high = _LEAST_WORDS, room + 1  # tokens grow with the number of words
    while high - low > 1:
        middle = (low + high) // 2
        fits = int((_counts(middle, len(runs)) * lengths).sum()) + len(end) <= room
        low, high = (middle, high) if fits else (low, middle)
    order = np.repeat(np.arange(len(runs)), _counts(low, len(runs))).tolist()
    rng.shuffle(order)
    at = len(order) - 1 - next(i for i, word in enumerate(reversed(order)) if word)
    order[at], order[-1] = order[-1], order[at]  # a coded word ends the line: dots would join it

    ends = np.cumsum(lengths)
    pool = np.concatenate(runs)
    for first in {0, len(order) // 3, len(order) - _CHECKED}:
        some = order[first : first + _CHECKED]
        text = "".join(f" {vocabulary[word]}" for word in some)
        _check_equal(np.concatenate([runs[word] for word in some]), encode_after(tokenizer, "a", text), text)
    words_at = np.array(order)
    return Body(np.concatenate([_gathered(pool, (ends - lengths)[words_at], ends[words_at]), end]))


def _counts(words: int, ranks: int) -> Tokens:
    """How often each rank occurs among about `words` words."""
    return (words / _ZETA_2 / np.arange(1, ranks + 1) ** 2).astype(np.int64)


def solve_coded(prompt: str) -> tuple[str, ...]:
    """The three most frequent coded words, the most frequent first."""
    asked = re.fullmatch(re.escape(_CODED_QUESTION), prompt[-len(_CODED_QUESTION) :])
    if asked is None:
        raise ValueError("the prompt does not end in the question")
    text = prompt[prompt.index(_CODED_HEAD) + len(_CODED_HEAD) : -len(_CODED_QUESTION)]
    return tuple(_most_frequent([word for word in text.split() if word != _FILLER], _ASKED, in_order=True))


def _most_frequent(words: Sequence[str], count: int, *, in_order: bool = False) -> list[str]:
    """The `count` most frequent words.

    Raises:
        ValueError: the next one is as frequent, or, `in_order`, two of them are.
    """
    found = Counter(words).most_common(count + 1)
    borders = range(count) if in_order else [count - 1]
    for i in borders:
        if len(found) <= i + 1 or found[i][1] <= found[i + 1][1]:
            raise ValueError(f"rank {i + 1} is not more frequent than the next")
    return [word for word, _ in found[:count]]
