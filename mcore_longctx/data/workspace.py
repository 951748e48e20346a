"""A folder that one command fills over several starts: one writer at a time, tasks in parallel, no leftovers of the dead.

Tasks are independent: each writes its files aside and renames them, and a task whose file is there is done. So a run that was killed
goes on with what is missing, and the tasks can as well be handed out by somebody else's engine (`data/engines/scale_out.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import IO, Any, TypeVar

from mcore_longctx.errors import DataError, InUseError
from mcore_longctx.manifest import is_alive, partial_path

__all__ = ["lock_folder", "remove_aside", "remove_leftovers", "run_tasks", "usable_cores"]

T = TypeVar("T")

_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_held: list[IO[str]] = []  # locks of this process


@contextmanager
def lock_folder(folder: Path, *, who: str = "run") -> Iterator[None]:
    """Make a folder if it is not there, and hold it while it is filled. `who` says in errors what holds such folders.

    The kernel gives the lock back when the process ends, however it ends.

    Raises:
        InUseError: another process holds it.
        DataError: the folder cannot be made, written or locked, or no room was left while the block wrote.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(error, folder) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _LOCKED:
                raise DataError(
                    f"cannot be locked ({error.strerror})",
                    where=folder,
                    fix="use a file system with flock (Lustre: mount -o flock)",
                ) from None
            file.seek(0)
            holder = file.read().strip()  # empty for the moment between its lock and its name
            raise InUseError(
                f"another {who} works on this folder" + (f" ({holder})" if holder else ""),
                where=folder,
                fix="wait for it or use another output",
            ) from None
        _held.append(file)
        try:
            file.truncate(0)
            job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
            file.write(f"process {os.getpid()} on {os.uname().nodename}{job}")
            file.flush()
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _unwritable(error, folder) from None
        finally:
            _held.remove(file)


def _unwritable(error: OSError, folder: Path) -> DataError:
    fix = "make room and start the same command again; it goes on where it was"
    if error.errno not in _NO_ROOM or error.errno == errno.EROFS:
        fix = "choose another output folder"
    return DataError(f"cannot be written ({error.strerror})", where=error.filename or folder, fix=fix)


def remove_aside(folder: Path) -> None:
    """Remove a folder of ours. A kill in the middle leaves it under a partial name, never half of it under its own."""
    if folder.is_dir():
        aside = partial_path(folder)
        folder.rename(aside)
        shutil.rmtree(aside)


def remove_leftovers(folder: Path, *, of: Collection[str] = ()) -> None:
    """Remove partial files and folders whose writer, a process of this host, is dead. Others are left alone.

    of: names whose partial files are meant, where the folder is not ours alone; empty: of every name.
    """
    mark = f".partial-{socket.gethostname()}-"
    for path in folder.glob(f"*{mark}*"):
        name, pid = path.name.partition(mark)[0], path.name.rpartition(mark)[2]
        if not pid.isdigit() or is_alive(int(pid)) or (of and name not in of):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_tasks(do: Callable[[int], T], tasks: Sequence[int], workers: int) -> Iterator[T]:
    """`do(task)` for every task, in up to `workers` forked processes; results in the order in which they come.

    The first failure ends it: no further task is begun, those that run end, then the error is raised. If this process is killed, its
    workers end too. With one worker, or one task, everything happens in this process.
    """
    if min(workers, len(tasks)) <= 1:
        yield from map(do, tasks)
        return
    sys.stdout.flush()  # or every worker would print what is still in the buffer
    context = get_context("fork")  # what the parent has loaded, a tokenizer, is there at no cost
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_begin_worker, initargs=(do,)) as pool:
        queue, running = iter(tasks), set[Future[T]]()
        try:
            while True:
                # two a worker: enough to keep them busy, few enough to stop soon
                running |= {pool.submit(_do_task, task) for task in islice(queue, 2 * workers - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker was killed (out of memory?)",
                fix="start the same command again, with fewer workers; it goes on where it was",
            ) from None
        finally:
            for future in running:
                future.cancel()


_do: Callable[[int], Any] | None = None  # of a worker: inherited by the fork, so it need not be picklable


def _begin_worker(do: Callable[[int], Any]) -> None:
    global _do  # noqa: PLW0603 (the one place where a pool lets a worker keep something)
    _do = do
    for file in _held:  # or a worker that has yet to notice the end of its parent would keep the folder locked
        file.close()
    parent = parent_process()
    assert parent is not None

    def watch(sentinel: Any = parent.sentinel) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do_task(task: int) -> Any:
    assert _do is not None
    return _do(task)
