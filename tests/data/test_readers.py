"""Documents come out of files and folders in a fixed order, and bad input is named by file and line."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_longctx.data.readers import Part, SourceReader
from mcore_longctx.errors import DataError


def read(path: Path, text_field: str = "text") -> list[tuple[str, str]]:
    return [(d.id, "".join(part.text for part in d.parts)) for d in SourceReader(path).documents(text_field)]


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    jsonl("in/b.jsonl", [{"id": "r1", "text": "one"}, {"id": 2, "text": "two"}])
    (tmp_path / "in/a").mkdir()
    (tmp_path / "in/a/note.txt").write_text("first\r\n")
    (tmp_path / "in/c.md").write_text("# last")
    (tmp_path / "in/d.csv").write_text("not read")
    (tmp_path / "in/.hidden.txt").write_text("not read")
    reader = SourceReader(tmp_path / "in")
    documents = list(reader.documents())
    assert [(d.id, d.parts) for d in documents] == [
        ("a/note.txt", (Part("first\r\n"),)),
        ("r1", (Part("one"),)),
        ("2", (Part("two"),)),
        ("c.md", (Part("# last"),)),
    ]
    assert documents[2].where == f"{tmp_path}/in/b.jsonl:2"
    assert reader.ignored == 2
    assert [file.name for file in reader.files] == ["a/note.txt", "b.jsonl", "c.md"]
    raw = (tmp_path / "in/b.jsonl").read_bytes()
    assert (reader.files[1].size, reader.files[1].sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_a_record_without_id_is_known_by_its_content(jsonl: Callable[..., Path]) -> None:
    one = read(jsonl("a.jsonl", [{"text": "x"}, {"text": "y"}]))
    other = read(jsonl("b.jsonl", [{"text": "y"}, {"text": "x"}, {"segments": [{"text": "x", "loss": False}]}]))
    assert one == other[1::-1]
    assert len({name for name, _ in other}) == 3


def test_the_text_field_can_be_named(jsonl: Callable[..., Path]) -> None:
    assert read(jsonl("a.jsonl", [{"id": "1", "body": "x"}]), "body") == [("1", "x")]


def test_segments_carry_their_own_loss_flag(jsonl: Callable[..., Path]) -> None:
    record = {"segments": [{"text": "question", "loss": False}, {"text": "answer", "loss": True}]}
    (document,) = SourceReader(jsonl("a.jsonl", [record])).documents()
    assert document.parts == (Part("question", False), Part("answer", True))


def test_blank_lines_a_missing_last_newline_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "text": "x"}\n\n  \n{"id": "2", "text": "y\\u0000"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path) == [("1", "x"), ("2", "y\0"), ("b.txt", "hello")]


def test_records_without_text_are_counted(jsonl: Callable[..., Path]) -> None:
    reader = SourceReader(jsonl("a.jsonl", [{"text": ""}, {"text": "x"}, {"segments": []}]))
    assert len(list(reader.documents())) == 1
    assert reader.empty == 2


BAD_LINES = [
    (b'{"text": "x\xff"}', r"a\.jsonl:2: not UTF-8: byte 0xff at byte offset 28 of the file; convert it to UTF-8"),
    (b'{"text": "x"', r"a\.jsonl:2: not JSON: Expecting ',' delimiter at character \d+"),
    (b"[" * 100_000, r"a\.jsonl:2: JSON that cannot be read"),
    (b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: JSON that cannot be read"),
    (b'["text"]', r"a\.jsonl:2: a record must be an object, this is a list"),
    (b'{"id": 1, "body": "x"}', r"a\.jsonl:2: no field 'text'; the record has 'id', 'body'; set text_field of the source"),
    (b"{}", r"a\.jsonl:2: no field 'text'; the record has nothing"),
    (b'{"text": 7}', r"a\.jsonl:2: 'text' is a number, expected a string"),
    (b'{"text": null}', r"a\.jsonl:2: 'text' is null, expected a string"),
    (
        b'{"text": "ab\\ud800"}',
        r"a\.jsonl:2: 'text' holds half of a surrogate pair \(\\ud800\) at character 3; repair the escape",
    ),
    (b'{"id": [1], "text": "x"}', r"a\.jsonl:2: 'id' is a list, expected a string or a whole number"),
    (b'{"text": "x", "segments": []}', r"a\.jsonl:2: both 'text' and 'segments'; give one of them"),
    (b'{"segments": {}}', r"a\.jsonl:2: 'segments' is an object, expected a list"),
    (b'{"segments": [{"text": "x"}]}', r"a\.jsonl:2: segments\[0\] must have the fields 'text' and 'loss' and no other"),
    (b'{"segments": [{"text": "x", "loss": 1}]}', r"a\.jsonl:2: segments\[0\]\.loss is a number, expected true or false"),
    (b'{"segments": [{"text": 1, "loss": true}]}', r"a\.jsonl:2: segments\[0\]\.text is a number"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}' + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name}: empty file; remove it or fill it"):
        read(tmp_path / name)


def test_a_file_of_blank_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"a\.jsonl: holds no record"):
        read(tmp_path)


def test_a_text_file_that_is_not_utf8_is_refused_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xefve")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8: byte 0xef at byte offset 5 of the file"):
        read(tmp_path)


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.jsonl, \.txt, \.md file in this folder, it is empty"):
        SourceReader(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match="in this folder, only 1 other files"):
        SourceReader(tmp_path)
    with pytest.raises(DataError, match=r"a\.csv: unknown suffix '\.csv'; expected \.jsonl, \.txt, \.md"):
        SourceReader(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; check the source's path"):
        SourceReader(tmp_path / "nowhere")


BAD_CHATS = [
    ({"text": "x"}, r"a\.jsonl:1: no field 'messages'"),
    ({"messages": []}, r"'messages' is an empty list, expected a filled list"),
    ({"messages": "hi"}, r"'messages' is a string, expected a filled list"),
    ({"messages": ["hi"]}, r"messages\[0\] is a string, expected an object"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content is null, expected a string"),
]


@pytest.mark.parametrize(("record", "message"), BAD_CHATS)
def test_a_bad_chat_is_named(jsonl: Callable[..., Path], record: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(SourceReader(jsonl("a.jsonl", [record])).chats())


def test_chats_come_from_jsonl_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt: chats are read from \.jsonl files only"):
        list(SourceReader(tmp_path).chats())


def test_chats_keep_every_field_of_a_message(jsonl: Callable[..., Path]) -> None:
    messages = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "hello"}]
    (chat,) = SourceReader(jsonl("a.jsonl", [{"id": "c", "messages": messages}])).chats()
    assert (chat.id, chat.messages) == ("c", json.loads(json.dumps(messages)))
