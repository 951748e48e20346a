"""Input and output errors as one line, and the space that a conversion needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore_longctx.errors import CheckpointError

__all__ = ["check_free_space", "io_errors"]


@contextmanager
def io_errors() -> Iterator[None]:
    """Turn an OSError (disk full, no permission, a file that vanished) into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), where=error.filename) from error


def check_free_space(folder: Path, needed: int, out: Path) -> None:
    """Raise CheckpointError unless the file system of `folder` has `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"needs {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free on its file system",
            where=os.fspath(out),
            fix="free some space",
        )
