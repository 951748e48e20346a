"""The rendered training script on a real scheduler: what it makes of stops, deaths and failures. The trainer is a stub."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, skip_without_slurm, started, wait_until

RECIPE = "examples/tiny_slurm/recipe.yaml"


@dataclass
class Training:
    """The training job of a recipe, and a job that must only start after it."""

    cluster: Cluster
    folder: Path
    job: int = 0
    successor: int = 0

    def orders(self, **how: Any) -> None:
        """What the stub does from its next start on."""
        (self.folder / "stub.json").write_text(json.dumps(how))

    def submit(self) -> None:
        script = self.folder / "slurm" / "20-extend.sbatch"
        self.job = self.cluster.submit(script, stub=True)
        words = (f"--dependency=afterok:{self.job}", "--kill-on-invalid-dep=yes", "--output=/dev/null", "--wrap=true")
        self.successor = int(self.cluster.call("sbatch", "--parsable", *words).stdout)

    def wait_for(self, line: str, seconds: float = 60) -> None:
        log = self.folder / "stub.log"
        wait_until(lambda: log.exists() and line in log.read_text().splitlines(), seconds, lambda: self.cluster.story(self.job))

    def starts(self) -> list[int]:
        """The iteration at which each slice started."""
        lines = (self.folder / "stub.log").read_text().splitlines()
        return [int(line.split()[-1]) for line in lines if line.startswith("start at")]

    def starts_so_far(self) -> int:
        return len(self.starts()) if (self.folder / "stub.log").exists() else 0

    def log_so_far(self) -> str:
        logs = list((self.folder / "slurm").glob(f"*-{self.job}.out"))
        return logs[0].read_text() if logs else ""

    def slices(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "logs" / "extend" / "slices.jsonl").read_text().splitlines()]

    def log(self) -> str:
        (path,) = (self.folder / "slurm").glob(f"*-{self.job}.out")
        return path.read_text()

    def end(self, state: str, code: str, seconds: float = 120) -> None:
        """The training job must end like this; what follows runs only after a good end."""
        assert self.cluster.end_of(self.job, seconds=seconds) == (state, code), self.cluster.story(self.job)
        follows = self.cluster.end_of(self.successor)[0]
        assert follows == ("COMPLETED" if state == "COMPLETED" else "CANCELLED")


def launched(cluster: Cluster, folder: Path, *overrides: str) -> Training:
    cluster.call("mcore-longctx", "launch", RECIPE, f"output={folder}", *overrides)
    return Training(cluster, folder)


@pytest.fixture
def training(cluster: Cluster, tmp_path: Path) -> Training:
    return launched(cluster, tmp_path / "run")


def test_done_in_one_slice_and_the_chain_goes_on(training: Training) -> None:
    training.orders()
    training.submit()
    training.end("COMPLETED", "0:0")
    (only,) = training.slices()
    assert (only["before"], only["after"], only["state"], only["verdict"], only["asked"]) == (-1, 12, "done", "done", "")
    assert only["nodes"] == "n[0-1]"
    assert f"would note: run {training.folder}/recipe.yaml --steps train-extend" in training.log()


def test_the_time_limit_is_near_the_slice_saves_and_the_job_goes_on_there(training: Training) -> None:
    training.orders(step_seconds=1)
    training.submit()
    training.wait_for("step 2")
    training.cluster.signal(training.job, "USR1")
    training.wait_for("start at 2")
    training.orders(step_seconds=0.05)
    training.wait_for("step 4")
    training.cluster.signal(training.job, "TERM")
    training.end("COMPLETED", "0:0")
    assert training.starts()[0] == 0
    first, second, third = training.slices()
    assert (first["asked"], first["state"], first["code"], first["after"], first["verdict"]) == (
        "USR1",
        "stopped",
        75,
        2,
        "requeue",
    )
    assert (second["asked"], second["restart"], second["before"]) == ("TERM", 1, 2)
    assert (third["restart"], third["after"], third["verdict"]) == (2, 12, "done")


def test_preempted_in_the_middle_of_a_step(training: Training) -> None:
    training.orders(step_seconds=2)
    training.submit()
    training.wait_for("step 1")
    urgent = training.cluster.preempt()  # TERM to the ranks, not to the script
    assert training.cluster.end_of(urgent) == ("COMPLETED", "0:0")
    training.orders(step_seconds=0.05)
    training.end("COMPLETED", "0:0")
    assert training.cluster.restarts(training.job) == 1
    assert training.starts() == [0, 1]
    assert [one["state"] for one in training.slices()] == ["stopped", "done"]


def preempt_while_it_starts(training: Training, number: int) -> None:
    """The `number`th time, as soon as both ranks import; the slices after the second train."""
    for rank in (0, 1):
        training.wait_for(f"rank {rank} imports, restart {number - 1}")
    urgent = training.cluster.preempt()
    assert training.cluster.end_of(urgent) == ("COMPLETED", "0:0")
    if number == 2:
        training.orders(step_seconds=0.05)
    training.cluster.wait_for_restart(training.job, number)


@pytest.mark.long
def test_preempted_while_it_starts_as_often_as_it_may_stand_still_it_goes_on(training: Training) -> None:
    training.orders(start_seconds=90)  # deaf: the script is told after GraceTime, and KillWait later all of it is killed
    training.submit()
    for number in (1, 2):
        preempt_while_it_starts(training, number)
    training.end("COMPLETED", "0:0")
    *killed, last = training.slices()
    assert [(one["asked"], one["state"], one["after"]) for one in killed] == [("TERM", "none", -1)] * 2
    assert (last["restart"], last["verdict"]) == (2, "done")


def test_preempted_while_it_starts_and_dead_before_the_script_is_told_it_goes_on(training: Training) -> None:
    training.orders(start_seconds=90, deaf=False)
    training.submit()
    with training.cluster.grace(60):
        for number in (1, 2):
            preempt_while_it_starts(training, number)
    training.end("COMPLETED", "0:0")
    *killed, last = training.slices()
    assert [(one["asked"], one["state"], one["verdict"]) for one in killed] == [("PREEMPT", "none", "requeue")] * 2
    assert (last["restart"], last["asked"], last["verdict"]) == (2, "", "done")
    assert training.log().count("PREEMPT: SLURM is preempting this job") == 2
    line = ", SLURM was preempting the job, still at no checkpoint (told to stop before start-up and one step: not counted)\n"
    assert training.log().count(line) == 2


@pytest.mark.parametrize(
    ("status", "code", "verdict"),
    [("failed 2 data/extend: no such data; run the step before", 2, "refused"), ("failed 1 loss is nan", 1, "failed")],
)
def test_a_failure_ends_the_chain_at_once(training: Training, status: str, code: int, verdict: str) -> None:
    training.orders(status=status)
    training.submit()
    training.end("FAILED", f"{code}:0")
    assert [one["verdict"] for one in training.slices()] == [verdict]
    assert status.split(maxsplit=2)[2] in training.log()


def test_a_trainer_that_never_saves_is_given_up_after_two_slices(training: Training) -> None:
    training.orders(status="die")
    training.submit()
    training.end("FAILED", "3:0")
    assert training.cluster.restarts(training.job) == 1
    assert [one["verdict"] for one in training.slices()] == ["requeue", "no progress"]
    assert "no progress: 2 slices in a row without a newer checkpoint" in training.log()


def test_two_deaths_with_a_checkpoint_between_are_not_two_in_a_row(training: Training) -> None:
    training.orders(status="die")
    training.submit()
    wait_until((training.folder / "logs" / "extend" / "slices.jsonl").exists, 60)
    training.orders(step_seconds=0.3)
    training.wait_for("step 5")
    (worker,) = training.cluster.workers(training.job, "n0")
    os.kill(worker, signal.SIGKILL)  # after the checkpoint of step 4
    training.end("COMPLETED", "0:0")
    assert [one["after"] for one in training.slices()] == [-1, 4, 12]
    assert [one["verdict"] for one in training.slices()] == ["requeue", "requeue", "done"]


def test_a_cancelled_job_is_not_requeued(training: Training) -> None:
    training.orders(step_seconds=1)
    training.submit()
    training.wait_for("step 1")
    training.cluster.call("scancel", str(training.job))
    assert training.cluster.end_of(training.job)[0] == "CANCELLED"
    assert training.cluster.end_of(training.successor)[0] == "CANCELLED"
    assert training.cluster.restarts(training.job) == 0


def test_an_edited_script_runs_as_it_was_edited(training: Training) -> None:
    script = training.folder / "slurm" / "20-extend.sbatch"
    text = script.read_text()
    assert text.count("stages.extend.save_interval=4\n") == 1
    script.write_text(text.replace("stages.extend.save_interval=4\n", "stages.extend.save_interval=3\n"))
    said = training.cluster.call("mcore-longctx", "launch", RECIPE, f"output={training.folder}").stdout
    assert "20-extend.sbatch" in said
    assert "save_interval=3\n" in script.read_text()
    training.orders()
    training.submit()
    training.end("COMPLETED", "0:0")
    saved = sorted(path.name for path in (training.folder / "checkpoints" / "extend").glob("iter_*"))
    assert saved == [f"iter_{step:07d}" for step in (3, 6, 9, 12)]


def test_a_dead_node_costs_a_slice_not_the_run(tmp_path: Path) -> None:
    skip_without_slurm()
    with started(SLURM_SANDBOX_TIMEOUT="6") as cluster:
        training = launched(cluster, tmp_path / "run", "stages.extend.train_iters=400")
        training.orders(step_seconds=0.5)
        training.submit()
        training.wait_for("step 4")
        cluster.kill_daemon("slurmd-n1")
        wait_until(lambda: cluster.state(training.job)[0] == "PENDING", 120, lambda: cluster.story(training.job))
        training.orders(step_seconds=0.001)
        cluster.start_slurmd("n1")
        training.end("COMPLETED", "0:0")
        assert cluster.restarts(training.job) >= 1
        assert training.starts()[0] == 0
        assert training.starts()[1] >= 4
        assert training.slices()[-1]["verdict"] == "done"


def test_polite_preemptions_before_a_step_could_end_do_not_stop_the_chain(training: Training) -> None:
    training.orders(step_seconds=30)
    training.submit()
    for number in (1, 2):
        wait_until(lambda wanted=number: training.starts_so_far() == wanted, 60, lambda: training.cluster.story(training.job))
        urgent = training.cluster.preempt()  # TERM to the ranks alone: the script is not told
        assert training.cluster.end_of(urgent) == ("COMPLETED", "0:0")
        if number == 2:
            training.orders(step_seconds=0.05)
        training.cluster.wait_for_restart(training.job, number)
    training.end("COMPLETED", "0:0")
    assert [(one["state"], one["after"]) for one in training.slices()] == [("stopped", -1), ("stopped", -1), ("done", 12)]


def test_a_signal_while_slice_begin_runs_costs_a_slice_not_the_chain(training: Training) -> None:
    training.orders()
    training.submit()
    wait_until(lambda: "== " in training.log_so_far(), 60, lambda: training.cluster.story(training.job))
    training.cluster.signal(training.job, "USR1")
    training.end("COMPLETED", "0:0")
    first, *_, last = training.slices()
    assert (first["asked"], first["verdict"], last["verdict"]) == ("USR1", "requeue", "done")


def test_a_stage_that_is_held_saves_and_stops_for_good(training: Training) -> None:
    training.orders(step_seconds=0.5)
    training.submit()
    training.wait_for("step 2")
    (training.folder / "logs" / "extend" / "hold").touch()
    training.cluster.signal(training.job, "USR1")
    training.end("FAILED", "1:0")
    assert training.cluster.restarts(training.job) == 0
    (only,) = training.slices()
    assert (only["state"], only["verdict"]) == ("stopped", "held")
    assert only["after"] >= 2
