"""The eight needle tasks: secrets hidden in a context, some of them asked for.

    The secret number of kelora-vitemu is 4829137.        The secret code of 0f1e...-... is 7c2d...-....

The context is noise, held-out text, or nothing but other secrets.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from mcore_longctx.tasks.placing import Insert, place_sentences
from mcore_longctx.tasks.ruler.draft import Body, Draft, fill_with_lines, noise_haystack
from mcore_longctx.tasks.ruler.texts import RulerTexts
from mcore_longctx.tasks.ruler.words import identifier, number, word_key
from mcore_longctx.tasks.tokens import TextTokenizer, encode_lines

__all__ = ["NeedleTask", "draft_needles", "solve_needles"]

_LEAST_TEXT = 64  # tokens of text around the needles
_LEAST_LINES = 4  # other secrets around the one
_DEPTHS = 40  # places that are drawn from, 0 to 1, as in RULER


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden in what.

    Attributes:
        context: noise, text, or nothing but needles.
        key, value: what the secrets are made of.
        keys: needles with different keys; `asked` of them are asked for.
        values: needles of each key, all of them asked for.
    """

    context: Literal["noise", "text", "needles"]
    key: Callable[[random.Random], str] = word_key
    value: Callable[[random.Random], str] = number
    keys: int = 1
    values: int = 1
    asked: int = 1

    @property
    def noun(self) -> str:
        """How the prompt calls a value."""
        return "code" if self.value is identifier else "number"

    def sentence(self, key: str, value: str) -> str:
        """A needle."""
        return f"The secret {self.noun} of {key} is {value}."


def draft_needles(task: NeedleTask, rng: random.Random, texts: RulerTexts, tokenizer: TextTokenizer, index: int) -> Draft:
    """Draw keys, values and depths."""
    keys: list[str] = []
    while len(keys) < task.keys:
        key = task.key(rng)
        if key not in keys:
            keys.append(key)
    secrets = [(key, task.value(rng)) for key in keys for _ in range(task.values)]
    asked = rng.sample(keys, task.asked)
    wanted = [i for key in asked for i, secret in enumerate(secrets) if secret[0] == key]
    depths = [i / (_DEPTHS - 1) for i in rng.sample(range(_DEPTHS), len(secrets))]
    if task.values > 1:
        depths.sort()  # values are asked for in the order of the text
    expected = tuple(secrets[i][1] for i in wanted)
    sentences = [task.sentence(*secret) for secret in secrets]

    if task.context == "needles":
        gold = encode_lines(tokenizer, sentences)
        others = _other_secrets(task, rng, set(keys))
        least = len(gold.tokens) * (1 + _LEAST_LINES)

        def fill(room: int) -> Body:
            return fill_with_lines(tokenizer, gold, others, lambda lines: [rng.randint(0, lines) for _ in secrets], room)

    else:
        haystack, unit = noise_haystack(tokenizer) if task.context == "noise" else (texts.of(index), None)
        inserts = [Insert.of(tokenizer, sentence) for sentence in sentences]
        if task.context == "noise":  # whole lines of noise stay together
            inserts = [Insert(insert.text, insert.at_line) for insert in inserts]
        least = sum(insert.most for insert in inserts) + _LEAST_TEXT

        def fill(room: int) -> Body:
            start = rng.randrange(len(haystack.tokens))
            placed = place_sentences(haystack, tokenizer, inserts, depths, start=start, room=room)
            share = haystack.unique_share(placed.text_tokens) if unit is None else min(1.0, unit / placed.text_tokens)
            starts, found = tuple(placed.starts[i] for i in wanted), tuple(placed.depths[i] for i in wanted)
            return Body(placed.tokens, starts, found, start, share)

    many = len(expected) > 1
    hidden = f"secret {task.noun}s" if many or task.context == "needles" or task.keys > 1 else f"a secret {task.noun}"
    names = _listed(asked)
    return Draft(
        head=f"The text below holds {hidden}. Remember what it says; you are asked at its end.\n",
        question=_question(task, names),
        answer=" " + ", ".join(expected),
        expected=expected,
        least=least,
        fill=fill,
    )


def _question(task: NeedleTask, names: str) -> str:
    if task.values > 1:
        ask = f"Which secret {task.noun}s of {names} are in the text above? Name all {task.values} in the order of the text."
        return f"{ask}\nAnswer: the secret {task.noun}s of {names} are"
    if task.asked > 1:
        ask = f"Which secret {task.noun}s of {names} are in the text above? Name them in this order."
        return f"{ask}\nAnswer: the secret {task.noun}s of {names} are"
    return f"Which secret {task.noun} of {names} is in the text above?\nAnswer: the secret {task.noun} of {names} is"


def _other_secrets(task: NeedleTask, rng: random.Random, known: set[str]) -> Iterator[str]:
    while True:
        key = task.key(rng)
        if key not in known:
            known.add(key)
            yield task.sentence(key, task.value(rng))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def solve_needles(task: NeedleTask, prompt: str) -> tuple[str, ...]:
    """Values of the keys that the last lines ask for."""
    asked = re.search(
        rf"\nWhich secret {task.noun}s? of ([^\n]*) (?:is|are) in the text above\?[^\n]*\n"
        rf"Answer: the secret {task.noun}s? of \1 (?:is|are)$",
        prompt,
    )
    if asked is None:
        raise ValueError("the prompt does not end in a question")
    found: list[str] = []
    for key in re.split(", | and ", asked[1]):
        values = re.findall(rf"The secret {task.noun} of {re.escape(key)} is ([0-9a-f-]+)\.", prompt)
        if len(values) != task.values:
            raise ValueError(f"{len(values)} values of {key!r} in the prompt, expected {task.values}")
        found += values
    return tuple(found)
