"""What a command costs with all its children: CPU-seconds, wall time, peak memory.

    cost = run(["sort", "FILE"], log=Path("sort.log"))
    cost.cpu, cost.wall, cost.peak

A small process of its own starts the command and waits for it: the CPU-seconds are those that the kernel adds up for it and for all
descendants that were waited for, and the memory of whoever measures counts nowhere. Memory is the sum over the living processes of
the tree of their proportional set size (PSS: a page shared by n processes counts 1/n in each), asked every 50 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Cost", "run"]

SAMPLE_SECONDS = 0.05
TOLD = 2000  # characters of the log that an error shows


@dataclass(frozen=True)
class Cost:
    """Of one command. Bytes are 0 where memory was not asked for."""

    cpu: float  # seconds, user and system, all processes
    wall: float  # seconds
    peak: int  # bytes, PSS of the tree, mapped files included
    peak_anonymous: int  # bytes, PSS of the tree without mapped files: what the machine cannot drop
    largest: int  # bytes, resident memory of the largest process, mapped files included
    code: int  # exit code; -9 for signal 9


def run(
    command: Sequence[str],
    *,
    log: Path,
    memory: bool = True,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    deadline: float = 1800.0,
) -> Cost:
    """Run a command to its end, in `folder`, its output into the file `log`, and say what it cost.

    Raises:
        RuntimeError: it failed, or did not end within `deadline` seconds (it is ended then); with the end of its output.
    """
    asked = {"command": list(command), "log": str(log.absolute()), "memory": memory, "deadline": deadline}
    done = subprocess.run(
        [sys.executable, "-S", "-E", __file__],
        input=json.dumps(asked),
        env={**os.environ, **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    cost = Cost(**json.loads(done.stdout))
    if cost.code:
        end = log.read_text(errors="replace")[-TOLD:]
        raise RuntimeError(f"exit code {cost.code} after {cost.wall:.0f} s\n{' '.join(command)}\n{end}")
    return cost


def _measure(command: list[str], log: str, *, memory: bool, deadline: float) -> Cost:
    peak = peak_anonymous = 0
    began = time.monotonic()
    with Path(log).open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if memory:
            total, anonymous = _tree_bytes(process.pid)
            peak, peak_anonymous = max(peak, total), max(peak_anonymous, anonymous)
        if time.monotonic() - began > deadline:
            os.killpg(process.pid, 9)  # the session that was made for it
        time.sleep(SAMPLE_SECONDS if memory else SAMPLE_SECONDS / 10)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(
        cpu=usage.ru_utime + usage.ru_stime,
        wall=time.monotonic() - began,
        peak=peak,
        peak_anonymous=peak_anonymous,
        largest=usage.ru_maxrss * 1024,
        code=process.returncode,
    )


def _tree_bytes(pid: int) -> tuple[int, int]:
    """PSS of a process and its descendants: all of it, and without mapped files."""
    total = anonymous = 0
    waiting = [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
            rows = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        total += _kilobytes(rows["Pss"])
        anonymous += _kilobytes(rows["Pss_Anon"]) + _kilobytes(rows["Pss_Shmem"])
    return total * 1024, anonymous * 1024


def _kilobytes(cell: str) -> int:
    return int(cell.split(maxsplit=1)[0])


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(asdict(_measure(given["command"], given["log"], memory=given["memory"], deadline=given["deadline"]))))
