"""What a source holds: documents, chats and records that are bad; and the rules that tell them apart.

A record is a JSON object: {"id": ..., "text": "..."}, or a document in parts that carry their own loss flag
{"segments": [{"text": "...", "loss": true}, ...]}, or a chat {"messages": [{"role": ..., "content": ...}, ...]}. The rules are those
of Python's `json` (a key given twice: the last counts; NaN is read), and the whole line must be UTF-8. Fields without a name here are
read over. msgspec does the same four times as fast for plain documents; whatever it refuses is judged by the rules.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mcore_longctx.errors import DataError

__all__ = [
    "BadRecord",
    "Chat",
    "Document",
    "Item",
    "LineCounter",
    "Part",
    "Place",
    "RecordParser",
    "identity",
    "messages_of",
    "parts_of",
    "text_of",
]

_BOM = b"\xef\xbb\xbf"  # some editors put it before UTF-8 text; it is no part of the first record
_BLOCK = 1 << 20  # bytes or characters that are handled at once
_NAMES_SHOWN = 20


class LineCounter:
    """Line of a byte offset in a file. It remembers where it was, so that ascending offsets cost one pass over the file."""

    def __init__(self, path: str) -> None:
        self._path, self._offset, self._line = path, 0, 1

    def line(self, offset: int) -> int | None:
        """Line (from 1) that holds the byte at `offset`; None if the file cannot be read any more."""
        if offset < self._offset:
            self._offset, self._line = 0, 1
        try:
            with Path(self._path).open("rb", buffering=0) as file:
                file.seek(self._offset)
                while self._offset < offset:
                    block = file.read(min(_BLOCK, offset - self._offset))
                    if not block:
                        return None
                    self._offset += len(block)
                    self._line += block.count(b"\n")
        except OSError:
            return None
        return self._line


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: `str()` gives FILE:LINE, `FILE row N`, or FILE where the file is the record.

    A record of a plain file knows its byte offset; its line is counted when it is asked for.
    """

    path: str
    offset: int | None = None  # of its line's first byte in a plain file
    line: int | None = None  # from 1; where the file is packed
    row: int | None = None  # from 1; of a Parquet file
    counter: LineCounter | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        if self.row is not None:
            return f"{self.path} row {self.row}"
        line = self.line
        if line is None and self.offset is not None:
            line = (self.counter or LineCounter(self.path)).line(self.offset)
            if line is None:
                return f"{self.path} at byte offset {self.offset}"
        return self.path if line is None else f"{self.path}:{line}"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a document, and whether its tokens are learned."""

    text: str
    loss: bool = True


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name. It has at least one character."""

    id: str
    parts: tuple[Part, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: `messages` as the chat template wants them."""

    id: str
    messages: list[dict[str, Any]]
    place: Place


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used: `what` is wrong and, after a semicolon, how to repair it."""

    place: Place
    what: str


Item = Document | Chat | BadRecord


class RecordParser:
    """Lines of one JSONL file to documents, chats or bad records.

    Args:
        path: the file, for messages.
        text_field: name of the field with the text.
        id_field: name of the field with the document's name.
        chats: expect chats.
        packed: the file is compressed: places are line numbers.

    Attributes:
        empty: records without any text.
    """

    def __init__(self, path: str, *, text_field: str, id_field: str, chats: bool, packed: bool) -> None:
        self.empty = 0
        self._path, self._text_field, self._id_field, self._chats, self._packed = path, text_field, id_field, chats, packed
        self._counter = LineCounter(path)
        # decoders of plain documents: without any other field, or with fields to read over
        self._exact = None if chats else _plain_decoder(text_field, id_field, only=True)
        self._open = None if chats else _plain_decoder(text_field, id_field, only=False)

    def __call__(self, line: bytearray | memoryview, offset: int, number: int, is_ascii: bool) -> Item | None:
        """The record of one line; None if the line is blank or the record has no text.

        Args:
            line: its bytes, which may change after the call.
            offset: of the line in its file, unpacked.
            number: of the line; used only if the file is packed.
            is_ascii: whether the line is known to be ASCII alone.
        """
        body: bytearray | memoryview = line
        if offset == 0 and bytes(line[: len(_BOM)]) == _BOM:
            offset, body = len(_BOM), memoryview(line)[len(_BOM) :]
        record = self._plain(body, is_ascii)
        if record is not None:
            if not record.text:
                self.empty += 1
                return None
            parts = (Part(record.text),)
            return Document(identity(record.id, parts, self._id_field), parts, self._place(offset, number))
        try:
            return self._by_the_rules(body, offset, number)
        except DataError as error:
            return BadRecord(self._place(offset, number), str(error))

    def _plain(self, line: bytearray | memoryview, is_ascii: bool) -> Any:
        """Text and id of a plain document; None if the rules are to judge."""
        record = None
        if self._exact is not None:
            record = _decoded(self._exact, line)
        if record is None and self._open is not None:
            record = _decoded(self._open, line)
            if record is None:
                return None
            self._exact = None  # this file has other fields: do not try again
            if not is_ascii and not _is_utf8(line):  # msgspec does not look at the bytes that it reads over
                return None
        return record if record is not None and record.segments is msgspec.UNSET else None

    def _place(self, offset: int, number: int) -> Place:
        if self._packed:
            return Place(self._path, line=number)
        return Place(self._path, offset, counter=self._counter)

    def _by_the_rules(self, line: bytearray | memoryview, offset: int, number: int) -> Document | Chat | None:
        text = _decode(line, offset, "unpacked file" if self._packed else "file")
        if not text or text.isspace():
            return None
        record = _load(text)
        if self._chats:
            messages = messages_of(record)
            return Chat(identity(record.get(self._id_field), messages, self._id_field), messages, self._place(offset, number))
        parts = parts_of(record, self._text_field)
        if not any(part.text for part in parts):
            self.empty += 1
            return None
        return Document(identity(record.get(self._id_field), parts, self._id_field), parts, self._place(offset, number))


def _plain_decoder(text_field: str, id_field: str, *, only: bool) -> Any:
    """Decoder of records with a text and, if there is one, an id; it notes whether there are segments. only: no other field."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        ("text", str),
        ("id", str | int | None, None),
        ("segments", msgspec.Raw | msgspec.UnsetType, msgspec.UNSET),
    ]
    names = {"text": text_field, "id": id_field}
    return msgspec.json.Decoder(msgspec.defstruct("Record", fields, rename=names, forbid_unknown_fields=only, gc=False))


def _decoded(decoder: Any, line: bytearray | memoryview) -> Any:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _is_utf8(line: bytearray | memoryview) -> bool:
    """Whether all of a line is UTF-8, in memory that does not grow with the line."""
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(line)
    try:
        for at in range(0, len(view), _BLOCK):
            decoder.decode(view[at : at + _BLOCK], at + _BLOCK >= len(view))
    except UnicodeDecodeError:
        return False
    return True


def _decode(raw: bytes | bytearray | memoryview, offset: int, of: str) -> str:
    """Text of bytes that begin at `offset` of a file."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        at, byte = offset + error.start, raw[error.start]
    raise DataError(f"not UTF-8: byte 0x{byte:02x} at byte offset {at:,} of the {of}", fix="convert it to UTF-8")


def _load(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at character {error.pos + 1:,}"
    except RecursionError:
        what = "JSON that cannot be read: nested too deeply"
    else:
        if isinstance(record, dict):
            return record
        raise DataError(f"a record must be an object, this is {_kind(record)}", fix='write {"text": "..."}')
    raise DataError(what)  # outside the handler: the exceptions above hold the whole line


def _whole_number(digits: str) -> int | float:
    """Python refuses integers of thousands of digits; where nobody reads them they do no harm."""
    try:
        return int(digits)
    except ValueError:
        return float("-inf" if digits.startswith("-") else "inf")


def parts_of(record: dict[str, Any], text_field: str) -> tuple[Part, ...]:
    """The text of a record, in one part, or its segments.

    Raises:
        DataError: neither or both are there, or something in them has the wrong type. It has no place.
    """
    if "segments" not in record:
        if text_field not in record:
            raise DataError(f"no field {text_field!r}; the record has {_names(record)}", fix="set text_field of the source")
        return (Part(text_of(record[text_field], repr(text_field))),)
    if text_field in record:
        raise DataError(f"both {text_field!r} and 'segments'", fix="give one of them")
    segments = record["segments"]
    if not isinstance(segments, list):
        raise DataError(f"'segments' is {_kind(segments)}, expected a list")
    parts = []
    for index, segment in enumerate(segments):
        name = f"segments[{index}]"
        if not isinstance(segment, dict) or set(segment) != {"text", "loss"}:
            raise DataError(f"{name} must have the fields 'text' and 'loss' and no other")
        if not isinstance(segment["loss"], bool):
            raise DataError(f"{name}.loss is {_kind(segment['loss'])}, expected true or false")
        parts.append(Part(text_of(segment["text"], f"{name}.text"), segment["loss"]))
    return tuple(parts)


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a chat. Errors as in `parts_of`."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "no field 'messages'" if "messages" not in record else f"'messages' is {_kind(messages)}, expected a filled list"
        raise DataError(what, fix='write {"messages": [{"role": "user", "content": "..."}, ...]}')
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"messages[{index}] is {_kind(message)}, expected an object")
        for name in ("role", "content"):
            if name not in message:
                raise DataError(f"messages[{index}] has no {name!r}")
            text_of(message[name], f"messages[{index}].{name}")
    return messages


def text_of(value: object, name: str) -> str:
    """`value` if it is a string that can be written as UTF-8. Errors as in `parts_of`."""
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, expected a string")
    try:
        for _ in _utf8_pieces(value):
            pass
    except UnicodeEncodeError as error:
        code = error.object[error.start]
        at = value.index(code)
        raise DataError(
            f"{name} holds half of a surrogate pair (\\u{ord(code):04x}) at character {at + 1:,}", fix="repair the escape"
        ) from None
    return value


def identity(given: object, content: tuple[Part, ...] | list[dict[str, Any]], id_field: str) -> str:
    """A record's own id, or a hash of its content: the same wherever the record stands. Errors as in `parts_of`."""
    if type(given) is str and given.isascii():
        return given
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise DataError(f"{id_field!r} is {_kind(given)}, expected a string or a whole number")
        return text_of(str(given), repr(id_field))
    digest = hashlib.blake2b(digest_size=12)
    if isinstance(content, list):
        digest.update(json.dumps(content).encode())
        return digest.hexdigest()
    for index, part in enumerate(content):
        digest.update(b"\0%d" % part.loss if index else b"%d" % part.loss)
        for piece in _utf8_pieces(part.text):
            digest.update(piece)
    return digest.hexdigest()


def _utf8_pieces(text: str) -> Iterator[bytes]:
    """UTF-8 of a text, piece by piece: of a text of 1 GB there is no second copy."""
    for at in range(0, len(text), _BLOCK):
        yield text[at : at + _BLOCK].encode()


def _names(record: dict[str, Any]) -> str:
    names = [repr(name) for name in list(record)[:_NAMES_SHOWN]]
    if len(record) > _NAMES_SHOWN:
        names.append(f"and {len(record) - _NAMES_SHOWN:,} more")
    return ", ".join(names) or "nothing"


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bytes: "bytes",
        bool: "true or false",
        type(None): "null",
    }
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
