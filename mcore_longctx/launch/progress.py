"""One slice of a training under SLURM: what it began with, what became of it, and what the job must do next.

A slice is one start of a job: until the training is done, told to stop, or dead. `begin_slice` notes the newest verified checkpoint,
`end_slice` reads STATUS and looks again. Two slices of a job in a row without a newer checkpoint stop the chain.

    logs/<stage>/slice-<job>.json   the slice that runs; asked-<job>: what its script was told; error-<job>: why its ranks never began
    logs/<stage>/slices.jsonl       a line for each that has ended
    logs/<stage>/hold               made by a person: save, and do not come back
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from mcore_longctx.checkpoint_folder import iteration_of, latest_checkpoint, lock_owner
from mcore_longctx.errors import CheckpointError, ConfigError, InUseError, NoProgress
from mcore_longctx.launch.status import State, read_status
from mcore_longctx.manifest import verify_manifest, write_atomic

__all__ = ["Slice", "StageFolders", "Verdict", "begin_slice", "decide", "end_slice", "newest_verified", "read_slices"]

IDLE_SLICES = 2  # without a newer checkpoint, in a row
SHORT_SLICES = 10  # told to stop before a step could end, in a row
LOCK_SECONDS = 600.0  # ranks of a slice whose node was lost may live on until they notice
_POLL_SECONDS = 5.0

# What the trainer says of an exception that it did not raise itself (`rank 3: RuntimeError: ...`), when a rank has lost its peers, its
# network, its disk or its GPU, and of a save whose disk went away or whose writing process was killed (most often: host memory):
# the machine's doing, another start may help. A full disk is not among them: it stays full.
_MACHINE = re.compile(
    r"rank \d+: .*(DistBackendError|DistNetworkError|DistStoreError|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|"
    r"[Tt]imed out|CUDA error|AcceleratorError|ECC error|Input/output error|Stale file handle)|"
    r".*the checkpoint could not be written: .*(Input/output error|Stale file handle|[Tt]imed out|Remote I/O error|"
    r"[Tt]ransport endpoint|Connection closed|Connection reset|writing process ended with signal \d+ \(SIG(KILL|TERM|BUS)\))"
)


@dataclass(frozen=True)
class StageFolders:
    """Of one stage: its logs, its checkpoints, and the iteration at which it is done."""

    stage: str
    logs: Path
    checkpoints: Path
    iterations: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One start of a job. Iterations are those of the newest verified checkpoint, -1: none."""

    job: str
    restart: int
    nodes: str  # as SLURM writes them: n[0-31]
    began: float  # seconds since the epoch
    before: int
    short_seconds: float  # start-up and one step: less is too short for a newer checkpoint
    seconds: float = 0.0
    after: int = -1
    state: State = "none"
    code: int | None = None
    reason: str = ""
    asked: str = ""  # USR1 or TERM: its script was told to stop; PREEMPT: not yet, but SLURM said that it was preempting the job
    srun_code: int | None = None
    verdict: str = ""

    @property
    def moved(self) -> bool:
        """Whether there is a newer checkpoint than before."""
        return self.after > self.before

    @property
    def short(self) -> bool:
        """Whether it was told to stop before a step could end: the script, or the ranks alone (at a preemption with GraceTime)."""
        return (bool(self.asked) or self.state == "stopped") and self.seconds < self.short_seconds

    @property
    def died(self) -> bool:
        """Whether it ended by itself, and badly: perhaps for its nodes."""
        return self.state not in ("stopped", "done") and self.asked != "PREEMPT" and bool(self.nodes)


@dataclass(frozen=True)
class Verdict:
    """What the script does next (0: the chain goes on; 1, 2, 3: it stops; 75: requeue), and one line for people."""

    code: int
    word: str  # done, failed, refused, requeue, held, no progress
    line: str


def decide(slices: Sequence[Slice], stage: StageFolders) -> Verdict:
    """The verdict on the last of the slices of a job."""
    last = slices[-1]
    moved = f"from {_at(last.before)} to {_at(last.after)}" if last.moved else f"still at {_at(last.after)}"
    if last.state == "done":
        if last.after >= stage.iterations:
            return Verdict(0, "done", f"done: {last.reason}, {_at(last.after)}")
        what = f"STATUS says done, the newest verified checkpoint is {_at(last.after)} of {stage.iterations}"
        return Verdict(1, "failed", f"failed: {what}; look at {stage.checkpoints}")
    if last.state == "failed" and not _MACHINE.match(last.reason):
        if last.code == 2:
            return Verdict(2, "refused", f"refused: {last.reason}")
        return Verdict(1, "failed", f"failed: {last.reason} ({moved})")
    what = _how_it_ended(last)
    idle, short = _without_progress(slices)
    if idle >= IDLE_SLICES:
        line = f"no progress: {idle} slices in a row without a newer checkpoint ({_at(last.after)}); the last one {what}"
        died = f"; {_deaths(slices)}" if last.died else ""
        return Verdict(3, "no progress", f"{line}; look at {stage.logs}{died}")
    if short >= SHORT_SLICES:
        line = (
            f"no progress: {short} slices in a row were told to stop before start-up and one step ({last.short_seconds:,.0f} s)"
        )
        return Verdict(3, "no progress", f"{line}; ask for a partition that leaves more time")
    count = " (told to stop before start-up and one step: not counted)" if last.short and not last.moved else ""
    died = f"; {_deaths(slices)}" if last.died else ""
    return Verdict(75, "requeue", f"requeue: it {what}, {moved}{count}{died}")


def _how_it_ended(last: Slice) -> str:
    words = {
        "stopped": f"stopped ({last.reason})",
        "hung": f"hung ({last.reason})",
        "failed": f"lost a machine or a link ({last.reason})",
        "running": "died without a word",
        "none": "ended before training began",
        "done": "is done",
    }[last.state]
    code = "" if last.srun_code in (None, 0) or last.state == "stopped" else f", srun ended with {last.srun_code}"
    return words + code + (", SLURM was preempting the job" if last.asked == "PREEMPT" else "")


def _deaths(slices: Sequence[Slice]) -> str:
    """Where slices died: a node that is in every one of them is worth an --exclude."""
    dead = [one for one in slices if one.died]
    nodes = dict.fromkeys(one.nodes for one in dead)
    return f"slices of this job that died: {len(dead)}, on {', then on '.join(nodes)} (sbatch --exclude=NODE leaves one out)"


def _without_progress(slices: Sequence[Slice]) -> tuple[int, int]:
    """Slices since the last newer checkpoint: (those that had the time for one, those that had not)."""
    idle = short = 0
    for one in reversed(slices):
        if one.moved:
            break
        if one.short:
            short += 1
        else:
            idle += 1
    return idle, short


def _at(iteration: int) -> str:
    return "no checkpoint" if iteration < 0 else f"checkpoint {iteration}"


def newest_verified(checkpoints: Path) -> int:
    """Iteration of the newest checkpoint, if it has every file of its manifest in its size; -1 if not, or if there is none."""
    newest = latest_checkpoint(checkpoints)
    if newest is None:
        return -1
    try:
        verify_manifest(newest, "checkpoint", hashes=False)
    except CheckpointError:
        return -1
    return iteration_of(newest)


def begin_slice(
    stage: StageFolders, environment: Mapping[str, str], *, short_seconds: float, queued: Collection[str] = ()
) -> Slice:
    """Note what this slice begins with, and close one before it that was killed with its script.

    Waits, up to LOCK_SECONDS, for ranks of an earlier slice of this job that still hold the checkpoints.

    Args:
        stage: whose training it is.
        environment: of the job (SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_JOB_NODELIST).
        short_seconds: start-up and one step.
        queued: ids of the jobs in the queue, this one among them; if it is not, the list is no list, and other jobs are known
            by the lock alone.

    Raises:
        NoProgress: the slice before was killed with its script, and it was one too many without a newer checkpoint.
        InUseError: another job trains into this folder, or will when it comes back; its number is in the message.
        ConfigError: a person holds the stage.
    """
    hold = stage.logs / "hold"
    if hold.exists():
        raise ConfigError("this stage is held", where=hold, fix="remove the file and submit again")
    job = _job_of(environment)
    _wait_for_lock(stage.checkpoints, job)
    stage.logs.mkdir(parents=True, exist_ok=True)
    before = newest_verified(stage.checkpoints)
    _close_killed(stage, job, before)
    now = Slice(
        job=job,
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=environment.get("SLURM_JOB_NODELIST", ""),
        began=time.time(),
        before=before,
        short_seconds=short_seconds,
    )
    own = _file(stage, "slice", job)
    write_atomic(own, json.dumps(asdict(now)) + "\n")  # then a look at others: of two that begin at once, none misses the other
    try:
        _refuse_beside(stage, job, queued)
    except InUseError:
        own.unlink()
        raise
    for path in (stage.logs / "STATUS", *(_file(stage, name, job) for name in ("error", "asked"))):
        path.unlink(missing_ok=True)  # of a slice before: what is not there cannot be taken for this one's
    return now


def _close_killed(stage: StageFolders, job: str, newest: int) -> None:
    """Count the slice before this one, if its script was killed before `slice end`."""
    own = _file(stage, "slice", job)
    killed = _slice_of(own.read_bytes()) if own.is_file() else None
    if killed is None:
        return
    earlier = _of_job(stage, job)
    if not any(
        (one.restart, one.began) == (killed.restart, killed.began) for one in earlier
    ):  # or killed after its line was written
        status = read_status(_file(stage, "error", job), stage.logs / "STATUS")
        alive = max((path.stat().st_mtime for path in stage.logs.rglob("*") if path.is_file()), default=killed.began)
        ended = replace(
            killed,
            seconds=round(max(0.0, alive - killed.began), 1),
            after=newest,
            state=status.state,
            code=status.code,
            reason=status.reason,
            asked=_asked(stage, job),
        )
        earlier.append(ended)
        _append(stage, replace(ended, verdict=f"{decide(earlier, stage).word} (killed with its script)"))
    own.unlink()
    verdict = decide(earlier, stage)
    if verdict.code == 3:
        raise NoProgress(verdict.line)


def _refuse_beside(stage: StageFolders, job: str, queued: Collection[str]) -> None:
    """Refuse to begin beside another job that is in the queue; what jobs left that are gone is removed."""
    if job not in queued:
        return
    for path in sorted(stage.logs.glob("slice-*.json")):
        other = path.stem.removeprefix("slice-")
        if other == job:
            continue
        if other in queued:
            fix = f"wait for it, scancel {other}, or use another output"
            raise InUseError(f"SLURM job {other} trains into this folder", where=stage.checkpoints, fix=fix)
        for name in ("slice", "error", "asked"):
            _file(stage, name, other).unlink(missing_ok=True)


def end_slice(stage: StageFolders, environment: Mapping[str, str], *, asked: str, srun_code: int | None) -> Verdict:
    """Look at what the slice of this job has left, write its line, and say what comes next.

    Raises:
        ConfigError: this job has begun no slice.
    """
    job = _job_of(environment)
    own = _file(stage, "slice", job)
    if not own.is_file():
        raise ConfigError("no slice has begun here", where=stage.logs, fix="`mcore-longctx slice begin` comes first")
    running = _slice_of(own.read_bytes()) or _unreadable(stage, environment)
    # `error` is this job's own; STATUS may be that of another job, which was first and holds the folder
    status = read_status(_file(stage, "error", job), stage.logs / "STATUS")
    ended = replace(
        running,
        seconds=round(time.time() - running.began, 1),
        after=newest_verified(stage.checkpoints),
        state=status.state,
        code=status.code,
        reason=status.reason,
        asked=asked or _asked(stage, job),
        srun_code=srun_code,
    )
    verdict = decide([*_of_job(stage, job), ended], stage)
    hold = stage.logs / "hold"
    if verdict.code == 75 and hold.exists():
        line = f"held: {verdict.line.removeprefix('requeue: ')}; {hold} is there: remove it and submit again to go on"
        verdict = Verdict(1, "held", line)
    _append(stage, replace(ended, verdict=verdict.word))
    for name in ("error", "asked", "slice"):
        _file(stage, name, job).unlink(missing_ok=True)
    return verdict


def _unreadable(stage: StageFolders, environment: Mapping[str, str]) -> Slice:
    """What is known of a slice whose file is damaged: it began where the one before it had ended, when the file was written."""
    job = _job_of(environment)
    earlier = _of_job(stage, job)
    return Slice(
        job=job,
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=environment.get("SLURM_JOB_NODELIST", ""),
        began=_file(stage, "slice", job).stat().st_mtime,
        before=earlier[-1].after if earlier else -1,
        short_seconds=0.0,
    )


def _wait_for_lock(checkpoints: Path, job: str) -> None:
    """A lock of a dead process is gone: the kernel, or the file server, gives it back."""
    until = time.monotonic() + LOCK_SECONDS
    while owner := lock_owner(checkpoints):
        ours = bool(job) and owner.endswith(f"SLURM job {job}")
        if not ours or time.monotonic() > until:
            fix = "wait for it, scancel it, or use another output"
            if ours:
                fix = (
                    "ranks of an earlier slice of this job live on: end them on that host, then scontrol release or submit again"
                )
            raise InUseError(f"{owner} trains into this folder", where=checkpoints, fix=fix)
        time.sleep(_POLL_SECONDS)


def _job_of(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_JOB_ID", "")


def _file(stage: StageFolders, name: str, job: str) -> Path:
    """A file of one job: `slice-4711.json`, and `asked-4711` and `error-4711` as its script names them."""
    return stage.logs / f"{name}-{job}{'.json' if name == 'slice' else ''}"


def _asked(stage: StageFolders, job: str) -> str:
    """What the script was told, as its trap wrote it down: it may have been killed before it could say so."""
    file = _file(stage, "asked", job)
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""


def _of_job(stage: StageFolders, job: str) -> list[Slice]:
    return [one for one in read_slices(stage.logs) if one.job == job]


def read_slices(log_folder: Path) -> list[Slice]:
    """The slices of a stage that have ended, oldest first. Lines that are cut or damaged are left out."""
    file = log_folder / "slices.jsonl"
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    return [one for one in map(_slice_of, lines) if one is not None]


def _slice_of(line: bytes) -> Slice | None:
    """None for a line that was cut short by a kill, or is none of ours."""
    try:
        return msgspec.json.decode(line, type=Slice)
    except (msgspec.MsgspecError, ValueError):
        return None


def _append(stage: StageFolders, ended: Slice) -> None:
    path = stage.logs / "slices.jsonl"
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")  # a writer was killed
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(asdict(ended)) + "\n")
