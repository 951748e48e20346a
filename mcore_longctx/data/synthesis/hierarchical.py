"""Long chats about documents: plan, ask a writer, check, assemble (He et al., arXiv 2504.12637, section 3).

1. every chunk is summarised, then every section of three chunks, then the document
2. questions are asked for as planned (`question_plan.py`): about a chunk in the light of the summaries, three chunks, or one
3. those with ambiguous quotes, and those that can be answered without the document, are dropped; the paper does neither
4. what is left becomes chats of the wanted lengths

OUT.jsonl            the chats
OUT.evidence.jsonl   for every question where in its chat the evidence stands
OUT.rejected.jsonl   items without a usable answer, or dropped, each with the reason
OUT.work/            all answers: a later start, killed or not, asks for none of them again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_longctx.data.synthesis.assemble import AssembledChat, assemble, quote_fault
from mcore_longctx.data.synthesis.closed_book import answerable_without, same_answer
from mcore_longctx.data.synthesis.documents import ChunkedDocument, control_texts, read_documents
from mcore_longctx.data.synthesis.question_plan import ChatPlan, QuestionCounts, Slot, plan_chat
from mcore_longctx.data.synthesis.sized import TokenCounter
from mcore_longctx.data.synthesis.writer import Answers, Rejected, Writer
from mcore_longctx.data.synthesis.writing import (
    SynthesisReport,
    Wanted,
    in_order,
    output_paths,
    prepare_folder,
    sibling,
    write_lines,
)
from mcore_longctx.data.workspace import lock_folder, remove_leftovers
from mcore_longctx.errors import DataError

__all__ = ["HierarchicalReport", "HierarchicalSettings", "make_hierarchical_chats"]

_SECTION = 3  # chunks


@dataclass(frozen=True, kw_only=True)
class HierarchicalSettings:
    """How chats are made. The defaults are the paper's, but for what it does not say."""

    seed: int = 1234
    chunk: int = 4096  # tokens
    counts: QuestionCounts = field(default_factory=QuestionCounts)
    question_tokens: int = 192  # set aside for a question and its answer
    writer: Writer = field(default_factory=Writer)
    closed_book: Writer | None = None  # None: the rule that needs no model
    max_rejected: float = 0.1  # share of the items of one kind that may stay without a usable answer

    def __post_init__(self) -> None:
        for name in ("chunk", "question_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more tokens")
        if not 0.0 <= self.max_rejected < 1.0:
            raise ValueError(f"max-rejected is {self.max_rejected}, expected 0 or more and less than 1")


@dataclass(frozen=True, kw_only=True)
class HierarchicalReport:
    """What was made. `str(report)` is the text for the screen."""

    chats: SynthesisReport
    documents: int
    documents_left_out: int  # empty, or with the text of a control token
    asked: int  # of the writer, in this start
    known: int  # from earlier starts
    rejected: Mapping[str, int]  # items by what became of them
    too_long: int  # questions that did not fit into their chat
    empty: int  # chats without a question: not written

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {**vars(self), "chats": self.chats.as_dict(), "rejected": dict(self.rejected)}

    def __str__(self) -> str:
        left = f", {self.documents_left_out:,} left out (empty, or with control tokens)" if self.documents_left_out else ""
        lines = [str(self.chats), f"documents: {self.documents:,}{left}"]
        lines.append(f"{self.asked:,} items asked, {self.known:,} known from before")
        lines += [f"  {count:,} {what}" for what, count in self.rejected.items() if count]
        if self.too_long:
            lines.append(f"  {self.too_long:,} questions did not fit: raise --question-tokens")
        if self.empty:
            lines.append(f"  {self.empty:,} chats had no question left and were not written")
        return "\n".join(lines)


def make_hierarchical_chats(
    out: Path,
    inputs: Sequence[Path],
    wanted: Sequence[Wanted],
    tokenizer: Path,
    settings: HierarchicalSettings,
    *,
    workers: int = 1,
    on_answer: Callable[[], None] = lambda: None,
) -> HierarchicalReport:
    """Write chats about documents, with their evidence and what was rejected, beside OUT.

    All documents are held in memory. With the built-in writer the result is a function of documents, tokenizer and settings.

    Args:
        out: file; for several lengths see `output_paths`.
        inputs: files or folders of documents.
        wanted: lengths and chats of each.
        tokenizer: model folder or tokenizer.json.
        settings: seed, chunks, counts, writers.
        workers: processes that assemble.
        on_answer: called for every answer of a writer.

    Raises:
        ConfigError: an output is there, or a command cannot be started.
        DataError: inputs, tokenizer, a length that is too small, too many failures of the writer.
        InUseError: another process works on these outputs.
    """
    work = out.with_name(f"{out.stem}.work")
    evidence, rejected = sibling(out, "evidence"), sibling(out, "rejected")
    publishing = work / "publishing"  # there while finished files get their names: those that have them are ours
    paths = output_paths(out, wanted, besides=(evidence, rejected), ours=publishing.exists())
    count = TokenCounter(tokenizer)
    documents, left_out = read_documents(inputs, count.tokenizer, chunk=settings.chunk)
    plans: list[tuple[Wanted, int, ChatPlan]] = []
    for one in wanted:
        for _ in range(one.chats):
            plan = plan_chat(
                documents,
                settings.counts,
                seed=settings.seed,
                index=len(plans),
                length=one.length,
                question_tokens=settings.question_tokens,
            )
            plans.append((one, len(plans), plan))
    prepare_folder(out)
    with lock_folder(work):
        remove_leftovers(work)
        answers = Answers(work / "answers.jsonl", forbidden=control_texts(count.tokenizer))
        known = len(answers.known)
        asking = _Asking(documents, settings, answers, on_answer)
        items = asking.items([plan for _, _, plan in plans])

        def record(number: int) -> dict[str, Any]:
            one, index, plan = plans[number]
            chat = assemble(plan, items[number], documents, count, length=one.length)
            return {"id": f"hierarchical-{settings.seed}-{one.length}-{index}", "chat": chat}

        rows: list[dict[str, Any]] = []
        files = []
        questions = too_long = empty = 0
        for path, one in zip(paths, wanted, strict=True):
            numbers = [number for number, (asked, _, _) in enumerate(plans) if asked is one]
            tokens = chats = 0

            def records(numbers: list[int] = numbers) -> Iterator[dict[str, Any]]:
                nonlocal tokens, chats, questions, too_long, empty
                for made in in_order(record, numbers, workers):
                    chat: AssembledChat | None = made["chat"]
                    if chat is None:
                        empty += 1
                        continue
                    tokens, chats, too_long = tokens + chat.tokens, chats + 1, too_long + chat.dropped
                    questions += len(chat.evidence)
                    rows.extend({"chat": made["id"], "tokens": chat.tokens, **row} for row in chat.evidence)
                    yield {"id": made["id"], "messages": chat.messages, "tokens": chat.tokens}

            write_lines(work / path.name, records())
            if not chats:
                write_lines(work / "rejected.jsonl", (one.as_dict() for one in answers.rejected))
                raise DataError(
                    f"no chat of {one.length:,} tokens has a question left", where=work / "rejected.jsonl", fix="see there why"
                )
            files.append((str(path), one.length, chats, tokens))
        write_lines(work / evidence.name, iter(rows))
        write_lines(work / rejected.name, (one.as_dict() for one in answers.rejected))
        publishing.touch()
        for path in (evidence, rejected, *paths):
            (work / path.name).replace(path)
        publishing.unlink()
    return HierarchicalReport(
        chats=SynthesisReport(files=tuple(files), questions=questions),
        documents=len(documents),
        documents_left_out=left_out,
        asked=answers.asked,
        known=known,
        rejected=asking.counts,
        too_long=too_long,
        empty=empty,
    )


class _Asking:
    """Asks for everything that the plans need, in the order in which one request needs the answers of another."""

    def __init__(
        self,
        documents: Sequence[ChunkedDocument],
        settings: HierarchicalSettings,
        answers: Answers,
        on_answer: Callable[[], None],
    ) -> None:
        self._documents, self._settings, self._answers, self._on_answer = documents, settings, answers, on_answer
        self._summaries: dict[tuple[int, int], tuple[list[str], str]] = {}  # document and chunks: of its sections, of all
        self.counts: Counter[str] = Counter()

    def items(self, plans: Sequence[ChatPlan]) -> list[dict[Slot, dict[str, Any]]]:
        """Question and answer for the slots of every plan, as far as they are usable."""
        self._summarise(list(dict.fromkeys(taken for plan in plans for taken in plan.documents)))
        slots = [
            (plan, slot, self._named(self._question(plan, slot))) for plan in plans for after in plan.slots for slot in after
        ]
        self._ask([request for _, _, request in slots])
        self._count("without a usable answer", len(self._answers.rejected))
        requests = {request["id"]: (plan, slot, request) for plan, slot, request in slots}
        good = {name: item for name, place in requests.items() if (item := self._checked(*place)) is not None}
        for name in self._known_without(good):
            self._drop("answerable without the document", requests[name][2], "answerable without the document")
            del good[name]
        found: list[dict[Slot, dict[str, Any]]] = [{} for _ in plans]
        number_of = {id(plan): number for number, plan in enumerate(plans)}
        asked: set[tuple[int, int, str]] = set()
        for plan, slot, request in slots:
            item, number = good.get(request["id"]), number_of[id(plan)]
            if item is None:
                continue
            question = (number, slot.document, item["question"])
            if question in asked:
                self._count("asked before in the same chat", 1)
                continue
            asked.add(question)
            found[number][slot] = item
        return found

    def _named(self, request: dict[str, Any], writer: Writer | None = None) -> dict[str, Any]:
        return {"id": (writer or self._settings.writer).request_id(request), **request}

    def _ask(self, requests: Sequence[Mapping[str, Any]], writer: Writer | None = None) -> None:
        writer = writer or self._settings.writer
        self._answers.ask(requests, writer, max_rejected=self._settings.max_rejected, on_answer=self._on_answer)

    def _count(self, what: str, count: int) -> None:
        self.counts[what] += count

    # ------------------------------------------------------------------ summaries
    def _summarise(self, taken: Sequence[tuple[int, int]]) -> None:
        texts = {(number, at): self._documents[number].chunk(at) for number, chunks in taken for at in range(chunks)}
        of_chunk = self._summaries_of(texts, "chunk")
        sections = {
            (number, chunks, first): "\n".join(of_chunk[number, at] for at in range(first, min(first + _SECTION, chunks)))
            for number, chunks in taken
            for first in range(0, chunks, _SECTION)
        }
        of_section = self._summaries_of(sections, "section")
        whole = {
            (number, chunks): "\n".join(of_section[number, chunks, first] for first in range(0, chunks, _SECTION))
            for number, chunks in taken
        }
        of_document = self._summaries_of(whole, "document")
        for number, chunks in taken:
            parts = [of_section[number, chunks, first] for first in range(0, chunks, _SECTION)]
            self._summaries[number, chunks] = parts, of_document[number, chunks]

    def _summaries_of(self, texts: Mapping[Any, str], level: str) -> dict[Any, str]:
        """A summary for each text; where the writer gave none, nothing: then the question is asked without it."""
        requests = {key: self._named({"kind": "summary", "level": level, "text": text}) for key, text in texts.items() if text}
        self._ask([*requests.values()])
        known = self._answers.known
        return {
            key: known[requests[key]["id"]]["summary"] if key in requests and requests[key]["id"] in known else ""
            for key in texts
        }

    # ------------------------------------------------------------------ questions
    def _question(self, plan: ChatPlan, slot: Slot) -> dict[str, Any]:
        number, chunks = plan.documents[slot.document]
        document = self._documents[number]
        request: dict[str, Any] = {"kind": slot.kind, "name": slot.name}
        if slot.kind == "multi_hop":
            return request | {"chunks": [document.chunk(at) for at in slot.chunks]}
        request["chunk"] = document.chunk(slot.chunks[0])
        sections, whole = self._summaries[number, chunks]
        if slot.kind == "hierarchical":
            return request | {"section_summary": sections[slot.chunks[0] // _SECTION], "document_summary": whole}
        return request | ({"document_summary": whole} if slot.kind == "other" else {})

    def _checked(self, plan: ChatPlan, slot: Slot, request: Mapping[str, Any]) -> dict[str, Any] | None:
        item = self._answers.known.get(request["id"])
        if item is None:
            return None
        number, chunks = plan.documents[slot.document]
        fault = quote_fault(self._documents[number].text[: self._documents[number].stops[chunks - 1]], item)
        if fault is None:
            return item
        self._drop(fault, request, "with an ambiguous quote")
        return None

    def _known_without(self, items: Mapping[str, dict[str, Any]]) -> list[str]:
        """Those that can be answered without the document."""
        writer = self._settings.closed_book
        if writer is None:
            return [name for name, item in items.items() if answerable_without(item["question"], item["answer"])]
        requests = {name: self._named({"kind": "closed_book", "question": items[name]["question"]}, writer) for name in items}
        before = len(self._answers.rejected)
        self._ask([*requests.values()], writer)
        self._count("not checked without the document", len(self._answers.rejected) - before)
        given = {name: self._answers.known.get(request["id"]) for name, request in requests.items()}
        return [name for name, item in items.items() if (said := given[name]) and same_answer(said["answer"], item["answer"])]

    def _drop(self, reason: str, request: Mapping[str, Any], what: str) -> None:
        self._answers.rejected.append(Rejected(reason, request))
        self._count(what, 1)
