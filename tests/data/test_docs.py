"""The examples of docs/data.md, run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.cli.main import main
from tests.data.conftest import make_tokenizer, words

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line.strip()]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page's commands name."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "Llama-3.1-8B")
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": words(i, 2500)}) + "\n" for i in range(12)))
    for name in ("one", "two"):
        (tmp_path / "repositories" / name / "src").mkdir(parents=True)
        for part in range(4):
            (tmp_path / "repositories" / name / "src" / f"{part}.py").write_text(words(part, 1200))
    return tmp_path


def test_the_steps_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [command for command in COMMANDS if command.startswith("mcore-longctx data ") and " OUT" in command]
    assert [shlex.split(step)[2] for step in steps][:4] == ["tokenize", "plan", "pack", "show"]
    for step in steps[:4]:
        _, *arguments = shlex.split(step.replace("1M", "256"))
        assert main(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "code: 2 documents" in said
    assert "sample 3 of " in said
    assert main(["data", "verify", "OUT"]) == 0


def test_the_python_example(folder: Path) -> None:
    common = ["--tokenizer", "Llama-3.1-8B", "books=books.jsonl"]
    for arguments in (
        ["tokenize", "x", *common],
        ["plan", "x", "--seq-length", "256"],
        ["pack", "x", "--name", "long-documents"],
    ):
        assert main(["data", *arguments]) == 0
    names: dict[str, Any] = {}
    exec(PYTHON.replace("runs/tiny-cpu/data/extend", "x"), names)
    assert names["tokens"].shape == (64,)
    assert names["positions"][0] == 32
