"""A run that is killed, stopped or moved to another layout ends as one that never stopped. Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.manifest import verify_manifest
from mcore_longctx.train import TrainJob, iteration_folder, latest_checkpoint
from tests.train.jobs import Ranks, die_in_save, make_job, make_world, rows, start_at, tensor_hashes, train

pytestmark = pytest.mark.multiproc

STEPS, SAVE_EVERY = 8, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: Path) -> TrainJob:
    """CP=2, never stopped; every checkpoint kept."""
    job = make_job(world, "straight", context_parallel_size=2, keep_checkpoints=9)
    train(job)
    return job


@pytest.fixture(scope="module")
def alone(world: Path) -> TrainJob:
    """One process, never stopped."""
    job = make_job(world, "alone", keep_checkpoints=9)
    train(job)
    return job


def assert_same_end(job: TrainJob, reference: TrainJob) -> None:
    """Every step once, the same losses, norms, rates and samples, and the same weights and moments, all bit for bit."""
    assert rows(job) == rows(reference)
    assert [row["step"] for row in rows(job)] == list(range(1, STEPS + 1))
    final = iteration_folder(job.checkpoints, STEPS)
    verify_manifest(final, "checkpoint")
    assert tensor_hashes(final) == tensor_hashes(iteration_folder(reference.checkpoints, STEPS))


def status(job: TrainJob) -> str:
    return (job.log_folder / "STATUS").read_text()


def test_losses_fall_and_every_checkpoint_is_whole(straight: TrainJob) -> None:
    losses = [row["loss"] for row in rows(straight)]
    assert losses[-1] < losses[0] - 0.3
    assert status(straight) == "done 0 8 iterations\n"
    assert (straight.checkpoints / "latest_checkpointed_iteration.txt").read_text() == "8"
    for iteration in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY):
        manifest = verify_manifest(iteration_folder(straight.checkpoints, iteration), "checkpoint")
        assert (manifest["iteration"], manifest["consumed_samples"], manifest["stage"]) == (iteration, 4 * iteration, "extend")
        assert {"common.pt", ".metadata", "__0_0.distcp", "__1_0.distcp", "hf/config.json", "hf/tokenizer.json"} <= set(
            manifest["files"]
        )
    log = (straight.log_folder / "rank0.log").read_text()
    assert "] saved iter_0000008 in " in log
    assert "all 20 samples have been seen once, pass 2 goes on in a new order" in log
    assert "|" in log.splitlines()[-2]


def test_kill_9_at_any_step_changes_nothing(world: Path, straight: TrainJob) -> None:
    job = make_job(world, "killed", context_parallel_size=2)
    for step in (1, 3, 4, 6):  # before the first save, between saves, while saving
        ranks = Ranks(job)
        ranks.wait_for(f"iteration {step}/8")
        ranks.kill()
        assert status(job).startswith("running - process ")
    train(job)
    assert_same_end(job, straight)
    assert sorted(path.name for path in job.checkpoints.iterdir() if path.is_dir()) == ["iter_0000006", "iter_0000008"]


def test_a_lost_rank_ends_the_others_and_the_next_start_goes_on(world: Path, straight: TrainJob) -> None:
    job = make_job(world, "lost", context_parallel_size=2)
    ranks = Ranks(job)
    ranks.wait_for("iteration 3/8")
    ranks.send(signal.SIGKILL, range(1, 2))
    assert ranks.wait() == [1, -signal.SIGKILL]
    (line,) = ranks.errors()
    assert line.startswith("mcore-longctx: rank 0: RuntimeError: ")
    assert line.endswith(f"(details in {job.log_folder / 'rank0.log'})")
    assert status(job).startswith("failed 1 rank 0: RuntimeError: ")
    train(job)
    assert_same_end(job, straight)


def test_signals_save_and_end_with_75(world: Path, straight: TrainJob) -> None:
    job = make_job(world, "signals", context_parallel_size=2, save_interval=100)
    for step, number, receivers in ((1, signal.SIGTERM, range(2)), (4, signal.SIGUSR1, range(1, 2))):
        ranks = Ranks(job)
        ranks.wait_for(f"iteration {step}/8")
        for _ in range(2):  # they may come twice
            ranks.send(number, receivers)
        assert ranks.wait() == [75, 75]
        newest = latest_checkpoint(job.checkpoints)
        assert newest is not None
        reached = int(newest.name.removeprefix("iter_"))
        assert step <= reached < STEPS
        name = signal.Signals(number).name
        assert status(job) == f"stopped 75 {name} at iteration {reached}, checkpoint saved; start again to go on\n"
        assert ranks.errors() == [f"mcore-longctx: {name} at iteration {reached}, checkpoint saved; start again to go on"]
        assert rows(job)[-1]["step"] == reached
    train(job)
    assert_same_end(job, straight)


def stop_inside_step(rank: int, sample: int) -> None:
    """SIGTERM to rank 1 when it comes to a sample: the third micro-batch of the fourth step."""
    from mcore_longctx.train.dataset import StepData

    as_tensors = StepData._as_tensors

    def stop_before(self: StepData, rows: Any) -> Any:
        if rank == 1 and sample in rows.sample_ids:
            os.kill(os.getpid(), signal.SIGTERM)
        return as_tensors(self, rows)

    StepData._as_tensors = stop_before


def test_a_signal_inside_a_step_drops_the_step(world: Path, straight: TrainJob) -> None:
    from mcore_longctx.train.order import SampleOrder

    job = make_job(world, "inside", context_parallel_size=2)
    sample = SampleOrder(20, seed=job.seed)[3 * 4 + 2]
    ranks = Ranks(job, before=stop_inside_step, args=(sample,))
    assert ranks.wait() == [75, 75]
    assert "SIGTERM at iteration 3, checkpoint saved" in status(job)
    assert "iteration 4/8" not in ranks.output(0)
    train(job)
    assert_same_end(job, straight)


def stop_before_the_first_step(rank: int) -> None:
    from mcore_longctx.train import loop

    build = loop.build_gpt_model

    def build_and_stop(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(*args, **kwargs)

    loop.build_gpt_model = build_and_stop


def test_a_signal_before_the_first_step_takes_none(world: Path) -> None:
    job = make_job(world, "early")
    assert Ranks(job, before=stop_before_the_first_step).wait() == [75]
    assert status(job) == "stopped 75 SIGUSR1 at iteration 0, before the first step, nothing to save; start again to go on\n"
    assert latest_checkpoint(job.checkpoints) is None
    assert job.metrics_path.read_text() == ""


CHECKPOINT, WRITING = "mcore_longctx.train.checkpoint", "mcore_longctx.train.writing"
DEATHS = [  # where in a save, and which checkpoint is the newest afterwards
    ((WRITING, "RankWriter.write", 1, True), None),
    ((CHECKPOINT, "write_card", 1, False), None),
    ((CHECKPOINT, "write_manifest", 1, True), None),
    (("mcore_longctx.checkpoint_folder", "write_tracker", 1, False), "iter_0000002"),
    (("shutil", "rmtree", 1, False), "iter_0000004"),  # old checkpoint renamed, not yet removed
    ((WRITING, "RankWriter.write", 1, False), "iter_0000004"),
]


def test_a_kill_inside_a_save_never_leaves_half_a_checkpoint(world: Path, alone: TrainJob) -> None:
    job = make_job(world, "half", keep_checkpoints=1)
    for death, newest in DEATHS:
        ranks = Ranks(job, before=die_in_save, args=death)
        assert ranks.wait() == [-signal.SIGKILL], ranks.output(0)
        found = latest_checkpoint(job.checkpoints)
        assert (found.name if found else None) == newest, death
        if found:
            verify_manifest(found, "checkpoint")
    train(job)
    assert_same_end(job, alone)
    assert [path.name for path in job.checkpoints.iterdir() if path.is_dir()] == ["iter_0000008"]


# relative, against one layout that goes on: fp32 sums in another order
TOLERANCE = 1e-6


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"data_parallel_size": 2, "micro_batch_size": 2},
        {"pipeline_model_parallel_size": 2},
        {},
    ],
    ids=["TP2-SP", "DP2", "PP2", "alone"],
)
def test_a_run_goes_on_at_another_layout(world: Path, straight: TrainJob, layout: dict[str, Any], request: Any) -> None:
    job = make_job(world, f"moved-{request.node.callspec.id}", **layout)
    start_at(job, iteration_folder(straight.checkpoints, 4))
    train(job)
    assert [row["step"] for row in rows(job)] == [5, 6, 7, 8]
    for mine, reference in zip(rows(job), rows(straight)[4:], strict=True):
        assert mine["samples"] == reference["samples"]
        assert mine["loss_tokens"] == reference["loss_tokens"]
        assert mine["lr"] == reference["lr"]
        assert mine["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


def test_context_parallelism_and_gradient_accumulation_change_nothing(world: Path, straight: TrainJob, alone: TrainJob) -> None:
    whole = make_job(world, "whole", micro_batch_size=4, save_interval=100)
    train(whole)
    for job in (straight, whole):
        for mine, reference in zip(rows(job), rows(alone), strict=True):
            assert mine["samples"] == reference["samples"]
            assert mine["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE)
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


def test_bf16_resumes_bit_for_bit(world: Path) -> None:
    reference = make_job(world, "bf16", precision="bf16", keep_checkpoints=9)
    train(reference)
    job = make_job(world, "bf16-resumed", precision="bf16", save_interval=4)
    start_at(job, iteration_folder(reference.checkpoints, 4))
    train(job)
    assert rows(job) == rows(reference)[4:]
    last = [tensor_hashes(iteration_folder(one.checkpoints, STEPS)) for one in (job, reference)]
    assert last[0] == last[1]


def test_a_finished_stage_is_left_alone(straight: TrainJob) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.checkpoints.rglob("*") if path.name != ".lock"}
    assert "nothing left to do" in (train(straight) and status(straight))
    after = {path: path.stat().st_mtime_ns for path in straight.checkpoints.rglob("*") if path.name != ".lock"}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {straight.checkpoints.name}
    assert [row["step"] for row in rows(straight)] == list(range(1, STEPS + 1))


OTHER = "MCORE_LONGCTX_OTHER_PYTHON"  # an interpreter with another megatron-core


@pytest.mark.skipif(OTHER not in os.environ, reason=f"{OTHER} is not set: no second megatron-core at hand")
def test_checkpoints_cross_megatron_versions(world: Path, alone: TrainJob) -> None:
    import subprocess

    train(make_job(world, "alone-beside", keep_checkpoints=9, async_save=True))
    script = Path(__file__).with_name("other_version.py")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [os.environ[OTHER], str(script), str(world)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    versions = json.loads((world / "other" / "versions.json").read_text())
    assert versions["python"] != list(sys.version_info[:2])
    # theirs goes on from our checkpoint, ours from theirs
    assert rows(make_job(world, "ours-there")) == rows(alone)[4:]
    assert rows(make_job(world, "ours-beside-there")) == rows(alone)[4:]
    job = start_at(make_job(world, "theirs-here"), iteration_folder(make_job(world, "theirs").checkpoints, 4))
    train(job)
    assert rows(job) == rows(make_job(world, "theirs"))[4:]
