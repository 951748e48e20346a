"""Start the ranks of a verb: torchrun on this machine, srun inside a SLURM allocation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from mcore_longctx.errors import LayoutError, LongctxError, StoppedBySignal, TrainingError

__all__ = ["ERROR_NOTE", "launch_ranks"]

ERROR_NOTE = "MCORE_LONGCTX_ERROR_NOTE"  # names a file in which a verb leaves `failed CODE REASON`

_PREFIX = "mcore-longctx: "


def launch_ranks(arguments: Sequence[str], ranks: int, *, log: Path, status: Path | None = None) -> None:
    """Run `mcore-longctx ARGUMENTS` on `ranks` processes and wait for them.

    Args:
        arguments: the verb and its arguments.
        ranks: processes to start.
        log: folder for what the processes write to stderr.
        status: the STATUS file of a training. torchrun turns every exit code into 1; this file, and for other verbs a note that
            the command line leaves in `log`, tell the truth.

    Raises:
        LayoutError: more ranks than this machine can start, outside a SLURM allocation.
        LongctxError: the verb failed; the message is its own line, the exit code its own.
    """
    command = _command(arguments, ranks)
    log.mkdir(parents=True, exist_ok=True)
    note = (log / "error").absolute()
    for path in (note, status):
        if path is not None:
            path.unlink(missing_ok=True)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", ERROR_NOTE: str(note)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    said: list[str] = []
    with (log / "stderr.log").open("a", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        assert child.stderr is not None
        reader = threading.Thread(target=_drain, args=(child.stderr, errors, said), daemon=True)
        reader.start()
        with _forwarded_signals(child):
            code = child.wait()
        reader.join(timeout=10)  # a grandchild may keep the pipe open
        if not reader.is_alive():
            child.stderr.close()
    if code == 0:
        return
    code, what = _truth(status) or _truth(note) or (code, said[-1] if said else "")
    raise _error(code, what or f"{arguments[0]} ended with code {code} (details in {log / 'stderr.log'})")


def _command(arguments: Sequence[str], ranks: int) -> list[str]:
    verb = ["-m", "mcore_longctx", *arguments]
    if "SLURM_JOB_ID" in os.environ and ranks > 1:
        return ["srun", f"--ntasks={ranks}", "--kill-on-bad-exit=1", sys.executable, *verb]
    if ranks == 1:
        return [sys.executable, *verb]
    most = 4 * (os.cpu_count() or 1)
    if ranks > most:
        raise LayoutError(
            f"{arguments[0]} wants {ranks:,} ranks, this machine starts at most {most}",
            fix=f"start `run` inside a SLURM allocation of {ranks:,} tasks, or make the layout smaller",
        )
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *verb]


def _drain(stream: IO[str], log: IO[str], said: list[str]) -> None:
    """Everything goes to the log; the verb's own error lines are kept for the message."""
    for line in stream:
        log.write(line)
        log.flush()
        if line.startswith(_PREFIX):
            said.append(line.removeprefix(_PREFIX).strip())


@contextmanager
def _forwarded_signals(child: subprocess.Popen[str]) -> Iterator[None]:
    """Hand SIGTERM, SIGUSR1 and Ctrl-C on, once; the child saves and leaves.

    torchrun passes only SIGTERM on to its ranks, so every one of them is sent as SIGTERM.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        if child.poll() is None:
            child.terminate()

    old: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        old[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for restored, handler in old.items():
            signal.signal(restored, handler)
        if child.poll() is None:
            child.kill()


def _truth(file: Path | None) -> tuple[int, str] | None:
    """Exit code and reason from a line `STATE CODE REASON`; None if there is no such line, or the process was killed before."""
    if file is None or not file.is_file():
        return None
    words = file.read_text(encoding="utf-8").strip().split(maxsplit=2)
    if len(words) < 3 or not words[1].isdigit() or words[1] == "0":
        return None
    return int(words[1]), words[2]


def _error(code: int, what: str) -> LongctxError:
    if code == StoppedBySignal.exit_code:
        return StoppedBySignal(what)
    if code == LongctxError.exit_code:
        return LongctxError(what)
    return TrainingError(what)
