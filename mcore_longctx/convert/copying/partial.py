"""The unfinished output: `OUT.partial`, who may write it, and what is in it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mcore_longctx.convert.copying.journal import Journal, Record, boot_id, journal_name, record_in, rows_entry
from mcore_longctx.convert.copying.kernels import QuantizedRows
from mcore_longctx.convert.copying.step import Step
from mcore_longctx.convert.copying.telling import failures_told
from mcore_longctx.convert.copying.units import difference
from mcore_longctx.convert.disk import OpenFiles, check_free_space, storage_error, write_all
from mcore_longctx.convert.plans.plan import Blend, Plan
from mcore_longctx.errors import ConfigError, InUseError, LongctxError, StorageError
from mcore_longctx.manifest import fsync_folder

__all__ = ["Partial", "open_partial", "remove_ended_journal"]

STALL_SECONDS = 600.0  # without a line from anybody
POLL_SECONDS = 0.2
_BLOCK = 512  # of st_blocks
_JOURNALS = "journal-*.jsonl"


class Partial:
    """`OUT.partial` with the journal of this process, locked.

    Attributes:
        folder: the folder itself.
        targets: the plan's files in it, by number.
    """

    def __init__(self, plan: Plan, facts: dict[str, Any], out: Path, step: Step, ranks: Sequence[int], *, fsync: bool) -> None:
        """`ranks`: those that have something to do; the others need no journal."""
        self._ranks = ranks
        self.plan, self.facts, self.out, self.step, self.fsync = plan, facts, out, step, fsync
        self.folder = out.with_name(f"{out.name}.partial")
        self.aside = _aside(out)
        self.targets = [self.folder / file.name for file in plan.files]
        self.start = step.name or boot_id()
        self._journal: Journal | None = None
        self._made: list[Path] = []  # folders above, the innermost first

    @property
    def journal(self) -> Journal:
        """The journal of this process, which holds the lock."""
        assert self._journal is not None
        return self._journal

    # ------------------------------------------------------------------ rank 0: take and prepare it
    def prepare(self) -> None:
        """Lock the folder, compare what its journal says with the plan, and make all files in their full size."""
        self._journal = self._lock()
        record = self.journal.read()
        names = {path.name for path in self.folder.iterdir() if not path.match(_JOURNALS)}
        if record.facts is None and names:
            raise self._foreign()
        self._compare(record.facts)
        if not record.complete and (unknown := names - {file.name for file in self.plan.files}):
            raise ConfigError(f"holds {min(unknown)}, which no conversion put there", where=self.folder, fix="move it away")
        if record.prepared:
            self._check_targets()
        try:
            check_free_space(self.folder, self._missing_bytes(), self.out)
        except StorageError:
            if record.facts is None:  # nothing was begun
                self._remove_made()
            raise
        self.journal.begin(self.facts)
        self._make_targets()
        for rank in self._ranks:
            if rank > 0:
                (self.folder / journal_name(rank)).touch()
        self.journal.add({"ready": True})
        self.journal.sync()

    def _lock(self) -> Journal:
        while True:
            if os.path.lexists(self.out):
                raise ConfigError("output is already there", where=self.out, fix="choose another name or remove it")
            self._made += [folder for folder in self.out.parents if not folder.exists()]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            try:
                journal = self._lock_aside() or self._lock_inside()
            except FileNotFoundError:  # a run that ended in between took it away
                continue
            if journal is not None:
                return journal

    def _lock_aside(self) -> Journal | None:
        """The journal of a run that had everything and was killed before the output had its name."""
        if not os.path.lexists(self.aside):
            return None
        journal = self._open(self.aside, make=False)
        if journal.still_there and self.folder.is_dir():
            journal.move(self.folder / journal_name(0))
            return journal
        if journal.still_there:
            if not journal.read().ended:
                journal.close()
                raise self._foreign(self.aside)
            self.aside.unlink()  # of an output that has its name, or was moved since: a kill came before its removal
        journal.close()
        return None

    def _lock_inside(self) -> Journal | None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise self._foreign()
        self.folder.mkdir(exist_ok=True)
        names = {path.name for path in self.folder.iterdir()}
        if os.path.lexists(self.aside):
            return None
        if names and journal_name(0) not in names:
            raise self._foreign()
        journal = self._open(self.folder / journal_name(0))
        if journal.still_there:
            return journal
        journal.close()
        return None

    def _remove_made(self) -> None:
        """Remove the empty journal and the folders that were made for it."""
        self.journal.path.unlink()
        with contextlib.suppress(OSError):  # somebody else put something there
            for folder in (self.folder, *self._made):
                folder.rmdir()

    def _open(self, path: Path, *, make: bool = True) -> Journal:
        try:
            return Journal(path, self.start, fsync=self.fsync, make=make)
        except InUseError as error:
            raise InUseError(error.what, where=self.out, fix=error.fix) from None

    def _foreign(self, path: Path | None = None) -> ConfigError:
        return ConfigError(
            "is in the way: not what an unfinished conversion leaves",
            where=path or self.folder,
            fix="move it away or choose another output",
        )

    def _compare(self, facts: dict[str, Any] | None) -> None:
        if facts is None:
            return
        try:
            what = difference(facts, self.facts)
        except (KeyError, TypeError, ValueError, AttributeError):
            what = "its journal is damaged"
        if what is not None:
            raise ConfigError(
                f"belongs to a run with other inputs ({what})",
                where=self.folder,
                fix="remove it, or choose another output",
            )

    def _check_targets(self) -> None:
        for path, file in zip(self.targets, self.plan.files, strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                what = "is missing" if size is None else f"has {size:,} bytes instead of {file.bytes:,}"
                raise ConfigError(f"{file.name} {what}", where=self.folder, fix="remove the folder and run again")

    def _missing_bytes(self) -> int:
        """Bytes that the disk has to give. Holes of sources stay holes where nothing but ranges is copied."""
        needed = self.plan.bytes
        if all(not isinstance(fill.source, Blend) and fill.source.dtype == fill.dtype for fill in self.plan.fills):
            states = (file.path.stat() for file in self.plan.sources)
            needed -= sum(max(0, state.st_size - state.st_blocks * _BLOCK) for state in states)
        there = sum(path.stat().st_blocks * _BLOCK for path in self.targets if path.is_file())
        return max(0, needed - there)

    def _make_targets(self) -> None:
        for path, file in zip(self.targets, self.plan.files, strict=True):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    if os.fstat(descriptor).st_size != file.bytes:
                        os.ftruncate(descriptor, file.bytes)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise storage_error(error, path) from None
        with closing(OpenFiles(os.O_RDWR)) as files:
            for number, offset, data in self.plan.small():
                write_all(files.descriptor(self.targets[number]), data, offset, self.targets[number])
        if self.fsync:
            fsync_folder(self.folder)

    # ------------------------------------------------------------------ other ranks: join
    def join(self) -> bool:
        """Wait until rank 0 has prepared the folder. False: there is nothing left to do."""
        stall = _Stall(self.out)
        while not self.is_over():
            record = record_in(self.folder / journal_name(0), self.start)
            self._compare(record.facts)
            if record.ready:
                try:  # rank 0 has made it for those with a share; it goes when all is done: who comes too late leaves nothing there
                    self._journal = self._open(self.folder / journal_name(self.step.rank), make=False)
                except FileNotFoundError:
                    return False
                self._compare(self.journal.read().facts)
                self.journal.begin(self.facts)
                return True
            stall.look(record.bytes, f"rank 0 has not prepared {self.folder.name}")
        return False

    def is_over(self) -> bool:
        """Whether rank 0 has all that it needs of the others."""
        return self.step.rank > 0 and (os.path.lexists(self.out) or os.path.lexists(self.aside))

    def give_up(self, error: LongctxError) -> None:
        """Tell rank 0 that it need not wait for us."""
        with contextlib.suppress(LongctxError):  # the disk may be full
            self.journal.add({"failed": str(error)})

    # ------------------------------------------------------------------ what is done
    def read(self) -> Record:
        """What all journals say that belong to this plan."""
        record = self.journal.read()
        for path in self.folder.glob(_JOURNALS):
            if path != self.journal.path:
                other = record_in(path, self.start)
                if other.facts is not None and difference(other.facts, self.facts) is None:
                    record.add(other)
                record.failed = record.failed or other.failed
        return record

    def wait_for_units(self, count: int) -> bool:
        """Wait until all units are done. False: rank 0 has finished without us."""
        return self._wait(count, lambda record: range(count) if record.complete else record.units)

    def wait_for_hashes(self, count: int) -> bool:
        """Wait until all files are hashed."""
        return self._wait(count, lambda record: record.sha256)

    def wait_until_complete(self) -> None:
        """Wait until rank 0 has all that it needs."""
        stall = _Stall(self.out)
        while not self.is_over():
            stall.look(record_in(self.folder / journal_name(0), self.start).bytes, "rank 0 does not finish")

    def _wait(self, count: int, done_in: Callable[[Record], Container[int]]) -> bool:
        stall = _Stall(self.out)
        while True:
            record = self.read()
            done = done_in(record)
            behind = {self.step.owner(number, count) for number in range(count) if number not in done}
            if not behind:
                return True
            if self.is_over():
                return False
            if record.failed:
                raise StorageError(f"another rank gave up: {record.failed}", where=self.out, fix="run it again to go on")
            if self.step.size == 1:
                raise RuntimeError(f"{count} things to do, not all are in the journal, and nobody else does them")
            stall.look(record.bytes, f"rank {', '.join(map(str, sorted(behind)))} behind")

    # ------------------------------------------------------------------ the end
    def complete(self, record: Record, sums: Sequence[QuantizedRows]) -> None:
        """Leave a folder that holds the plan's files alone: one journal, which says all, beside it."""
        digests = {str(number): digest for number, digest in sorted(record.sha256.items())}
        self.journal.add({"complete": True, "sha256": digests, **rows_entry(sums)})
        self.journal.sync()
        self.journal.move(self.aside)  # first: another rank that finds less in the journals than there was sees why
        for path in self.folder.glob(_JOURNALS):
            path.unlink()

    def rename(self) -> None:
        """Give the output its name, and remove the journal."""
        try:
            self.folder.rename(self.out)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise ConfigError("output appeared while it was being written", where=self.out) from None
        if self.fsync:
            fsync_folder(self.out.parent)
        self.aside.unlink()

    def close(self) -> None:
        """Let others have it."""
        if self._journal is not None:
            self._journal.close()


def remove_ended_journal(out: Path) -> None:
    """Remove the journal that a kill has left beside an output that has its name; one that does not say that all is there stays.

    Raises:
        InUseError: the process that wrote the output is about to do that.
    """
    try:
        journal = Journal(_aside(out), boot_id(), fsync=True, make=False)
    except FileNotFoundError:
        return
    try:
        if journal.still_there and journal.read().ended:
            journal.path.unlink()
    finally:
        journal.close()


def _aside(out: Path) -> Path:
    """Where the journal lies while the output gets its name."""
    return out.with_name(f"{out.name}.partial-journal")


class _Stall:
    """Waits as long as somebody writes."""

    def __init__(self, out: Path) -> None:
        self.out, self.size, self.since = out, -1, time.monotonic()

    def look(self, size: int, what: str) -> None:
        """Sleep a moment. Raises StorageError if the journals have not grown for STALL_SECONDS."""
        now = time.monotonic()
        if size != self.size:
            self.size, self.since = size, now
        elif now - self.since > STALL_SECONDS:
            raise StorageError(f"no progress for {STALL_SECONDS:.0f} s: {what}", where=self.out, fix="run it again to go on")
        time.sleep(POLL_SECONDS)


@contextmanager
def open_partial(
    plan: Plan, facts: dict[str, Any], out: Path, step: Step, ranks: Sequence[int], *, fsync: bool
) -> Iterator[Partial | None]:
    """`OUT.partial`, ready to be filled, for as long as the block runs. None: the other ranks do or have done everything.

    `ranks` are those that have a share of the work.

    Raises:
        ConfigError: it belongs to another plan, or is not ours.
        InUseError: another run has it.
        StorageError: not enough space, or rank 0 does not prepare it.
    """
    partial = Partial(plan, facts, out, step, ranks, fsync=fsync)
    try:
        with failures_told(out, step):
            joined = step.rank == 0 or partial.join()
        if step.rank == 0:
            partial.prepare()
        if not joined:
            yield None
            return
        try:
            yield partial
        except LongctxError as error:
            partial.give_up(error)
            raise
    finally:
        partial.close()
