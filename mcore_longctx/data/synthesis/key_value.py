"""Dictionaries of numbers and questions about them (arXiv 2406.19292): long-context data without a single fact of the world.

`value`: the value of a key, and in which dictionary it stands (the paper's simple retrieval). `composed`: keys are tuples, and the
question names the numbers of one in another order (its multi-subkey retrieval). `sum`: two values from
two dictionaries, added. No key occurs twice in a chat, so every question has one answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mcore_longctx.data.synthesis.draws import Draws
from mcore_longctx.data.synthesis.sized import Messages, TokenCounter, fit

__all__ = ["make_key_value_chat"]

Dictionary = list[tuple[str, int]]  # keys as they are written, and values

_INTRODUCTION = "Dictionaries with numbers, or groups of numbers, as keys:"
_SMALLEST = 2  # dictionaries


def make_key_value_chat(count: TokenCounter, *, seed: int, index: int, length: int, turns: int = 4) -> dict[str, Any]:
    """One chat of at most `length` tokens with `turns` questions, fewer where so many do not fit: a record for `data build`.

    Arguments and errors as in `make_tables_chat`.
    """
    drawn: list[Dictionary] = []
    stream = _dictionaries(seed, index, digits=max(4, len(str(length))))

    def take(size: int) -> list[Dictionary]:
        drawn.extend(islice(stream, max(0, size - len(drawn))))
        return drawn[:size]

    def asked(size: int, turns: int) -> list[tuple[str, str, str]]:
        return _ask(take(size), Draws(seed, index, "questions"), turns)

    def make(size: int) -> Messages:
        lines = [_line(number, entries) for number, entries in enumerate(take(size))]
        messages: Messages = []
        for _, question, answer in asked(size, turns):
            text = question if messages else "\n".join([_INTRODUCTION, *lines, question])
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return messages

    while turns > 1 and count(make(_SMALLEST)) > length:
        turns -= 1
    fitted = fit(make, count, length, smallest=_SMALLEST, where="data synth keyvalue")
    return {
        "id": f"keyvalue-{seed}-{length}-{index}",
        "messages": fitted.messages,
        "tokens": fitted.tokens,
        "dictionaries": fitted.size,
        "questions": [kind for kind, _, _ in asked(fitted.size, turns)],
    }


def _dictionaries(seed: int, index: int, *, digits: int) -> Iterator[Dictionary]:
    """Dictionaries without end: three or four entries, numbers of so many digits, so that there are enough keys."""
    draws, seen = Draws(seed, index, "dictionaries"), set[tuple[int, ...]]()

    def key(numbers: int) -> str:
        while True:
            found = tuple(draws.between(10 ** (digits - 1), 10**digits - 1) for _ in range(numbers))
            if tuple(sorted(found)) not in seen:  # in any order: the question gives them in another
                seen.add(tuple(sorted(found)))
                return str(found[0]) if numbers == 1 else f"({', '.join(map(str, found))})"

    for number in range(1 << 40):
        numbers = 3 if number % 3 == 2 else 1
        yield [(key(numbers), draws.between(100, 9999)) for _ in range(draws.between(3, 4))]


def _line(number: int, entries: Dictionary) -> str:
    return f"Dictionary [{number}] {{{', '.join(f'{key}: {value}' for key, value in entries)}}}"


def _ask(dictionaries: list[Dictionary], draws: Draws, turns: int) -> list[tuple[str, str, str]]:
    """Kind, question and answer of so many different questions."""
    kinds: list[str] = []
    found: dict[str, tuple[str, str, str]] = {}
    for _ in range(20 * turns):  # a small chat has few different questions
        if len(found) == turns:
            break
        if not kinds:
            kinds = draws.shuffled(["value", "sum", "composed"][: 2 + (len(dictionaries) > 2)])
        kind = kinds.pop()
        plain = [number for number in range(len(dictionaries)) if number % 3 != 2]
        if kind == "sum":
            places = draws.sample(plain, 2)
            (a, x), (b, y) = (draws.choice(dictionaries[place]) for place in places)
            question = f"What is the sum of the values of the keys {a} and {b}?"
            answer = f"The value of key {a} is {x} and the value of key {b} is {y}. The sum is {x + y}."
        else:
            place = draws.choice(plain if kind == "value" else [n for n in range(len(dictionaries)) if n % 3 == 2])
            key, value = draws.choice(dictionaries[place])
            asked = key
            if kind == "composed":
                asked = " and ".join(draws.shuffled(key.strip("()").split(", ")))
                question = f"What is the value of the key that is made of {asked}, in any order, and in which dictionary is it?"
            else:
                question = f"What is the value of key {key}, and in which dictionary is it?"
            answer = f"The value of key {key} is {value} and it is in Dictionary [{place}]."
        found.setdefault(question, (kind, question, answer))
    return list(found.values())
