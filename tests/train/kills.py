"""Kills a training many times, at random moments of its saves, and looks each time at what is on the disk.

    python -m tests.train.kills FOLDER KILLS SEED

Every start is forked from one process that has imported everything: a start costs tenths of a second. It saves after every step, by turns
beside the training and not, and is killed, with all its processes, at a random moment after its first step. Each start goes on from
what the kill before it has left. Prints one JSON line.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mcore_longctx.train import TrainJob, latest_checkpoint
from mcore_longctx.train.checkpoint import verify_checkpoint
from mcore_longctx.train.loop import train_stage
from tests.train.jobs import make_job, make_world, rows

STEPS, KEEP = 120, 2


def job_of(world: Path, run: str, **changes: Any) -> TrainJob:
    return make_job(world, run, train_iters=STEPS, keep_checkpoints=KEEP, global_batch_size=1, **changes)


def start(job: TrainJob) -> int:
    """Fork a process group that trains. Returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        job.log_folder.mkdir(parents=True, exist_ok=True)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job.log_folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        code = train_stage(job)
    finally:
        os._exit(code)


def finish(job: TrainJob) -> None:
    _, status = os.waitpid(start(job), 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise AssertionError(f"exit code {code}: {(job.log_folder / 'err').read_text()[-2000:]}")


def group_is_gone(group: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def look(job: TrainJob) -> dict[str, int]:
    """Verify every byte of the newest checkpoint. Returns what lies in the folder."""
    found = latest_checkpoint(job.checkpoints)
    if found is not None:
        verify_checkpoint(found, shape=job.shape, rope=job.rope)
    names = [path.name for path in job.checkpoints.glob("iter_*")]
    partial = sum(".partial-" in name for name in names)
    if len(names) > KEEP + 2 or partial > 1:
        raise AssertionError(f"too much is kept: {names}")
    return {"complete": len(names) - partial, "partial": partial}


def kill_once(job: TrainJob, delay: float, *, alone: bool) -> bool:
    """Start, wait for the first step and a moment more, and kill. Whether there was still something to kill.

    Args:
        job: the job.
        delay: seconds after the first step.
        alone: kill the trainer only: what it has started must follow by itself.
    """
    before = steps_of(job)
    pid = start(job)
    deadline = time.monotonic() + 120
    moment = math.inf
    while time.monotonic() < min(moment, deadline):
        if moment is math.inf and steps_of(job) > before:
            moment = time.monotonic() + delay
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code:
                raise AssertionError(f"exit code {code}: {(job.log_folder / 'err').read_text()[-2000:]}")
            return False
        time.sleep(0.002)
    if moment is math.inf:
        raise AssertionError("no step in 120 s")
    (os.kill if alone else os.killpg)(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not group_is_gone(pid, 10):
        raise AssertionError("a process has outlived its trainer")
    return True


def steps_of(job: TrainJob) -> int:
    return job.metrics_path.read_text().count("\n") if job.metrics_path.exists() else 0


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    importlib.import_module("torch.utils.tensorboard")  # what a start would import by itself
    gc.freeze()
    dice = random.Random(seed)
    world = make_world(folder)
    reference = job_of(world, "reference", save_interval=STEPS)
    finish(reference)
    expected = rows(reference)
    counts = {"kills": 0, "in a save": 0, "beside": 0, "trainer alone": 0, "runs": 0}
    while counts["kills"] < kills:
        counts["runs"] += 1
        run = f"killed{counts['runs']}"
        while counts["kills"] < kills:
            is_beside, alone = bool(counts["kills"] % 2), counts["kills"] % 5 == 4
            job = job_of(world, run, save_interval=1, async_save=is_beside)
            if not kill_once(job, dice.uniform(0, 0.4), alone=alone):
                break
            counts["in a save"] += bool(look(job)["partial"])
            counts["kills"] += 1
            counts["beside"] += is_beside
            counts["trainer alone"] += alone
        finish(job_of(world, run, save_interval=1))
        if rows(job) != expected:
            raise AssertionError(f"{run} has other losses than a run that was never killed")
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
