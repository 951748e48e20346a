"""Inputs are cut into tasks in one order, whatever the size of the tasks; a change of a file is noticed."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcore_longctx.data.documents.inputs import InputTask, check_unchanged, plan_inputs
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.schema import DocumentSource
from tests.data.reading import WHOLE, items, source_of, task_readers, texts


def plan(path: Path, range_bytes: int = WHOLE, *, chats: bool = False, **fields: object) -> list[InputTask]:
    return plan_inputs([source_of(path, **fields)], range_bytes=range_bytes, chats=chats)


def rows(tasks: list[InputTask]) -> list[tuple[str, str, int, int]]:
    return [(task.kind, " ".join(file.name for file in task.files), task.start, task.stop) for task in tasks]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text files of 3 bytes and JSONL files, whose names alternate."""
    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    for name in ("a1.txt", "a2.md", "b/x.txt", "c3.txt"):
        (root / name).write_text("abc")
    (root / "b/y.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return root


def test_tasks_stand_in_the_order_of_the_names(folder: Path) -> None:
    (folder / "c4.csv").touch()
    tasks = plan(folder)
    assert rows(tasks) == [
        ("text", "a1.txt a2.md b/x.txt", 0, 0),
        ("jsonl", "b/y.jsonl", 0, 32),
        ("text", "c3.txt", 0, 0),
    ]
    assert [(task.size, task.ignored) for task in tasks] == [(9, 1), (32, 0), (3, 0)]
    assert rows(plan(folder, 10)) == [
        ("text", "a1.txt a2.md b/x.txt", 0, 0),
        ("jsonl", "b/y.jsonl", 0, 10),
        ("jsonl", "b/y.jsonl", 10, 20),
        ("jsonl", "b/y.jsonl", 20, 30),
        ("jsonl", "b/y.jsonl", 30, 32),
        ("text", "c3.txt", 0, 0),
    ]
    assert [task.size for task in plan(folder, 6)][:2] == [6, 3]


def test_the_size_of_the_tasks_does_not_change_what_is_read(folder: Path) -> None:
    whole = texts(folder)
    assert [text for _, text in whole] == ["abc", "abc", "abc", "one", "two", "abc"]
    for size in range(1, 40):
        assert texts(folder, range_bytes=size) == whole


def test_sources_keep_their_order(folder: Path, jsonl: Callable[..., Path]) -> None:
    sources = [DocumentSource(name="z", path=jsonl("z.jsonl", [{"text": "x"}])), DocumentSource(name="a", path=folder / "c3.txt")]
    assert [task.source for task in plan_inputs(sources, range_bytes=4, chats=False)] == [0, 0, 0, 0, 1]


def test_tasks_survive_json(folder: Path) -> None:
    tasks = plan(folder, 10)
    assert [InputTask.from_dict(json.loads(json.dumps(task.as_dict()))) for task in tasks] == tasks


# ------------------------------------------------------------------ changes
def test_unchanged_files_pass_whatever_the_ranges(folder: Path) -> None:
    check_unchanged(plan(folder, 10), plan(folder, 7), [source_of(folder)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "a2.md").write_text("abcdef"), r"a2\.md: has changed: 6 bytes, it had 3 since the run began"),
        (lambda root: os.utime(root / "a2.md", ns=(1, 1)), r"a2\.md: has changed: it was written again since the run began"),
        (lambda root: (root / "b/y.jsonl").unlink(), r"b/y\.jsonl: is gone since the run began; put it back, or begin a new run"),
        (lambda root: (root / "a3.txt").write_text("new"), r"a3\.txt: is new since the run began"),
    ],
)
def test_a_changed_file_is_named(folder: Path, change: Callable[[Path], object], message: str) -> None:
    before = plan(folder)
    change(folder)
    with pytest.raises(DataError, match=message):
        check_unchanged(before, plan(folder), [source_of(folder)])


def test_a_change_in_a_folder_document_is_noticed(tmp_path: Path) -> None:
    repository(tmp_path / "in/repo")
    before, (reader,) = plan(tmp_path / "in", document="folder"), task_readers(tmp_path / "in", document="folder")
    check_unchanged(before, plan(tmp_path / "in", document="folder"), [source_of(tmp_path / "in")])
    (tmp_path / "in/repo/b.py").rename(tmp_path / "in/repo/c.py")  # neither size nor time changes
    with pytest.raises(DataError, match="in/repo: has changed: it was written again since the run began"):
        check_unchanged(before, plan(tmp_path / "in", document="folder"), [source_of(tmp_path / "in")])
    with pytest.raises(DataError, match="in/repo: has changed"):
        list(reader)


# ------------------------------------------------------------------ a folder is a document
def repository(root: Path) -> None:
    """Text with and without a last newline, in subfolders; binary, hidden and linked files besides."""
    (root / "a").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "a/z.c").write_bytes(b"\xef\xbb\xbfint z;\r\n")
    (root / "a.txt").write_text("no newline")
    (root / "b.py").write_text("b = 'ü'\n")
    (root / "empty.py").touch()
    (root / ".git/config").write_text("hidden")
    (root / ".hidden").write_text("hidden")
    (root / "image.png").write_bytes(b"\x89PNG\r\n")
    (root / "late.bin").write_bytes(b"x" * (1 << 20) + b"\0" + b"\xff")
    (root / "cut.txt").write_bytes("ü".encode()[:1])
    (root / "link.py").symlink_to(root / "b.py")
    (root / "loop").symlink_to(root)
    (root / "outside").symlink_to("/etc")


REPOSITORY = "a.txt\nno newline\na/z.c\nint z;\r\nb.py\nb = 'ü'\nempty.py\n"


def test_a_folder_is_one_document(tmp_path: Path) -> None:
    root = tmp_path / "in"
    repository(root / "one")
    repository(root / "two")
    (root / "three").mkdir()
    (root / "three/only.bin").write_bytes(b"\0")
    (root / "void").mkdir()
    (root / ".hidden").mkdir()
    (root / "linked").symlink_to(root / "one")
    (root / "loose.txt").write_text("not in a folder")
    for range_bytes in (WHOLE, 1):
        readers = task_readers(root, range_bytes=range_bytes, document="folder")
        assert len(readers) == (1 if range_bytes == WHOLE else 4)
        found = [item for reader in readers for item in reader]
        assert [(d.id, d.parts[0].text, str(d.place)) for d in found] == [
            (name, REPOSITORY, str(root / name)) for name in ("one", "two")
        ]
        assert sum(reader.binary for reader in readers) == 7
        assert sum(reader.ignored for reader in readers) == 3 + 2 * 5
        assert sum(reader.empty for reader in readers) == 2


def test_letters_that_lie_across_blocks_are_whole(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/a.txt").write_text("é" * 600_000, encoding="utf-8")
    (tmp_path / "repo/b.txt").write_text("x" + "é" * 600_000, encoding="utf-8")
    ((_, text),) = texts(tmp_path, document="folder")
    assert text == "a.txt\n" + "é" * 600_000 + "\nb.txt\nx" + "é" * 600_000 + "\n"


def test_a_source_of_folders_without_any_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no folder in this one, and 1 other entries; `document: folder` reads each folder"):
        plan(tmp_path, document="folder")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="1 empty folders in this one, and 1 other entries"):
        plan(tmp_path, document="folder")
    with pytest.raises(DataError, match=r"a\.txt: not a folder"):
        plan(tmp_path / "a.txt", document="folder")


# ------------------------------------------------------------------ what cannot be read
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name}: empty file; remove it or fill it"):
        plan(tmp_path / name)


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no \.jsonl, \.jsonl\.gz, \.jsonl\.zst, \.parquet, \.txt, \.md file in this folder, it is empty"
    ):
        plan(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.json.gz").touch()
    with pytest.raises(DataError, match="in this folder, only 2 others"):
        plan(tmp_path)
    with pytest.raises(DataError, match=r"a\.csv: unknown suffix '\.csv'; expected \.jsonl, \.jsonl\.gz"):
        plan(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"b\.json\.gz: unknown suffix '\.json\.gz'"):
        plan(tmp_path / "b.json.gz")
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; check the source's path"):
        plan(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match="every file is empty"):
        plan(tmp_path)


def test_a_device_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: not a folder"):
        plan(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="in this folder, only 1 others"):
        plan(tmp_path)


@contextmanager
def nobody() -> Iterator[None]:
    """Root may read everything: give that up for a moment."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_what_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        root = Path(folder, "in")
        (root / "sub").mkdir(parents=True)
        (root / "a.txt").write_text("x")
        (root / "b.jsonl").write_text('{"text": "x"}')
        for name in ("a.txt", "b.jsonl"):
            (root / name).chmod(0)
            with nobody(), pytest.raises(DataError, match=rf"in/{name}: cannot be read \(Permission denied\)"):
                items(root)
            (root / name).chmod(0o644)
        (root / "sub").chmod(0)
        with nobody(), pytest.raises(DataError, match=r"in/sub: cannot be read \(Permission denied\)"):
            plan(root)
        with nobody(), pytest.raises(DataError, match=r"in/sub/a\.txt: cannot be read \(Permission denied\)"):
            plan(root / "sub/a.txt")
        (root / "sub").chmod(0o755)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.txt", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(DataError, match=r"udcff\.txt': the name of this file is not UTF-8; rename it"):
        plan(tmp_path)


def test_fields_that_do_not_go_together_are_refused(folder: Path) -> None:
    for fields in ({"text_field": "id"}, {"text_field": "segments"}, {"id_field": "segments"}):
        with pytest.raises(ConfigError, match=r"source 'source': text_field .* must be two names other than 'segments'"):
            plan(folder, **fields)
    with pytest.raises(ConfigError, match="must be two names other than 'messages'"):
        plan(folder, chats=True, id_field="messages")
    with pytest.raises(ConfigError, match="chats are records, a folder is a document"):
        plan(folder, chats=True, document="folder")
    with pytest.raises(ConfigError, match="range_bytes is 0, expected 1 or more"):
        plan(folder, 0)


def test_chats_do_not_come_from_text_files(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a1\.txt: chats are read from \.jsonl and \.parquet files only"):
        plan(folder, chats=True)
