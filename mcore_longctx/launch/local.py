"""Start the ranks of a verb: torchrun on this machine, or on each node of a SLURM allocation by srun.

Inside an allocation the words are those of the training job's script (`templates/train.sbatch.j2`): one task a node, torchrun inside.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from mcore_longctx.errors import ConfigError, LayoutError, LongctxError, StoppedBySignal, TrainingError
from mcore_longctx.launch.status import read_status

__all__ = ["CONTAINER", "ERROR_NOTE", "SRUN_OPTIONS", "launch_ranks", "master_port"]

ERROR_NOTE = "MCORE_LONGCTX_ERROR_NOTE"  # names a file in which a verb leaves `failed CODE REASON`

SRUN_OPTIONS = "MCORE_LONGCTX_SRUN_OPTIONS"  # further options of srun, as a shell would read them
CONTAINER = "MCORE_LONGCTX_CONTAINER"  # a command in front of torchrun on each node, as a shell would read it

_PREFIX = "mcore-longctx: "


def launch_ranks(
    arguments: Sequence[str], ranks: int, *, log: Path, status: Path | None = None, nproc_per_node: int | None = None
) -> None:
    """Run `mcore-longctx ARGUMENTS` on `ranks` processes and wait for them.

    Args:
        arguments: the verb and its arguments.
        ranks: processes to start.
        log: folder for what the processes write to stderr.
        status: the STATUS file of a training. torchrun turns every exit code into 1; this file, and for other verbs a note that
            the command line leaves in `log`, tell the truth.
        nproc_per_node: ranks of a node inside a SLURM allocation; None: all on one.

    Raises:
        LayoutError: more ranks than this machine can start, or more nodes than the allocation has.
        LongctxError: the verb failed; the message is its own line, the exit code its own.
    """
    command = _command(arguments, ranks, nproc_per_node)
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
        with _forwarded_signals(child, saves=status is not None and command[0] == "srun"):
            code = child.wait()
        reader.join(timeout=10)  # a grandchild may keep the pipe open
        if not reader.is_alive():
            child.stderr.close()
    if code == 0:
        return
    code, what = _truth(status) or _truth(note) or (code, said[-1] if said else "")
    raise _error(code, what or f"{arguments[0]} ended with code {code} (details in {log / 'stderr.log'})")


def _command(arguments: Sequence[str], ranks: int, nproc_per_node: int | None = None) -> list[str]:
    verb = ["-m", "mcore_longctx", *arguments]
    if ranks == 1:
        return [sys.executable, *verb]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if "SLURM_JOB_ID" in os.environ:
        nodes = -(-ranks // (nproc_per_node or ranks))
        if nodes > 1 or "SLURMD_NODENAME" not in os.environ:  # without it, this is salloc's shell on a login node
            return _srun(verb, ranks, nodes, torchrun)
        return [*torchrun, "--standalone", f"--nproc-per-node={ranks}", *verb]
    most = 4 * (os.cpu_count() or 1)
    if ranks > most:
        raise LayoutError(
            f"{arguments[0]} wants {ranks:,} ranks, this machine starts at most {most}",
            fix="start `run` inside a SLURM allocation, let `launch` write job scripts, or make the layout smaller",
        )
    return [*torchrun, "--standalone", f"--nproc-per-node={ranks}", *verb]


def _srun(verb: list[str], ranks: int, nodes: int, torchrun: list[str]) -> list[str]:
    there = int(os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", str(nodes))))
    if nodes > there or ranks % nodes:
        raise LayoutError(
            f"{verb[2]} wants {ranks:,} ranks on {nodes:,} nodes, this allocation has {there:,}",
            fix="ask for more nodes, or change the layout or cluster.nproc_per_node",
        )
    container = shlex.split(os.environ.get(CONTAINER, ""))
    options = shlex.split(os.environ.get(SRUN_OPTIONS, ""))
    if container or options:  # the Python of this process need not be there
        torchrun = ["torchrun"]
    # On the node. SLURM signals every process of a step: torchrun must not act on it (it would end its ranks 30 s later), the ranks
    # catch it themselves. What is ignored is inherited through exec.
    launcher = (
        f'trap "" USR1 TERM; exec {shlex.join(torchrun)} --node_rank="$SLURM_NODEID" --master_addr={_master_address()} "$@"'
    )
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *("--kill-on-bad-exit=1", "--wait=120", "--cpu-bind=none", *options, *container),
        *("bash", "-c", launcher, "torchrun"),
        *(f"--nproc_per_node={ranks // nodes}", f"--nnodes={nodes}", f"--master_port={master_port(os.environ['SLURM_JOB_ID'])}"),
        *("--signals_to_handle=SIGINT,SIGHUP,SIGQUIT", *verb),
    ]


def master_port(job_id: str) -> int:
    """Where the ranks of a job meet: two jobs on one node need two ports."""
    return 20000 + int(job_id) % 10000


def _master_address() -> str:
    """The address of node 0, as shell text."""
    if "SLURMD_NODENAME" in os.environ:
        return '"$SLURM_LAUNCH_NODE_IPADDR"'  # the batch host, which is node 0: no name needs to be looked up
    names = _scontrol("show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", ""))
    node = names.split()[0] if names.split() else ""
    address = re.search(r"NodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", node))
    if address is None:
        raise ConfigError("SLURM does not tell the address of the first node of this allocation", fix="use sbatch, or srun --pty")
    return shlex.quote(address[1])


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False, timeout=60).stdout
    except OSError as error:
        raise ConfigError(f"scontrol cannot be started: {error.strerror}") from None


def _drain(stream: IO[str], log: IO[str], said: list[str]) -> None:
    """Everything goes to the log; the verb's own error lines are kept for the message."""
    for line in stream:
        log.write(line)
        log.flush()
        if line.startswith(_PREFIX):
            said.append(line.removeprefix(_PREFIX).strip())


@contextmanager
def _forwarded_signals(child: subprocess.Popen[str], *, saves: bool) -> Iterator[None]:
    """Hand SIGTERM, SIGUSR1 and Ctrl-C on; the child saves and leaves.

    torchrun passes only SIGTERM on to its ranks, so every one of them is sent as SIGTERM. srun passes SIGUSR1 to every process of the
    step: with `saves`, ranks that catch it get it first, and a second signal ends them.
    """
    number_of_signals = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal number_of_signals
        number_of_signals += 1
        if child.poll() is None:
            child.send_signal(signal.SIGUSR1 if saves and number_of_signals == 1 else signal.SIGTERM)

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
    """Exit code and reason; None if nothing is said there, or the process was killed before."""
    told = read_status(*([] if file is None else [file]))
    return None if not told.code or not told.reason else (told.code, told.reason)


def _error(code: int, what: str) -> LongctxError:
    if code == StoppedBySignal.exit_code:
        return StoppedBySignal(what)
    if code == LongctxError.exit_code:
        return LongctxError(what)
    return TrainingError(what)
