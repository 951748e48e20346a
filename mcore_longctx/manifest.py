"""Folders that appear whole or not at all, and the manifest that proves them.

A folder is written as `NAME.partial-<host>-<pid>`, gets a `manifest.json` (sha256 and size of every file, the versions that
wrote it) as its last file, is fsynced and renamed. Checkpoint formats do not notice a flipped bit; the manifest does. It notices
its own too: its last key is the sha256 of all that stands before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from mcore_longctx.errors import CheckpointError, ConfigError, LongctxError
from mcore_longctx.reading import parse_json, read_bounded

__all__ = [
    "MANIFEST",
    "fsync_folder",
    "fsync_tree",
    "is_alive",
    "partial_path",
    "read_manifest",
    "read_sealed",
    "readable_bytes",
    "refusals_as",
    "sha256_file",
    "staged_folder",
    "verify_manifest",
    "versions",
    "write_atomic",
    "write_manifest",
    "write_sealed",
]

MANIFEST = "manifest.json"
_MAX_BYTES = 100_000_000  # 500,000 files
_HASHED_AT_ONCE = 4  # files: one thread hashes about 1.5 GB a second, and a node has several ranks
_VERSIONED = ("mcore-longctx", "numpy", "torch", "megatron-core", "transformers", "tokenizers", "safetensors")


def readable_bytes(count: int) -> str:
    """A size for people, decimal units.

    >>> readable_bytes(16_100_000_000), readable_bytes(3_226_128), readable_bytes(950)
    ('16.1 GB', '3.2 MB', '950 bytes')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter for a result. Imports none of them."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def partial_path(path: Path) -> Path:
    """Where a file or folder is written before it gets its name. Says who writes it: `NAME.partial-HOST-PID`."""
    return path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")


@contextmanager
def refusals_as(error: type[LongctxError], path: Path, *, done: str = "written", fix: str = "") -> Iterator[None]:
    """What the system refuses while `path` is written or read, as one line: `path: cannot be written (No space left on device); fix`."""
    try:
        yield
    except OSError as refusal:
        raise error(f"cannot be {done} ({refusal.strerror})", where=path, fix=fix) from None


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    aside = partial_path(path)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `final` when the block ends without an exception.

    Raises ConfigError if `final` exists. On an exception the folder is removed; after a kill it stays as
    `NAME.partial-<host>-<pid>`, which no reader accepts, and the next call removes it.
    """
    final = final.absolute()
    if final.exists():
        raise ConfigError("output folder is already there", where=final, fix="choose another name or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final)
    partial = partial_path(final)
    partial.mkdir()
    try:
        yield partial
        fsync_tree(partial)
        if final.exists():
            raise ConfigError("output folder appeared while it was being written", where=final)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(final.parent)


def write_manifest(
    folder: Path,
    kind: str,
    *,
    files: Iterable[str] | None = None,
    sha256: Mapping[str, str] | None = None,
    sizes_only: Iterable[str] = (),
    **facts: Any,
) -> None:
    """Write `folder/manifest.json` over the files that are there. Call it last.

    Args:
        folder: the finished folder.
        kind: what the folder is: `checkpoint`, `data`, `export`, ...
        files: names of the files it is to list, relative to `folder`. None: every file in it.
        sha256: hashes that are known because they were taken while writing, hexadecimal, by name. The others are read.
        sizes_only: names of files of which only the size is listed: hashing large weights costs more than copying them.
        **facts: anything JSON that a reader should find (counts, seeds, hashes of inputs).
    """
    if files is None:
        everything = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        files = [path.relative_to(folder).as_posix() for path in everything]
    known, unhashed = sha256 or {}, set(sizes_only)
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(files, key=Path):
        rows[name] = {"bytes": (folder / name).stat().st_size}
        if name not in unhashed:
            rows[name]["sha256"] = known.get(name) or sha256_file(folder / name)
    text = json.dumps({"format": 1, "kind": kind, "versions": versions(), **facts, "files": rows}, indent=1)
    write_atomic(folder / MANIFEST, _sealed(text))


def read_manifest(folder: Path, *kinds: str) -> Mapping[str, Any]:
    """Read `folder/manifest.json`, whole and unchanged since it was written. The files it lists are not looked at.

    Raises:
        CheckpointError: no manifest, one that is damaged or no regular file, or of a kind not in `kinds`.
    """
    path, kind = folder / MANIFEST, " or ".join(kinds)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError(f"no {kind} here", where=folder, fix="check the path")
    try:
        raw = read_bounded(path, _MAX_BYTES, f"a {MANIFEST}")
    except FileNotFoundError:
        raise CheckpointError(
            f"no {MANIFEST}: this {kind} was not finished, or not written by mcore-longctx", where=folder
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=path) from None
    damaged = CheckpointError(
        "damaged manifest (its checksum differs)", where=path, fix=f"restore this {kind} from a copy, or make it again"
    )
    try:
        text = raw.decode()
        if _sealed(text[:-_SEAL_LENGTH] + _END) != text:
            raise damaged
        manifest = parse_json(raw, path)
        for row in manifest["files"].values():
            row["bytes"] = int(row["bytes"])
            row["sha256"] = str(row["sha256"]) if "sha256" in row else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise damaged from None
    if manifest.get("kind") not in kinds:
        raise CheckpointError(f"is a folder of kind {manifest.get('kind')!r}, expected {kind}", where=folder)
    return manifest


def verify_manifest(folder: Path, *kinds: str, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> Mapping[str, Any]:
    """Read `folder/manifest.json` and compare every file that it lists.

    Args:
        folder: a folder written by `staged_folder` and `write_manifest`.
        *kinds: the kinds that the caller takes.
        hashes: compare sha256 too, of the files that have one, several at a time; False compares names and sizes only.
        share: (i, n): look at every n-th file only, from the i-th on. n processes with one share each have seen all.

    Raises:
        CheckpointError: no manifest, a damaged one, another kind, or a file that is missing, of another size or of another hash.
    """
    manifest = read_manifest(folder, *kinds)
    restore = f"the {' or '.join(kinds)} is damaged, use another copy"
    mine = dict(islice(manifest["files"].items(), share[0], None, share[1]))
    for name, row in mine.items():
        file, size = folder / name, row["bytes"]
        if not file.is_file():
            raise CheckpointError("listed in the manifest but missing", where=file, fix=restore)
        if file.stat().st_size != size:
            raise CheckpointError(f"{file.stat().st_size:,} bytes, the manifest says {size:,}", where=file, fix=restore)
    listed = {name: row["sha256"] for name, row in mine.items() if hashes and row["sha256"] is not None}
    threads = ThreadPoolExecutor(_HASHED_AT_ONCE)  # hashlib lets go of Python's lock
    try:
        for name, found in zip(listed, threads.map(lambda name: sha256_file(folder / name), listed), strict=True):
            if found != listed[name]:
                raise CheckpointError("contents differ from the manifest's sha256", where=folder / name, fix=restore)
    finally:
        threads.shutdown(cancel_futures=True)
    return manifest


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum over itself, aside and renamed."""
    write_atomic(path, _sealed(json.dumps(facts, indent=1)))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        ValueError: a byte of it has changed, or it is no such file.
        OSError: it cannot be read.
    """
    text = path.read_bytes().decode()
    if _sealed(text[:-_SEAL_LENGTH] + _END) != text:
        raise ValueError("its checksum differs")
    facts: dict[str, Any] = json.loads(text)  # an object: the seal is its last key
    del facts["sha256"]
    return facts


_END = "\n}"  # how json.dumps ends an object with an indent


def _sealed(text: str) -> str:
    """`text`, a JSON object, with one more key: the sha256 of `text`. Every byte of the result is determined by `text`."""
    return f'{text.removesuffix(_END)},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


_SEAL_LENGTH = len(_sealed(_END))


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a file's own fsync does not do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make everything in `folder` last, its names too."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def _remove_leftovers(final: Path) -> None:
    """Remove what a killed process of this host left of the same output; a living one means: refuse."""
    prefix = f"{final.name}.partial-{socket.gethostname()}-"
    for path in final.parent.glob(f"{final.name}.partial-*"):
        pid = path.name.removeprefix(prefix)
        if not pid.isdigit() or not path.is_dir():
            continue
        if is_alive(int(pid)):
            raise ConfigError(f"process {pid} is writing this folder", where=final, fix="wait for it or stop it")
        shutil.rmtree(path)


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs. One that has ended and that nobody has asked about (a zombie) does not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # gone, or no number of a process
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # gone since, or no /proc
        return not Path("/proc/self").exists()
    return state != "Z"
