"""docs/from-zero-to-4m.md: what can run here runs, the rest is understood by the parsers that would get it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_longctx.cli.main import parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/from-zero-to-4m.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()]
DRY = [c for c in dict.fromkeys(COMMANDS) if re.match(r"mcore-longctx (plan|doctor|run|launch) ", c) and "--submit" not in c]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page is read: a clone, before the model and the data are there."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.parametrize("command", DRY)
def test_a_command_that_needs_no_cluster_runs(folder: Path, command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mcore_longctx", *shlex.split(command)[1:]],
        cwd=folder, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert result.stdout
    faults = [line for line in result.stdout.splitlines() if line.startswith("WRONG")]
    if command.startswith(
        "mcore-longctx doctor examples/"
    ):  # the model and the data of the page are not here, and nothing else is wrong
        assert faults
        assert all(line.split()[1] in ("model", "inputs") and ": " in line and "; " in line for line in faults), faults
        assert result.returncode == 1, result.stderr
    else:
        assert not faults
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_command_of_ours_is_understood() -> None:
    ours = [
        shlex.split(command[command.index("mcore-longctx") :])
        for command in COMMANDS
        if re.search(r"mcore-longctx [a-z]", command)
    ]
    assert {words[1] for words in ours} == {"doctor", "convert", "data", "plan", "run", "launch", "report"}
    for words in ours:
        parse(words[1:])


def test_what_is_not_ours_is_what_a_cluster_has() -> None:
    programs = {command.split()[0] for command in COMMANDS}
    assert programs == {
        "python3.11",
        "source",
        "pip",
        "mcore-longctx",
        "hf",
        "srun",
        "squeue",
        "scancel",
        "touch",
        "tail",
        "cat",
        "vllm",
    }


def test_the_files_that_it_names_are_there_or_are_made(folder: Path) -> None:
    for path in set(re.findall(r"(?<![\w/])examples/[\w./]+", PAGE)) - {"examples/ultralong_8b_"}:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w.-]+\.md)\)", PAGE):
        assert (ROOT / "docs" / link).is_file(), link
    assert {path.split("/")[1] for path in re.findall(r"runs/[\w./-]+", PAGE)} == {"ultralong-8b-4m"}


def test_the_words_of_the_table_are_those_of_the_verdicts() -> None:
    source = (ROOT / "mcore_longctx/launch/progress.py").read_text(encoding="utf-8")
    for word in re.findall(r"^\| `([a-z ]+): \.\.\.` \|", PAGE, re.MULTILINE):
        assert f'f"{word}: ' in source, word
