"""Input and output errors as one line, and the space that a conversion needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore_longctx.errors import CheckpointError
from mcore_longctx.manifest import readable_bytes

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
            f"needs {readable_bytes(needed)}, {readable_bytes(free)} are free on its file system",
            where=os.fspath(out),
            fix="free some space",
        )
