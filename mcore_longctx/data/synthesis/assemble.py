"""From a plan and its questions to one chat, with the place of the evidence of every question in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcore_longctx.data.synthesis.documents import ChunkedDocument
from mcore_longctx.data.synthesis.question_plan import ChatPlan, Slot
from mcore_longctx.data.synthesis.sized import Messages, TokenCounter
from mcore_longctx.errors import DataError

__all__ = ["AssembledChat", "assemble", "quote_fault"]


@dataclass(frozen=True)
class AssembledChat:
    """A chat, its tokens, a row for each question, and how many questions had to go because the chat was too long."""

    messages: Messages
    tokens: int
    evidence: list[dict[str, Any]]
    dropped: int


@dataclass(frozen=True)
class _Turn:
    """Documents that are shown before a question (often none), and the question."""

    shown: tuple[int, ...]
    slot: Slot
    item: Mapping[str, Any]


def quote_fault(text: str, item: Mapping[str, Any]) -> str | None:
    """What is wrong with the quotes of a question: each must stand in its document exactly once, or the question is ambiguous."""
    for quote in item.get("quotes", []):
        first = text.find(quote)
        if first < 0 or text.find(quote, first + 1) >= 0:
            return f"quote {quote[:60]!r} stands {'nowhere' if first < 0 else 'more than once'} in the document"
    return None


def assemble(
    plan: ChatPlan,
    items: Mapping[Slot, Mapping[str, Any]],
    documents: Sequence[ChunkedDocument],
    count: TokenCounter,
    *,
    length: int,
) -> AssembledChat | None:
    """The chat of a plan; None if no question is left. Where it is too long its last questions go.

    A document behind which no question is left stands before the next question that there is; at the end it is left out.

    Args:
        plan: of the chat.
        items: `question` and `answer` for the slots that have one.
        documents: all.
        count: of tokens.
        length: tokens at most.
    """
    turns: list[_Turn] = []
    shown: list[int] = []
    for place, slots in enumerate(plan.slots):
        shown.append(place)
        for slot in slots:
            if slot in items:
                turns.append(_Turn(tuple(shown), slot, items[slot]))
                shown = []
    kept = len(turns)
    if kept and count(_messages(turns, plan, documents)) > length:  # the largest number that fits, halving the rest each time
        fits, too_many = 0, kept
        while too_many - fits > 1:
            half = (fits + too_many) // 2
            if count(_messages(turns[:half], plan, documents)) <= length:
                fits = half
            else:
                too_many = half
        kept = fits
    if not kept:
        return None
    messages = _messages(turns[:kept], plan, documents)
    text = count.render(messages)
    ends = count.tokenizer.encode_chat(text)[1]
    return AssembledChat(messages, len(ends), _evidence(turns[:kept], plan, documents, text, ends), len(turns) - kept)


def _taken(place: int, plan: ChatPlan, documents: Sequence[ChunkedDocument]) -> str:
    """The text of a document as far as the chat shows it."""
    number, chunks = plan.documents[place]
    return documents[number].text[: documents[number].stops[chunks - 1]]


def _shown(place: int, plan: ChatPlan, documents: Sequence[ChunkedDocument]) -> str:
    return f"Document [{place + 1}]\n\n{_taken(place, plan, documents)}\n\n"


def _messages(turns: Sequence[_Turn], plan: ChatPlan, documents: Sequence[ChunkedDocument]) -> Messages:
    messages: Messages = []
    for turn in turns:
        before = "".join(_shown(place, plan, documents) for place in turn.shown)
        question = f"{before}About document [{turn.slot.document + 1}]: {turn.item['question']}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.item["answer"]}]
    return messages


def _find(text: str, part: str, at: int) -> int:
    found = text.find(part, at)
    if found < 0:
        raise DataError(
            "the chat template rewrites the messages, so where the evidence stands is unknown",
            where="data synth hierarchical",
            fix="use a template that writes them as they are",
        )
    return found


def _evidence(
    turns: Sequence[_Turn], plan: ChatPlan, documents: Sequence[ChunkedDocument], text: str, ends: Any
) -> list[dict[str, Any]]:
    """For each question where its evidence stands, and how far behind it the answer begins, in tokens of the chat."""
    begin_of: dict[int, int] = {}  # documents, in characters of the chat
    at, rows = 0, []
    for number, turn in enumerate(turns):
        for place in turn.shown:
            document = _taken(place, plan, documents)
            at = begin_of[place] = _find(text, document, at)
            at += len(document)
        at = _find(text, turn.item["question"], at) + len(turn.item["question"])
        at = _find(text, turn.item["answer"].strip(), at)
        which = plan.documents[turn.slot.document][0]
        document = _taken(turn.slot.document, plan, documents)
        inside = [document.index(quote) for quote in turn.item.get("quotes", [])]
        inside = inside or [documents[which].start(chunk) for chunk in turn.slot.chunks]
        places = np.searchsorted(ends, [begin_of[turn.slot.document] + one for one in inside], side="right")
        rows.append(
            {
                "turn": number,
                "kind": turn.slot.kind,
                "when": turn.slot.when,
                "document": documents[which].id,
                "chunks": list(turn.slot.chunks),
                "evidence_tokens": places.tolist(),
                "answer_token": int(np.searchsorted(ends, at, side="right")),
                "depth": round(float(places.min()) / len(ends), 4),
            }
        )
    return rows
