"""The verb `doctor`: what it prints, and its exit code."""

import json
import re
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main

ROOT = Path(__file__).parents[2]


def test_a_machine_that_is_fit_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["wrong"] == 0
    assert {finding["level"] for finding in printed["findings"]} <= {"ok", "note"}
    assert printed["rope"] is None


def test_a_recipe_is_told_its_rope_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["doctor", "tiny-cpu", "cluster.gpu=none", f"output={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "\nrope of tiny-cpu:\nllama3 factor 8 over 512" in printed
    assert "WRONG" not in printed


def test_a_recipe_that_would_fail_is_exit_code_1_and_the_last_line_says_of_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    changed = ["data.chats.sources.chats.path=nowhere.jsonl", f"output={tmp_path / 'run'}", "cluster.gpu=none"]
    assert main(["doctor", "tiny-cpu", *changed]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "2 wrong: environment, inputs"
    for line in printed.splitlines():
        assert not line.startswith("WRONG") or "; " in line


def test_a_time_limit_that_launch_refuses_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["doctor", "tiny-cpu", "cluster.time_limit=00:02:00", "cluster.gpu=none", f"output={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 wrong: time limit"


def test_a_recipe_whose_model_and_data_are_not_there_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "ultralong-8b-1m"]) == 1
    assert re.fullmatch(r"\d wrong: model, inputs", capsys.readouterr().out.splitlines()[-1])


def test_a_recipe_that_is_not_there_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
