"""Small files of other people, read without surprises: regular files alone, of a bounded size, and JSON without its loopholes.

Opening a FIFO waits for whoever writes to it, perhaps for ever, and a device may have no end. So every reader of a checkpoint asks
here first. No numpy, no torch.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from mcore_longctx.errors import CheckpointError

__all__ = ["is_there", "parse_json", "read_bounded", "read_json_object", "regular_size"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_there(path: Path) -> bool:
    """Whether the name exists, be it that of a link that leads nowhere: that is to be named, not overlooked."""
    return os.path.lexists(path)


def regular_size(path: Path) -> int:
    """Size of a file in bytes, after following links; every reader calls it before it opens the file.

    Raises:
        CheckpointError: a folder, FIFO, socket or device, or a link that leads nowhere.
        OSError: there is no such file, or it may not be looked at.
    """
    try:
        state = path.stat()
    except OSError as error:
        if not path.is_symlink() or error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise
        what = "a link that leads to itself" if error.errno == errno.ELOOP else "a broken link"
        raise CheckpointError(
            f"{what}, to {str(path.readlink())[:200]}", where=path, fix="copy or download the file that it stands for"
        ) from None
    if not stat.S_ISREG(state.st_mode):
        kind = _KINDS.get(stat.S_IFMT(state.st_mode), "something else")
        raise CheckpointError(f"is {kind}, expected a file", where=path)
    return state.st_size


def read_bounded(path: Path, limit: int, kind: str) -> bytes:
    """A whole file of at most `limit` bytes. `kind` says in errors what it should be. Raises as `regular_size`."""
    size = regular_size(path)
    if size <= limit:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        size = max(size, len(data))  # it may grow
    if size > limit:
        raise CheckpointError(f"{size:,} bytes, too large for {kind}", where=path)
    return data


def read_json_object(path: Path, limit: int, kind: str) -> dict[str, Any]:
    """A JSON object from a file. Raises as `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path, limit, kind), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that `data` is.

    Raises:
        CheckpointError: not UTF-8 JSON, NaN or Infinity, a repeated key, nested too deeply, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(f"key {counts.most_common(1)[0][0][:80]!r} twice")
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError:
        raise CheckpointError("not UTF-8 text", where=path) from None
    except ValueError as error:
        raise CheckpointError(f"not valid JSON ({error})", where=path) from None
    except RecursionError:
        raise CheckpointError("not valid JSON (nested too deeply)", where=path) from None
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=path)
    return value
