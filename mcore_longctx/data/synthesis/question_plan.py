"""Which documents and which questions make up a chat, before a word of a question is written (He et al., arXiv 2504.12637, section 3).

After each document come questions about it that know its structure (hierarchical) and diverse ones (multi-hop over three chunks, local
ones, others); after each but the first also diverse ones about earlier documents, and for every earlier document with a probability
some follow-ups. The counts are fixed: in the paper fixed counts beat random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mcore_longctx.data.synthesis.documents import ChunkedDocument
from mcore_longctx.data.synthesis.draws import Draws
from mcore_longctx.errors import DataError

__all__ = ["ChatPlan", "QuestionCounts", "Slot", "plan_chat"]

_DIVERSE = ("multi_hop", "local", "other")
_HOPS = 3  # chunks of a multi-hop question
_FRAME = 16  # tokens for what a chat's template puts around a turn, and for the words before a document or question


@dataclass(frozen=True, kw_only=True)
class QuestionCounts:
    """How many questions stand where. The values are the paper's."""

    hierarchical: int = 5  # after a document
    diverse: int = 5  # after a document
    revisit: int = 9  # after a document: diverse ones about earlier documents
    follow_up: int = 3  # after a document, about an earlier one
    follow_up_probability: float = 0.6

    def __post_init__(self) -> None:
        for name in ("hierarchical", "diverse", "revisit", "follow_up"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more")
        if self.hierarchical + self.diverse < 1:
            raise ValueError("hierarchical and diverse are both 0: no question stands behind a document")
        if not 0.0 <= self.follow_up_probability <= 1.0:
            raise ValueError(f"follow-up-probability is {self.follow_up_probability}, expected 0 to 1")


@dataclass(frozen=True)
class Slot:
    """Place for one question."""

    when: str  # `after` its document, `revisit`, `follow_up`
    kind: str  # `hierarchical`, `multi_hop`, `local`, `other`
    document: int  # place of its document in the chat
    chunks: tuple[int, ...]  # that it is about, ascending
    name: str  # no two slots of one seed have the same: else two chats about one document would have the same questions


@dataclass(frozen=True)
class ChatPlan:
    """Documents of a chat, each with the number of its chunks that are taken, and the questions that stand behind each."""

    documents: tuple[tuple[int, int], ...]  # number among all documents, chunks
    slots: tuple[tuple[Slot, ...], ...]  # for each document


def plan_chat(
    documents: Sequence[ChunkedDocument], counts: QuestionCounts, *, seed: int, index: int, length: int, question_tokens: int
) -> ChatPlan:
    """Documents in random order, each cut at a chunk where it does not fit whole, until the length is full.

    Args:
        documents: all that there are.
        counts: of questions.
        seed: of all chats.
        index: of this chat.
        length: tokens at most.
        question_tokens: set aside for a question and its answer, which nobody knows yet.

    Raises:
        DataError: no chunk fits.
    """
    chosen: list[tuple[int, int]] = []
    slots: list[tuple[Slot, ...]] = []
    order = Draws(seed, index, "documents").shuffled(range(len(documents)))
    left, needed = length, 0
    for place, number in enumerate(order):
        draws = Draws(seed, index, "slots", place)
        kinds = [*_kinds(place, counts, draws)]
        room = left - len(kinds) * (question_tokens + _FRAME) - _FRAME
        document = documents[number]
        chunks = sum(tokens <= room for tokens in document.tokens)
        if not chunks:
            needed = length - room + document.tokens[0]
            break
        chosen.append((number, chunks))
        left = room - document.tokens[chunks - 1]
        named = ((f"{seed}-{index}-{place}-{at}", kind) for at, kind in enumerate(kinds))
        slots.append(tuple(_slot(*kind, name, chosen) for name, kind in named))
    if not chosen:
        raise DataError(
            f"a length of {length:,} tokens is too small: one chunk and its questions take about {needed:,}",
            where="data synth hierarchical",
            fix="raise --length, or lower --chunk, --hierarchical, --diverse or --question-tokens",
        )
    return ChatPlan(tuple(chosen), tuple(slots))


def _kinds(place: int, counts: QuestionCounts, draws: Draws) -> Iterator[tuple[str, str, int]]:
    """When, kind and document of every question behind the document at a place."""
    for _ in range(counts.hierarchical):
        yield "after", "hierarchical", place
    for kind in _diverse(counts.diverse, draws):
        yield "after", kind, place
    if not place:
        return
    for kind in _diverse(counts.revisit, draws):
        yield "revisit", kind, draws.below(place)
    for earlier in range(place):
        if draws.chance(counts.follow_up_probability):
            for kind in _diverse(counts.follow_up, draws):
                yield "follow_up", kind, earlier


def _diverse(count: int, draws: Draws) -> Iterator[str]:
    """The kinds in turn, beginning with a random one."""
    first = draws.below(len(_DIVERSE))
    for number in range(count):
        yield _DIVERSE[(first + number) % len(_DIVERSE)]


def _slot(when: str, kind: str, document: int, name: str, chosen: Sequence[tuple[int, int]]) -> Slot:
    chunks = chosen[document][1]
    wanted = min(_HOPS if kind == "multi_hop" else 1, chunks)
    return Slot(when, kind, document, tuple(sorted(Draws("chunks", name).sample(range(chunks), wanted))), name)
