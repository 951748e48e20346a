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
    assert main(["convert", "import", a, b]) == 2
    assert "output is already there" in capsys.readouterr().err
