"""`launch --submit` and submit.sh against a real scheduler: what is submitted, and what is refused before anything is. The jobs are stubs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

RECIPE = "examples/tiny_slurm/recipe.yaml"
JOBS = ("00-prepare", "20-extend", "90-finish")


def submitted(printed: str) -> dict[str, int]:
    return {name: int(job) for job, name in re.findall(r"^(?:job )?(\d+):? (\S+)$", printed, re.MULTILINE)}


def orders(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "stub.json").write_text("{}")


@pytest.mark.parametrize("name", ["a run", "o'brien"])  # a blank; a quote that sbatch would read as its own
def test_submit_sh_submits_the_chain_and_each_job_waits_for_the_one_before(cluster: Cluster, tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    cluster.call("mcore-longctx", "launch", RECIPE, f"output={run}")
    orders(run)
    jobs = submitted(cluster.call("bash", run / "slurm" / "submit.sh", stub=True).stdout)
    assert tuple(jobs) == JOBS
    for job, after in (("20-extend", "00-prepare"), ("90-finish", "20-extend")):
        assert cluster.fact(jobs[job], "Dependency").startswith(f"afterok:{jobs[after]}(")
    for job in JOBS:
        assert cluster.end_of(jobs[job]) == ("COMPLETED", "0:0"), cluster.story(jobs[job])
    ends = [cluster.fact(jobs[job], "EndTime") for job in JOBS]
    starts = [cluster.fact(jobs[job], "StartTime") for job in JOBS]
    assert all(start >= end for start, end in zip(starts[1:], ends[:-1], strict=True))


def test_a_second_submission_is_refused_while_jobs_of_the_first_are_there(cluster: Cluster, tmp_path: Path) -> None:
    words = ("mcore-longctx", "launch", RECIPE, f"output={tmp_path}/run", "--submit")
    cluster.call("scontrol", "update", "PartitionName=main", "State=DOWN")  # so that nothing starts
    try:
        jobs = submitted(cluster.call(*words).stdout)
        noted = (tmp_path / "run" / "slurm" / "jobs.txt").read_text()
        assert submitted(noted) == jobs
        said = cluster.call(*words, code=2).stderr
        assert said.count("\n") == 1
        assert all(f"{name} (job {job}, " in said for name, job in jobs.items())
        assert len(cluster.queue().splitlines()) == len(JOBS)
        cluster.cancel_all()
        again = submitted(cluster.call(*words).stdout)
        assert tuple(again) == JOBS
        assert not set(again.values()) & set(jobs.values())
    finally:
        cluster.call("scontrol", "update", "PartitionName=main", "State=UP")


@pytest.mark.parametrize("by", ["launch", "submit.sh"])
def test_when_the_last_script_is_refused_none_is_left(cluster: Cluster, tmp_path: Path, by: str) -> None:
    run = tmp_path / "run"
    cluster.call("mcore-longctx", "launch", RECIPE, f"output={run}")
    last = run / "slurm" / "90-finish.sbatch"
    last.write_text(last.read_text().replace("--partition=main", "--partition=nowhere"))
    if by == "launch":
        said = cluster.call("mcore-longctx", "launch", RECIPE, f"output={run}", "--submit", code=2).stderr
        assert "90-finish.sbatch" in said
        assert re.search("[Ii]nvalid partition", said)
    else:
        cluster.call("bash", run / "slurm" / "submit.sh", code=1)
    assert cluster.queue() == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.partition=nowhere", r"[Ii]nvalid partition"),
        (
            "cluster.time_limit=02:00:00",
            r"asks for 02:00:00, partition main gives at most 01:00:00 \(MaxTime\); lower cluster.time_limit",
        ),
        ("cluster.sbatch=[--constraint=gold]", r"[Ii]nvalid feature"),
    ],
)
def test_what_the_partition_cannot_honour_is_refused_and_nothing_is_submitted(
    cluster: Cluster, tmp_path: Path, override: str, words: str
) -> None:
    cluster.call("scontrol", "update", "PartitionName=main", "MaxTime=60")  # SLURM itself would take the job and never start it
    try:
        said = cluster.call("mcore-longctx", "launch", RECIPE, f"output={tmp_path}/run", override, "--submit", code=2).stderr
    finally:
        cluster.call("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE")
    assert said.count("\n") == 1
    assert re.search(words, said)
    assert cluster.queue() == ""


def test_more_nodes_than_the_partition_has_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    words = (
        "mcore-longctx",
        "launch",
        RECIPE,
        f"output={tmp_path}/run",
        "stages.extend.parallel.context_parallel_size=4",
        "--submit",
    )
    said = cluster.call(*words, code=2).stderr
    assert said.count("\n") == 1
    assert "asks for 4 nodes, a job in partition main gets at most 2" in said
    assert cluster.queue() == ""


def test_without_sbatch_nothing_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    tools = cluster.folder / "tools"
    words = (tools / "mcore-longctx", "launch", RECIPE, f"output={tmp_path}/run", "--submit")
    said = cluster.call(*words, code=2, PATH=str(tools)).stderr
    assert said.startswith("mcore-longctx: sbatch is not on PATH")
    assert said.count("\n") == 1
