"""Tasks in forked processes that end with their parent; whoever is free takes the next one.

No `multiprocessing`: importing it costs more than copying a small model. The numbers of all tasks stand in a file in memory whose
position the processes share, so nobody waits for a dispatcher.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NoReturn

from mcore_longctx import errors
from mcore_longctx.errors import LongctxError, StorageError

__all__ = ["Report", "Work", "end_with", "run_tasks"]

Report = dict[str, Any]  # what was done, as JSON
# Given the numbers of tasks, one by one as they are free, yields what to report.
Work = Callable[[Iterator[int]], Iterator[Report]]

_NUMBER_BYTES = 4
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def end_with(process: int) -> Callable[[], None]:
    """A function for the workers of `process` to call now and then: it ends the worker if `process` is no more."""

    def look() -> None:
        if os.getpid() != process and os.getppid() != process:
            os._exit(1)

    return look


def run_tasks(work: Work, tasks: Sequence[int], workers: int) -> Generator[Report, None, None]:
    """Do `tasks` and yield what is reported, as it comes. With one worker, or one task, everything happens in this process.

    An error of a worker is raised here. Whatever ends this generator early ends the workers at once: a task that was not reported
    is not done.

    Raises:
        StorageError: a worker was killed.
    """
    if min(workers, len(tasks)) <= 1:
        yield from work(iter(tasks))
        return
    sys.stdout.flush()  # or every worker would print what is still in the buffer
    sys.stderr.flush()
    queue = os.memfd_create("tasks")
    os.pwrite(queue, b"".join(task.to_bytes(_NUMBER_BYTES, "little") for task in tasks), 0)
    running: dict[int, int] = {}  # end of a pipe -> process
    try:
        _start(work, queue, min(workers, len(tasks)), running)
        yield from _reports(running)
    finally:
        for end, pid in running.items():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(end)
        os.close(queue)


def _start(work: Work, queue: int, count: int, running: dict[int, int]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # or a worker could run the parent's handler
    try:
        for _ in range(count):
            end, report_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                for other in (*running, end):
                    os.close(other)
                _be_worker(work, queue, report_end)
            os.close(report_end)
            running[end] = pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reports(running: dict[int, int]) -> Iterator[Report]:
    poll = select.poll()
    parts = dict.fromkeys(running, b"")
    for end in running:
        poll.register(end, select.POLLIN)
    while running:
        for end, _ in poll.poll():
            data = os.read(end, 1 << 16)
            *lines, parts[end] = (parts[end] + data).split(b"\n")
            for line in lines:
                report = json.loads(line)
                if "error" in report:
                    raise _error(report)
                yield report
            if not data:
                poll.unregister(end)
                os.close(end)
                _, status = os.waitpid(running.pop(end), 0)
                if status:
                    how = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "lost"
                    raise StorageError(f"a worker was {how} (out of memory?)", fix="run it again to go on")


def _be_worker(work: Work, queue: int, report_end: int) -> NoReturn:
    code = 1
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the parent gets them too, and ends its workers
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for report in work(_numbers(queue)):
            _send(report_end, report)
        code = 0
    except LongctxError as error:
        where = None if error.where is None else str(error.where)
        _send(report_end, {"error": type(error).__name__, "what": error.what, "where": where, "fix": error.fix})
    except BaseException:
        _send(report_end, {"error": "", "what": traceback.format_exc()})
    finally:
        os._exit(code)


def _numbers(queue: int) -> Iterator[int]:
    while number := os.read(queue, _NUMBER_BYTES):
        yield int.from_bytes(number, "little")


def _send(descriptor: int, report: Report) -> None:
    line = memoryview(json.dumps(report).encode() + b"\n")
    while line:
        line = line[os.write(descriptor, line) :]


def _error(report: Report) -> Exception:
    kind = getattr(errors, report["error"], None)
    if kind is None:
        return RuntimeError(f"a worker failed:\n{report['what']}")
    error: LongctxError = kind(report["what"], where=report["where"], fix=report["fix"])
    return error
