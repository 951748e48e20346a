"""How a job ends: one line on stderr, the STATUS file, the exit code, tracebacks in the log folder.

`logs/<stage>/STATUS` is one line, `STATE CODE REASON`:

    running - process 4711 on node07
    done 0 36 iterations
    stopped 75 SIGTERM at iteration 12, checkpoint saved
    failed 2 checkpoints/base: no checkpoint here; check the path
    hung 1 rank 3: no micro-batch for 31 s (3 x the median of 10.1 s) in iteration 12, ...

torchrun turns every exit code into 1, so this file tells the truth. It stays `running` when the process was killed. On a full disk the line
is written over the old one. `hung` is a job that stood still and was ended by its own watchdog: for whoever requeues it is a death like
any other.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mcore_longctx.errors import LongctxError, StoppedBySignal
from mcore_longctx.manifest import write_atomic
from mcore_longctx.train.control import PeerFailed

__all__ = ["Outcome", "open_log"]

logger = logging.getLogger("mcore_longctx")

_INTERRUPTED = 130  # as a shell reports Ctrl-C
_BLOCK = 4096  # bytes of a file system's block: the file that holds one byte holds as many


class Outcome:
    """Of one rank of one job. The first rank that fails speaks; the others leave quietly with its exit code."""

    def __init__(self, log_folder: Path, rank: int) -> None:
        self.folder, self.rank = log_folder, rank
        self._claim = log_folder / ".failure"
        self._has_started = False

    def started(self) -> None:
        """Called on every rank when the job holds its folder and all ranks have met."""
        self._has_started = True

    def write_running(self) -> None:
        """STATUS of a job that begins. Rank 0 calls it, before any other rank can fail on its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim.unlink(missing_ok=True)
        for leftover in self.folder.glob("STATUS.partial-*"):  # of processes that were killed while they wrote it
            leftover.unlink()
        self._write_status("running", None, f"process {os.getpid()} on {socket.gethostname()}")

    def done(self, reason: str) -> int:
        """End well. Returns exit code 0."""
        if self.rank == 0:
            self._write_status("done", 0, reason)
        return 0

    def failed(self, error: BaseException) -> int:
        """End badly, or stop on a signal. Returns the exit code, after this rank has said what it has to say."""
        code = _exit_code(error)
        if not isinstance(error, LongctxError | PeerFailed | KeyboardInterrupt):
            self._write_traceback(error)
        if isinstance(error, PeerFailed):
            return self._claimed_code()
        if (isinstance(error, LongctxError) and error.agreed) or (isinstance(error, LongctxError) and not self._has_started):
            # every rank has raised the same
            if self.rank == 0:
                self._say(error, code)
            return code
        if not self._has_started or self._claim_failure(code):
            self._say(error, code)
            return code
        return self._claimed_code()

    def hung(self, reason: str) -> None:
        """Say that the job stands still, unless another rank has spoken. Called by the watchdog, which then ends the process."""
        if not self._claim_failure(1):
            return
        sys.stderr.write(f"mcore-longctx: {reason}\n")
        sys.stderr.flush()
        logger.error("%s", reason, extra={"log_file_only": True})
        self._write_status("hung", 1, reason)

    def _say(self, error: BaseException, code: int) -> None:
        line = self._line(error)
        sys.stderr.write(f"mcore-longctx: {line}\n")
        sys.stderr.flush()
        if self._has_started:  # before that, the STATUS there may belong to another job that trains into this folder
            logger.error("%s", line, extra={"log_file_only": True})
            self._write_status("stopped" if isinstance(error, StoppedBySignal) else "failed", code, line)
        elif note := os.environ.get("MCORE_LONGCTX_ERROR_NOTE"):  # for whoever started this rank (`launch`)
            with suppress(OSError):
                write_atomic(Path(note), f"failed {code} {line}\n")

    def _line(self, error: BaseException) -> str:
        if isinstance(error, LongctxError):
            return str(error)
        if isinstance(error, KeyboardInterrupt):
            return "interrupted"
        first = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
        return f"rank {self.rank}: {text} (details in {self._traceback_file()})"

    def _traceback_file(self) -> Path:
        return self.folder / f"rank{self.rank}.log"

    def _write_traceback(self, error: BaseException) -> None:
        with suppress(OSError):  # the line on stderr says what happened
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._traceback_file().open("a", encoding="utf-8") as file:
                file.write("".join(traceback.format_exception(error)))

    def _claim_failure(self, code: int) -> bool:
        """Whether this rank is the first that fails. Decided by creating a file: the ranks may no longer be able to talk."""
        try:
            descriptor = os.open(self._claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        except OSError:  # not even a name fits on the disk: better said twice than never
            return True
        with suppress(OSError), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"rank": self.rank, "exit_code": code}, file)
        return True

    def _claimed_code(self) -> int:
        for _ in range(20):  # the rank that fails at this very moment has made the file and not yet filled it
            try:
                return int(json.loads(self._claim.read_text(encoding="utf-8"))["exit_code"])
            except (OSError, ValueError, KeyError):
                time.sleep(0.05)
        return 1

    def _write_status(self, state: str, code: int | None, reason: str) -> None:
        line = f"{state} {'-' if code is None else code} {reason}\n"
        path = self.folder / "STATUS"
        if state == "running":  # if this fails, the job ends before it has begun
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, line)
            return
        try:
            write_atomic(path, line)
        except OSError:  # a full disk: the block that holds `running` has room for another line
            with suppress(OSError):
                _overwrite(path, line.encode())


def _overwrite(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if len(line) > _BLOCK:
            line = line[: _BLOCK - 1] + b"\n"
        os.pwrite(descriptor, line, 0)
        os.ftruncate(descriptor, len(line))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _LogFile:
    """`rank0.log`. Its lines are on stdout or stderr too: what a full disk does not take is not told once more, with a traceback."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def write(self, text: str) -> None:
        with suppress(OSError):
            os.write(self._descriptor, text.encode())

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, LongctxError):
        return error.exit_code
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


@contextmanager
def open_log(log_folder: Path, rank: int) -> Iterator[None]:
    """Rank 0: our lines to stdout and, with the time, to `rank0.log`. Other ranks: our warnings to stderr.

    What megatron-core and Python's `warnings` say goes to `rank0.log` alone: it is about how libraries call each other.
    """
    console: logging.Handler
    if rank == 0:
        log_folder.mkdir(parents=True, exist_ok=True)
        stream: _LogFile | None = _LogFile(log_folder / "rank0.log")
        file: logging.Handler = logging.StreamHandler(stream)
        file.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        console = logging.StreamHandler(sys.stdout)
        console.addFilter(lambda record: not getattr(record, "log_file_only", False))
    else:
        stream, file, console = None, logging.NullHandler(), logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        console.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    theirs = [logging.getLogger(name) for name in ("megatron", "py.warnings")]
    with ExitStack() as undo, warnings.catch_warnings():
        if stream is not None:
            undo.callback(stream.close)
        undo.callback(file.close)
        undo.callback(logging.captureWarnings, False)
        logging.captureWarnings(True)
        warnings.filterwarnings("ignore", category=FutureWarning)
        _attach(undo, logger, logging.INFO, file, console)
        for one in theirs:
            _attach(undo, one, logging.WARNING, file)
        yield


def _attach(undo: ExitStack, target: logging.Logger, level: int, *handlers: logging.Handler) -> None:
    undo.callback(target.setLevel, target.level)
    undo.callback(setattr, target, "propagate", target.propagate)
    target.setLevel(level)
    target.propagate = False
    for handler in handlers:
        target.addHandler(handler)
        undo.callback(target.removeHandler, handler)
