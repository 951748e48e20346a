"""Checkpoints written beside the training: the same files, the newest complete one always loads, and no signal or death breaks it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import verify_manifest
from mcore_longctx.train import TrainJob, iteration_folder, latest_checkpoint
from tests.train.jobs import Ranks, die_in_save, make_job, make_world, refused, rows, start_at, tensor_hashes, train

pytestmark = pytest.mark.multiproc

STEPS = 8
WRITING = "mcore_longctx.train.writing"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def waiting(world: Path) -> TrainJob:
    """CP 2, the training waits for each save; every checkpoint kept."""
    job = make_job(world, "waiting", context_parallel_size=2, keep_checkpoints=9)
    train(job)
    return job


@pytest.fixture(scope="module")
def beside(world: Path) -> TrainJob:
    """The same with saves beside the training."""
    job = make_job(world, "beside", context_parallel_size=2, keep_checkpoints=9, async_save=True)
    train(job)
    return job


def folders(job: TrainJob) -> list[str]:
    return sorted(path.name for path in job.checkpoints.iterdir() if path.is_dir())


def status(job: TrainJob) -> str:
    return (job.log_folder / "STATUS").read_text()


def test_the_files_are_those_of_a_save_that_is_waited_for(waiting: TrainJob, beside: TrainJob) -> None:
    assert rows(beside) == rows(waiting)
    assert folders(beside) == folders(waiting) == [f"iter_{step:07d}" for step in (2, 4, 6, 8)]
    for step in (2, 4, 6, 8):
        mine, theirs = (iteration_folder(job.checkpoints, step) for job in (beside, waiting))
        manifests = [verify_manifest(folder, "checkpoint") for folder in (mine, theirs)]
        assert list(manifests[0]["files"]) == list(manifests[1]["files"])
        assert tensor_hashes(mine) == tensor_hashes(theirs)
        # where each tensor lies in the files, too
        places = [
            {
                (name, chunk.offsets, chunk.file.name, chunk.offset, chunk.length)
                for name, tensor in read_torch_dist(folder).tensors.items()
                for chunk in tensor.chunks
            }
            for folder in (mine, theirs)
        ]
        assert places[0] == places[1]
    log = (beside.log_folder / "rank0.log").read_text()
    assert re.search(r"saved iter_0000002 in \d+\.\d s, training waited \d+\.\d s", log)
    assert re.search(r"saved iter_0000008 in \d+\.\d s\n", log)  # nothing left to train: waited for


def slow_writing(rank: int, seconds: float) -> None:
    """Each rank's share takes `seconds` longer, in the process that writes it."""
    from mcore_longctx.train.writing import RankWriter

    write = RankWriter.write

    def slow(self: RankWriter) -> Any:
        time.sleep(seconds)
        return write(self)

    RankWriter.write = slow


def children(ranks: Ranks) -> list[int]:
    """Processes that the ranks have started."""
    import psutil

    found = [psutil.Process(process.pid).children(recursive=True) for process in ranks.processes]
    return [child.pid for some in found for child in some]


def wait_for_writers(ranks: Ranks) -> list[int]:
    while len(children(ranks)) < ranks.size:
        assert time.monotonic() < ranks.deadline
        time.sleep(0.005)
    return children(ranks)


def is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def assert_same_end(job: TrainJob, reference: TrainJob) -> None:
    assert rows(job) == rows(reference)
    assert [row["step"] for row in rows(job)] == list(range(1, STEPS + 1))
    last = [iteration_folder(one.checkpoints, STEPS) for one in (job, reference)]
    assert tensor_hashes(last[0]) == tensor_hashes(last[1])


def test_the_training_goes_on_while_a_checkpoint_is_written(world: Path, waiting: TrainJob) -> None:
    job = make_job(world, "goes-on", context_parallel_size=2, save_interval=4, async_save=True, train_iters=STEPS)
    ranks = train(job, before=slow_writing, args=(0.5,))
    said = [line for line in ranks.output(0).splitlines() if "iteration" in line or line.startswith("saved")]
    steps_of = {name: sum("iteration " in line for line in said[: said.index(line)]) for line in said for name in [line[:18]]}
    assert steps_of["saved iter_0000004"] > 4
    assert_same_end(job, waiting)


def test_one_save_at_a_time_and_never_more_folders_than_are_kept_and_one(world: Path) -> None:
    job = make_job(world, "bounded", save_interval=1, keep_checkpoints=2, async_save=True, train_iters=STEPS)
    ranks = Ranks(job, before=slow_writing, args=(0.1,))
    most, partial = 0, 0
    while ranks.processes[0].is_alive():
        names = [path.name for path in job.checkpoints.glob("iter_*")]
        most, partial = max(most, len(names)), max(partial, sum(".partial-" in name for name in names))
        time.sleep(0.002)
    assert ranks.wait() == [0]
    assert (most, partial) == (3, 1)
    assert folders(job) == ["iter_0000007", "iter_0000008"]
    assert len(re.findall(r"^saved iter_", ranks.output(0), re.MULTILINE)) == STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_to_every_process_finishes_the_save_and_saves_the_last_step(
    world: Path, waiting: TrainJob, number: signal.Signals
) -> None:
    job = make_job(world, f"stopped-{number}", context_parallel_size=2, save_interval=3, async_save=True, keep_checkpoints=9)
    ranks = Ranks(job, before=slow_writing, args=(1.0,))
    ranks.wait_for("iteration 4/8")
    for pid in (*wait_for_writers(ranks), *wait_for_writers(ranks)):  # twice, as SLURM may
        os.kill(pid, number)
    ranks.send(number)
    assert ranks.wait() == [75, 75]
    reached = rows(job)[-1]["step"]
    assert folders(job) == ["iter_0000003", f"iter_{reached:07d}"]
    assert status(job) == f"stopped 75 {number.name} at iteration {reached}, checkpoint saved; start again to go on\n"
    for name in folders(job):
        verify_manifest(job.checkpoints / name, "checkpoint")
    train(make_job(world, f"stopped-{number}", context_parallel_size=2, keep_checkpoints=9))
    assert_same_end(job, waiting)


def test_a_killed_rank_takes_its_writer_with_it(world: Path, waiting: TrainJob) -> None:
    job = make_job(world, "orphan", context_parallel_size=2, async_save=True)
    ranks = Ranks(job, before=slow_writing, args=(60.0,))
    ranks.wait_for("iteration 3/8")
    writers = wait_for_writers(ranks)
    assert len(writers) == 2
    ranks.kill()
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in writers):
        assert time.monotonic() < deadline, "a writer has outlived its rank"
        time.sleep(0.01)
    assert latest_checkpoint(job.checkpoints) is None
    train(job)
    assert_same_end(job, waiting)


def test_a_writer_that_dies_is_said_and_the_old_checkpoint_stays(world: Path, waiting: TrainJob) -> None:
    job = make_job(world, "killed-writer", context_parallel_size=2, async_save=True)
    start_at(job, iteration_folder(waiting.checkpoints, 2))
    ranks = Ranks(job, before=slow_writing, args=(1.0,))
    ranks.wait_for("iteration 5/8")
    os.kill(wait_for_writers(ranks)[1], signal.SIGKILL)
    assert ranks.wait() == [1, 1]
    assert ranks.errors() == [
        f"mcore-longctx: {job.checkpoints}/iter_0000004: the checkpoint could not be written: rank 1: the writing process ended with"
        " signal 9 (SIGKILL); iter_0000002 is untouched"
    ]
    assert folders(job) == ["iter_0000002"]
    assert status(job).startswith("failed 1 ")


def limit_file_size(rank: int, size: int) -> None:
    """No file of rank 1 may grow beyond `size` bytes: what a quota looks like to a writer."""
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_write_that_fails_beside_the_training_is_one_line(world: Path, waiting: TrainJob) -> None:
    job = make_job(world, "quota", context_parallel_size=2, async_save=True)
    start_at(job, iteration_folder(waiting.checkpoints, 2))
    line = refused(job, code=1, before=limit_file_size, args=(100_000,))
    assert line.startswith(f"mcore-longctx: {job.checkpoints}/iter_0000004: the checkpoint could not be written: rank 1: ")
    assert "File too large" in line
    assert line.endswith("; iter_0000002 is untouched")
    assert folders(job) == ["iter_0000002"]
    train(job)
    assert rows(job) == rows(waiting)[2:]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill_disk(rank: int, place: Path, where: str) -> None:
    """The disk is full from the moment at which a checkpoint's tensors, or its manifest, are to be written.

    It is when the job tells how it ended, too: somebody else takes what the removal of the partial checkpoint has freed.
    """
    from mcore_longctx.train import checkpoint
    from mcore_longctx.train.outcome import Outcome
    from mcore_longctx.train.writing import RankWriter

    def full(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            with (place / "filler").open("ab", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
            return function(*args, **options)

        return run

    Outcome.failed = full(Outcome.failed)
    if where == "tensors":
        RankWriter.write = full(RankWriter.write)
    else:
        checkpoint.write_manifest = full(checkpoint.write_manifest)


def assert_no_traceback(folder: Path) -> None:
    for path in folder.glob("*.err"):
        assert "Traceback" not in path.read_text()
        assert "Logging error" not in path.read_text()


@pytest.mark.parametrize("where", ["tensors", "manifest"])
@pytest.mark.parametrize("is_beside", [False, True], ids=["waited-for", "beside"])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(
    world: Path, small_disk: Path, waiting: TrainJob, is_beside: bool, where: str, tmp_path: Path
) -> None:
    run = small_disk / "run"  # all of it: logs, metrics and STATUS have no room either
    place = run / "checkpoints"
    job = make_job(
        world,
        f"full-{is_beside}-{where}",
        async_save=is_beside,
        checkpoints=place,
        log_folder=run / "logs",
        metrics_path=run / "metrics.jsonl",
        tensorboard=run / "tensorboard",
    )
    place.mkdir(parents=True)
    start_at(job, iteration_folder(waiting.checkpoints, 2))
    line = refused(job, code=1, before=fill_disk, args=(small_disk, where), folder=tmp_path / "ranks")
    assert_no_traceback(tmp_path / "ranks")
    assert line.startswith(f"mcore-longctx: {place}/iter_0000004: the checkpoint could not be written: ")
    assert "No space left on device" in line
    assert line.endswith("; iter_0000002 is untouched")
    assert folders(job) == ["iter_0000002"]
    verify_manifest(place / "iter_0000002", "checkpoint")
    assert status(job) == f"failed 1 {line.removeprefix('mcore-longctx: ')}\n"
    (small_disk / "filler").unlink()
    train(job)
    assert [row["samples"] for row in rows(job)] == [row["samples"] for row in rows(waiting)[2:]]


def test_what_will_not_fit_later_is_said_before_the_first_step(world: Path, small_disk: Path) -> None:
    place = small_disk / "checkpoints"
    place.mkdir()
    line = refused(make_job(world, "later", checkpoints=place, save_interval=1, keep_checkpoints=40, train_iters=60), code=1)
    assert re.search(
        r"MB free, 41 checkpoints \(those that are kept and one being written\) need \d+\.\d MB; free some space and start again or lower",
        line,
    )
    assert folders(make_job(world, "later", checkpoints=place)) == []


FOLDER = "mcore_longctx.checkpoint_folder"
DEATHS = [  # where in a save, and which checkpoint is the newest afterwards
    ((WRITING, "RankWriter.write", 1, False), None),
    ((WRITING, "RankWriter.write", 1, True), None),
    (("mcore_longctx.train.checkpoint", "write_manifest", 1, True), None),
    ((FOLDER, "publish", 1, True), "iter_0000002"),
    ((FOLDER, "write_tracker", 1, False), "iter_0000004"),
    (("shutil", "rmtree", 1, False), "iter_0000006"),  # old checkpoint renamed, not yet removed
]


def test_a_kill_inside_a_save_beside_the_training_never_leaves_half_a_checkpoint(world: Path) -> None:
    job = make_job(world, "half", keep_checkpoints=1, async_save=True)
    for death, newest in DEATHS:
        ranks = Ranks(job, before=die_in_save, args=death)
        assert ranks.wait() == [-signal.SIGKILL], ranks.output(0)
        found = latest_checkpoint(job.checkpoints)
        assert (found.name if found else None) == newest, death
        if found:
            verify_manifest(found, "checkpoint")
    train(job)
    whole = make_job(world, "whole")
    train(whole)
    assert_same_end(job, whole)
    assert folders(job) == ["iter_0000008"]


def kill_many(folder: Path, kills: int, seed: int, seconds: float) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kills", str(folder), str(kills), str(seed)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    import json

    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert found["in a save"] > kills / 4
    return found


def test_kills_spread_over_saves_always_leave_a_checkpoint_that_loads(tmp_path: Path) -> None:
    kill_many(tmp_path, 16, seed=1, seconds=240)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_200_kills_spread_over_saves_always_leave_a_checkpoint_that_loads(tmp_path: Path) -> None:
    found = kill_many(tmp_path, 200, seed=2, seconds=2900)
    assert found["beside"] == 100
