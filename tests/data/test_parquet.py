"""Rows of Parquet files are the documents of the same records in JSONL, in any cut; bad values are named by row."""

import json
import sys
import zlib
from pathlib import Path

import pytest

from mcore_longctx.data.documents.readers import BadRecord, plan_inputs
from mcore_longctx.errors import DataError
from tests.data.reading import items, source_of, task_readers, texts

RECORDS = [{"id": str(i) if i % 3 else None, "text": "wörd " * (i % 7), "unread": {"a": [i]}} for i in range(100)]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: pyarrow is not installed; pip install 'mcore-longctx\[data\]'"):
        items(tmp_path)


def write(path: Path, records: list[dict], **how: object) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(records), path, **how)
    return path


@pytest.mark.parametrize(
    "how", [{}, {"row_group_size": 7}, {"use_dictionary": False, "compression": "zstd", "row_group_size": 1}]
)
def test_rows_are_the_same_documents_as_lines(tmp_path: Path, how: dict) -> None:
    path = write(tmp_path / "a.parquet", RECORDS, **how)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    expected = texts(tmp_path / "a.jsonl")
    assert len(expected) == 85
    for range_bytes in (1, 1000, 1 << 40):
        readers = task_readers(path, range_bytes=range_bytes)
        found = [item for reader in readers for item in reader]
        assert [(d.id, d.parts[0].text) for d in found] == expected
        assert [str(d.place) for d in found] == [f"{path} row {i + 1}" for i in range(100) if i % 7]
        assert sum(reader.empty for reader in readers) == 15
    assert len(task_readers(path, range_bytes=1)) == {7: 15, 1: 100}.get(how.get("row_group_size"), 1)


def test_the_bytes_of_a_row_group_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", RECORDS, row_group_size=50)
    raw = path.read_bytes()
    readers = task_readers(path, range_bytes=1)
    for reader in readers:
        list(reader)
    first, second = readers
    assert first.crc32 == zlib.crc32(raw[4 : 4 + first.bytes_read])  # after the magic number, side by side
    assert second.crc32 == zlib.crc32(raw[4 + first.bytes_read : 4 + first.bytes_read + second.bytes_read])
    tasks = plan_inputs([source_of(path)], range_bytes=1, chats=False)
    assert [task.size for task in tasks] == [first.bytes_read, second.bytes_read]


def test_bad_values_are_named_by_row(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = arrow.array([b"good", b"na\xefve", None, b"good too"], arrow.binary())
    column = arrow.Array.from_buffers(arrow.string(), 4, raw.buffers())
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": column, "id": ["1", "2", "3", "4"]}), path)
    first, not_utf8, null, last = items(path)
    assert (first.id, last.id) == ("1", "4")
    assert isinstance(not_utf8, BadRecord)
    assert (str(not_utf8.place), not_utf8.what) == (
        f"{path} row 2",
        "'text' is not UTF-8: byte 0xef at byte 2 of the value; convert it to UTF-8",
    )
    assert (str(null.place), null.what) == (f"{path} row 3", "'text' is null, expected a string")


def test_columns_of_a_wrong_type_are_bad_in_every_row(tmp_path: Path) -> None:
    bad = items(write(tmp_path / "a.parquet", [{"text": 1}, {"text": 2}]))
    assert [item.what for item in bad] == ["'text' is a number, expected a string"] * 2
    (bad,) = items(write(tmp_path / "b.parquet", [{"text": "x", "id": 1.5}]))
    assert bad.what == "'id' is a number, expected a string or a whole number"
    (bad,) = items(write(tmp_path / "c.parquet", [{"text": b"x"}]))
    assert bad.what == "'text' is bytes, expected a string"


def test_a_missing_column_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"body": "x", "id": "1"}])
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; the file has 'body', 'id'; set text_field of the source"):
        items(path)
    assert texts(path, text_field="body") == [("1", "x")]


def test_segments_and_chats_come_from_nested_columns(tmp_path: Path) -> None:
    records = [
        {"text": "x", "segments": None},
        {"text": None, "segments": [{"text": "q", "loss": False}, {"text": "a", "loss": True}]},
        {"text": "x", "segments": []},
        {"text": None, "segments": None},
    ]
    one, two, both, none = items(write(tmp_path / "a.parquet", records))
    assert [part.loss for part in one.parts + two.parts] == [True, False, True]
    assert both.what == "both 'text' and 'segments'; give one of them"
    assert none.what == "'text' is null, expected a string"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (chat,) = items(write(tmp_path / "b.parquet", [{"id": 3, "messages": messages}]), chats=True)
    assert (chat.id, chat.messages) == ("3", messages)


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.parquet", RECORDS).read_bytes()
    for cut in (raw[:-1], raw[:100], b"PAR1" * 10):
        (tmp_path / "a.parquet").write_bytes(cut)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet \(.+\); copy or write it again"):
            items(tmp_path)
    (tmp_path / "a.parquet").write_bytes(raw[:200] + bytes(300) + raw[500:])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        items(tmp_path)
    write(tmp_path / "a.parquet", RECORDS[:0])
    with pytest.raises(DataError, match=r"holds no row|every file is empty"):
        items(tmp_path)
