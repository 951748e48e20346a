"""Documents and chats from JSONL and plain-text files, one at a time, with errors that name file and line.

    .jsonl       one record a line: {"id": ..., "text": "..."}, or parts that carry their own loss flag:
                 {"segments": [{"text": "...", "loss": true}, ...]}, or a chat: {"messages": [{"role", "content"}, ...]}
    .txt, .md    one file is one document; its id is its path inside the source

A folder is read recursively, in sorted order; other suffixes and hidden files are counted, not read. Memory holds one document.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.errors import DataError

__all__ = ["Chat", "Document", "InputFile", "Part", "SourceReader"]

_TEXT_SUFFIXES = (".txt", ".md")
_SUFFIXES = (".jsonl", *_TEXT_SUFFIXES)
_BOM = b"\xef\xbb\xbf"  # some editors put it before UTF-8 text; it is no part of the document


@dataclass(frozen=True)
class Part:
    """A stretch of a document, and whether its tokens are learned."""

    text: str
    loss: bool = True


@dataclass(frozen=True)
class Document:
    """A text with a name. `where` is FILE or FILE:LINE, for messages."""

    id: str
    parts: tuple[Part, ...]
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation: `messages` as the chat template wants them."""

    id: str
    messages: list[dict[str, Any]]
    where: str


@dataclass(frozen=True)
class InputFile:
    """A file that was read to its end."""

    name: str  # path inside the source
    size: int  # bytes
    sha256: str


class SourceReader:
    """Reads the documents or chats of one source: a file, or a folder of files.

    Attributes (complete once the iteration has ended):
        files: what was read.
        ignored: files of a folder with another suffix, or hidden.
        empty: records without any text, left out.

    Raises:
        DataError: the path does not exist, holds no file that can be read, or a file is bad (while iterating).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[InputFile] = []
        self.empty = 0
        self._paths, self.ignored = _find(path)

    def documents(self, text_field: str = "text") -> Iterator[Document]:
        """Every document, in the order of the sorted file names."""
        for path, name in self._paths:
            if path.suffix in _TEXT_SUFFIXES:
                yield self._text_file(path, name)
                continue
            found = False
            for where, record in self._records(path, name):
                found = True
                parts = _parts(record, text_field, where)
                if any(part.text for part in parts):
                    yield Document(_identity(record, parts, where), parts, where)
                else:
                    self.empty += 1
            if not found:
                raise DataError("holds no record", where=path, fix="remove the file or fill it")

    def chats(self) -> Iterator[Chat]:
        """Every conversation, in the order of the sorted file names."""
        for path, name in self._paths:
            if path.suffix != ".jsonl":
                raise DataError("chats are read from .jsonl files only", where=path, fix='one {"messages": [...]} a line')
            found = False
            for where, record in self._records(path, name):
                found = True
                messages = _messages(record, where)
                yield Chat(_identity(record, messages, where), messages, where)
            if not found:
                raise DataError("holds no record", where=path, fix="remove the file or fill it")

    def _text_file(self, path: Path, name: str) -> Document:
        raw = _read(path)
        text = _decode(raw.removeprefix(_BOM), path, start=len(_BOM) if raw.startswith(_BOM) else 0)
        if not text:
            raise DataError("empty file", where=path, fix="remove it or fill it")
        self.files.append(InputFile(name, len(raw), hashlib.sha256(raw).hexdigest()))
        return Document(name, (Part(text),), str(path))

    def _records(self, path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """`FILE:LINE` and record of every line that is not blank."""
        digest, at = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    where = f"{path}:{number}"
                    skip = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
                    text = _decode(line[skip:], where, start=at + skip)
                    at += len(line)
                    if text.strip():
                        yield where, _record(text, where)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=path) from None
        if at == 0:
            raise DataError("empty file", where=path, fix="remove it or fill it")
        self.files.append(InputFile(name, at, digest.hexdigest()))


def _find(path: Path) -> tuple[list[tuple[Path, str]], int]:
    """Files to read with their names inside the source, sorted by name; and how many others there are."""
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"unknown suffix {path.suffix!r}", where=path, fix=f"expected {', '.join(_SUFFIXES)}")
        return [(path, path.name)], 0
    if not path.is_dir():
        raise DataError("no such file or folder", where=path, fix="check the source's path")
    every = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    files = sorted((file.relative_to(path).as_posix(), file) for file in every if file.suffix in _SUFFIXES)
    files = [(name, file) for name, file in files if not any(part.startswith(".") for part in name.split("/"))]
    if not files:
        found = f"only {len(every):,} other files" if every else "it is empty"
        raise DataError(f"no {', '.join(_SUFFIXES)} file in this folder, {found}", where=path)
    return [(file, name) for name, file in files], len(every) - len(files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None


def _decode(raw: bytes, where: object, *, start: int) -> str:
    """`start`: byte offset of `raw` in its file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte offset {at:,} of the file", where=where, fix="convert it to UTF-8"
        ) from None


def _record(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos + 1:,}", where=where) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets nested thousands deep
        raise DataError(f"JSON that cannot be read: {error}", where=where) from None
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, this is {_kind(record)}", where=where, fix='write {"text": "..."}')
    return record


def _parts(record: dict[str, Any], text_field: str, where: str) -> tuple[Part, ...]:
    if "segments" not in record:
        if text_field not in record:
            names = ", ".join(map(repr, record)) or "nothing"
            raise DataError(f"no field {text_field!r}; the record has {names}", where=where, fix="set text_field of the source")
        return (Part(_text(record[text_field], repr(text_field), where)),)
    if text_field in record:
        raise DataError(f"both {text_field!r} and 'segments'", where=where, fix="give one of them")
    segments = record["segments"]
    if not isinstance(segments, list):
        raise DataError(f"'segments' is {_kind(segments)}, expected a list", where=where)
    parts = []
    for index, segment in enumerate(segments):
        name = f"segments[{index}]"
        if not isinstance(segment, dict) or set(segment) != {"text", "loss"}:
            raise DataError(f"{name} must have the fields 'text' and 'loss' and no other", where=where)
        if not isinstance(segment["loss"], bool):
            raise DataError(f"{name}.loss is {_kind(segment['loss'])}, expected true or false", where=where)
        parts.append(Part(_text(segment["text"], f"{name}.text", where), segment["loss"]))
    return tuple(parts)


def _messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "no field 'messages'" if "messages" not in record else f"'messages' is {_kind(messages)}, expected a filled list"
        raise DataError(what, where=where, fix='write {"messages": [{"role": "user", "content": "..."}, ...]}')
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"messages[{index}] is {_kind(message)}, expected an object", where=where)
        for field in ("role", "content"):
            if field not in message:
                raise DataError(f"messages[{index}] has no {field!r}", where=where)
            _text(message[field], f"messages[{index}].{field}", where)
    return messages


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, expected a string", where=where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(
            f"{name} holds half of a surrogate pair (\\u{code:04x}) at character {error.start + 1:,}",
            where=where,
            fix="repair the escape",
        ) from None
    return value


def _identity(record: dict[str, Any], content: object, where: str) -> str:
    """The record's own id, or a hash of its content: the same wherever the record stands."""
    given = record.get("id")
    if given is None:
        text = "\0".join(f"{part.loss:d}{part.text}" for part in content) if isinstance(content, tuple) else json.dumps(content)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise DataError(f"'id' is {_kind(given)}, expected a string or a whole number", where=where)
    return _text(str(given), "'id'", where)


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
