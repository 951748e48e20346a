"""JSON lines that survive a kill: one line per sample as soon as it is known, and going on from what is there."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from mcore_longctx.errors import ConfigError, LongctxError, StorageError
from mcore_longctx.manifest import refusals_as

__all__ = ["RowFile", "on_first_rank"]

Result = TypeVar("Result")


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 alone and give its result to all ranks. All ranks must call it.

    Raises:
        LongctxError: what `action` raised, on every rank, so that none waits for another.
        StorageError: the same of a file that `action` could not read or write.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except LongctxError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = StorageError(error.strerror or str(error), where=error.filename)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


class RowFile:
    """Rows of one task and column. Rank 0 reads and writes; every rank knows which samples are done.

    Args:
        path: the .jsonl file; it may be there already.
        key_fields: fields that name a sample.
        identity: fields that every row must have with these values (model, rope, seed, text, how it is asked): a file of another model
            or text is refused, and one whose rows do not say: nobody knows then what they would be mixed with.

    Raises (all ranks alike, here and when a row is added, so that none waits for another):
        StorageError: the file cannot be read or written.
        ConfigError: the file holds rows of another model, rope, seed or text, or a damaged line.
    """

    def __init__(self, path: Path, key_fields: tuple[str, ...], identity: Mapping[str, Any]) -> None:
        self.path, self.key_fields, self.identity = path, key_fields, dict(identity)
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = on_first_rank(self._read)
        self._file: io.FileIO | None = None

    def __enter__(self) -> RowFile:
        on_first_rank(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.rows

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row, on disk before this returns. All ranks call it."""
        whole = {**row, **self.identity}
        on_first_rank(lambda: self._append(json.dumps(whole).encode() + b"\n"))
        self.rows[self._key(whole)] = whole

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key_fields)

    def _refusals(self, done: str) -> AbstractContextManager[None]:
        return refusals_as(StorageError, self.path, done=done, fix="mend that and run it again: it goes on from what is there")

    def _open(self) -> None:
        with self._refusals("written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)  # what a full disk refused is not tried again at the close

    def _append(self, line: bytes) -> None:
        assert self._file is not None, "rows are added inside `with`"
        with self._refusals("written"):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def _read(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Rows that are there. A last line that a kill cut off is removed from the file."""
        with self._refusals("read"):
            if not self.path.exists():
                return {}
            raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        rows = {}
        for number, line in enumerate(whole.splitlines(), 1):
            where = f"{self.path}:{number}"
            try:
                row = json.loads(line)
                key = self._key(row)
                wrong = [name for name, value in self.identity.items() if row.get(name) != value]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError("damaged line", where=where, fix="remove the file and measure again") from None
            if wrong:
                name = wrong[0]
                there = f"is {row[name]!r}" if name in row else "is not stated (rows of an earlier version)"
                raise ConfigError(
                    f"{name} {there}, this evaluation has {self.identity[name]!r}",
                    where=where,
                    fix="remove or move the file to measure again",
                )
            rows[key] = row
        if len(whole) < len(raw):
            with self._refusals("written"), self.path.open("r+b") as file:
                file.truncate(len(whole))
        return rows
