"""Documents for hierarchical questions: read whole, cut into chunks at the ends of lines and sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.data.documents.inputs import plan_inputs
from mcore_longctx.data.documents.readers import BadRecord, Document, read_task
from mcore_longctx.data.tokenizers import Tokenizer
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import DocumentSource

__all__ = ["ChunkedDocument", "control_texts", "read_documents"]

_WHOLE = 1 << 62  # a range that no file exceeds
_BORDERS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?]\s"), re.compile(r"\s"))  # the best first


@dataclass(frozen=True)
class ChunkedDocument:
    """A document and where its chunks end."""

    id: str
    text: str
    stops: tuple[int, ...]  # characters; the last is the end of the text
    tokens: tuple[int, ...]  # of the text up to each stop, about

    def chunk(self, number: int) -> str:
        """Text of one chunk."""
        return self.text[self.start(number) : self.stops[number]]

    def start(self, number: int) -> int:
        """Where a chunk begins, in characters."""
        return self.stops[number - 1] if number else 0


def read_documents(paths: Sequence[Path], tokenizer: Tokenizer, *, chunk: int) -> tuple[list[ChunkedDocument], int]:
    """All documents of some files or folders, in chunks of about `chunk` tokens, and how many were left out.

    Left out are those that hold the text of a control token, which the chat template would take for one.

    Raises:
        DataError: an input is missing, a record is bad, or there is no document.
    """
    forbidden = control_texts(tokenizer)
    found, left_out = [], 0
    for document in _read(paths):
        text = "".join(part.text for part in document.parts)
        if not text.strip() or forbidden.search(text):
            left_out += 1
            continue
        tokens = len(tokenizer.encode(text))
        stops = _cut(text, max(1, round(chunk * len(text) / max(1, tokens))))
        found.append(ChunkedDocument(document.id, text, stops, tuple(round(tokens * stop / len(text)) for stop in stops)))
    if not found:
        raise DataError("no document with text", where=", ".join(map(str, paths)), fix="give documents: JSON lines with a text")
    return found, left_out


def control_texts(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the texts of control tokens, which the chat template would take for such tokens."""
    texts = [tokenizer.decode([token]) for token in sorted(tokenizer.control_ids())]
    return re.compile("|".join(re.escape(text) for text in texts if text) or r"(?!)")  # (?!) is found nowhere


def _read(paths: Sequence[Path]) -> Iterator[Document]:
    sources = [DocumentSource(name=f"documents {number}", path=path) for number, path in enumerate(paths)]
    for task in plan_inputs(sources, range_bytes=_WHOLE, chats=False):
        for record in read_task(task, sources[task.source], chats=False):
            if isinstance(record, BadRecord):
                raise DataError(record.what, where=record.place, fix="repair the record")
            assert isinstance(record, Document)
            yield record


def _cut(text: str, size: int) -> tuple[int, ...]:
    """Ends of chunks of about `size` characters: at a paragraph, a line, a sentence or a word in their last quarter."""
    stops, start = [], 0
    while len(text) - start > size * 5 // 4:
        low, high = start + size * 3 // 4, start + size
        stop = high
        for border in _BORDERS:
            ends = [match.end() for match in border.finditer(text, low, high)]
            if ends:
                stop = ends[-1]
                break
        stops.append(stop)
        start = stop
    return (*stops, len(text))
