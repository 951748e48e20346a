"""What is done so far: one file a process, a line a unit, written when the unit's bytes are in the file.

    OUT.partial/journal-0.jsonl     {"journal": 1, "version": ..., "plan": HASH, "kind": ..., "settings": ..., "sources": ...}
                                    {"start": NAME, "fsync": true}       a process began to work
                                    {"ready": true}                      the files stand there in their full size
                                    {"unit": 17, "rows": [...]}          a unit, with the sums of what it quantised
                                    {"file": 0, "sha256": ...}           a whole file's hash
                                    {"complete": true, ...}              everything, of all processes

The process holds a lock on its journal, which the kernel gives back when the process ends, however it ends. It is a POSIX lock,
because those work over NFS too, and they are lost when *any* descriptor of the file is closed: so the holder reads its own
journal through the descriptor that it holds, and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_longctx.convert.copying.kernels import QuantizedRows
from mcore_longctx.convert.copying.units import FORMAT
from mcore_longctx.convert.disk import storage_error, write_all
from mcore_longctx.errors import CheckpointError, InUseError

__all__ = ["Journal", "Record", "boot_id", "journal_name", "read_record", "record_in", "rows_entry"]

_LOCKED = (errno.EAGAIN, errno.EACCES)


@dataclass
class Record:
    """What one or several journals say.

    Attributes:
        facts: the first line, None where there is no whole one.
        prepared: the files of the output stood there in their full size, at some start.
        ready: they do, and it was said in this start.
        units: those that are done, with what they quantised.
        sha256: of files that were hashed, by number.
        complete: everything is done; the sums of all units are in `sums`.
        ended: that was said, whether it is believed or not.
        failed: what a process said when it gave up in this start.
        bytes: how long the journals are; grows while their processes live.
        readable: how many of them are before the first line that is damaged.
    """

    facts: dict[str, Any] | None = None
    prepared: bool = False
    ready: bool = False
    units: dict[int, list[QuantizedRows]] = field(default_factory=dict)
    sha256: dict[int, str] = field(default_factory=dict)
    complete: bool = False
    ended: bool = False
    sums: list[QuantizedRows] = field(default_factory=list)
    failed: str = ""
    bytes: int = 0
    readable: int = 0

    def add(self, other: Record) -> None:
        """Take in what another journal says."""
        self.prepared |= other.prepared
        self.ready |= other.ready
        self.complete |= other.complete
        self.units |= other.units
        self.sha256 |= other.sha256
        self.sums += other.sums
        self.failed = self.failed or other.failed
        self.bytes += other.bytes


def journal_name(rank: int) -> str:
    """`journal-0.jsonl`."""
    return f"journal-{rank}.jsonl"


def boot_id() -> str:
    """Which boot of this machine it is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def read_record(data: bytes, start: str) -> Record:
    """Read a journal. A last line that is not whole, as a kill leaves it, is not looked at; neither is anything after damage.

    start: name of the present one. What an earlier one wrote without fsync may have been lost since, when a machine went down:
        it counts as not done.
    """
    record, trusted, ours = Record(bytes=len(data)), False, False
    for line in data.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
            if record.facts is None:
                if entry["journal"] != FORMAT or not isinstance(entry["plan"], str):
                    break
                record.facts = entry
            elif "start" in entry:
                ours = entry["start"] == start
                trusted = ours or entry["fsync"] is True
            elif "failed" in entry:
                record.failed = str(entry["failed"]) if ours else ""
            else:
                record.ended |= "complete" in entry
                if trusted:
                    _take(entry, record, ours=ours)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            break
        record.readable += len(line) + 1
    return record


def record_in(path: Path, start: str) -> Record:
    """`read_record` of a file; an empty one where there is none."""
    try:
        return read_record(path.read_bytes(), start)
    except FileNotFoundError:
        return Record()


def _take(entry: dict[str, Any], record: Record, *, ours: bool) -> None:
    if "unit" in entry:
        record.units[int(entry["unit"])] = _rows(entry)
    elif "file" in entry:
        record.sha256[int(entry["file"])] = str(entry["sha256"])
    elif "complete" in entry:
        record.complete, record.sums = True, _rows(entry)
        record.sha256 |= {int(number): str(digest) for number, digest in entry["sha256"].items()}
    elif "ready" in entry:
        record.prepared, record.ready = True, ours


def _rows(entry: dict[str, Any]) -> list[QuantizedRows]:
    return [QuantizedRows(*row) for row in entry.get("rows", [])]


def rows_entry(sums: Iterable[QuantizedRows]) -> dict[str, Any]:
    """The sums as a part of a line; nothing where nothing was quantised."""
    rows = [[entry.name, entry.rows, entry.amax, entry.squared, entry.squared_error] for entry in sums]
    return {"rows": rows} if rows else {}


class Journal:
    """The journal of this process, locked."""

    def __init__(self, path: Path, start: str, *, fsync: bool, make: bool = True) -> None:
        """Open or make it, and lock it.

        Raises:
            FileNotFoundError: it is not there and not to be made, or its folder is not there.
            InUseError: another process holds it.
            CheckpointError: the file system knows no locks.
            StorageError: the file cannot be made.
        """
        self.path, self.start, self.fsync = path, start, fsync
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            raise storage_error(error, path) from None
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno in _LOCKED:
                raise InUseError("another run writes this output", where=path, fix="wait for it or stop it") from None
            raise CheckpointError(
                f"cannot be locked ({error.strerror})", where=path, fix="choose an output on a file system with locks"
            ) from None
        self._end = os.fstat(self._descriptor).st_size

    def read(self) -> Record:
        """What it says."""
        return read_record(self._bytes(), self.start)

    def _bytes(self) -> bytes:
        parts, at = [], 0
        while part := os.pread(self._descriptor, 1 << 20, at):
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    @property
    def still_there(self) -> bool:
        """Whether the file that is locked still has its name: a run that ended in between took it away."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def begin(self, facts: dict[str, Any]) -> None:
        """Go on writing after its last good line, or write the first one."""
        self._end = self.read().readable
        os.ftruncate(self._descriptor, self._end)
        if not self._end:
            self.add(facts)
        self.add({"start": self.start, "fsync": self.fsync})
        self.sync()

    def add(self, entry: dict[str, Any]) -> None:
        """Append one line. Raises StorageError where the disk is full."""
        line = json.dumps(entry).encode() + b"\n"
        write_all(self._descriptor, line, self._end, self.path)
        self._end += len(line)

    def sync(self) -> None:
        """Make it last, where that is asked for."""
        if self.fsync:
            os.fsync(self._descriptor)

    def move(self, path: Path) -> None:
        """Give it another name, locked as it is."""
        self.path = self.path.rename(path)

    def close(self) -> None:
        """Close it, which gives the lock back."""
        os.close(self._descriptor)
