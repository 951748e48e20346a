"""Carries out a plan: into `OUT.partial`, by several processes, going on where a killed run stopped.

The output is a function of the plan. What a run leaves when it is killed, at any point, is `OUT.partial` with its journals, and the
same command goes on from there:

1. `OUT.partial` is made, the journal locked, the plan compared with the one that the journal names.
2. All files get their full size and their small bytes; then the journal says `ready`.
3. Units are copied, by all workers of all ranks (`copying/units.py`); then the hashes, where they are asked for.
4. `complete` goes into the journal of rank 0 with all that the others found, and the journal leaves the folder for the name
   `OUT.partial-journal`: what stands beside the weights is written into a folder that holds the output and nothing else.
5. `OUT.partial` becomes `OUT`; then the journal is removed. Nothing else that exists is ever removed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mcore_longctx.convert.copying.journal import Record, rows_entry
from mcore_longctx.convert.copying.kernels import Copier, QuantizedRows, joined
from mcore_longctx.convert.copying.partial import Partial, open_partial
from mcore_longctx.convert.copying.progress import Progress
from mcore_longctx.convert.copying.step import Step, read_step
from mcore_longctx.convert.copying.telling import failures_told
from mcore_longctx.convert.copying.units import Unit, cut, facts_of
from mcore_longctx.convert.copying.workers import Report, Work, end_with, run_tasks
from mcore_longctx.convert.disk import io_errors
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.errors import CheckpointError, ConfigError, StoppedBySignal
from mcore_longctx.manifest import fsync_tree

__all__ = ["Execution", "QuantizedRows", "Written", "execute", "failures_told_to_rank_0"]

MOST_WORKERS = 256  # each is a process and a pipe of this one, which may have 1,024 files open
SYNC_BYTES = 256 << 20  # a worker makes what it wrote last, and reports it, about so often


@dataclass(frozen=True)
class Execution:
    """How a plan is carried out; none of it changes a byte of the output.

    Attributes:
        workers: processes on this machine, at most MOST_WORKERS.
        fsync: make files last before they get their name. False: as `cp` does; a crash of the machine may lose an output that
            looks finished (a killed process does not).
        checksum: hash what is written (the manifest then holds sha256 of every file).
        srun: this process is one task of a SLURM step, all of which share the work (SLURM_PROCID of SLURM_STEP_NUM_TASKS).
    """

    workers: int = 1
    fsync: bool = True
    checksum: bool = False
    srun: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where there are too few or too many workers."""
        if not 1 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"{self.workers:,} workers; expected 1 to {MOST_WORKERS}", where="--workers")


@dataclass(frozen=True)
class Written:
    """What `finish` may want to know.

    Attributes:
        quantized: one entry a quantised tensor, in the order of the plan.
        sha256: of the plan's files, hexadecimal, by name; empty without `Execution.checksum`.
    """

    quantized: tuple[QuantizedRows, ...]
    sha256: Mapping[str, str]


def execute(plan: Plan, out: Path, finish: Callable[[Path, Written], None], how: Execution) -> bool:
    """Write `plan` into `OUT.partial`, call `finish(folder, written)` for the files beside the weights, rename to `out`.

    `finish` writes into a folder that holds the plan's files and nothing else, but after a kill also what an earlier call with the
    same plan wrote: it writes over that. Under srun only rank 0 calls it.

    Returns:
        Whether this process finished the output: True, but under srun for rank 0 alone.

    Raises:
        ConfigError: `out` exists, or `OUT.partial` is not of this plan (another setting, a source that changed, not ours at all).
        InUseError: another run writes `OUT.partial`.
        StorageError: not enough space, a full or failing disk, a killed worker; the same command goes on.
        CheckpointError: a source that is shorter than its header said, or that changed meanwhile.
        ConversionError: numbers that the wanted element type cannot hold.
        StoppedBySignal: SIGTERM or SIGUSR1; the same command goes on.
    """
    out = out.absolute()
    step = read_step() if how.srun else Step()
    with io_errors(), _stop_on_signals(out):
        if step.rank > 0 and os.path.lexists(out):
            return False  # the others were done before this one began
        _refuse_existing(out)
        units = cut(plan)
        ranks = step.owners(len(units), len(plan.files) if how.checksum else 0)
        with open_partial(plan, facts_of(plan), out, step, ranks, fsync=how.fsync) as partial:
            if partial is None:
                return False
            _copy(plan, units, partial, step, how)
            if step.rank > 0:
                partial.wait_until_complete()
                return False
            record = partial.read()
            _check_sources(plan)
            sums = _sums(record, units)
            partial.complete(record, sums)
            hashes = {plan.files[number].name: digest for number, digest in sorted(record.sha256.items())} if how.checksum else {}
            finish(partial.folder, Written(tuple(sums), hashes))
            if how.fsync:
                fsync_tree(partial.folder)
            _refuse_existing(out)
            partial.rename()
        return True


@contextmanager
def failures_told_to_rank_0(out: Path, how: Execution) -> Iterator[None]:
    """For what a conversion does before `execute`: under srun, rank 0 does not wait for a rank that failed there."""
    if not how.srun:
        yield
        return
    with failures_told(out.absolute(), read_step()):
        yield


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError("output is already there", where=out, fix="choose another name or remove it")


def _copy(plan: Plan, units: list[Unit], partial: Partial, step: Step, how: Execution) -> None:
    """Do this rank's units that no journal lists, and hash its files; wait for what it needs of the others."""
    record = partial.read()
    if partial.is_over():
        return
    mine = [i for i in step.share(len(units)) if i not in record.units and not record.complete]
    total = sum(part.bytes for i in mine for part in units[i])
    # other machines hash and finish what this one wrote: on NFS they see what was synced
    copying = run_tasks(_copying(units, partial, sync=how.fsync or step.size > 1), mine, how.workers)
    with closing(copying), Progress(total, shown=step.rank == 0) as progress:
        for report in copying:
            partial.journal.add(report)
            progress.add(sum(part.bytes for part in units[report["unit"]]))
    if (step.rank == 0 or how.checksum) and not partial.wait_for_units(len(units)):
        return
    if not how.checksum:
        return
    record = partial.read()
    mine = [i for i in step.share(len(plan.files)) if i not in record.sha256]
    hashing = run_tasks(_hashing(partial), mine, how.workers)
    with closing(hashing):
        for report in hashing:
            partial.journal.add(report)
    if step.rank == 0:
        partial.wait_for_hashes(len(plan.files))


def _copying(units: list[Unit], partial: Partial, *, sync: bool) -> Work:
    pause = end_with(os.getpid())

    def work(numbers: Iterator[int]) -> Iterator[Report]:
        copier = Copier(partial.targets, pause)
        waiting: list[Report] = []  # copied, but not yet sure to last
        unsure = 0
        try:
            for number in numbers:
                sums = copier.copy(units[number])
                waiting.append({"unit": number, **rows_entry(sums)})
                unsure += sum(part.bytes for part in units[number])
                if sync and unsure < SYNC_BYTES:
                    copier.begin_writeback(units[number])
                    continue
                if sync:
                    copier.sync()
                yield from waiting
                waiting, unsure = [], 0
            if waiting:
                copier.sync()
            yield from waiting
        finally:
            copier.close()

    return work


def _hashing(partial: Partial) -> Work:
    look = end_with(os.getpid())

    def work(numbers: Iterator[int]) -> Iterator[Report]:
        buffer = memoryview(bytearray(1 << 20))
        for number in numbers:
            digest = hashlib.sha256()
            with partial.targets[number].open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    look()
            yield {"file": number, "sha256": digest.hexdigest()}

    return work


def _sums(record: Record, units: list[Unit]) -> list[QuantizedRows]:
    """The sums of the tensors, added up in the order of the units, so that restarts and workers do not change a bit of them."""
    if record.complete:
        return record.sums
    return joined([entry for number in range(len(units)) for entry in record.units[number]])


def _check_sources(plan: Plan) -> None:
    """Raise CheckpointError if a source is no longer what the plan was made from."""
    for source in plan.sources:
        state = source.path.stat()
        if (state.st_size, state.st_mtime_ns) != (source.bytes, source.mtime_ns):
            raise CheckpointError(
                "changed while it was read", where=source.path, fix="remove the unfinished output and run again"
            )


@contextmanager
def _stop_on_signals(out: Path) -> Iterator[None]:
    """SIGTERM and SIGUSR1 (SLURM's before a time limit) end the run in one line; what is done stays done."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedBySignal(f"stopped by {signal.Signals(number).name}", where=out, fix="run it again to go on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
