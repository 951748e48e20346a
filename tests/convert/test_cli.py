from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.errors import StorageError
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


@pytest.mark.parametrize(
    ("action", "first", "then", "what"),
    [
        ("import", [], ["--dtype", "bf16"], "dtype was keep, now bf16"),
        ("import", ["--dtype", "fp16"], [], "dtype was fp16, now keep"),
        ("import", [], ["--layer-keys", "per-layer"], "layer-keys was stacked, now per-layer"),
        ("import", [], ["--chunks-for-tp", "2"], "chunks-for-tp was 1, now 2"),
        ("import", [], ["--vocab-multiple", "1"], "vocab-multiple was 128, now 1"),
        ("import", [], ["--rope", "linear:2"], "rope.type was none, now linear"),
        ("export", [], ["--dtype", "bf16"], "dtype was keep, now bf16"),
        ("export", [], ["--shard-size", "1MB"], "shard-size was 5000000000, now 1000000"),
        ("export", [], ["--quantize", "fp8"], "quantize was None, now fp8"),
        ("export", ["--rope", "linear:2"], ["--rope", "linear:4"], "rope.factor was 2.0, now 4.0"),
    ],
)
def test_another_command_than_the_one_that_was_killed_is_told_by_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, action, first, then, what
) -> None:
    source = write_folder(tmp_path / "hf", llama_config())
    if action == "export":
        assert main(["convert", "import", str(source), str(tmp_path / "checkpoint")]) == 0
        source = tmp_path / "checkpoint"
    base = ["convert", action, str(source), str(tmp_path / "base")]

    def stop(*_: object) -> None:
        raise StorageError("no power", where="here")

    with monkeypatch.context() as patch:
        patch.setattr("mcore_longctx.convert.copying.kernels.Copier.copy", stop)
        assert main([*base, *first]) == 1
    capsys.readouterr()
    assert main([*base, *then]) == 2
    said = f"base.partial: belongs to a run with other inputs ({what}); remove it, or choose another output"
    assert capsys.readouterr().err == f"mcore-longctx: {tmp_path}/{said}\n"
    if (action, then) == ("import", ["--dtype", "bf16"]):
        assert f"\n    {said}\n" in (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    assert main([*base, *first]) == 0


def test_another_rope_is_told_as_it_was_and_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, base, out = str(write_folder(tmp_path / "hf", llama_config())), str(tmp_path / "base"), str(tmp_path / "out")
    assert main(["convert", "import", hf, base, "--rope", "linear:2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("rope: none: no scaling, base 500,000")
    assert " -> linear" in lines[0]
    assert main(["convert", "export", base, out, "--rope", "llama3:8,original=512"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("rope: linear")
    assert " -> llama3" in line


def test_what_could_not_be_checked_of_a_foreign_checkpoint_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, base = write_folder(tmp_path / "hf", llama_config()), tmp_path / "base"
    assert main(["convert", "import", str(hf), str(base)]) == 0
    for name in ("mcore_longctx.json", "manifest.json"):
        (base / name).unlink()
    shutil.rmtree(base / "hf")
    told = ["the rope was not checked", "nor was the rest"]
    monkeypatch.setattr("mcore_longctx.convert.views.torch_dist.check_saved_settings", lambda *_: told)
    capsys.readouterr()
    assert main(["convert", "export", str(base), str(tmp_path / "out"), "--config", str(hf)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [f"note: {line}" for line in told]


@pytest.mark.parametrize("action", ["import", "export", "merge"])
def test_an_output_inside_its_source_or_around_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    source = write_folder(tmp_path / "around" / "source", llama_config())
    if action == "export":
        source = tmp_path / "around" / "checkpoint"
        assert main(["convert", "import", str(tmp_path / "around" / "source"), str(source)]) == 0
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    sources = [str(source)] * (2 if action == "merge" else 1)
    capsys.readouterr()
    for out, what in (
        (source / "out", f"lies inside the source {source}"),
        (tmp_path / "link" / "deep" / "out", f"lies inside the source {source}"),
        (tmp_path / "around", f"the source {source} lies inside it"),
    ):
        assert main(["convert", action, *sources, str(out)]) == 2
        assert capsys.readouterr().err == f"mcore-longctx: {out}: {what}; choose a folder beside it\n"
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["convert", action, *sources, str(tmp_path / "around" / "out")]) == 0
