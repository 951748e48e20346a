"""Documents come out of files and folders in a fixed order, and a record that is bad is named by file and line."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_longctx.data.documents.readers import BadRecord, Part, Place, read_texts
from mcore_longctx.errors import DataError
from tests.data.reading import items, task_readers, texts

zstandard = pytest.importorskip("zstandard")


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    jsonl("in/b.jsonl", [{"id": "r1", "text": "one"}, {"id": 2, "text": "two"}])
    (tmp_path / "in/a").mkdir()
    (tmp_path / "in/a/note.txt").write_bytes(b"first\r\n")
    (tmp_path / "in/c.md").write_text("# last")
    (tmp_path / "in/d.csv").write_text("not read")
    (tmp_path / "in/.hidden.txt").write_text("not read")
    (tmp_path / "in/.git").mkdir()
    (tmp_path / "in/.git/e.txt").write_text("not read")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    readers = task_readers(tmp_path / "in")
    documents = [item for reader in readers for item in reader]
    assert [(d.id, d.parts) for d in documents] == [
        ("a/note.txt", (Part("first\r\n"),)),
        ("r1", (Part("one"),)),
        ("2", (Part("two"),)),
        ("c.md", (Part("# last"),)),
    ]
    folder = tmp_path / "in"
    assert [str(d.place) for d in documents] == [
        f"{folder}/a/note.txt",
        f"{folder}/b.jsonl:1",
        f"{folder}/b.jsonl:2",
        f"{folder}/c.md",
    ]
    assert sum(reader.ignored for reader in readers) == 4


def test_links_to_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("hello")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").symlink_to(tmp_path / "blob")
    assert texts(tmp_path / "in") == [("a.txt", "hello")]
    (tmp_path / "blob").unlink()
    with pytest.raises(DataError, match=r"in/a\.txt: cannot be read \(No such file or directory\)"):
        texts(tmp_path / "in")


def test_a_record_without_id_is_known_by_its_content(jsonl: Callable[..., Path]) -> None:
    one = texts(jsonl("a.jsonl", [{"text": "x"}, {"text": "y"}]))
    other = texts(jsonl("b.jsonl", [{"text": "y"}, {"id": None, "text": "x"}, {"segments": [{"text": "x", "loss": False}]}]))
    assert one == other[1::-1]
    assert len({name for name, _ in other}) == 3


def test_the_hash_of_a_content_covers_where_its_parts_end(jsonl: Callable[..., Path]) -> None:
    parts = [{"text": "a", "loss": True}, {"text": "ü", "loss": False}]
    one, two, three = texts(jsonl("a.jsonl", [{"segments": parts}, {"text": "a0ü"}, {"segments": parts[::-1]}]))
    assert one[0] == hashlib.blake2b("1a\0000ü".encode(), digest_size=12).hexdigest()
    assert two[0] == hashlib.blake2b("1a0ü".encode(), digest_size=12).hexdigest()
    assert len({one[0], two[0], three[0]}) == 3


def test_fields_can_be_named(jsonl: Callable[..., Path]) -> None:
    path = jsonl("a.jsonl", [{"path/ü": "1", "body": "x", "text": 7, "id": []}])
    assert texts(path, text_field="body", id_field="path/ü") == [("1", "x")]


def test_other_fields_are_read_over(jsonl: Callable[..., Path]) -> None:
    records = [{"text": "x", "id": "1"}, {"meta": {"a": [1, "\ud800", 1e999]}, "text": "y", "id": "2"}, {"text": "z", "id": "3"}]
    path = jsonl("a.jsonl", [])
    path.write_text("\n".join(map(json.dumps, records)))
    assert texts(path) == [("1", "x"), ("2", "y"), ("3", "z")]


def test_segments_carry_their_own_loss_flag(jsonl: Callable[..., Path]) -> None:
    record = {"segments": [{"text": "question", "loss": False}, {"text": "", "loss": False}, {"text": "answer", "loss": True}]}
    (document,) = items(jsonl("a.jsonl", [record]))
    assert document.parts == (Part("question", False), Part("", False), Part("answer", True))


def test_blank_lines_a_missing_last_newline_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    raw = b'\xef\xbb\xbf{"id": "1", "text": "x"}\r\n\n  \t\n\xc2\xa0\n{"id": "2", "text": "y\\u0000"}'
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfhel\0lo")
    assert texts(tmp_path) == [("1", "x"), ("2", "y\0"), ("1", "x"), ("2", "y\0"), ("c.txt", "hel\0lo")]


def test_the_last_of_two_equal_keys_counts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "text": "y", "id": 1, "id": "2"}\n{"text": 1, "text": "z", "id": 3}\n')
    assert texts(tmp_path) == [("2", "y"), ("3", "z")]


def test_documents_without_text_are_counted(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    records = [{"text": ""}, {"text": "x"}, {"segments": []}, {"segments": [{"text": "", "loss": True}]}]
    jsonl("a.jsonl", records)
    (tmp_path / "b.txt").touch()
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf")
    readers = task_readers(tmp_path)
    assert len([item for reader in readers for item in reader]) == 1
    assert sum(reader.empty for reader in readers) == 5


BAD_LINES = [
    (b'{"text": "x\xff"}', "not UTF-8: byte 0xff at byte offset 28 of the file; convert it to UTF-8"),
    (b'{"text": "x", "m": "\xff"}', "not UTF-8: byte 0xff at byte offset 37 of the file; convert it to UTF-8"),
    (b'{"text": "x", "\xc3": 1}', "not UTF-8: byte 0xc3 at byte offset 32 of the file; convert it to UTF-8"),
    (b'{"text": "x"', "not JSON: Expecting ',' delimiter at character 13"),
    (b'{"text": "x"} {"text": "y"}', "not JSON: Extra data at character 15"),
    (b'{"text": "a\x00b"}', "not JSON: Invalid control character at at character 12"),
    (b"[" * 100_000, "JSON that cannot be read: nested too deeply"),
    (b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON that cannot be read: nested too deeply"),
    (b'{"text": ' + b"9" * 5000 + b"}", "'text' is a number, expected a string"),
    (b'{"text": "x", "id": -' + b"9" * 5000 + b"}", "'id' is a number, expected a string or a whole number"),
    (b'["text"]', 'a record must be an object, this is a list; write {"text": "..."}'),
    (b"null", 'a record must be an object, this is null; write {"text": "..."}'),
    (b'{"id": 1, "body": "x"}', "no field 'text'; the record has 'id', 'body'; set text_field of the source"),
    (
        json.dumps({f"f{i}": 1 for i in range(23)}).encode(),
        f"no field 'text'; the record has {', '.join(repr(f'f{i}') for i in range(20))}, and 3 more; set text_field of the source",
    ),
    (b"{}", "no field 'text'; the record has nothing; set text_field of the source"),
    (b'{"text": 7}', "'text' is a number, expected a string"),
    (b'{"text": 7.5}', "'text' is a number, expected a string"),
    (b'{"text": null}', "'text' is null, expected a string"),
    (b'{"text": true}', "'text' is true or false, expected a string"),
    (b'{"text": {"text": "x"}}', "'text' is an object, expected a string"),
    (b'{"text": ["x"]}', "'text' is a list, expected a string"),
    (b'{"text": "ab\\ud800"}', "'text' holds half of a surrogate pair (\\ud800) at character 3; repair the escape"),
    (b'{"text": "\xc3\xbc\\udc00\\ud800"}', "'text' holds half of a surrogate pair (\\udc00) at character 2; repair the escape"),
    (b'{"id": [1], "text": "x"}', "'id' is a list, expected a string or a whole number"),
    (b'{"id": true, "text": "x"}', "'id' is true or false, expected a string or a whole number"),
    (b'{"id": 1.0, "text": "x"}', "'id' is a number, expected a string or a whole number"),
    (b'{"id": "\\ud800", "text": "x"}', "'id' holds half of a surrogate pair (\\ud800) at character 1; repair the escape"),
    (b'{"text": "x", "segments": []}', "both 'text' and 'segments'; give one of them"),
    (b'{"segments": {}}', "'segments' is an object, expected a list"),
    (b'{"segments": null}', "'segments' is null, expected a list"),
    (b'{"segments": [{"text": "x"}]}', "segments[0] must have the fields 'text' and 'loss' and no other"),
    (b'{"segments": [{"text": "x", "loss": 1}]}', "segments[0].loss is a number, expected true or false"),
    (b'{"segments": [{"text": 1, "loss": true}]}', "segments[0].text is a number, expected a string"),
]


@pytest.mark.parametrize("is_open", [False, True], ids=["exact", "with other fields"])
@pytest.mark.parametrize(("line", "what"), BAD_LINES)
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, what: str, is_open: bool) -> None:
    first = b'{"text":"good","m":"\xc3\xbc"}\n' if is_open else b'{"text": "good"}\n'
    offset = len(first) - 17
    what = what.replace("offset 28", f"offset {28 + offset}").replace("offset 37", f"offset {37 + offset}")
    what = what.replace("offset 32", f"offset {32 + offset}")
    path = tmp_path / "a.jsonl"
    path.write_bytes(first + line + b"\n" + b'{"text": "also good"}\n')
    before, bad, after = items(path)
    assert (before.parts[0].text, after.parts[0].text) == ("good", "also good")
    assert isinstance(bad, BadRecord)
    assert (str(bad.place), bad.what) == (f"{path}:2", what)
    with pytest.raises(DataError) as caught:
        list(read_texts(path))
    assert str(caught.value) == f"{path}:2: {what}"


def test_a_surrogate_in_a_long_text_is_found_at_its_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "é" * 1_500_000 + '\\udfff"}\n')
    (bad,) = items(tmp_path)
    assert bad.what.startswith(r"'text' holds half of a surrogate pair (\udfff) at character 1,500,001")


def test_the_line_of_a_place_is_counted_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 40_000 + b"bad\n\nworse\n")
    first, second = (item for item in items(path, range_bytes=1 << 18) if isinstance(item, BadRecord))
    assert (str(second.place), str(first.place), str(second.place)) == (f"{path}:40003", f"{path}:40001", f"{path}:40003")
    assert first.place == Place(str(path), 560_000)
    path.unlink()
    assert str(first.place) == f"{path} at byte offset 560000"


def test_bytes_are_counted_with_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xff"}\n')
    (bad,) = items(tmp_path)
    assert bad.what.startswith("not UTF-8: byte 0xff at byte offset 13 of the file")


def test_bad_bytes_of_a_packed_file_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'\n{"text": "x"}\n{"text": "\xff"}\n'))
    _, bad = items(path)
    assert (str(bad.place), bad.what) == (
        f"{path}:3",
        "not UTF-8: byte 0xff at byte offset 25 of the unpacked file; convert it to UTF-8",
    )


def test_a_text_file_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xefve")
    (tmp_path / "b.txt").write_text("fine")
    bad, fine = items(tmp_path)
    assert (str(bad.place), bad.what) == (
        f"{tmp_path}/a.txt",
        "not UTF-8: byte 0xef at byte offset 5 of the file; convert it to UTF-8",
    )
    assert fine.id == "b.txt"


# ------------------------------------------------------------------ compressed files
def packings(raw: bytes) -> dict[str, bytes]:
    """Whole, in members of 1 and of 50 bytes, with an empty member, and padded as tape writers do."""
    pieces = {size: [raw[at : at + size] for at in range(0, len(raw), size)] for size in (1, 50)}
    zstd = zstandard.ZstdCompressor(write_checksum=True).compress
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    return {
        "a.jsonl.gz": gzip.compress(raw),
        "b.jsonl.gz": b"".join(map(gzip.compress, pieces[1])),
        "c.jsonl.gz": b"".join(map(gzip.compress, [*pieces[50], b""])) + bytes(100),
        "d.jsonl.zst": zstd(raw),
        "e.jsonl.zst": b"".join(map(zstd, pieces[1])),
        "f.jsonl.zst": skippable + b"".join(map(unsized.compress, [b"", *pieces[50]])) + skippable,
    }


def test_packed_files_give_the_same_documents(tmp_path: Path) -> None:
    records = [{"id": i, "text": "wörd" * i} for i in range(1, 9)]
    raw = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    (tmp_path / "plain.jsonl").write_bytes(raw)
    expected = texts(tmp_path / "plain.jsonl")
    assert expected == [(str(i), "wörd" * i) for i in range(1, 9)]
    for name, packed in packings(raw).items():
        (tmp_path / name).write_bytes(packed)
        (reader,) = task_readers(tmp_path / name, range_bytes=10)
        found = list(reader)
        assert [(d.id, d.parts[0].text) for d in found] == expected, name
        assert [str(d.place) for d in found] == [f"{tmp_path / name}:{line}" for line in range(1, 9)]
        assert (reader.bytes_read, reader.crc32) == (len(packed), zlib.crc32(packed))


def test_a_zstd_file_with_a_long_window_is_read(tmp_path: Path) -> None:
    raw = b'{"id": "1", "text": "x"}\n'
    window = bytes([(28 - 10) << 3])  # 256 MiB, as of `zstd --long=28`
    block = (len(raw) << 3 | 1).to_bytes(3, "little")  # the last one, not compressed
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00" + window + block + raw)
    assert texts(tmp_path) == [("1", "x")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl.gz", "d.jsonl.zst", "e.jsonl.zst", "f.jsonl.zst"])
def test_a_truncated_packed_file_is_an_error_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    raw = b'{"text": "hello"}\n' * 2
    packed, path = packings(raw)[name], tmp_path / name
    refused = 0
    for size in range(1, len(packed)):
        path.write_bytes(packed[:size])
        try:
            texts = [item.parts[0].text for item in items(path) if not isinstance(item, BadRecord)]
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            assert "truncated: the " in str(error) or "damaged" in str(error)  # noqa: PT017
        else:  # the cut is between two members
            assert texts == ["hello"] * len(texts)
    whole_members = {"a.jsonl.gz": 0, "b.jsonl.gz": 35, "d.jsonl.zst": 0, "e.jsonl.zst": 35, "f.jsonl.zst": 3}[name]
    assert refused == len(packed) - 1 - whole_members


@pytest.mark.parametrize("name", ["a.jsonl.gz", "d.jsonl.zst"])
def test_a_damaged_packed_file_is_an_error(tmp_path: Path, name: str) -> None:
    raw = json.dumps({"text": os.urandom(3000).hex()}).encode()
    packed, path = bytearray(packings(raw)[name]), tmp_path / name
    packed[len(packed) // 2] ^= 0x10
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"damaged (gzip|zstd) stream \(.*\); copy or pack it again"):
        items(path)
    path.write_bytes(b"no such stream")
    with pytest.raises(DataError, match=r"damaged (gzip|zstd) stream"):
        items(path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: zstandard is not installed; pip install 'mcore-longctx\[data\]'"):
        items(tmp_path)


# ------------------------------------------------------------------ what concerns a file
def test_a_file_that_changes_after_planning_is_an_error(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl("a.jsonl", [{"text": "x"}])
    (reader,) = task_readers(path)
    path.write_text('{"text": "longer"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: has changed: 19 bytes, it had 14 since the run began"):
        list(reader)
    (reader,) = task_readers(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file or directory\)"):
        list(reader)


def test_checksums_of_ranges_cover_every_byte_once(tmp_path: Path) -> None:
    raw = b'{"text": "hello"}\n\n' * 50 + b'{"text": "' + b"x" * 300 + b'"}'
    (tmp_path / "a.jsonl").write_bytes(raw)
    for size in (1, 7, 100, 2000):
        readers = task_readers(tmp_path, range_bytes=size)
        assert sum(len(list(reader)) for reader in readers) == 51
        assert [reader.crc32 for reader in readers] == [zlib.crc32(raw[at : at + size]) for at in range(0, len(raw), size)]
        assert sum(reader.bytes_read for reader in readers) == len(raw)


def test_texts_of_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no text"):
        list(read_texts(tmp_path))


# ------------------------------------------------------------------ chats
BAD_CHATS = [
    ({"text": "x"}, "no field 'messages'"),
    ({"messages": []}, "'messages' is an empty list, expected a filled list"),
    ({"messages": "hi"}, "'messages' is a string, expected a filled list"),
    ({"messages": ["hi"]}, "messages[0] is a string, expected an object"),
    ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null, expected a string"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content holds half of a surrogate pair (\\udc00)"),
    ({"messages": [{"role": "user", "content": "hi"}], "id": {}}, "'id' is an object, expected a string or a whole number"),
]


@pytest.mark.parametrize(("record", "what"), BAD_CHATS)
def test_a_bad_chat_is_named(tmp_path: Path, record: dict, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    (bad,) = items(path, chats=True)
    assert str(bad.place) == f"{path}:1"
    assert bad.what.startswith(what)


def test_chats_keep_every_field_of_a_message(jsonl: Callable[..., Path]) -> None:
    messages = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "hello"}]
    given, hashed = items(jsonl("a.jsonl", [{"id": "c", "messages": messages}, {"messages": messages}]), chats=True)
    assert (given.id, given.messages, hashed.messages) == ("c", messages, messages)
    assert len(hashed.id) == 24
