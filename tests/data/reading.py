"""Reading as the tests need it: whole sources to plain values, and a plain-Python reader to compare with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mcore_longctx.data.documents.readers import BadRecord, Chat, Document, TaskReader, plan_inputs, read_task
from mcore_longctx.recipe.schema import DocumentSource

WHOLE = 1 << 40  # range_bytes that cuts nothing


def source_of(path: Path, **fields: Any) -> DocumentSource:
    return DocumentSource(name="source", path=path, **fields)


def task_readers(path: Path, *, range_bytes: int = WHOLE, chats: bool = False, **fields: Any) -> list[TaskReader]:
    source = source_of(path, **fields)
    return [read_task(task, source, chats=chats) for task in plan_inputs([source], range_bytes=range_bytes, chats=chats)]


def items(path: Path, **how: Any) -> list[Document | Chat | BadRecord]:
    return [item for reader in task_readers(path, **how) for item in reader]


def texts(path: Path, **how: Any) -> list[tuple[str, str]]:
    """Id and text of every document; a bad record fails the test."""
    return [(item.id, "".join(part.text for part in item.parts)) for item in items(path, **how)]


def plain_python(raw: bytes) -> list[tuple[str, Any]]:
    """The same from the bytes of a JSONL file with json.loads a line: ("document", id, text) or ("bad", line number)."""
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode()
            if not text.strip():
                continue
            record = json.loads(text)
            text, given = record["text"], record.get("id")
            if not isinstance(text, str) or isinstance(given, bool) or not isinstance(given, str | int | None):
                raise TypeError
            text.encode(), str(given).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            rows.append(("bad", number))
            continue
        if text:
            digest = hashlib.blake2b(f"1{text}".encode(), digest_size=12).hexdigest()
            rows.append(("document", digest if given is None else str(given), text))
    return rows


def as_plain(found: list[Document | Chat | BadRecord]) -> list[tuple[str, Any]]:
    """What was read, in the form of `plain_python`."""
    return [
        ("bad", int(str(item.place).rpartition(":")[2]))
        if isinstance(item, BadRecord)
        else ("document", item.id, "".join(part.text for part in item.parts))
        for item in found
    ]
