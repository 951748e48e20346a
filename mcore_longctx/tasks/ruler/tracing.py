"""Variable tracing: one value handed on from name to name, in lines between noise.

Set KQXTB to 48213.     ...     Set WMZRA to KQXTB.     ...     Which names stand for 48213?
"""

from __future__ import annotations

import random
import re

from mcore_longctx.tasks.placing import Insert, place_sentences
from mcore_longctx.tasks.ruler.draft import NOISE, Body, Draft, noise_haystack
from mcore_longctx.tasks.ruler.texts import RulerTexts
from mcore_longctx.tasks.tokens import TextTokenizer

__all__ = ["draft_tracing", "solve_tracing"]

_HOPS = 4
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LEAST_LINES = 4  # of noise
_EXAMPLE_END = "\n\n"


def draft_tracing(rng: random.Random, texts: RulerTexts, tokenizer: TextTokenizer, index: int) -> Draft:
    """One chain of five names behind a worked example with short names. Texts are not used."""
    names, value = _chain(rng, 3)
    shown = _assignments(names, value)
    example = "\n".join([shown[0], NOISE, *shown[1:3], NOISE, *shown[3:]])
    head = f"Names are set in the text below. First an example.\n{example}\n{_question(value)} {', '.join(names)}.{_EXAMPLE_END}"
    names, value = _chain(rng, 5)
    inserts = [
        Insert(insert.text, insert.at_line) for insert in (Insert.of(tokenizer, line) for line in _assignments(names, value))
    ]
    haystack, unit = noise_haystack(tokenizer)
    depths = sorted(rng.random() for _ in inserts)  # in the order of the chain

    def fill(room: int) -> Body:
        start = rng.randrange(unit)
        placed = place_sentences(haystack, tokenizer, inserts, depths, start=start, room=room)
        return Body(placed.tokens, placed.starts, placed.depths, start, min(1.0, unit / placed.text_tokens))

    least = sum(insert.most for insert in inserts) + _LEAST_LINES * unit
    return Draft(head, _question(value), " " + ", ".join(names), tuple(names), least, fill)


def _question(value: str) -> str:
    return f"Which names stand for {value} in the end, in the order in which they were set?\nAnswer: {_HOPS + 1} names, namely"


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str]:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(_LETTERS, k=letters))
        if name not in names:
            names.append(name)
    return names, str(rng.randrange(10_000, 100_000))


def _assignments(names: list[str], value: str) -> list[str]:
    return [f"Set {name} to {source}." for name, source in zip(names, [value, *names[:-1]], strict=True)]


def solve_tracing(prompt: str) -> tuple[str, ...]:
    """Names that hold the value of the last question, in the order of the text."""
    text = prompt[prompt.index(_EXAMPLE_END) :]
    asked = re.search(r"\n" + re.escape(_question("VALUE")).replace("VALUE", r"(\d+)") + "$", text)
    if asked is None:
        raise ValueError("the prompt does not end in a question")
    holds: dict[str, None] = {}
    for name, source in re.findall(r"^Set ([A-Z]+) to (\w+)\.$", text, re.MULTILINE):
        if name in holds:
            raise ValueError(f"{name} is set twice")
        if source == asked[1] or source in holds:
            holds[name] = None
    return tuple(holds)
