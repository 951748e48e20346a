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


def has_ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


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


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    importlib.import_module("torch.utils.tensorboard")  # what a start would import by itself
    gc.freeze()
    dice = random.Random(seed)
    world = make_world(folder)
    reference = job_of(world, "reference", save_interval=STEPS)
    finish(reference)
    expected = rows(reference)
    done, run, counts = 0, 0, {"during a save": 0, "between saves": 0, "beside": 0, "alone writers killed": 0, "finished runs": 0}
    while done < kills:
        job = job_of(world, f"killed{run}", save_interval=1)
        run += 1
        while done < kills:
            is_beside = bool(done % 2)
            one = job_of(world, f"killed{run - 1}", save_interval=1, async_save=is_beside)
            lines = len(job.metrics_path.read_text().splitlines()) if job.metrics_path.exists() else 0
            pid = start(one)
            deadline = time.monotonic() + 60
            while not job.metrics_path.exists() or len(job.metrics_path.read_text().splitlines()) <= lines:
                if has_ended(pid) or time.monotonic() > deadline:
                    break
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.4))
            if done % 5 == 4:  # the trainer alone: what it has started must follow by itself
                os.kill(pid, signal.SIGKILL)
                counts["alone writers killed"] += 1
            else:
                os.killpg(pid, signal.SIGKILL)
            try:
                _, status = os.waitpid(pid, 0)
            except ChildProcessError:  # it has ended before: the run is done
                break
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                break
            if not group_is_gone(pid, 5):
                raise AssertionError("a process has outlived its trainer")
            found = look(one)
            counts["during a save" if found["partial"] else "between saves"] += 1
            counts["beside"] += is_beside
            done += 1
        if done < kills:
            finish(job)
            counts["finished runs"] += 1
        mine = rows(job)
        if mine != expected[: len(mine)]:
            raise AssertionError(f"run {run - 1} has other losses than one that was never killed")
    last = job_of(world, f"killed{run - 1}", save_interval=1)
    finish(last)
    if rows(last) != expected:
        raise AssertionError("the last run has other losses than one that was never killed")
    sys.stdout.write(json.dumps({"kills": done, "runs": run, **counts}) + "\n")


if __name__ == "__main__":
    main()
