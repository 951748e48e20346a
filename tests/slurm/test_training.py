"""examples/tiny_slurm on a real scheduler, by the commands of its README: the chain, stops inside a step, deaths, preemptions."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, wait_until

RECIPE = "examples/tiny_slurm/recipe.yaml"
JOBS = ("00-prepare", "20-extend", "90-finish")
ITERATIONS = 12
CLOCK = (
    "tokens_per_second",
    "memory_bytes",
    "seconds",
)  # all else of a line of metrics must not depend on how often it was stopped


@dataclass
class Run:
    """The chain of jobs of the recipe."""

    cluster: Cluster
    folder: Path
    jobs: dict[str, int] = field(default_factory=dict)

    def submit(self, *overrides: str) -> None:
        words = ("mcore-longctx", "launch", RECIPE, f"output={self.folder}", *overrides, "--submit")
        printed = self.cluster.call(*words).stdout
        self.jobs = {name: int(job) for job, name in re.findall(r"^job (\d+): (\S+)$", printed, re.MULTILINE)}
        assert tuple(self.jobs) == JOBS

    @property
    def job(self) -> int:
        return self.jobs["20-extend"]

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of every step, without what a clock has measured."""
        path = self.folder / "metrics" / "extend.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            {name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines if line[-1] == "}"
        ]

    def slices(self) -> list[dict[str, Any]]:
        path = self.folder / "logs" / "extend" / "slices.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def story(self) -> str:
        return self.cluster.story(self.job)

    def wait_inside_step(self, after: int, share: float = 0.4) -> int:
        """Wait until more than `after` steps are done and the next one is under way. Returns how many are done."""
        wait_until(lambda: len(self.rows()) > after, 240, self.story)
        last = json.loads((self.folder / "metrics" / "extend.jsonl").read_text().splitlines()[-1])
        time.sleep(share * last["seconds"])
        return int(last["step"])

    def wait_for_slice(self, number: int) -> dict[str, Any]:
        """Wait until that many slices have ended. Returns the last one."""
        wait_until(lambda: len(self.slices()) >= number, 240, self.story)
        return self.slices()[number - 1]

    def wait_for_the_end(self) -> None:
        for name, job in self.jobs.items():
            assert self.cluster.end_of(job, seconds=400) == ("COMPLETED", "0:0"), f"{name}\n{self.cluster.story(job)}"


@pytest.fixture(scope="module")
def whole(two_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing stops."""
    run = Run(two_nodes, tmp_path_factory.mktemp("whole") / "run")
    run.submit()
    run.wait_for_the_end()
    return run


@pytest.mark.timeout(900)
def test_the_chain_runs_from_the_model_to_the_report(whole: Run) -> None:
    assert [row["step"] for row in whole.rows()] == list(range(1, ITERATIONS + 1))
    assert [(one["state"], one["before"], one["after"]) for one in whole.slices()] == [("done", -1, ITERATIONS)]
    steps = json.loads((whole.folder / "run.json").read_text())["steps"]
    assert [(step["name"], step["state"]) for step in steps] == [
        (name, "done") for name in ("import", "data-extend", "train-extend", "export", "verify", "report")
    ]
    assert (whole.folder / "export" / "model.safetensors").is_file()
    assert (whole.folder / "report.html").is_file()
    assert {path.name for path in (whole.folder / "checkpoints" / "extend").glob("iter_*")} == {"iter_0000008", "iter_0000012"}


@pytest.mark.multiproc
@pytest.mark.timeout(900)
def test_stopped_inside_a_step_and_killed_it_ends_with_the_same_losses(whole: Run, cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "run")
    run.submit()
    done = run.wait_inside_step(1)
    cluster.signal(run.job, "USR1")
    first = run.wait_for_slice(1)
    assert (first["asked"], first["state"], first["code"], first["verdict"]) == ("USR1", "stopped", 75, "requeue")
    # the step that had begun was dropped, the one before it saved; on a slow machine the signal came a step later
    assert first["after"] in (done, done + 1)
    done = run.wait_inside_step(first["after"] + 1)
    (worker,) = cluster.workers(run.job, "n1")
    os.kill(worker, signal.SIGKILL)
    second = run.wait_for_slice(2)
    assert (second["verdict"], second["restart"], second["before"]) == ("requeue", 1, first["after"])
    assert second["after"] <= done
    run.wait_for_the_end()
    assert run.rows() == whole.rows()
    assert tensors(run) == tensors(whole)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_preempted_ten_times_in_a_row_it_ends_with_the_same_losses(whole: Run, cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "run")
    run.submit()
    done = 0
    for number in range(1, 11):
        done = run.wait_inside_step(done)
        urgent = cluster.preempt()
        assert cluster.end_of(urgent) == ("COMPLETED", "0:0")
        one = run.wait_for_slice(number)
        assert (one["state"], one["verdict"]) == ("stopped", "requeue"), f"{one}\n{run.story()}"
        assert one["after"] in (done, done + 1)  # the step that had begun is dropped; on a slow machine it was the next one
        done = one["after"]
    run.wait_for_the_end()
    assert cluster.restarts(run.job) == 10
    assert len(run.slices()) == 11
    assert run.rows() == whole.rows()
    assert tensors(run) == tensors(whole)


def tensors(run: Run) -> dict[str, str]:
    """sha256 of every tensor of the last checkpoint, of weights and optimizer."""
    from tests.train.jobs import tensor_hashes

    return tensor_hashes(run.folder / "checkpoints" / "extend" / f"iter_{ITERATIONS:07d}")


def test_data_that_is_not_there_ends_the_chain(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "run")
    run.submit("data.long-documents.sources.books.path=no/such/books")
    assert cluster.end_of(run.jobs["00-prepare"]) == ("FAILED", "2:0")
    for name in JOBS[1:]:
        assert cluster.end_of(run.jobs[name])[0] == "CANCELLED"
    (log,) = (run.folder / "slurm").glob(f"*-{run.jobs['00-prepare']}.out")
    assert [line for line in log.read_text().splitlines() if line.startswith("mcore-longctx: no/such/books")]
    assert not (run.folder / "checkpoints" / "extend").exists()
