"""The job scripts: quoted, checked by bash and shellcheck, and run with made-up srun, scontrol and trainer. No SLURM is needed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.launch.chain import build_chain
from mcore_longctx.launch.slurm import shape_of_job
from mcore_longctx.recipe import Parallel
from mcore_longctx.recipe.load import open_recipe
from tests.scripts import check_scripts

PRESETS = ["tiny-cpu", "ultralong-8b-1m", "ultralong-8b-4m"]
PYXIS = "cluster.container={runtime: pyxis, image: 'registry/a b.sqsh', mounts: ['/data:/data', '/x:/y:ro']}"
APPTAINER = "cluster.container={runtime: apptainer, image: 'it''s.sif', mounts: ['/data:/data']}"


def scripts(preset: str, *overrides: str) -> dict[str, str]:
    return build_chain(open_recipe(preset, overrides)).scripts


def training(preset: str = "ultralong-8b-4m", *overrides: str) -> str:
    return scripts(preset, *overrides)["20-extend.sbatch"]


@pytest.mark.parametrize("overrides", [(), (PYXIS,), (APPTAINER,)], ids=["bare", "pyxis", "apptainer"])
@pytest.mark.parametrize("preset", PRESETS)
def test_bash_and_shellcheck_take_every_script(preset: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    secrets = "cluster.secrets=[WANDB_API_KEY]"
    setup = "cluster.setup=['module load cuda', 'source venv/bin/activate']"
    rendered = scripts(preset, *overrides, secrets, setup, "cluster.environment={A: 'b c', NCCL_IB_TIMEOUT: '20'}")
    for name, text in rendered.items():
        (tmp_path / name).write_text(text)
    check_scripts(*(tmp_path / name for name in rendered))


def test_the_lines_that_slurm_reads() -> None:
    text = training("ultralong-8b-4m", "cluster.account=proj", "cluster.qos=long", "cluster.sbatch=[--mail-type=END]")
    head = text[: text.index("set -eo pipefail")]
    words = {line.split("  #")[0].removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH ")}
    plain = {word for word in words if not word.startswith("--signal")}
    assert plain == {
        "--job-name=ultralong-8b-4m.20-extend", "--nodes=32", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive",
        "--time=04:00:00", "--account=proj", "--qos=long", "--mail-type=END", "--requeue", "--open-mode=append",
        "--output=runs/ultralong-8b-4m/slurm/%x-%j.out",
    }  # fmt: skip
    (lead,) = words - plain
    plan = build_chain(open_recipe("ultralong-8b-4m")).recipe
    assert lead.startswith("--signal=B:USR1@")
    assert 60 < int(lead.partition("@")[2]) < 4 * 3600
    assert plan.stages[0].distributed_timeout_minutes is not None
    assert plan.stages[0].distributed_timeout_minutes >= 30
    assert f"stages.extend.distributed_timeout_minutes={plan.stages[0].distributed_timeout_minutes}" in text


def test_jobs_that_need_no_gpu_ask_for_none() -> None:
    every = scripts("ultralong-8b-4m", "cluster.partition=gpu", "cluster.cpu_partition=cpu")
    assert "#SBATCH --partition=cpu\n" in every["00-prepare.sbatch"]
    assert "--gpus-per-node" not in every["00-prepare.sbatch"]
    assert all("#SBATCH --partition=gpu\n" in every[name] for name in every if name[0] in "1239")
    assert all("--gpus-per-node" not in text for text in scripts("tiny-cpu").values())
    assert "CUDA_VISIBLE_DEVICES" in scripts("tiny-cpu")["20-extend.sbatch"]
    assert "NCCL" not in scripts("tiny-cpu")["20-extend.sbatch"].replace("NCCL and gloo", "")


def test_what_the_script_gives_the_trainer_is_the_recipe_itself() -> None:
    """The arguments of the arrays, read again as overrides, change nothing."""
    file = open_recipe("ultralong-8b-4m", ["stages.extend.parallel.cp_comm_type=a2a+p2p",
                                           "stages.extend.parallel.hierarchical_context_parallel_sizes=[4, 4]"])  # fmt: skip
    chain = build_chain(file)
    words = [
        word
        for line in chain.scripts["20-extend.sbatch"].splitlines()
        if line.startswith("    ") and "stages.extend." in line
        for word in shlex.split(line)
    ]
    assert len(words) > 10
    again = open_recipe("ultralong-8b-4m", words)
    assert again.recipe.stages[0] == chain.recipe.stages[0]
    assert yaml.safe_load(words[-1].partition("=")[2]) == chain.recipe.stages[0].distributed_timeout_minutes


def test_a_layout_fills_whole_nodes() -> None:
    assert shape_of_job(Parallel(context_parallel_size=4), 8, where="x") == (1, 4)
    assert shape_of_job(Parallel(context_parallel_size=8), 8, where="x") == (1, 8)
    assert shape_of_job(Parallel(context_parallel_size=16, data_parallel_size=2), 8, where="x") == (4, 8)
    with pytest.raises(
        ConfigError, match=r"x: .* 12 ranks fill no whole number of nodes with 8 ranks each; nearest are 8 and 16"
    ):
        shape_of_job(Parallel(context_parallel_size=12), 8, where="x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.gpu=h10", "no GPU 'h10'"),
        ("cluster.time_limit=00:15:00", r"holds \d steps?: start-up"),
        ("cluster.time_limit=soon", "is no time limit of SLURM"),
        ("cluster.nproc_per_node=7", "fill no whole number of nodes with 7 ranks each"),
        ("stages.extend.activations={recompute: none}", r"stages\.extend: does not fit on h100-80gb: .* GB a GPU"),
        ("cluster.environment={HF_TOKEN: hidden}", "environment.HF_TOKEN looks like a secret"),
        ("cluster.environment={WANDB_API_KEY: hidden}", "environment.WANDB_API_KEY looks like a secret"),
        ("cluster.partition='gpu; rm -rf x'", "cannot stand in an #SBATCH line"),
        ("cluster.sbatch=[mail]", "sbatch option 'mail'"),
        ("cluster.secrets=['A B']", "'A B' is no name of an environment variable"),
        ("cluster.container={runtime: pyxis, image: x, mounts: [/data]}", "mount '/data' is not of the form HOST:CONTAINER"),
        ("output='runs/a#b'", "cannot stand in an #SBATCH line"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(LongctxError, match=message) as caught:
        build_chain(open_recipe("ultralong-8b-4m", [override]))
    assert caught.value.exit_code == 2
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- run, with everything around them made up

STUBS = {
    "mcore-longctx": 'echo "mcore-longctx $*" >>"$CALLS"; [[ $2 == "$SLOW" ]] && touch "$CALLS.$2" && /bin/sleep 1; '
    '[[ $2 == begin ]] && exit "${BEGIN_CODE:-0}"; if [[ $2 == end ]]; then exit "$END_CODE"; fi; exit 0',
    "srun": 'trap \'echo "srun got USR1" >>"$CALLS"; exit 138\' USR1; printf "%s\\n" "srun" "$@" >>"$CALLS"; '
    'touch "$CALLS.ready"; for _ in $(seq "$SRUN_TENTHS"); do /bin/sleep 0.1; done; exit "${SRUN_CODE:-0}"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"',
    "squeue": '[[ " $* " == *" --me "* ]] && echo "$QUEUE" && exit; [[ " $* " == *PreemptTime* ]] || { echo RUNNING None; exit; }; '
    '[[ $SLURM_TIME_FORMAT == %s ]] && printf "%-20s%-20s\\n" $TIMES && exit "$TIMES_CODE"',
    "sleep": '[[ $1 == 600 ]] || /bin/sleep 0.2',
}  # fmt: skip


class Job:
    """The rendered training script of tiny-cpu, between made-up programs."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir(parents=True)
        for name, body in STUBS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)
        chain = build_chain(open_recipe("tiny-cpu", [f"output={folder}/it's $(touch hacked) run", *overrides]))
        self.run = chain.recipe.run_folder
        self.run.mkdir()
        (self.run / "recipe.yaml").touch()
        self.script = folder / "job.sbatch"
        self.script.write_text(chain.scripts["20-extend.sbatch"])

    def start(self, end_code: int, *, tenths: int = 0, **more: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n0", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        stubs = {"CALLS": str(self.calls), "END_CODE": str(end_code), "SRUN_TENTHS": str(tenths), "SLOW": "", "QUEUE": "12345"}
        stubs |= {"TIMES": "N/A 1000", "TIMES_CODE": "0"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder), **slurm, **stubs, **more}
        return subprocess.Popen(
            ["bash", self.script], env=environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ended(self, end_code: int, **more: str) -> tuple[int, list[str]]:
        process = self.start(end_code, **more)
        self.said = process.communicate(timeout=60)[0]
        return process.returncode, self.calls.read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_name_with_shell_in_it_stays_a_name(job: Job) -> None:
    code, calls = job.ended(0)
    assert code == 0, job.said
    assert calls[0] == f"mcore-longctx slice begin {job.run}/recipe.yaml --stage extend --queued 12345"
    assert (job.run / "logs" / "extend").is_dir()
    assert not list(job.folder.rglob("hacked"))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75])
def test_the_verdict_decides_what_comes_next(job: Job, code: int) -> None:
    status, calls = job.ended(code, SRUN_CODE="9")
    assert status == code
    ends = [line for line in calls if "slice end" in line]
    assert ends == [f"mcore-longctx slice end {job.run}/recipe.yaml --stage extend --asked  --srun-code 9"]
    after = calls[calls.index(ends[0]) + 1 :]
    noted = [f"mcore-longctx run {job.run}/recipe.yaml --steps train-extend"]
    assert after == {0: noted, 75: ["scontrol requeue 12345"]}.get(code, [])


@pytest.mark.parametrize(
    ("times", "times_code", "srun_code", "asked"),
    [
        ("1005 1000", 0, 137, "PREEMPT"),
        ("1000 1000", 0, 1, "PREEMPT"),
        ("N/A 1000", 0, 137, ""),
        ("900 1000", 0, 137, ""),  # of the start before this one
        ("2026-11-22T22:39:10 2026-11-22T22:39:05", 0, 137, ""),  # not as it was asked for
        ("", 0, 137, ""),
        ("1005 1000", 1, 137, ""),
        ("1005 1000", 0, 0, ""),
    ],
)
def test_preempted_before_the_script_was_told(job: Job, times: str, times_code: int, srun_code: int, asked: str) -> None:
    status, calls = job.ended(75, SRUN_CODE=str(srun_code), TIMES=times, TIMES_CODE=str(times_code))
    assert status == 75, job.said
    ends = [line for line in calls if "slice end" in line]
    assert ends == [f"mcore-longctx slice end {job.run}/recipe.yaml --stage extend --asked {asked} --srun-code {srun_code}"]
    assert calls[-1] == "scontrol requeue 12345"
    note = job.run / "logs" / "extend" / "asked-12345"
    assert (note.read_text().strip() if note.exists() else "") == asked
    assert ("PREEMPT: SLURM is preempting this job" in job.said) == bool(asked)


def test_srun_is_given_one_torchrun_a_node(job: Job) -> None:
    _, calls = job.ended(0)
    words = calls[calls.index("srun") + 1 : next(i for i, line in enumerate(calls) if "slice end" in line)]
    assert words[: words.index("bash")] == ["--kill-on-bad-exit=1", "--wait=120", "--ntasks-per-node=1", "--cpu-bind=none"]
    for word in ("--nproc_per_node=2", "--nnodes=1", "--master_port=22345", "--signals_to_handle=SIGINT,SIGHUP,SIGQUIT"):
        assert word in words
    at = words.index("-m")
    assert words[at : at + 5] == ["-m", "mcore_longctx", "train", f"{job.run}/recipe.yaml", "--stage=extend"]
    assert "stages.extend.parallel.context_parallel_size=2" in words[at:]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGUSR1, "USR1"), (signal.SIGTERM, "TERM")])
def test_both_signals_reach_the_ranks_as_usr1_and_the_verdict_by_name(job: Job, number: int, name: str) -> None:
    process = job.start(75, tenths=300)
    try:
        deadline = time.monotonic() + 30
        while not Path(f"{job.calls}.ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
    calls = job.calls.read_text().splitlines()
    assert calls.count("srun got USR1") == 1
    assert f"mcore-longctx slice end {job.run}/recipe.yaml --stage extend --asked {name} --srun-code 138" in calls
    assert calls[-1] == "scontrol requeue 12345"
    assert (job.run / "logs" / "extend" / "asked-12345").read_text() == f"{name}\n"


@pytest.mark.parametrize("slow", ["setup", "begin"])
def test_a_signal_before_the_ranks_start_is_heard(tmp_path: Path, slow: str) -> None:
    """bash without a trap would die of it: the job fails, and the chain is cancelled."""
    job = Job(tmp_path, *(["cluster.setup=['touch $CALLS.setup && /bin/sleep 1']"] if slow == "setup" else []))
    process = job.start(75, SLOW=slow)
    try:
        deadline = time.monotonic() + 30
        while not Path(f"{job.calls}.{slow}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 75, said
    _, end, last = job.calls.read_text().splitlines()  # after `slice begin`: no srun
    assert end == f"mcore-longctx slice end {job.run}/recipe.yaml --stage extend --asked USR1 --srun-code 0"
    assert last == "scontrol requeue 12345"
    assert (job.run / "logs" / "extend" / "asked-12345").read_text() == "USR1\n"


@pytest.mark.parametrize(("code", "requeued"), [(2, False), (3, False), (137, False), (138, True), (143, True)])
def test_how_slice_begin_ended_decides_too(job: Job, code: int, requeued: bool) -> None:
    status, calls = job.ended(0, BEGIN_CODE=str(code))
    assert status == code
    assert calls[1:] == ["scontrol requeue 12345"] * requeued


def test_a_job_submitted_from_elsewhere_says_so(job: Job) -> None:
    (job.run / "recipe.yaml").unlink()
    process = job.start(0)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "submit from the folder in which launch was called" in said
    assert not job.calls.exists()


def test_a_secret_that_is_not_set_stops_the_job_by_name(tmp_path: Path) -> None:
    job = Job(tmp_path, "cluster.secrets=[WANDB_API_KEY]")
    process = job.start(0)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "WANDB_API_KEY: is not set: export it before sbatch" in said
    code, _ = job.ended(0, WANDB_API_KEY="planted-7f3a")
    assert code == 0
    assert "planted-7f3a" not in job.said + job.calls.read_text() + job.script.read_text()
