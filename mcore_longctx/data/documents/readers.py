"""Documents and chats of one task, one at a time. What a record may be stands in `data/documents/records.py`, what a source may be in `data/documents/inputs.py`.

A record that cannot be used is handed on as a `BadRecord`, to be counted; what concerns a whole file is an error. Memory holds one
document and a fixed buffer, whatever the size of the file.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_longctx.data.documents.inputs import (
    InputFile,
    InputTask,
    changed_error,
    check_unchanged,
    folder_files,
    input_path,
    plan_inputs,
    stat_input,
)
from mcore_longctx.data.documents.lines import BLOCK, Tally, read_lines, unpacked
from mcore_longctx.data.documents.parquet import BadText, column_names, read_rows
from mcore_longctx.data.documents.records import (
    BadRecord,
    Chat,
    Document,
    Item,
    Part,
    Place,
    RecordParser,
    identity,
    messages_of,
    parts_of,
)
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import DocumentSource

__all__ = [
    "BadRecord",
    "Chat",
    "Document",
    "InputFile",
    "InputTask",
    "Part",
    "Place",
    "TaskReader",
    "check_unchanged",
    "plan_inputs",
    "read_task",
    "read_texts",
]

_BOM = b"\xef\xbb\xbf"


def read_task(task: InputTask, source: DocumentSource, *, chats: bool) -> TaskReader:
    """Everything in a task, in order. See `TaskReader`."""
    return TaskReader(task, source, chats=chats)


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a file or a folder (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md), in the order of the sorted names.

    Raises:
        DataError: nothing there, a file that cannot be read, or a bad record; the first of them.
    """
    source, found = DocumentSource(name="text", path=path), False
    for task in plan_inputs([source], range_bytes=1 << 62, chats=False):
        for item in read_task(task, source, chats=False):
            if isinstance(item, BadRecord):
                raise DataError(item.what, where=item.place)
            assert isinstance(item, Document)
            found = True
            yield "".join(part.text for part in item.parts)
    if not found:
        raise DataError("holds no text", where=path)


class TaskReader:
    """Iterates once over the documents, chats and bad records of a task.

    Attributes (complete once the iteration has ended):
        empty: documents without any text, left out.
        binary: files of folders that are not UTF-8 text or hold a NUL byte, left out.
        ignored: files and folders that are not read: hidden, links, or of another suffix.
        bytes_read: of compressed files before they are unpacked.
        crc32: of these bytes. Of a JSONL file: of bytes start..stop-1.

    Raises:
        DataError: while iterating: a file is missing, damaged, or not as it was when the task was planned.
    """

    def __init__(self, task: InputTask, source: DocumentSource, *, chats: bool) -> None:
        self.empty, self.binary, self.ignored = 0, 0, task.ignored
        self._task, self._source, self._chats, self._tally = task, source, chats, Tally()
        read = {"parquet": self._rows, "text": self._text_files, "folder": self._folders}.get(task.kind, self._lines)
        self._items: Iterator[Item] = read()

    @property
    def bytes_read(self) -> int:
        """Bytes so far."""
        return self._tally.bytes

    @property
    def crc32(self) -> int:
        """CRC-32 of them."""
        return self._tally.crc32

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def __next__(self) -> Item:
        return next(self._items)

    def _lines(self) -> Iterator[Item]:
        (file,), task, source = self._task.files, self._task, self._source
        path, is_packed = self._checked(file), task.kind != "jsonl"
        parse = RecordParser(
            str(path), text_field=source.text_field, id_field=source.id_field, chats=self._chats, packed=is_packed
        )
        try:
            with path.open("rb", buffering=0) as raw:
                if is_packed:
                    with unpacked(raw, task.kind, self._tally) as stream:
                        lines: Iterator[Item] = read_lines(stream, parse)
                        yield from lines
                else:
                    raw.seek(max(task.start - 1, 0))
                    lines = read_lines(raw, parse, start=task.start, stop=task.stop, tally=self._tally)
                    yield from lines
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})", where=path) from None
        except DataError as error:
            raise DataError(error.what, where=path, fix=error.fix) from None
        self.empty += parse.empty

    def _rows(self) -> Iterator[Item]:
        (file,), task, source = self._task.files, self._task, self._source
        path = self._checked(file)
        names = column_names(path)
        wanted = ["messages"] if self._chats else [source.text_field, "segments"]
        columns = [name for name in (*wanted, source.id_field) if name in names]
        if not set(wanted) & set(columns):
            fix = "" if self._chats else "set text_field of the source"
            raise DataError(f"no column {wanted[0]!r}; the file has {', '.join(map(repr, names))}", where=path, fix=fix)
        for number, row in read_rows(path, task.start, task.stop, columns, self._tally):
            place = Place(str(path), row=number)
            try:
                item = self._row(row, place)
            except DataError as error:
                yield BadRecord(place, str(error))
                continue
            if item is None:
                self.empty += 1
            else:
                yield item

    def _row(self, row: dict[str, Any], place: Place) -> Document | Chat | None:
        for name, value in row.items():
            if isinstance(value, BadText):
                raise DataError(f"{name!r} is {value.what}", fix="convert it to UTF-8")
        given = row.pop(self._source.id_field, None)
        if self._chats:
            messages = messages_of(row)
            return Chat(identity(given, messages, self._source.id_field), messages, place)
        # every row has every column: null is how a row goes without
        there = {name: value for name, value in row.items() if value is not None}
        parts = parts_of(there or dict([*row.items()][:1]), self._source.text_field)
        if not any(part.text for part in parts):
            return None
        return Document(identity(given, parts, self._source.id_field), parts, place)

    def _text_files(self) -> Iterator[Item]:
        for file in self._task.files:
            if (item := self._text_file(file)) is not None:
                yield item
            item = None  # not kept while the next one is read

    def _text_file(self, file: InputFile) -> Item | None:
        path = self._checked(file)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=path) from None
        self._tally.add(raw)
        skip, place = len(_BOM) if raw.startswith(_BOM) else 0, Place(str(path))
        try:
            text = str(memoryview(raw)[skip:], "utf-8")
        except UnicodeDecodeError as error:
            at = skip + error.start
            return BadRecord(place, f"not UTF-8: byte 0x{raw[at]:02x} at byte offset {at:,} of the file; convert it to UTF-8")
        if text:
            return Document(file.name, (Part(text),), place)
        self.empty += 1
        return None

    def _folders(self) -> Iterator[Item]:
        for folder in self._task.files:
            if (item := self._folder(folder)) is not None:
                yield item
            item = None

    def _folder(self, planned: InputFile) -> Item | None:
        folder = self._source.path / planned.name
        found, names, ignored = folder_files(folder)
        if found != planned:
            raise changed_error(self._source, planned.name, planned, found)
        self.ignored += ignored
        pieces: list[str] = []
        for name in names:
            text = self._text_of(folder, name)
            if text is None:
                self.binary += 1
            else:
                pieces += [f"{name}\n", *text, "" if not text or text[-1].endswith("\n") else "\n"]
        if pieces:
            return Document(planned.name, (Part("".join(pieces)),), Place(str(folder)))
        self.empty += 1
        return None

    def _text_of(self, folder: Path, name: str) -> list[str] | None:
        """Text of a file in pieces, or None if it is binary: that shows early in a large file, so it is not read whole."""
        decoder, pieces, path = codecs.getincrementaldecoder("utf-8-sig")(), [], folder / name
        try:
            name.encode()
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    self._tally.add(block)
                    if b"\0" in block:
                        return None
                    pieces.append(decoder.decode(block))
                pieces.append(decoder.decode(b"", final=True))
        except UnicodeError:
            return None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=path) from None
        return [piece for piece in pieces if piece]

    def _checked(self, file: InputFile) -> Path:
        path = input_path(self._source, file.name)
        stat_input(path, file.name, self._source, file)
        return path
