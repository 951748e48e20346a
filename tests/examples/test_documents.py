"""The chats of the examples are what their commands make."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_chats_that_nobody_has_written_come_out_of_their_commands_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = EXAMPLES / "documents"
    page = (documents / "SOURCES.md").read_text()
    commands = re.findall(r"^mcore-longctx (data synth .*)$", page, re.MULTILINE)
    assert len(commands) == 2
    shutil.copytree(documents / "books", tmp_path / "documents" / "books")
    (tmp_path / "tiny-llama").symlink_to(EXAMPLES / "tiny-llama")
    monkeypatch.chdir(tmp_path / "documents")
    for command in commands:
        assert main(shlex.split(command)) == 0
    for name in ("tables.jsonl", "questions-1K.jsonl", "questions-2K.jsonl", "questions-4K.jsonl"):
        assert Path(name).read_bytes() == (documents / name).read_bytes(), name
