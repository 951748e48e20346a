"""However a file is cut into ranges and read in blocks, its documents are those of json.loads line by line."""

import gzip
import json
import tempfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcore_longctx.data.documents import lines
from mcore_longctx.data.documents.readers import Document
from tests.data.reading import as_plain, items, plain_python, task_readers

TEXT = st.text(st.sampled_from('ab"\\\n\r\0é海😀\u2028\x85\ufeff\x1f'), max_size=12)
GOOD = st.builds(
    lambda fields, ascii_only, spaces: json.dumps(fields, ensure_ascii=ascii_only, separators=spaces).encode(),
    st.fixed_dictionaries(
        {"text": TEXT},
        optional={
            "id": st.none() | st.integers() | TEXT,
            "meta": st.recursive(st.none() | st.floats() | TEXT, st.lists, max_leaves=4),
            "é": TEXT,
        },
    ),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
BAD = st.sampled_from(
    [
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"text": 1}',
        b'{"text": "\xff"}',
        b'{"text": "x", "m": "\xc3"}',
        b'{"text": "\\ud800"}',
        b'{"text": "x", "id": 1.5}',
        b'{"text": "x", "id": true}',
        b'{"id": "x"}',
        b'{"text": "x"} x',
        b'{"text": "x",}',
        b'\xef\xbb\xbf{"text": "x"}',
        b'{"text": "a\tb"}',
    ]
)
ODD = st.sampled_from(
    [
        b"",
        b"",
        b" ",
        b"\t\r",
        b"\xc2\xa0",
        b"\x1f",
        b'{"te\\u0078t": "x"}',
        b'{"text": "x", "text": ""}',
        b'{"text": 1, "text": "z"}',
        b'{"text": "x", "m": NaN}',
        b'{"text": "x", "m": "\\ud800"}',
        b'{"text": "x", "id": 123456789012345678901234567890}',
        b'{"text": "x", "id": -0}',
        b'{"text": "\\ud83d\\ude00\\/\\b"}',
        b' {"text" : "x"}\r',
    ]
)
LINES = st.lists(GOOD | BAD | ODD | st.binary(max_size=8).map(lambda raw: raw.replace(b"\n", b"")), max_size=8)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A JSONL file with good, bad, blank and odd lines; with or without BOM, CRLF and a last newline."""
    raw = draw(st.sampled_from([b"\n", b"\r\n"])).join(draw(LINES))
    raw = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + raw + draw(st.sampled_from([b"", b"\n", b"\n\n"]))
    return raw or b"\n"


@settings(max_examples=400, deadline=None)
@given(raw=files(), range_bytes=st.integers(1, 120), block=st.sampled_from([1, 2, 3, 7, 64, 1 << 20]))
@example(raw=b'{"text": "x"}\n{"text": "y"}\n', range_bytes=14, block=14)  # a range ends with a line, so does a block
@example(raw=b'{"text": "x"}\n{"text": "y"}\n', range_bytes=13, block=1)  # the newline is the first byte of a range
@example(raw=b'{"text": "x"}\n\n{"text": "y"}', range_bytes=15, block=3)
@example(raw=b'\xef\xbb\xbf{"text": "x"}\n\xef\xbb\xbf{"text": "y"}', range_bytes=1, block=1)
def test_any_split_gives_what_json_gives_line_by_line(raw: bytes, range_bytes: int, block: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        path = Path(folder, "a.jsonl")
        path.write_bytes(raw)
        readers = task_readers(path, range_bytes=range_bytes)
        found = [item for reader in readers for item in reader]
        assert as_plain(found) == plain_python(raw)
        assert [reader.crc32 for reader in readers] == [
            zlib.crc32(raw[at : at + range_bytes]) for at in range(0, len(raw), range_bytes)
        ]
        whole = task_readers(path)
        assert [item for reader in whole for item in reader] == found  # bad records and places too
        assert sum(reader.empty for reader in readers) == sum(reader.empty for reader in whole)


@settings(max_examples=300, deadline=None)
@given(line=GOOD | BAD | ODD, is_open=st.booleans())
def test_a_line_is_judged_alike_after_any_other_line(line: bytes, is_open: bool) -> None:
    """Whether msgspec reads a file with or without other fields does not show."""
    first = b'{"text": "first", "other": 1}\n' if is_open else b'{"text": "first"}\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(first + line)
        assert as_plain(items(path)) == plain_python(first + line)


def test_a_line_longer_than_many_blocks_is_one_document(tmp_path: Path) -> None:
    long = "wörd\n" * 1_000_000
    records = [{"id": "a", "text": "x"}, {"id": "b", "text": long}, {"id": "c", "text": "y"}, {"text": long[::-1], "id": "d"}]
    path = tmp_path / "a.jsonl"
    written = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    path.write_bytes(b"\n".join(written))
    expected = [(record["id"], record["text"]) for record in records]
    for range_bytes in (1 << 40, 3 << 20, 1_000_003):
        readers = task_readers(path, range_bytes=range_bytes)
        found = [[item for item in reader if isinstance(item, Document)] for reader in readers]
        assert [(d.id, d.parts[0].text) for documents in found for d in documents] == expected
        starts = [sum(len(line) + 1 for line in written[:index]) // range_bytes for index in range(4)]
        assert [len(documents) for documents in found] == [starts.count(index) for index in range(len(found))]


def peak_of_reading(path: Path, **how: Any) -> int:
    """Bytes of Python objects at the worst moment, while no document is kept."""
    readers = task_readers(path, **how)
    tracemalloc.start()
    try:
        for reader in readers:
            while next(reader, None) is not None:
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    raw = (json.dumps({"id": "1", "text": "0123456789" * 100}).encode() + b"\n") * 20_000
    (tmp_path / name).write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    assert peak_of_reading(tmp_path / name) < 6 * lines.BLOCK < len(raw) / 3


def test_a_long_line_needs_a_few_copies_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"id": "1", "text": "line\n" * 5_000_000}).encode() + b"\n"
    path.write_bytes(line * 3)
    assert peak_of_reading(path) < 3.3 * len(line)
