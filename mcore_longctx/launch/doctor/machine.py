"""This machine: cores, memory, limits, shared memory, clock, SLURM."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mcore_longctx.launch.doctor.findings import Finding, note, ok, wrong
from mcore_longctx.manifest import readable_bytes

__all__ = ["clock", "cores", "host_memory", "limits", "memory_found", "shared_memory", "slurm"]

_OPEN_FILES = 4096  # a rank holds a connection to each of its peers, and the files of a data set and a checkpoint
_SHARED_MEMORY = 1 << 30


def cores() -> Finding:
    """Cores, and threads a process would start."""
    usable = len(os.sched_getaffinity(0))
    text = f"{usable} of {os.cpu_count()} CPU cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if "OMP_NUM_THREADS" not in os.environ and usable > 8:
        return note(
            "machine", f"{text}: every rank starts {usable} threads unless its launcher sets it, as `run` and `launch` do"
        )
    return ok("machine", text)


# ------------------------------------------------------------------------------------------------------------------------- memory


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes that this process may use now, and the limit of its control group (0: none).

    A control group counts page cache too, which the kernel gives back: what is free is taken from the machine, bounded by the limit.
    """
    available = _meminfo(root / "proc/meminfo", "MemAvailable")
    limit = _cgroup_limit(root)
    return (min(available, limit) if limit else available), limit


def memory_found(needed: float = 0.0, *, root: Path = Path("/"), only_here: bool = True) -> Finding:
    """Free host memory, against what the plan says a node needs.

    Args:
        needed: bytes; 0: nothing is known.
        root: where /proc and /sys are.
        only_here: False: the job runs on other machines than this one, so that too little here is no fault.
    """
    free, limit = host_memory(root)
    text = f"{readable_bytes(free)} of host memory free"
    if limit:
        text += f", limit of this control group {readable_bytes(limit)}"
    if not needed:
        return ok("host memory", text)
    text += f"; the plan: {readable_bytes(round(needed))} on each node"
    if needed <= 0.9 * free:
        return ok("host memory", text)
    if not only_here:
        return note("host memory", f"{text}: this machine is not one of them, look again inside a job")
    return wrong(
        "host memory",
        f"{text}: above nine tenths the kernel kills ranks without a word",
        "raise the memory of the job, or lower activations.offload_fraction",
    )


def _meminfo(path: Path, name: str) -> int:
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _cgroup_limit(root: Path) -> int:
    """The smallest memory limit from this process's control group up; 0: none. Version 2, else version 1."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    limits = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory")
        name = "memory.max" if not controllers else "memory.limit_in_bytes"
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(top):
                break
            limits.append(_limit(place / name))
    limits = [limit for limit in limits if 0 < limit < 1 << 60]  # "no limit" of version 1 is a huge number
    return min(limits, default=0)


def _limit(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def shared_memory(ranks_here: int, *, on_gpus: bool, root: Path = Path("/")) -> Finding:
    """/dev/shm, in which NCCL and worker processes exchange; a container's default is 64 MB."""
    folder = root / "dev/shm"
    try:
        status = os.statvfs(folder)
    except OSError:
        return wrong("/dev/shm", "not there: torch and NCCL exchange in it", "mount it (docker: --ipc=host)")
    size = status.f_blocks * status.f_frsize
    text = readable_bytes(size)
    if size >= _SHARED_MEMORY:
        return ok("/dev/shm", text)
    if on_gpus and ranks_here > 1:
        return wrong(
            "/dev/shm", f"{text}: too little for NCCL between {ranks_here} ranks", "docker: --shm-size=16g, or --ipc=host"
        )
    return note("/dev/shm", f"{text}: too little for several ranks on GPUs (docker: --shm-size=16g)")


# ------------------------------------------------------------------------------------------------------------------------- limits


def limits(*, root: Path = Path("/")) -> Iterator[Finding]:
    """Limits of this shell that end jobs: locked memory where there is InfiniBand, open files."""
    locked, files = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], resource.getrlimit(resource.RLIMIT_NOFILE)
    has_infiniband = (root / "sys/class/infiniband").is_dir() and any((root / "sys/class/infiniband").iterdir())
    if has_infiniband and locked != resource.RLIM_INFINITY:
        yield wrong(
            "ulimit memlock",
            f"{readable_bytes(locked)}, and this machine has InfiniBand: NCCL cannot register its buffers",
            "ulimit -l unlimited (SLURM: PropagateResourceLimitsExcept=MEMLOCK in slurm.conf)",
        )
    else:
        yield ok(
            "ulimit memlock", "unlimited" if locked == resource.RLIM_INFINITY else f"{readable_bytes(locked)}, no InfiniBand"
        )
    soft, hard = files
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
        if soft < 1024:
            yield wrong(
                "ulimit nofile", f"{soft:,} open files: a rank needs more", f"ulimit -n {_OPEN_FILES} (the hard limit is {most})"
            )
        else:
            yield note("ulimit nofile", f"{soft:,} open files: little for hundreds of ranks (ulimit -n 65536; hard limit {most})")
    else:
        yield ok("ulimit nofile", "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}")


def clock(folder: Path) -> Finding:
    """This machine's clock against the file server's: what a file written now in `folder` is dated."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            skew = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        return wrong("run folder", f"{folder} cannot be written: {error.strerror}", "choose another output, or its permissions")
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}, {abs(skew):.1f} s from the file system's"
    if abs(skew) <= 30:
        return ok("clock", text)
    return wrong("clock", f"{text}: nodes that disagree by minutes are refused by munge and SLURM", "start chrony or ntpd")


def slurm(*, wanted: bool) -> Finding:
    """Whether jobs can be submitted from here."""
    if "SLURM_JOB_ID" in os.environ:
        return ok("slurm", f"inside job {os.environ['SLURM_JOB_ID']} on {socket.gethostname()}: `run` starts its ranks with srun")
    sbatch = shutil.which("sbatch")
    if sbatch:
        return ok("slurm", f"{sbatch}")
    text = "no sbatch here: `launch --submit` needs a login node of the cluster"
    return note("slurm", text) if wanted else ok("slurm", "no sbatch here (needed by `launch --submit` only)")
