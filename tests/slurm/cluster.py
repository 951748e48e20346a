"""A SLURM of its own for tests: two nodes on this machine, started by tools/slurm_sandbox.sh, gone when the tests are.

    with started() as cluster:
        job = cluster.submit(script)
        assert cluster.end_of(job) == ("COMPLETED", "0:0")

The sandbox is stopped, and its folder removed, by a process that waits for the end of a pipe whose other end only this process holds:
so it also goes when the tests are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

__all__ = ["REPOSITORY", "Cluster", "skip_without_slurm", "started", "wait_until"]

REPOSITORY = Path(__file__).parents[2]
SANDBOX = REPOSITORY / "tools" / "slurm_sandbox.sh"
# ends when its stdin does
_GUARD = 'while read -r _; do :; done; "$1" stop; rm -rf "$2"'
_FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

Found = TypeVar("Found")


def skip_without_slurm() -> None:
    """Skip the test, with the reason, where no SLURM of its own can be started."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {missing[0]}; apt-get install --no-install-recommends munge slurmctld slurmd slurm-client")
    if os.geteuid() != 0:
        pytest.skip("a SLURM of one's own needs root: slurmd starts jobs as their users")


def wait_until(what: Callable[[], Found], seconds: float, why: Callable[[], str] = str) -> Found:
    """Wait for something true and return it.

    Raises:
        AssertionError: it did not come; `why` tells what there was instead.
    """
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise AssertionError(f"timed out after {seconds:g} s\n{why()}")
        time.sleep(0.05)
    return found


@contextmanager
def started(**shape: str) -> Iterator[Cluster]:
    """A running cluster. `shape` are variables of the sandbox, for example SLURM_SANDBOX_TIMEOUT="6"."""
    place = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds a socket
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"SLURM_SANDBOX_DIR": str(place / "s")} | shape
    guard = subprocess.Popen(
        ["bash", "-c", _GUARD, "guard", str(SANDBOX), str(place)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    assert guard.stdin is not None
    try:
        start = subprocess.run([SANDBOX, "start"], env=environment, check=False, timeout=120, capture_output=True, text=True)
        assert start.returncode == 0, start.stderr
        yield Cluster(place / "s")
    finally:
        guard.stdin.close()
        guard.wait(timeout=120)


class Cluster:
    """What a user at the login node does, and what goes wrong behind their back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        python, stub = sys.executable, REPOSITORY / "tests" / "slurm" / "stub_trainer.py"
        own = f'exec {python} -m mcore_longctx "$@"'
        self._tool("tools/mcore-longctx", own)
        self._tool("tools/torchrun", f'exec {python} -m torch.distributed.run "$@"')
        # a stub has made nothing that `run` could note in run.json
        self._tool("stub/mcore-longctx", f'if [ "$1" = run ]; then echo "would note: $*"; exit 0; fi\n{own}')
        self._tool("stub/torchrun", f'LOCAL_RANK=0 exec {python} {stub} "$@"')

    def _tool(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    # ------------------------------------------------------------------ commands
    def environment(self, *, stub: bool = False, **more: str) -> dict[str, str]:
        """Of whoever submits: this Python, this checkout, this cluster; with `stub` a torchrun that trains nothing."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        tools = [str(self.folder / "stub")] if stub else []
        tools += [str(self.folder / "tools"), str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]
        path = os.pathsep.join(tools)
        return inherited | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": path,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",  # a machine's own name need not resolve
            **more,
        }

    def call(
        self, *words: str | Path, code: int = 0, seconds: float = 120, stub: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A command in the repository that must end with this exit code."""
        result = subprocess.run(
            [str(word) for word in words],
            env=self.environment(stub=stub, **variables),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert result.returncode == code, f"{words}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def submit(self, script: Path, *options: str, stub: bool = False, **variables: str) -> int:
        """Hand a script to sbatch. Returns the job id."""
        return int(self.call("sbatch", "--parsable", *options, script, stub=stub, **variables).stdout)

    def preempt(self, seconds: float = 0.5) -> int:
        """A job in partition urgent that takes both nodes. Returns its id."""
        words = ("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", f"--wrap=sleep {seconds}")
        return int(self.call("sbatch", "--parsable", *words).stdout)

    @contextmanager
    def grace(self, seconds: int) -> Iterator[None]:
        """Another GraceTime of partition main: how long after the ranks a script is told that its job is preempted. Up to 30 s more."""
        shown = self.call("scontrol", "--oneliner", "show", "partition", "main").stdout
        usual = next(word for word in shown.split() if word.startswith("GraceTime="))
        self.call("scontrol", "update", "PartitionName=main", f"GraceTime={seconds}")
        try:
            yield
        finally:
            self.call("scontrol", "update", "PartitionName=main", usual)

    def cancel_all(self) -> None:
        """End whatever a test left in the queue."""
        self.call("scancel", "--full", "--quiet", "--user=root")
        wait_until(lambda: not self.queue(), 60, self.queue)

    # ------------------------------------------------------------------ what the scheduler says
    def queue(self) -> str:
        """squeue: a line `id state reason` for every job that waits or runs."""
        return self.call("squeue", "--noheader", "--format=%i %T %r").stdout.strip()

    def state(self, job: int) -> tuple[str, str]:
        """State and reason, also of a job that has ended."""
        words = self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %r").stdout.split(maxsplit=1)
        return words[0], words[1].strip()

    def fact(self, job: int, name: str) -> str:
        """One field of `scontrol show job`, for example Restarts or ExitCode."""
        shown = self.call("scontrol", "--oneliner", "show", "job", str(job)).stdout
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def restarts(self, job: int) -> int:
        return int(self.fact(job, "Restarts"))

    def wait_for_state(self, job: int, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of these states; a job that has ended otherwise is an error at once."""

        def reached() -> str:
            state, reason = self.state(job)
            if state in states:
                return state
            assert state not in _FINISHED, f"job {job} is {state} ({reason})\n{self.story(job)}"
            return ""

        return wait_until(reached, seconds, lambda: self.story(job))

    def wait_for_restart(self, job: int, number: int, seconds: float = 120) -> None:
        """Wait until the job runs for the `number`th time after the first."""
        wait_until(lambda: self.restarts(job) >= number, seconds, lambda: self.story(job))
        self.wait_for_state(job, "RUNNING", seconds=seconds)

    def end_of(self, job: int, seconds: float = 120) -> tuple[str, str]:
        """How the job ended: state and ExitCode, for example `("FAILED", "3:0")`."""
        state = self.wait_for_state(job, *_FINISHED, seconds=seconds)
        return state, self.fact(job, "ExitCode")

    # ------------------------------------------------------------------ accidents
    def signal(self, job: int, name: str = "USR1") -> None:
        """What `--signal=B:USR1@...` does before the time limit: to the batch shell alone."""
        self.call("scancel", "--batch", f"--signal={name}", str(job))

    def workers(self, job: int, node: str = "") -> list[int]:
        """Processes of the training of a job (not of torchrun), on one node or on all."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", f"SLURM_JOB_ID={job}", *([f"SLURMD_NODENAME={node}"] if node else [])}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                variables = set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
            except OSError:
                continue  # it has just ended
            if wanted <= variables and any(name.startswith("LOCAL_RANK=") for name in variables) and "train" in words:
                found.append(int(process.name))
        return sorted(found)

    def kill_daemon(self, name: str) -> None:
        """kill -9 of slurmd-n1, as when a node loses power; its job steps live on, as after a lost network."""
        os.kill(int((self.folder / "run" / f"{name}.pid").read_text()), signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        self.call("slurmd", "-N", node, "-f", self.folder / "slurm.conf")

    # ------------------------------------------------------------------ telling
    def story(self, job: int) -> str:
        """All there is to know when a test fails."""
        shown = self.call("scontrol", "show", "job", str(job)).stdout
        log = Path(self.fact(job, "StdOut"))
        said = log.read_text(errors="replace") if log.is_file() else "(no log)"
        controller = (self.folder / "log" / "slurmctld.log").read_text(errors="replace")
        return f"{shown}\n---- {log}\n{said[-6000:]}\n---- slurmctld.log\n{controller[-1500:]}"
