"""The corpus of the benchmarks from packages made here: what becomes a document, restarts, and errors that say what to do.

A package is a tar archive here, `dpkg-deb` prints it, and `apt-get download` copies it: shell scripts in front of the PATH.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from mcore_longctx.errors import DataError

SCRIPT = Path(__file__).parents[2] / "tools" / "corpus.py"

APT_GET = """#!/bin/sh
[ "$1" = download ] || exit 9
shift
echo "$@" >> "$STORE/asked"
for package in "$@"; do
  [ -e "$STORE/offline" ] && { echo "W: something" >&2; echo "E: Failed to fetch $package" >&2; exit 100; }
  cp "$STORE/$package"_*.deb .
done
"""


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "corpus", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("./folder.md")  # no regular file
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store, programs = tmp_path / "store", tmp_path / "programs"
    store.mkdir()
    programs.mkdir()
    for name, text in {"apt-get": APT_GET, "dpkg-deb": '#!/bin/sh\n[ "$1" = --fsys-tarfile ] && exec cat "$2"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STORE", str(store))
    kernel = {
        "linux/fs/b.c": b"b\n",
        "linux/fs/a.c": b"a\n",
        "linux/fs/deep/c.c": b"c\n",
        "linux/fs/blank.c": b" \n",
        "linux/README.md": b"linux \xe2\x82\xac\n",
    }
    (store / "linux_6%3a1_all.deb").write_bytes(
        archive({"./usr/src/linux-source-6.1.tar.xz": lzma.compress(archive(kernel)), "./README.md": b"package"})
    )
    book = {"./book/2.md.gz": gzip.compress(b"two\n"), "./book/1.md.gz": gzip.compress(b"one\n"), "./latin.md": b"\xe9"}
    (store / "book_1_all.deb").write_bytes(archive(book))
    (store / "book-de_1_all.deb").write_bytes(archive({"./buch.md": "ü\n".encode()}))
    return store


@pytest.fixture
def sources(corpus: ModuleType) -> dict[str, object]:
    rule = corpus.Rule
    return {
        "text": (
            rule("book", r"\.md(\.gz)?$"),
            rule("book", r"\.md\.gz$", "package"),
            rule("book-de", r"\.md$"),
            rule("linux", r"\.md$"),
        ),
        "code": (rule("linux", r"/fs/.*\.c$", "directory"),),
    }


def documents(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    return {row["id"]: row["text"] for row in rows}


def test_files_packages_and_directories_become_documents(
    corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = corpus.build(out, sources)
    assert documents(out / "text.jsonl") == {
        "book-de:./buch.md": "ü\n",
        "book:*": "// ./book/1.md.gz\none\n\n// ./book/2.md.gz\ntwo\n",
        "book:./book/1.md.gz": "one\n",
        "book:./book/2.md.gz": "two\n",
        "linux:./README.md": "package",
        "linux:linux/README.md": "linux €\n",
    }
    assert documents(out / "code.jsonl") == {
        "linux:linux/fs": "// linux/fs/a.c\na\n\n// linux/fs/b.c\nb\n",
        "linux:linux/fs/deep": "// linux/fs/deep/c.c\nc\n",
    }
    assert manifest == json.loads((out / "MANIFEST.json").read_bytes())
    assert manifest["not_utf8"] == {"text": 1, "code": 0}
    package = {"file": "linux_6%3a1_all.deb", "version": "6:1"}
    assert manifest["packages"]["linux"] == {
        **package,
        "sha256": hashlib.sha256((store / package["file"]).read_bytes()).hexdigest(),
    }
    text = (out / "text.jsonl").read_bytes()
    assert manifest["sources"]["text"] == {
        "documents": 6,
        "text_bytes": sum(len(text.encode()) for text in documents(out / "text.jsonl").values()),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    assert sorted(path.name for path in out.iterdir()) == ["MANIFEST.json", "code.jsonl", "debs", "text.jsonl"]


def test_a_second_start_downloads_what_is_missing_and_leaves_a_whole_corpus_alone(
    corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = corpus.build(out, sources)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert corpus.build(out, sources) == whole
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # as after a kill: no manifest, a package short, half a file aside, half a download
    (out / "MANIFEST.json").unlink()
    (out / "debs" / "book_1_all.deb").unlink()
    (out / "text.jsonl").rename(out / "text.jsonl.partial")
    (out / "debs" / "download.partial").mkdir()
    (out / "debs" / "download.partial" / "book_1_all.deb").write_bytes(b"half")
    assert corpus.build(out, sources) == whole
    assert (store / "asked").read_text().splitlines() == ["book book-de linux", "book"]


def test_a_damaged_corpus_is_not_called_whole(
    corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    corpus.build(out, sources)
    data = (out / "code.jsonl").read_bytes()
    (out / "code.jsonl").write_bytes(data.replace(b"fs", b"sf", 1))
    with pytest.raises(DataError, match=r"code\.jsonl: missing, or not the file that the manifest describes; remove .*MANIFEST"):
        corpus.build(out, sources)
    (out / "MANIFEST.json").write_text("[]")
    with pytest.raises(DataError, match=r"MANIFEST\.json: not a manifest of this script"):
        corpus.build(out, sources)


def test_foreign_files_are_refused_before_anything_is_written(
    corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"out: holds 'thesis\.tex', which is no file of the corpus; name a new or empty folder"):
        corpus.build(out, sources)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match=r"thesis\.tex: not a folder"):
        corpus.build(out / "thesis.tex", sources)


def test_offline_says_what_apt_get_said(corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path) -> None:
    (store / "offline").touch()
    with pytest.raises(DataError, match=r"apt-get download. failed \(E: Failed to fetch book\); needs the network"):
        corpus.build(tmp_path / "out", sources)
    (store / "offline").unlink()
    assert corpus.build(tmp_path / "out", sources)["sources"]["code"]["documents"] == 2


@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb"])
def test_a_machine_without_the_programs_is_told_so(
    corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    programs = store.parent / "programs"
    (programs / program).unlink()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(DataError, match=f"^{program} is not there: the corpus is made of Debian packages; run this on Debian 12"):
        corpus.build(tmp_path / "out", sources)


def test_damaged_packages_are_named(corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path) -> None:
    package = store / "linux_6%3a1_all.deb"
    data = package.read_bytes()
    inner = data.index(b"\xfd7zXZ") + 40  # inside the archive in the archive
    damaged = {"cut": data[:inner], "empty": b"", "flipped": data[:inner] + b"\0\0\0\0" + data[inner + 4 :]}
    for name, content in damaged.items():
        package.write_bytes(content)
        with pytest.raises(DataError, match=r"linux_6%3a1_all\.deb: damaged .*; remove it and run again"):
            corpus.build(tmp_path / name, sources)
        assert not list((tmp_path / name).glob("*.jsonl"))
        assert not (tmp_path / name / "MANIFEST.json").exists()
    package.write_bytes(data)
    program = store.parent / "programs" / "dpkg-deb"
    program.write_text(program.read_text().replace("exec cat", "cat") + "exit 2\n")  # all of it, and then it says that it failed
    with pytest.raises(DataError, match=r"book-de_1_all\.deb: dpkg-deb ended with exit code 2; remove it and run again"):
        corpus.build(tmp_path / "told", sources)


def test_two_versions_of_a_package_are_refused(
    corpus: ModuleType, store: Path, sources: dict[str, object], tmp_path: Path
) -> None:
    debs = tmp_path / "out" / "debs"
    debs.mkdir(parents=True)
    for version in ("1", "2"):
        (debs / f"book_{version}_all.deb").write_bytes(b"")
    with pytest.raises(DataError, match=r"book_1_all\.deb and book_2_all\.deb: two versions; remove one"):
        corpus.build(tmp_path / "out", sources)
