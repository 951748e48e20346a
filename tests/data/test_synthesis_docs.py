"""Every command of docs/synthesis.md, run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from tests.data.test_synthesis_hierarchical import records, sentences

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "synthesis.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line.strip()]
(PROGRAM,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "writer.py").write_text(PROGRAM)
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": sentences(n, 120)}) + "\n" for n in range(5)))
    assert [shlex.split(command)[2:4] for command in COMMANDS][:4] == [
        *(["synth", kind] for kind in ("tables", "keyvalue", "hierarchical")),
        ["tokenize", "OUT"],
    ]
    for command in COMMANDS:
        program, *arguments = shlex.split(command.replace('"python writer.py"', f'"{sys.executable} writer.py"'))
        assert program == "mcore-longctx"
        assert main(arguments) == 0, capsys.readouterr().err
    assert main(["data", "verify", "OUT"]) == 0
    assert "20 chats of at most 1,024 tokens" in capsys.readouterr().out
    for name in ("chats", "asked"):
        assert len(records(tmp_path / f"{name}.jsonl")) in (2, 4)
        asked = records(tmp_path / f"{name}.evidence.jsonl")
        assert {"chat", "turn", "kind", "document", "chunks", "evidence_tokens", "answer_token", "depth"} <= set(asked[0])
