"""docs/quantize.md: its commands, run as they stand."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mcore_longctx.cli.main import VERBS, main, parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "quantize.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in TEXT.splitlines() if line.startswith("    mcore-longctx ")]


def test_the_page_shows_both_ways_and_every_command_is_one():
    assert {tuple(command[:2]) for command in COMMANDS} >= {("convert", "export"), ("quantize", "calibrate")}
    for command in COMMANDS:
        assert command[0] in VERBS
        parse(command)


def test_the_commands_of_the_page_run_as_they_stand(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    ran = [command for command in COMMANDS if command[0] == "convert" or importlib.util.find_spec("modelopt") is not None]
    for command in ran:
        assert main(command) == 0, (command, capsys.readouterr().err)
    if importlib.util.find_spec("compressed_tensors") is not None:
        for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(code, {})
        assert "torch.Size([1, 64, 262])" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed (make test-modelopt)")
def test_the_versions_of_the_page_are_those_that_are_installed():
    from importlib.metadata import version

    assert f"nvidia-modelopt {version('nvidia-modelopt')}" in TEXT
