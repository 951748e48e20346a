"""Files as the converters use them: read exactly, written exactly, and every failure as one line that names the file."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mcore_longctx.errors import CheckpointError, ConfigError, StorageError
from mcore_longctx.manifest import readable_bytes

__all__ = ["OpenFiles", "check_free_space", "free_bytes", "io_errors", "read_into", "refuse_nested", "storage_error", "write_all"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_VIEWS = 1024  # IOV_MAX of Linux
_MAX_OPEN = 64  # of the 1,024 that a process may have at least


@contextmanager
def io_errors() -> Iterator[None]:
    """Turn an OSError into one line that names the file: StorageError where a disk is full, else CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise storage_error(error, error.filename) from error
        raise CheckpointError(error.strerror or str(error), where=error.filename) from error


def storage_error(error: OSError, where: object) -> StorageError:
    """Disk full or a device that failed while `where` was written."""
    fix = "make room and run the same command again; it goes on" if error.errno in _NO_ROOM else "run it again to go on"
    return StorageError(f"cannot be written ({error.strerror or error})", where=where, fix=fix)


def free_bytes(out: Path) -> int:
    """What is left for us on the file system that `out`, which need not exist, is or will be on."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize


def check_free_space(folder: Path, needed: int, out: Path) -> None:
    """Raise StorageError unless the file system of `folder` has `needed` bytes left for us."""
    free = free_bytes(folder)
    if needed > free:
        raise StorageError(
            f"needs {readable_bytes(needed)}, {readable_bytes(free)} are free on its file system",
            where=out,
            fix="free some space",
        )


def refuse_nested(out: Path, source: Path) -> None:
    """Raise ConfigError where the output would lie in its source, or around it."""
    ours, theirs = out.resolve(), source.resolve()
    if ours != theirs and ours.is_relative_to(theirs):
        raise ConfigError(f"lies inside the source {source}", where=out, fix="choose a folder beside it")
    if ours != theirs and theirs.is_relative_to(ours):
        raise ConfigError(f"the source {source} lies inside it", where=out, fix="choose a folder beside it")


class OpenFiles:
    """Descriptors by path, opened when they are first asked for; those that were not used for longest are closed again."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """An open descriptor of `path`. Raises CheckpointError where it cannot be opened."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        try:
            opened = self._open[path] = os.open(path, self._flags)
        except OSError as error:
            raise CheckpointError(f"cannot be opened ({error.strerror})", where=path) from None
        return opened

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            os.close(self._open.popitem()[1])


def read_into(descriptor: int, views: Sequence[memoryview], offset: int, path: Path) -> None:
    """Fill `views`, one after the other, with the bytes of a file from `offset` on.

    Raises:
        CheckpointError: the file ends before they are full, or cannot be read.
    """
    first, part = 0, views[0] if views else memoryview(b"")
    while first < len(views):
        try:
            count = os.preadv(descriptor, [part, *views[first + 1 : first + _MAX_VIEWS]], offset)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", where=path) from None
        if not count and any(views[first:]):
            raise CheckpointError("ended while it was read; it changed or is damaged", where=path)
        offset += count
        while first < len(views) and count >= len(part):
            count -= len(part)
            first += 1
            part = views[first] if first < len(views) else part
        part = part[count:] if first < len(views) else part


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int, path: Path) -> None:
    """Write `data` at `offset`. Raises StorageError where that fails."""
    view = memoryview(data).cast("B")
    while view:
        try:
            count = os.pwrite(descriptor, view, offset)
        except OSError as error:
            raise storage_error(error, path) from None
        view, offset = view[count:], offset + count
