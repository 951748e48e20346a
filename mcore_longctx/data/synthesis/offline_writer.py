"""A writer that needs no model: summaries and questions cut out of the text, with answers that are right because they are copied.

It answers the same requests as a command (`docs/synthesis.md`). Its questions ask which text follows or precedes a quoted one, or what
stands in a gap; every quoted text is told in `quotes`, and a question of which one occurs more than once in the document is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from mcore_longctx.data.synthesis.draws import Draws

__all__ = ["answer_offline"]

_SENTENCE = re.compile(r"[^\s][^\n]*?(?:[.!?](?=\s|$)|(?=\n)|$)")
_SHORTEST, _LONGEST = 12, 240  # characters of a text that is quoted
_WORDS = 8  # of a text where sentences are missing
_SUMMARY = 240  # characters
_GAP = "____"


def answer_offline(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request; `error` says why there is none. A pure function of the request."""
    answer: dict[str, Any] = {"id": request["id"]}
    if request["kind"] == "summary":
        return answer | {"summary": _summary(request["text"])}
    texts = request["chunks"] if "chunks" in request else [request["chunk"]]
    draws = Draws("offline", request["id"])
    pairs = [pair for text in texts if (pair := _pair(text, draws)) is not None]
    if len(pairs) < len(texts):
        return answer | {"error": "a chunk without two texts in a row that can be quoted"}
    before, after = pairs[0]
    if request["kind"] == "multi_hop":
        places = [f"{number}. '{one}'" for number, (one, _) in enumerate(pairs, 1)]
        question = "\n".join([f"Here are {len(pairs)} texts of it. Which text follows directly on each?", *places])
        given = "\n".join(f"{number}. {following}" for number, (_, following) in enumerate(pairs, 1))
        return answer | {"question": question, "answer": given, "quotes": [one for one, _ in pairs]}
    if request["kind"] == "hierarchical":
        return answer | {"question": f"Which text stands directly before '{after}'?", "answer": before, "quotes": [after]}
    if request["kind"] == "local":
        gap, missing = _gap(after, draws)
        question = f"Directly after '{before}' stands '{gap}'. What belongs in the gap?"
        return answer | {"question": question, "answer": missing, "quotes": [before]}
    return answer | {"question": f"Which text follows directly on '{before}'?", "answer": after, "quotes": [before]}


def _summary(text: str) -> str:
    """The beginning, to the end of a sentence where there is one."""
    head = " ".join(text.split())[:_SUMMARY]
    end = max((match.end() for match in re.finditer(r"[.!?](?=\s|$)", head)), default=0)
    return head[:end] or head or "(nothing)"


def _pair(text: str, draws: Draws) -> tuple[str, str] | None:
    """Two texts of which the second follows on the first with only white space between, none of them twice in the chunk."""
    for pieces in (_sentences(text), _word_groups(text)):
        found = [
            (one, other)
            for one, other in pairwise(pieces)
            if all(_SHORTEST <= len(each) <= _LONGEST and text.count(each) == 1 for each in (one, other))
        ]
        if found:
            return draws.choice(found)
    return None


def _sentences(text: str) -> list[str]:
    return [match.group().rstrip() for match in _SENTENCE.finditer(text)]


def _word_groups(text: str) -> list[str]:
    """Stretches of so many words, as they stand in the text."""
    words = [*re.finditer(r"\S+", text)]
    groups = (words[at : at + _WORDS] for at in range(0, len(words) - _WORDS + 1, _WORDS))
    return [text[group[0].start() : group[-1].end()] for group in groups]


def _gap(text: str, draws: Draws) -> tuple[str, str]:
    """The text with a number, or else a word, left out, and what was left out."""
    found = [*re.finditer(r"\d+", text)] or [*re.finditer(r"[^\W\d_]{3,}", text)] or [*re.finditer(r"\S+", text)]
    chosen = draws.choice(found)
    return text[: chosen.start()] + _GAP + text[chosen.end() :], chosen.group()
