"""What there is to read, cut into tasks: ranges of large files, groups of small ones.

    .jsonl                    byte ranges
    .jsonl.gz, .jsonl.zst     a file a task
    .parquet                  ranges of row groups
    .txt, .md                 one file is one document; several files a task
    folders                   with `document: folder` each folder of the source is one document; several folders a task

The tasks in their order give the documents in the order of the sources, their sorted file names, and the lines in them; how large the
ranges are does not change that. Each task knows size and time of its files, so that a change between two starts is noticed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from mcore_longctx.data.documents.parquet import row_group_ranges
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.schema import DocumentSource

__all__ = [
    "InputFile",
    "InputTask",
    "changed_error",
    "check_unchanged",
    "folder_files",
    "input_path",
    "plan_inputs",
    "stat_input",
]

Kind = Literal["jsonl", "gzip", "zstd", "parquet", "text", "folder"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
_SUFFIXES = ", ".join(_KINDS)


@dataclass(frozen=True)
class InputFile:
    """A file of a source, or a folder that is one document."""

    name: str  # path inside the source
    size: int  # bytes; of a folder: of all its files
    mtime_ns: int  # of a folder: of its latest file
    listing: str = ""  # of a folder: hash of the names, sizes and times of its files


@dataclass(frozen=True)
class InputTask:
    """What one task reads. start and stop are bytes (jsonl) or row groups (parquet); other kinds are read whole."""

    source: int
    kind: Kind
    files: tuple[InputFile, ...]
    size: int  # bytes that it reads
    start: int = 0
    stop: int = 0
    ignored: int = 0  # files and folders of the source that no task reads; its first task has them all

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`, also after JSON made lists of its tuples."""
        return cls(**{**row, "files": tuple(InputFile(**file) for file in row["files"])})


def plan_inputs(sources: Sequence[DocumentSource], *, range_bytes: int, chats: bool) -> list[InputTask]:
    """The tasks of all sources, in the order of their documents.

    Args:
        sources: read in this order.
        range_bytes: about how much a task reads. A file that cannot be read from its middle is one task, however large.
        chats: the sources hold chats.

    Raises:
        DataError: a path does not exist, cannot be read, or holds nothing that can be read.
        ConfigError: fields of a source that do not go together.
    """
    if range_bytes < 1:
        raise ConfigError(f"range_bytes is {range_bytes}, expected 1 or more")
    return [task for index, source in enumerate(sources) for task in _source_tasks(index, source, range_bytes, chats)]


def check_unchanged(before: Sequence[InputTask], now: Sequence[InputTask], sources: Sequence[DocumentSource]) -> None:
    """Compare the files of two plans of the same sources, whatever their ranges.

    Raises:
        DataError: a file has changed, is new or is gone; the first of them is named.
    """
    then, today = _by_name(before), _by_name(now)
    for source, name in sorted(then.keys() | today.keys()):
        old, new = then.get((source, name)), today.get((source, name))
        if old != new:
            raise changed_error(sources[source], name, old, new)


def input_path(source: DocumentSource, name: str) -> Path:
    """Path of an input file of a source. A source that is a file has one name, its own."""
    return _join(source.path, name)


def stat_input(path: Path, name: str, source: DocumentSource, planned: InputFile | None = None) -> InputFile:
    """A file as it is now.

    Raises:
        DataError: it cannot be read, is no regular file, its name is not UTF-8, or it is not as planned.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError("not a regular file", where=path)
    _check_name(path, name)
    file = InputFile(name, found.st_size, found.st_mtime_ns)
    if planned is not None and file != planned:
        raise changed_error(source, name, planned, file)
    return file


def folder_files(folder: Path) -> tuple[InputFile, list[str], int]:
    """A folder that is one document: what is known of it, the names of its files in their order, and how many others there are.

    Hidden files and folders and all links are left out: a link leads outside, repeats a file or goes in circles.

    Raises:
        DataError: a folder cannot be read.
    """
    names, ignored = _walk(folder, follow_files=False)
    size, latest, digest = 0, 0, hashlib.blake2b(digest_size=16)
    for name in names:
        file = _stat_link(folder / name)
        size, latest = size + file.st_size, max(latest, file.st_mtime_ns)
        digest.update(f"{name}\0{file.st_size}\0{file.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return InputFile(folder.name, size, latest, digest.hexdigest()), names, ignored


def changed_error(source: DocumentSource, name: str, old: InputFile | None, new: InputFile | None) -> DataError:
    """What to say of a file that is not as planned."""
    if old is None or new is None:
        what = "is new" if old is None else "is gone"
    elif old.size != new.size:
        what = f"has changed: {new.size:,} bytes, it had {old.size:,}"
    else:
        what = "has changed: it was written again"
    return DataError(f"{what} since the run began", where=input_path(source, name), fix="put it back, or begin a new run")


def _source_tasks(index: int, source: DocumentSource, range_bytes: int, chats: bool) -> list[InputTask]:
    reserved = "messages" if chats else "segments"
    if source.id_field == reserved or (not chats and source.text_field in (source.id_field, reserved)):
        raise ConfigError(
            f"text_field {source.text_field!r} and id_field {source.id_field!r} must be two names other than {reserved!r}",
            where=f"source {source.name!r}",
        )
    if source.document == "folder":
        if chats:
            raise ConfigError("chats are records, a folder is a document", where=f"source {source.name!r}")
        tasks, ignored = _folder_tasks(index, source, range_bytes)
    else:
        tasks, ignored = _record_tasks(index, source, range_bytes, chats)
    first = asdict(tasks[0]) | {"ignored": ignored}
    return [InputTask.from_dict(first), *tasks[1:]]


def _record_tasks(index: int, source: DocumentSource, range_bytes: int, chats: bool) -> tuple[list[InputTask], int]:
    path = source.path
    names, ignored = _record_names(path)
    tasks: list[InputTask] = []
    texts: list[InputFile] = []
    for name in names:
        kind, whole = _kind_of(name), _join(path, name)
        assert kind is not None
        file = stat_input(whole, name, source)
        if chats and kind == "text":
            raise DataError(
                "chats are read from .jsonl and .parquet files only", where=whole, fix='one {"messages": [...]} a line'
            )
        if not file.size and (kind != "text" or len(names) == 1):
            raise DataError("empty file", where=whole, fix="remove it or fill it")
        if kind == "text":
            texts.append(file)
            continue
        tasks += _groups(index, "text", texts, range_bytes)
        texts = []
        if kind == "parquet":
            groups = row_group_ranges(whole, range_bytes)
            if not groups:
                raise DataError("holds no row", where=whole, fix="remove the file or fill it")
            tasks += [InputTask(index, kind, (file,), size, start, stop) for start, stop, size in groups]
        elif kind == "jsonl":
            starts = range(0, file.size, range_bytes)
            ranges = [(start, min(start + range_bytes, file.size)) for start in starts]
            tasks += [InputTask(index, kind, (file,), stop - start, start, stop) for start, stop in ranges]
        else:
            tasks.append(InputTask(index, kind, (file,), file.size))
    tasks += _groups(index, "text", texts, range_bytes)
    if not any(task.size for task in tasks):
        raise DataError("every file is empty", where=path)
    return tasks, ignored


def _record_names(path: Path) -> tuple[list[str], int]:
    """Names of the files that can be read, sorted, and how many entries there are besides."""
    if stat.S_ISREG(_mode(path)):
        if _kind_of(path.name) is None:
            suffix = "".join(path.suffixes[-2:] if path.suffix in (".gz", ".zst") else path.suffixes[-1:])
            raise DataError(f"unknown suffix {suffix!r}", where=path, fix=f"expected {_SUFFIXES}")
        return [path.name], 0
    _check_folder(path)
    every, ignored = _walk(path, follow_files=True)
    names = [name for name in every if _kind_of(name) is not None]
    ignored += len(every) - len(names)
    if not names:
        found = f"only {ignored:,} others" if ignored else "it is empty"
        raise DataError(f"no {_SUFFIXES} file in this folder, {found}", where=path)
    return names, ignored


def _folder_tasks(index: int, source: DocumentSource, range_bytes: int) -> tuple[list[InputTask], int]:
    _check_folder(source.path)
    folders, ignored = [], 0
    for entry in _entries(source.path):
        if entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir(follow_symlinks=False):
            ignored += 1
            continue
        _check_name(Path(entry.path), entry.name)
        file, _, _ = folder_files(Path(entry.path))
        folders.append(file)
    if not any(folder.size for folder in folders):
        found = f"{len(folders):,} empty folders" if folders else "no folder"
        raise DataError(
            f"{found} in this one, and {ignored:,} other entries; `document: folder` reads each folder directly below as one document",
            where=source.path,
        )
    return _groups(index, "folder", sorted(folders, key=lambda folder: folder.name), range_bytes), ignored


def _groups(index: int, kind: Kind, files: Iterable[InputFile], range_bytes: int) -> list[InputTask]:
    """Neighbours together, up to the file with which they reach `range_bytes`."""
    tasks: list[InputTask] = []
    group: list[InputFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.size
        if size >= range_bytes:
            tasks.append(InputTask(index, kind, tuple(group), size))
            group, size = [], 0
    if group:
        tasks.append(InputTask(index, kind, tuple(group), size))
    return tasks


def _walk(root: Path, *, follow_files: bool) -> tuple[list[str], int]:
    """Names of all files below a folder, sorted, and how many entries are left out: hidden ones, links to folders, devices.

    Args:
        root: the folder.
        follow_files: take links to files too (a Hugging Face cache is made of them); one that leads nowhere is an error later.
    """
    names, ignored, open_folders = [], 0, [""]
    while open_folders:
        inside = open_folders.pop()
        for entry in _entries(root / inside):
            name = f"{inside}{entry.name}"
            if entry.name.startswith("."):
                ignored += 1
            elif entry.is_symlink():
                take = follow_files and not entry.is_dir()
                names += [name] * take
                ignored += not take
            elif entry.is_dir():
                open_folders.append(f"{name}/")
            elif entry.is_file():
                names.append(name)
            else:
                ignored += 1
    return sorted(names), ignored


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=folder) from None


def _stat_link(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None


def _kind_of(name: str) -> Kind | None:
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)


def _join(root: Path, name: str) -> Path:
    return root if os.path.isfile(root) else root / name  # noqa: PTH113 - Path.is_file may raise


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("no such file or folder", where=path, fix="check the source's path") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None


def _check_folder(path: Path) -> None:
    if not stat.S_ISDIR(_mode(path)):
        raise DataError("not a folder", where=path, fix="check the source's path")


def _check_name(path: Path, name: str) -> None:
    if name.isascii():
        return
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError("the name of this file is not UTF-8", where=ascii(str(path)), fix="rename it") from None


def _by_name(tasks: Sequence[InputTask]) -> dict[tuple[int, str], InputFile]:
    return {(task.source, file.name): file for task in tasks for file in task.files}
