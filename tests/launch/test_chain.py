"""The chain of jobs: what each does, what is written and kept, how it is submitted. sbatch is made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.chain import Chain, build_chain
from mcore_longctx.launch.submit import submit_chain, write_chain
from mcore_longctx.plan.evaluation import evaluation_price
from mcore_longctx.plan.stages import cluster_gpu
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.run.steps import plan_steps

SECRET = "planted-5b1f9c"

# Hands out job numbers from 101 on and writes down what it was asked; fails at the N-th call if told so, waits while told to.
SBATCH = """\
#!/bin/bash
echo "$*" >>"$FAKE/sbatch.log"
count=$(wc -l <"$FAKE/sbatch.log")
if [[ -e $FAKE/fail_at && $count == $(cat "$FAKE/fail_at") ]]; then
    echo "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified" >&2
    exit 1
fi
while [[ -e $FAKE/hold ]]; do sleep 0.05; done
echo "$((100 + count));cluster"
"""
# Both fail with what they are told to say.
OTHERS = {
    "squeue": '[[ -e $FAKE/squeue_says ]] && { cat "$FAKE/squeue_says" >&2; exit 1; }; cat "$FAKE/queue" 2>/dev/null || true',
    "scancel": '[[ -e $FAKE/scancel_says ]] && { cat "$FAKE/scancel_says" >&2; exit 1; }; echo "$*" >>"$FAKE/scancel.log"',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which sbatch, squeue and scancel leave their words."""
    fake, programs = tmp_path / "fake", tmp_path / "bin"
    fake.mkdir()
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, **{name: f"#!/bin/bash\n{body}\n" for name, body in OTHERS.items()}}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    return fake


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def chain_of(run: Path, *overrides: str) -> Chain:
    return build_chain(open_recipe("tiny-cpu", [f"output={run}", *overrides]))


def jobs_of(run: Path) -> list[str]:
    return (run / "slurm" / "jobs.txt").read_text().splitlines()


def launch(run: Path, *words: str) -> int:
    return main(["launch", "tiny-cpu", f"output={run}", *words])


@pytest.mark.parametrize("preset", ["tiny-cpu", "ultralong-8b-2m"])
def test_the_jobs_do_every_step_once_in_the_order_of_run(preset: str) -> None:
    file = open_recipe(preset)
    steps = plan_steps(file, resolve(file, need_model=False))
    jobs = build_chain(file).jobs
    done = [name for job in jobs for name in job.steps]
    assert sorted(done) == sorted(step.name for step in steps)
    before: set[str] = set()
    for job in jobs:
        inside = {step.name: step for step in steps if step.name in job.steps}
        for step in inside.values():
            assert set(step.needs) <= before | set(inside)
        before |= set(inside)
    assert [job.name for job in jobs] == sorted(job.name for job in jobs)
    assert [(job.name, job.nodes) for job in jobs if job.stage] == [
        ("20-extend", 1 if preset == "tiny-cpu" else 32),
        ("30-instruct", 1 if preset == "tiny-cpu" else 32),
    ]


def test_without_evaluation_there_are_no_jobs_for_it(run: Path) -> None:
    names = [job.name for job in build_chain(open_recipe("examples/tiny_slurm/recipe.yaml")).jobs]
    assert names == ["00-prepare", "20-extend", "90-finish"]


def test_a_dry_run_prints_and_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(run, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"{run}/slurm/20-extend.sbatch" in said
    assert "#SBATCH --signal=B:USR1@60" in said
    assert not run.exists()
    assert launch(run, "--dry-run", "--stage", "instruct") == 0
    assert capsys.readouterr().out.count("# ----------") == 1
    assert launch(run, "--dry-run", "--stage", "instrukt") == 2
    assert "no stage 'instrukt'; stages: extend, instruct" in capsys.readouterr().err


def test_what_is_written_can_be_read_again_and_written_again(run: Path) -> None:
    first = write_chain(chain_of(run))
    assert [line.partition(":")[0] for line in first] == [
        str(run / "recipe.yaml"),
        *(str(run / "slurm" / name) for name in chain_of(run).scripts),
    ]
    written = open_recipe(run / "recipe.yaml").recipe
    assert written == chain_of(run).recipe
    assert [stage.distributed_timeout_minutes for stage in written.stages] == [30.0, 30.0]
    again = build_chain(open_recipe(run / "recipe.yaml"))
    assert again.scripts == chain_of(run).scripts
    assert write_chain(again) == first
    assert os.access(run / "slurm" / "submit.sh", os.X_OK)
    assert not list(run.rglob("*.partial*"))


def test_an_edited_script_is_kept_until_force(run: Path) -> None:
    write_chain(chain_of(run))
    script = run / "slurm" / "20-extend.sbatch"
    edited = script.read_text().replace("--time=04:00:00", "--time=08:00:00")
    script.write_text(edited)
    said = write_chain(chain_of(run, "cluster.account=proj"))
    assert f"{script}: edited since it was written, kept (--force writes it anew)" in said
    assert script.read_text() == edited
    assert "--account=proj" in (run / "slurm" / "30-instruct.sbatch").read_text()
    assert str(script) in write_chain(chain_of(run, "cluster.account=proj"), force=True)
    assert "--account=proj" in script.read_text()


def test_an_edited_recipe_of_a_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(run) == 0
    recipe = run / "recipe.yaml"
    edited = "# tried on Monday\n" + recipe.read_text().replace("seed: 1234", "seed: 4321")
    assert edited.count("seed: 4321") == 1
    recipe.write_text(edited)
    capsys.readouterr()
    assert launch(run) == 2
    said = capsys.readouterr().err
    assert f"{recipe}: edited since it was written, and says something else than this recipe; launch {recipe} to go by it" in said
    assert said.count("\n") == 1
    assert recipe.read_text() == edited
    assert main(["launch", str(recipe)]) == 0  # the edited one is what is wanted: kept, comments and all
    assert f"{recipe}: edited since it was written, kept" in capsys.readouterr().out
    assert recipe.read_text() == edited
    assert launch(run) == 2
    assert launch(run, "--force") == 0
    assert recipe.read_text() != edited
    assert launch(run, "seed=9") == 0  # not edited by hand: another recipe takes its place


def test_evaluation_is_held_against_the_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "examples/ultralong_8b_4m/recipe.yaml", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("2 models in ") == 1  # 10-evaluate-before: as it is, and with the rope alone
    assert said.count("SITE: one model in ") == 2
    recipe = open_recipe(words[1]).recipe
    assert recipe.evaluate.needle is not None
    many = ["evaluate.needle.samples=2000", "evaluate.needle.depths=5", "evaluate.needle.shared=false"]
    file = open_recipe(words[1], many)
    gpu = cluster_gpu(file.recipe.cluster)
    assert gpu is not None
    price = evaluation_price(file.recipe.evaluate, resolve(file, need_model=False).shape, gpu)
    assert price is not None
    assert main([*words, *many]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    (hours,) = re.findall(
        r"evaluate: 10-evaluate-before measures 2 models: (\d+) h \[planned\], cluster.time_limit gives 4.0 h", refused
    )
    assert int(hours) == pytest.approx(2 * price.seconds / 3600, rel=0.01)
    assert "most of it: needle, 10,000 x 4,194,304 tokens, 18" in refused
    # one model alone fits where two do not
    fits = (price.seconds / 3600) * 1.5
    with pytest.raises(ConfigError, match="10-evaluate-before measures 2 models"):
        build_chain(open_recipe(words[1], [*many, f"cluster.time_limit={round(fits * 60)}"]))
    long_enough = round(price.seconds / 60 * 2 + 60)
    build_chain(open_recipe(words[1], [*many, f"cluster.time_limit={long_enough}"]))


@pytest.mark.parametrize("name", ["-dash/run", "-x"])
def test_a_run_folder_that_programs_take_for_an_option_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "tiny-cpu", f"output={name}", "--dry-run"]) == 2
    assert f"run folder {name}: a name that starts with a dash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("written.json", text)
            for text in (b"[]", b"3", b"\xff", b"{}", b'{"scripts": 3, "recipe": "a"}', b'{"scripts": {"a": 1}, "recipe": "a"}')
        ),
        *(("written.json", text) for text in (b'{"scripts": {}, "recipe": 3}', b'{"scripts": {}}', b"")),
        *(("jobs.txt", text) for text in (b"{}", b"\xff\xfe", b"12\n", b"twelve 20-extend\n", b"1 2 3\n")),
    ],
)
def test_damaged_notes_are_one_line(run: Path, slurm: Path, name: str, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(run) == 0
    (run / "slurm" / name).write_bytes(text)
    capsys.readouterr()
    assert launch(run, "--submit") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"slurm/{name}: damaged" in said
    assert not (slurm / "sbatch.log").exists()


def test_a_folder_that_is_no_run_folder_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.mkdir()
    (run / "thesis.txt").write_text("precious")
    assert launch(run) == 2
    assert "is already there and is not a run folder" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]


def test_a_run_that_was_made_from_other_values_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chain(chain_of(run))
    stamp = {"recipe": {"stages.extend.optimizer.lr": 1.0}, "files": {}}
    (run / "run.json").write_text(json.dumps({"steps": [{"name": "train-extend", "state": "done", "inputs": stamp}]}))
    before = (run / "recipe.yaml").read_bytes()
    assert launch(run, "seed=5") == 2
    assert "when step train-extend ran" in capsys.readouterr().err
    assert (run / "recipe.yaml").read_bytes() == before


# ---------------------------------------------------------------------- submitting


NAMES = [
    "00-prepare",
    "10-evaluate-before",
    "20-extend",
    "21-evaluate-extend",
    "30-instruct",
    "31-evaluate-instruct",
    "90-finish",
]


def test_each_job_waits_for_a_good_end_of_the_one_before(run: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(run, "--submit") == 0
    calls = (slurm / "sbatch.log").read_text().splitlines()
    first = "--parsable --kill-on-invalid-dep=yes"
    assert calls == [
        f"{first} {run}/slurm/{NAMES[0]}.sbatch",
        *(f"{first} --dependency=afterok:{101 + i} {run}/slurm/{name}.sbatch" for i, name in enumerate(NAMES[1:])),
    ]
    assert "job 107: 90-finish" in capsys.readouterr().out
    assert jobs_of(run) == [f"{101 + i} {name}" for i, name in enumerate(NAMES)]


def test_submit_sh_submits_the_same_chain(run: Path, slurm: Path) -> None:
    write_chain(chain_of(run))
    said = subprocess.run([run / "slurm" / "submit.sh"], capture_output=True, text=True, check=True).stdout
    assert said.split() == [word for i, name in enumerate(NAMES) for word in (str(101 + i), name)]
    by_hand = (slurm / "sbatch.log").read_text()
    assert jobs_of(run) == said.splitlines()
    (slurm / "sbatch.log").unlink()
    submit_chain(chain_of(run))
    assert (slurm / "sbatch.log").read_text() == by_hand


@pytest.mark.parametrize("by_hand", [False, True])
def test_when_the_third_job_is_refused_the_first_two_are_cancelled(run: Path, slurm: Path, by_hand: bool) -> None:
    (slurm / "fail_at").write_text("3")
    write_chain(chain_of(run))
    if by_hand:
        assert subprocess.run([run / "slurm" / "submit.sh"], capture_output=True, check=False).returncode != 0
    else:
        with pytest.raises(ConfigError, match=r"20-extend\.sbatch: sbatch: .*Invalid account.*; nothing of the chain is left"):
            submit_chain(chain_of(run))
    assert (slurm / "scancel.log").read_text() == "101 102\n"
    assert jobs_of(run) == []
    assert len((slurm / "sbatch.log").read_text().splitlines()) == 3


def test_a_chain_in_the_queue_is_not_submitted_again(run: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(run, "--submit") == 0
    (slurm / "queue").write_text("103 RUNNING\n104 PENDING\n9999 RUNNING\n")
    assert launch(run, "--submit") == 2
    said = capsys.readouterr().err
    assert "already submitted: 20-extend (job 103, running), 21-evaluate-extend (job 104, pending)" in said
    assert "scancel 103 104" in said
    assert launch(run) == 0  # the same recipe: nothing changes for them
    before = (run / "recipe.yaml").read_bytes()
    assert launch(run, "seed=7") == 2
    assert "jobs of this chain would read a changed recipe: 20-extend (job 103" in capsys.readouterr().err
    assert (run / "recipe.yaml").read_bytes() == before
    (slurm / "queue").write_text("9999 RUNNING\n")
    assert launch(run, "--submit") == 0


@pytest.mark.parametrize(("first", "second"), [("launch", "launch"), ("launch", "submit.sh"), ("submit.sh", "launch")])
def test_of_two_submissions_at_once_the_second_is_refused(run: Path, slurm: Path, first: str, second: str) -> None:
    assert launch(run) == 0
    commands = {
        "launch": [sys.executable, "-m", "mcore_longctx", "launch", "tiny-cpu", f"output={run}", "--submit"],
        "submit.sh": ["bash", str(run / "slurm" / "submit.sh")],
    }
    (slurm / "hold").touch()  # the first stands in its first sbatch: it has looked at the queue, and no job is written down
    one = subprocess.Popen(commands[first], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (slurm / "sbatch.log").exists():
            assert one.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        other = subprocess.run(commands[second], capture_output=True, text=True, check=False, timeout=60)
    finally:
        (slurm / "hold").unlink()
        assert one.wait(60) == 0
    assert other.returncode == 2, other.stdout
    assert other.stderr.count("\n") == 1
    assert f"another launch works on this folder (process {one.pid} on " in other.stderr
    assert len((slurm / "sbatch.log").read_text().splitlines()) == len(NAMES)
    assert jobs_of(run) == [f"{101 + i} {name}" for i, name in enumerate(NAMES)]
    assert launch(run) == 0  # nobody holds it any more


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_scancel_did_not_take_is_named_and_stays_written_down(
    run: Path, slurm: Path, by_hand: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "fail_at").write_text("3")
    (slurm / "scancel_says").write_text("scancel: error: Unable to contact slurm controller\n")
    write_chain(chain_of(run))
    if by_hand:
        result = subprocess.run([run / "slurm" / "submit.sh"], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "scancel failed: still in the queue may be 101 102" in result.stderr
    else:
        left = (
            r"scancel failed too \(.*Unable to contact.*\): still in the queue may be 00-prepare \(job 101\), 10-.* \(job 102\)"
        )
        with pytest.raises(ConfigError, match=left + "; scancel 101 102$"):
            submit_chain(chain_of(run))
    assert jobs_of(run) == ["101 00-prepare", "102 10-evaluate-before"]
    (slurm / "queue").write_text("101 PENDING\n102 PENDING\n")
    assert launch(run, "--submit") == 2
    assert "already submitted: 00-prepare (job 101, pending)" in capsys.readouterr().err


def test_scancel_and_squeue_are_those_of_the_environment_that_is_given(
    run: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(os.environ)
    write_chain(chain_of(run))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("FAKE")
    (slurm / "fail_at").write_text("3")
    with pytest.raises(ConfigError, match="nothing of the chain is left"):
        submit_chain(chain_of(run), given)
    assert (slurm / "scancel.log").read_text() == "101 102\n"
    (slurm / "fail_at").unlink()
    submit_chain(chain_of(run), given)
    (slurm / "queue").write_text("104 RUNNING\n")
    with pytest.raises(ConfigError, match="already submitted"):
        submit_chain(chain_of(run), given)


STOPPING_SBATCH = SBATCH.replace(
    'echo "$((100', '[[ $count == 3 ]] && {{ kill -{signal} $PPID; sleep 2; exit 1; }}\necho "$((100'
)


@pytest.mark.parametrize("signal", ["KILL", "INT"])
def test_whoever_is_stopped_while_submitting_leaves_no_job_unknown(run: Path, slurm: Path, tmp_path: Path, signal: str) -> None:
    (tmp_path / "bin" / "sbatch").write_text(STOPPING_SBATCH.replace("{signal}", signal).replace("{{", "{").replace("}}", "}"))
    command = [sys.executable, "-m", "mcore_longctx", "launch", "tiny-cpu", f"output={run}", "--submit"]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert stopped.returncode != 0
    if signal == "INT":
        assert (slurm / "scancel.log").read_text() == "101 102\n"
        assert jobs_of(run) == []
    else:
        assert jobs_of(run) == ["101 00-prepare", "102 10-evaluate-before"]
        (slurm / "queue").write_text("101 RUNNING\n102 PENDING\n")
        with pytest.raises(ConfigError, match=r"already submitted: 00-prepare \(job 101, running\)"):
            submit_chain(chain_of(run))


def test_launch_knows_the_jobs_of_submit_sh_and_submit_sh_those_of_launch(
    run: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run) == 0
    by_hand = run / "slurm" / "submit.sh"
    subprocess.run([by_hand], capture_output=True, check=True)
    (slurm / "queue").write_text("102 RUNNING\n")
    before = (run / "recipe.yaml").read_bytes()
    assert launch(run, "seed=99") == 2
    assert "would read a changed recipe: 10-evaluate-before (job 102, running)" in capsys.readouterr().err
    assert (run / "recipe.yaml").read_bytes() == before
    assert launch(run, "--submit") == 2
    again = subprocess.run([by_hand], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == (
        "already submitted: 10-evaluate-before (job 102): wait for it, or scancel 102; nothing was submitted\n"
    )
    assert len((slurm / "sbatch.log").read_text().splitlines()) == len(NAMES)
    (slurm / "queue").unlink()
    assert launch(run, "--submit") == 0
    (slurm / "queue").write_text("110 PENDING\n")
    assert subprocess.run([by_hand], capture_output=True, check=False).returncode == 2


def test_a_queue_that_does_not_answer_is_not_an_empty_one(run: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm / "squeue_says").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert launch(run, "--submit") == 0  # nothing was ever submitted: nothing to ask for
    calls = (slurm / "sbatch.log").read_text()
    capsys.readouterr()
    for words in (("--submit",), ("seed=7",)):
        assert launch(run, *words) == 2
        said = capsys.readouterr().err
        assert "jobs.txt: squeue does not answer (slurm_load_jobs error: Unable to contact" in said
        assert said.count("\n") == 1
    by_hand = subprocess.run([run / "slurm" / "submit.sh"], capture_output=True, text=True, check=False)
    assert by_hand.returncode == 2
    assert "squeue does not answer" in by_hand.stderr
    assert (slurm / "sbatch.log").read_text() == calls
    assert len(jobs_of(run)) == len(NAMES)


def test_without_sbatch_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(run, "--submit") == 2
    assert "sbatch is not on PATH: nothing was submitted; submit on a login node" in capsys.readouterr().err
    assert not run.exists()


def test_a_secret_is_wanted_by_name_and_written_nowhere(
    run: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("cluster.secrets=[WANDB_API_KEY]", "--submit")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert launch(run, *words) == 2
    assert "cluster.secrets: WANDB_API_KEY: not set, nothing was submitted; export it first" in capsys.readouterr().err
    assert not run.exists()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert launch(run, *words) == 0
    said = capsys.readouterr()
    texts = [path.read_text() for path in [*run.rglob("*"), *slurm.rglob("*")] if path.is_file()]
    assert len(texts) > 8
    assert "WANDB_API_KEY:?" in "".join(texts)
    assert SECRET not in "".join([*texts, said.out, said.err])


def test_a_stage_on_transformer_engine_is_planned_as_such() -> None:
    def steps(backend: str) -> str:
        without_cache = ["evaluate.needle.shared=false", "evaluate.short_suite=null"]  # Transformer Engine's layers keep none
        chain = build_chain(open_recipe("ultralong-8b-1m", [f"model.backend={backend}", *without_cache]))
        (found,) = re.findall(r"([\d,]+) steps of \S+ s fit", chain.scripts["30-instruct.sbatch"])
        return found

    assert steps("te") != steps("local")
