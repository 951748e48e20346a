"""A stop signal ends a job within a micro-batch and a save, wherever it comes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.manifest import verify_manifest
from mcore_longctx.train import TrainJob, iteration_folder, latest_checkpoint
from tests.train.jobs import Ranks, make_job, make_world, rows

pytestmark = pytest.mark.multiproc

SLOW = 0.3  # seconds of a micro-batch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def slow_micro_batches(rank: int) -> None:
    from mcore_longctx.train.dataset import StepData

    as_tensors = StepData._as_tensors

    def slow(self: StepData, rows: Any) -> Any:
        time.sleep(SLOW)
        return as_tensors(self, rows)

    StepData._as_tensors = slow


def status(job: TrainJob) -> str:
    return (job.log_folder / "STATUS").read_text()


@pytest.mark.parametrize(
    ("layout", "number"),
    [({"context_parallel_size": 2}, signal.SIGTERM), ({"data_parallel_size": 2}, signal.SIGUSR1)],
    ids=["CP2", "DP2"],
)
def test_a_stop_takes_a_micro_batch_and_a_save_not_a_step(world: Path, layout: dict[str, int], number: signal.Signals) -> None:
    """20 micro-batches of 0.3 s a step: the signal comes to one rank, in the second step."""
    batch = 20 * layout.get("data_parallel_size", 1)
    job = make_job(
        world, f"stop-{'-'.join(layout)}-{number}", global_batch_size=batch, train_iters=3, save_interval=100, **layout
    )
    assert job.stage.num_microbatches == 20
    ranks = Ranks(job, before=slow_micro_batches)
    ranks.wait_for("iteration 1/3")
    time.sleep(3 * SLOW)
    began = time.monotonic()
    for _ in range(2):
        ranks.send(number, range(1, 2))
    while not status(job).startswith("stopped 75 "):
        assert time.monotonic() < ranks.deadline
        time.sleep(0.005)
    took = time.monotonic() - began
    assert ranks.wait() == [75, 75]
    assert status(job) == f"stopped 75 {number.name} at iteration 1, checkpoint saved; start again to go on\n"
    assert took < 12 * SLOW  # the step had 17 micro-batches to go
    assert [row["step"] for row in rows(job)] == [1]
    verify_manifest(iteration_folder(job.checkpoints, 1), "checkpoint")


def stop_in(rank: int, what: str) -> None:
    """Both signals, to rank 1 alone, while the job loads or while it saves its second step."""
    from mcore_longctx.train import loop
    from mcore_longctx.train.writing import RankWriter

    def signalled(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **options)

        return run

    if what == "loading":
        loop.load_model_weights = signalled(loop.load_model_weights)
    else:
        RankWriter.write = signalled(RankWriter.write)


def test_a_stop_while_loading_takes_no_step(world: Path) -> None:
    job = make_job(world, "loading", context_parallel_size=2)
    assert Ranks(job, before=stop_in, args=("loading",)).wait() == [75, 75]
    assert status(job) == "stopped 75 SIGUSR1 at iteration 0, before the first step, nothing to save; start again to go on\n"
    assert latest_checkpoint(job.checkpoints) is None


def test_a_stop_while_saving_finishes_the_save_and_takes_no_step_more(world: Path) -> None:
    job = make_job(world, "saving", context_parallel_size=2)
    assert Ranks(job, before=stop_in, args=("saving",)).wait() == [75, 75]
    assert status(job) == "stopped 75 SIGUSR1 at iteration 2, checkpoint saved; start again to go on\n"
    assert [row["step"] for row in rows(job)] == [1, 2]
    verify_manifest(iteration_folder(job.checkpoints, 2), "checkpoint")
