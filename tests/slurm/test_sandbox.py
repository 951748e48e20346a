"""The sandbox itself: it comes up beside others, is gone with whoever started it, and behaves as the other tests assume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import REPOSITORY, Cluster, skip_without_slurm, started, wait_until


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n#SBATCH --output={folder}/job.out --open-mode=append\n{text}")
    return path


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line or environment names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes() + (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_two_nodes_run_a_step_and_tell_its_exit_code(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        script(tmp_path, "#SBATCH --nodes=2 --ntasks-per-node=1\nsrun bash -c 'echo $SLURMD_NODENAME'\nexit 7\n")
    )
    assert cluster.end_of(job) == ("FAILED", "7:0")
    assert sorted((tmp_path / "job.out").read_text().split()) == ["n0", "n1"]


def test_a_requeued_job_starts_again_in_seconds(cluster: Cluster, tmp_path: Path) -> None:
    text = '#SBATCH --requeue\necho "slice ${SLURM_RESTART_COUNT:-0}"\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 600\n'
    job = cluster.submit(script(tmp_path, text))
    wait_until(lambda: (tmp_path / "job.out").exists() and "slice 0" in (tmp_path / "job.out").read_text(), 30)
    cluster.call("scontrol", "requeue", str(job))
    assert cluster.end_of(job, seconds=60) == ("COMPLETED", "0:0")  # without cred_expire: 121 s
    assert "slice 1" in (tmp_path / "job.out").read_text()


@pytest.mark.parametrize("asks", [True, False])
def test_a_preempted_job_that_ends_politely_must_ask_to_be_requeued(cluster: Cluster, tmp_path: Path, asks: bool) -> None:
    text = (
        "#SBATCH --requeue --nodes=2 --exclusive\n"
        'echo "slice ${SLURM_RESTART_COUNT:-0}"\n[ -z "$SLURM_RESTART_COUNT" ] || exit 0\n'
        "srun sleep 600 || true\n"  # SLURM sends TERM to the step, at once
    )
    asking = "scontrol requeue $SLURM_JOB_ID && sleep 60\n" if asks else ""
    job = cluster.submit(script(tmp_path, text + asking))
    wait_until(lambda: f"{job}.0" in cluster.call("squeue", "--steps", "--noheader", "--format=%i").stdout, 30)
    urgent = cluster.preempt()
    assert cluster.end_of(urgent) == ("COMPLETED", "0:0")
    state, _ = cluster.end_of(job)
    assert (state, cluster.restarts(job)) == ("COMPLETED", 1 if asks else 0)  # SLURM thinks that it is done, half-way
    assert ("slice 1" in (tmp_path / "job.out").read_text()) == asks


def test_a_second_sandbox_beside_it_is_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    with started(SLURM_SANDBOX_NODES="1") as other:
        mine = cluster.submit(script(tmp_path, "sleep 600\n"))
        assert other.queue() == ""
        theirs = other.submit(script(tmp_path, "true\n"))
        assert other.end_of(theirs) == ("COMPLETED", "0:0")
        folder = other.folder.parent
    assert not folder.exists()
    assert processes_of(folder) == []
    assert cluster.state(mine)[0] == "RUNNING"  # the end of the other one changes nothing here


def test_a_killed_test_run_leaves_no_daemon_no_job_and_no_folder(tmp_path: Path) -> None:
    skip_without_slurm()
    sleeper = script(tmp_path, "sleep 600\n")
    program = (
        "import pathlib, time\nfrom tests.slurm.cluster import started\nwith started() as cluster:\n"
        f"    job = cluster.submit(pathlib.Path({str(sleeper)!r}))\n"
        "    cluster.wait_for_state(job, 'RUNNING')\n    print(cluster.folder.parent, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            folder = Path(run.stdout.readline().strip())
            assert len(processes_of(folder)) >= 5  # four daemons and the job
            run.send_signal(signal.SIGKILL)
        finally:
            run.kill()
    wait_until(lambda: not folder.exists(), 60)
    assert processes_of(folder) == []


def test_a_sandbox_that_does_not_come_up_is_one_line(tmp_path: Path) -> None:
    skip_without_slurm()
    environment = os.environ | {"SLURM_SANDBOX_DIR": str(tmp_path), "SLURM_SANDBOX_PORT": "1"}
    (tmp_path / "mine").touch()
    result = subprocess.run(
        [REPOSITORY / "tools" / "slurm_sandbox.sh", "start"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    if len(str(tmp_path)) <= 85:
        assert "is not empty and no sandbox" in result.stderr
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize(("uid", "path", "reason"), [(1000, None, "needs root"), (0, "/nowhere", "no munged; apt-get install")])
def test_where_there_is_no_slurm_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, uid: int, path: str | None, reason: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    if path:
        monkeypatch.setattr("shutil.which", lambda name, path: None)
    else:
        monkeypatch.setattr("shutil.which", lambda name, path: f"/usr/bin/{name}")
    with pytest.raises(pytest.skip.Exception, match=reason):
        skip_without_slurm()
