"""The whole line on the tiny model, made short, and every command of the README.

`make demo` runs the recipe `tiny-cpu`; here the same recipe runs with two training steps and one sample per cell, is killed in the
middle and goes on. The other commands of the README then run as they stand there.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SHORT = [
    "stages.extend.train_iters=3",
    "stages.extend.optimizer.lr_warmup_iters=0",
    "stages.extend.save_interval=1",
    "stages.instruct.train_iters=2",
    "evaluate.needle.lengths=[512, 1024]",
    "evaluate.needle.depths=2",
    "evaluate.needle.samples=1",
    "evaluate.ruler.lengths=[1024]",
    "evaluate.ruler.samples=1",
    "evaluate.short_suite.questions=11",
    "evaluate.loss_by_position.windows=2",
    "evaluate.loss_by_position.short_windows=4",
]
pytestmark = pytest.mark.multiproc


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mcore_longctx", *arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fresh clone, with the run that `make demo` makes."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "docs", "Makefile", "pyproject.toml", "constraints"):
        (folder / name).symlink_to(ROOT / name)
    kill_after_step(folder, 1)
    result = subprocess.run(cli("run", "tiny-cpu", *SHORT), cwd=folder, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "printed.txt").write_text(result.stdout)
    return folder


def kill_after_step(folder: Path, step: int) -> None:
    """Start the run and kill every process of it with SIGKILL once the stage `extend` has finished a step."""
    metrics = folder / "runs" / "tiny-cpu" / "metrics" / "extend.jsonl"
    deadline = time.monotonic() + 240
    command = cli("run", "tiny-cpu", *SHORT)
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        for pid in (run.pid, *children):  # `run` starts the ranks in a session of their own
            os.killpg(os.getpgid(pid), signal.SIGKILL)


@pytest.mark.timeout(600)
def test_the_line_goes_on_after_a_kill_and_ends_with_a_report(folder: Path) -> None:
    run = folder / "runs" / "tiny-cpu"
    printed = (folder / "printed.txt").read_text()
    assert "[1/12] import: done before, skipped" in printed
    assert "report: runs/tiny-cpu/report.html" in printed
    steps = json.loads((run / "run.json").read_text())["steps"]
    assert [step["state"] for step in steps] == ["done"] * 12
    metrics = [json.loads(line)["step"] for line in (run / "metrics" / "extend.jsonl").read_text().splitlines()]
    assert metrics == [1, 2, 3]
    verify = json.loads((run / "verify.json").read_text())
    assert verify["equal"]
    assert verify["logits"]["inverse_frequencies_equal"]
    page = (run / "report.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']https?:", page)


def test_running_again_does_nothing_twice(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "tiny-cpu" / "checkpoints").rglob("*")}
    result = subprocess.run(cli("run", "tiny-cpu", *SHORT), cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done before, skipped") == 12
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs" / "tiny-cpu" / "checkpoints").rglob("*")}


def test_make_demo_runs_the_tiny_recipe_and_make_test_the_suite(folder: Path) -> None:
    for target, command in (("demo", "mcore-longctx run tiny-cpu"), ("test", "-m pytest")):
        assert f"make {target}" in COMMANDS
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        assert command in result.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("make ", "pip install"))])
def test_every_other_command_of_the_readme_works(folder: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "mcore-longctx"
    result = subprocess.run(cli(*arguments), cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not result.stderr


def test_the_extras_of_the_readme_exist() -> None:
    installs = [c for c in COMMANDS if c.startswith("pip install")]
    extras = set(re.findall(r"`?\.\[(\w+)\]", README))
    declared = (ROOT / "pyproject.toml").read_text()
    assert installs == ["pip install -e '.[train]'"]
    assert extras >= {"train", "te"}
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)
    assert "apex = [" not in declared


def test_the_plan_that_the_readme_shows_is_what_the_verb_prints(tmp_path: Path) -> None:
    command = cli("plan", "ultralong-8b-4m", "--stage", "extend")
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    shown = README.partition("## Before you book")[2].partition("```\n")[2].partition("```")[0].splitlines()
    assert len(shown) > 20
    lines = iter(printed.splitlines())
    missing = [line for line in shown if line != "..." and line not in lines]  # in this order: `in` goes on where it was
    assert not missing
    accuracy = " ".join(printed.partition("accuracy:")[2].split())
    pattern = r"([\d.]+)% off.*?\((\d+) runs.*?more: mean -([\d.]+)%.*?memory ([\d.]+)% \((\d+) runs"
    time, runs, long, memory, rows = re.search(pattern, accuracy).groups()
    claim = f"are {time}% off on average ({runs} runs), memory {memory}% ({rows} runs); the runs of 512K tokens and more are planned {long}%"
    assert claim in " ".join(README.split())
