"""Rebuild the corpus of the data benchmarks from Debian 12 packages: 22,429 documents, 325 MB of text, 101 million tokens of Llama 3.

    apt-get update; python tools/corpus.py OUT            # 0.3 GB to download, 0.6 GB in OUT, a minute

  books.jsonl    a FAQ of 1.3 million words (each chapter, and the whole as one document), dictionaries of computing
  docs.jsonl     handbooks: Linux, Python, SymPy, Dask, git, Perl, vim, zsh
  gocode.jsonl   sources of Go, a file a document
  man.jsonl      manual pages in seven languages
  repos.jsonl    sources of Linux, a directory a document: documents of up to 2.5 million tokens

Nothing is installed: the packages are kept in OUT/debs and read as archives. One {"id", "text"} a line, sorted by id, so the five
files are a function of the versions of the packages, which OUT/MANIFEST.json names with the SHA-256 of everything. Started again, it
goes on with the packages that are there; a corpus that is whole is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mcore_longctx.errors import DataError, LongctxError


@dataclass(frozen=True)
class Rule:
    """Which files of a package belong to a source.

    `pattern` is searched in a file's path. `unit` says what one document is: "file", "directory" (all matching files of one
    directory) or "package" (all matching files).
    """

    package: str
    pattern: str
    unit: str = "file"


MAN_PAGES = (
    "manpages",
    "manpages-dev",
    "manpages-de",
    "manpages-fr",
    "manpages-ja",
    "manpages-ru",
    "manpages-zh",
    "erlang-manpages",
)

SOURCES: dict[str, tuple[Rule, ...]] = {
    "books": (
        Rule("dict-gcide", r"\.dict\.dz$"),  # not UTF-8: left out and counted
        Rule("dict-foldoc", r"\.dict\.dz$"),
        Rule("dict-jargon", r"\.dict\.dz$"),
        Rule("dict-devil", r"\.dict\.dz$"),
        Rule("anarchism", r"\.md\.gz$"),
        Rule("anarchism", r"\.md\.gz$", "package"),
    ),
    "docs": (
        Rule("python3.11-doc", r"\.rst\.txt$"),
        Rule("python-sympy-doc", r"\.rst\.txt$"),
        Rule("python-dask-doc", r"\.rst\.txt$"),
        Rule("git-doc", r"\.(txt|adoc)(\.gz)?$"),
        Rule("perl-doc", r"\.pod$"),
        Rule("vim-runtime", r"/doc/.*\.txt$"),
        Rule("debian-policy", r"\.rst\.txt$"),
        Rule("zsh-doc", r"\.txt(\.gz)?$"),
        Rule("linux-source-6.1", r"^[^/]+/Documentation/.*\.(rst|txt)$"),
    ),
    "man": tuple(Rule(package, r"/man/.*\.gz$") for package in MAN_PAGES),
    "gocode": (Rule("golang-1.19-src", r"\.go$"),),
    "repos": (
        Rule(
            "linux-source-6.1",
            r"^[^/]+/(fs|net|mm|kernel|lib|block|crypto|ipc|security|virt|init)/.*\.(c|h|S|py|sh)$",
            "directory",
        ),
    ),
}
INNER_ARCHIVE = re.compile(r"linux-source-[\d.]+\.tar\.xz$")  # the package holds one archive, and that the sources
MANIFEST, PACKAGES, ASIDE = "MANIFEST.json", "debs", ".partial"


def build(out: Path, sources: dict[str, tuple[Rule, ...]] = SOURCES) -> dict[str, Any]:
    """Make the corpus in `out` and return its manifest.

    Raises:
        DataError: `out` holds other files, apt-get or dpkg-deb is missing or fails, or a package is damaged.
    """
    refuse_foreign_files(out, sources)
    found = finished(out)
    if found is not None:
        return found
    need("dpkg-deb")
    (out / PACKAGES).mkdir(parents=True, exist_ok=True)
    packages = fetch(out / PACKAGES, sorted({rule.package for rules in sources.values() for rule in rules}))
    manifest = {"packages": {name: describe(path) for name, path in packages.items()}, **write_sources(out, sources, packages)}
    write_aside(out / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def refuse_foreign_files(out: Path, sources: dict[str, tuple[Rule, ...]]) -> None:
    """Raise DataError unless everything in `out` has a name that this script gives."""
    ours = {PACKAGES} | {name + end for name in (MANIFEST, *(f"{source}.jsonl" for source in sources)) for end in ("", ASIDE)}
    if out.exists() and not out.is_dir():
        raise DataError("not a folder", where=out)
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in ours) if out.exists() else []
    if foreign:
        raise DataError(f"holds {foreign[0]!r}, which is no file of the corpus", where=out, fix="name a new or empty folder")


def finished(out: Path) -> dict[str, Any] | None:
    """The manifest, if every file that it names is there and has its SHA-256."""
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        named = {f"{source}.jsonl": str(facts["sha256"]) for source, facts in manifest["sources"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError("not a manifest of this script", where=path, fix="remove it and run again") from None
    for name, expected in named.items():
        if not (out / name).is_file() or sha256(out / name) != expected:
            raise DataError("missing, or not the file that the manifest describes", where=out / name, fix=f"remove {path}")
    return manifest


# ------------------------------------------------------------------------------------------------------------------ packages


def need(program: str) -> None:
    """Raise DataError unless `program` can be run."""
    if shutil.which(program) is None:
        raise DataError(f"{program} is not there: the corpus is made of Debian packages", fix="run this on Debian 12")


def fetch(folder: Path, packages: list[str]) -> dict[str, Path]:
    """The package files of `folder`, after downloading those that are missing: name -> path."""
    missing = [package for package in packages if package_file(folder, package) is None]
    if missing:
        download(folder, missing)
    found = {package: package_file(folder, package) for package in packages}
    absent = [package for package, path in found.items() if path is None]
    if absent:
        raise DataError(f"apt-get brought no {', '.join(absent)}", where=folder)
    return {package: path for package, path in found.items() if path is not None}


def package_file(folder: Path, package: str) -> Path | None:
    """PACKAGE_VERSION_ARCHITECTURE.deb of `folder`."""
    found = sorted(folder.glob(f"{package}_*.deb"))
    if len(found) > 1:
        raise DataError(f"{found[0].name} and {found[1].name}: two versions", where=folder, fix="remove one")
    return found[0] if found else None


def download(folder: Path, packages: list[str]) -> None:
    """`apt-get download` into a folder aside, then rename: what lies in `folder` is whole (apt-get compares the checksums)."""
    need("apt-get")
    aside = folder / f"download{ASIDE}"
    aside.mkdir(exist_ok=True)
    ran = subprocess.run(["apt-get", "download", *packages], cwd=aside, capture_output=True, text=True, check=False)
    if ran.returncode:
        told = (
            [line for line in ran.stderr.splitlines() if line.startswith("E:")] or ran.stderr.split("\n")[-2:] or ["no message"]
        )
        raise DataError(
            f"`apt-get download` failed ({told[0].strip()})",
            fix="needs the network, `apt-get update`, and Debian 12 for these packages",
        )
    for path in aside.glob("*.deb"):
        path.rename(folder / path.name)
    aside.rmdir()


def describe(path: Path) -> dict[str, str]:
    """Name, version and checksum of a package."""
    return {"file": path.name, "version": path.name.split("_")[1].replace("%3a", ":"), "sha256": sha256(path)}


def package_files(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of the regular files in a package whose path matches, also in the archive that it may hold.

    Raises:
        DataError: the package is damaged.
    """
    # to a pipe: nothing is unpacked on disk, and one file at a time is in memory
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            yield from _archive_files(process.stdout, wanted)
            while process.stdout.read(1 << 20):  # padding behind the archive: dpkg-deb must end by itself
                pass
            if process.wait():
                raise DataError(f"dpkg-deb ended with exit code {process.returncode}", where=path, fix="remove it and run again")
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"damaged ({error})", where=path, fix="remove it and run again") from None
        finally:
            process.kill()


def _archive_files(stream: IO[bytes], wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile():
                continue
            if INNER_ARCHIVE.search(member.name):
                with lzma.open(_member(archive, member)) as unpacked:
                    yield from _archive_files(unpacked, wanted)  # type: ignore[arg-type]
            elif wanted.search(member.name):
                packed = _member(archive, member).read()
                yield member.name, gzip.decompress(packed) if member.name.endswith((".gz", ".dz")) else packed


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None  # a regular file
    return stream


# ------------------------------------------------------------------------------------------------------------------ documents


def write_sources(out: Path, sources: dict[str, tuple[Rule, ...]], packages: dict[str, Path]) -> dict[str, Any]:
    """Write the five files, each aside, and rename them at the end. Returns counts and checksums.

    Memory: the text of one package.
    """
    paths = {source: out / f"{source}.jsonl" for source in sources}
    counts = {source: {"documents": 0, "text_bytes": 0} for source in sources}
    not_utf8 = dict.fromkeys(sources, 0)
    with contextlib.ExitStack() as stack:
        files = {source: stack.enter_context(_aside(path).open("wb")) for source, path in paths.items()}
        # an id is PACKAGE:PATH. In this order of the packages all lines of a source are sorted by id
        for package in sorted(packages, key=lambda name: f"{name}:"):
            print(f"  {package}", file=sys.stderr, flush=True)
            for source, documents in read_package(packages[package], package, sources, not_utf8).items():
                for name, text in sorted(documents.items()):
                    line = json.dumps({"id": name, "text": text}, ensure_ascii=False)
                    files[source].write(line.encode() + b"\n")
                    counts[source]["documents"] += 1
                    counts[source]["text_bytes"] += len(text.encode())
    for path in paths.values():
        _aside(path).replace(path)
    facts = {source: {**counts[source], "sha256": sha256(path)} for source, path in paths.items()}
    return {"not_utf8": not_utf8, "sources": facts}


def read_package(
    path: Path, package: str, sources: dict[str, tuple[Rule, ...]], not_utf8: dict[str, int]
) -> dict[str, dict[str, str]]:
    """Documents of one package: source -> id -> text. Files that are not UTF-8 are counted for the first source that wants them."""
    rules = [
        (source, rule, re.compile(rule.pattern)) for source, all_ in sources.items() for rule in all_ if rule.package == package
    ]
    any_of_them = re.compile("|".join(f"(?:{rule.pattern})" for _, rule, _ in rules))
    parts: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, data in package_files(path, any_of_them):
        hits = [(source, rule.unit) for source, rule, pattern in rules if pattern.search(name)]
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            not_utf8[hits[0][0]] += 1
            continue
        if text.strip():
            for source, unit in hits:
                key = {"file": name, "directory": str(PurePosixPath(name).parent), "package": "*"}[unit]
                parts[source, unit, key].append((name, text))
    documents: dict[str, dict[str, str]] = defaultdict(dict)
    for (source, unit, key), files in parts.items():
        joined = (f"// {name}\n{text}" for name, text in sorted(files))
        documents[source][f"{package}:{key}"] = files[0][1] if unit == "file" else "\n".join(joined)
    return documents


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_aside(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    _aside(path).write_bytes(content)
    _aside(path).replace(path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ASIDE)


def main() -> int:
    """Build, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    try:
        manifest = build(parser.parse_args().out)
    except LongctxError as error:
        print(f"corpus: {error}", file=sys.stderr)
        return error.exit_code
    for source, facts in manifest["sources"].items():
        print(f"{source:8} {facts['documents']:7,} documents {facts['text_bytes'] / 1e6:8.1f} MB  {facts['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
