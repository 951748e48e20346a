from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from tests.convert.hf_folders import llama_config, read_weights, write_folder


def test_the_four_actions_work_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron, out = str(write_folder(tmp_path / "hf", llama_config())), str(tmp_path / "megatron"), str(tmp_path / "out")
    assert main(["convert", "import", hf, megatron]) == 0
    assert "parameters, float32; rope none: no scaling, base 500,000" in capsys.readouterr().out
    assert main(["convert", "export", megatron, out, "--shard-size", "20KB"]) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert read_weights(tmp_path / "out") == read_weights(tmp_path / "hf")
    capsys.readouterr()
    assert main(["convert", "verify", hf, out, "--json-file", str(tmp_path / "verify.json")]) == 0
    assert "equal: 21 tensors compared" in capsys.readouterr().out
    assert json.loads((tmp_path / "verify.json").read_text())["equal"] is True
    assert main(["convert", "inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"].startswith("holds; of ")
    assert main(["convert", "inspect", out]) == 0
    assert "Hugging Face folder" in capsys.readouterr().out


def test_a_difference_is_exit_code_1_and_bad_input_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = str(write_folder(tmp_path / "a", llama_config()))
    b = str(write_folder(tmp_path / "b", llama_config(rope_theta=1e6)))
    assert main(["convert", "verify", a, b, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["rope_equal"] is False
    assert main(["convert", "verify", a, str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"mcore-longctx: {tmp_path}/none: no such folder; check the path\n"
    assert main(["convert", "export", a, str(tmp_path / "out"), "--shard-size", "big"]) == 2
    assert "--shard-size: 'big' is not a file size; write 5GB or 500MB" in capsys.readouterr().err
    assert main(["convert", "export", a, str(tmp_path / "out"), "--shard-size", "9" * 350 + "GB"]) == 2
    assert f"--shard-size: '{'9' * 37}...' is not a file size" in capsys.readouterr().err
    assert main(["convert", "import", a, b]) == 2
    assert "output is already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workers", "1000", "--workers: 1,000 workers; expected 1 to 256"),
        ("--workers", "0", "--workers: 0 workers; expected 1 to 256"),
        ("--vocab-multiple", "9" * 17, f"--vocab-multiple: a vocabulary multiple of {int('9' * 17):,}; expected 1 to 1,048,576"),
        ("--vocab-multiple", "0", "--vocab-multiple: a vocabulary multiple of 0; expected 1 to 1,048,576"),
    ],
)
def test_sizes_without_sense_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], option, value, message) -> None:
    hf = str(write_folder(tmp_path / "hf", llama_config()))
    assert main(["convert", "import", hf, str(tmp_path / "out"), option, value]) == 2
    assert capsys.readouterr().err == f"mcore-longctx: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("place", ["none/verify.json", ".", "hf/config.json/verify.json"])
def test_a_result_that_cannot_be_written_is_said_before_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    hf = str(write_folder(tmp_path / "hf", llama_config()))
    monkeypatch.setattr("mcore_longctx.convert.compare", lambda *_, **__: pytest.fail("compared"))
    file = tmp_path / place
    assert main(["convert", "verify", hf, hf, "--json-file", str(file)]) == 2
    what = "is a folder; name a file" if place == "." else "its folder is not there; make the folder"
    assert capsys.readouterr().err == f"mcore-longctx: {file}: {what}\n"
