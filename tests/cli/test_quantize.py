"""`mcore-longctx quantize calibrate`: what is refused before anything is loaded, and the folder that appears."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mcore_longctx.cli.main import main
from mcore_longctx.manifest import read_manifest
from tests.convert.hf_folders import llama_config, write_folder

has_modelopt = importlib.util.find_spec("modelopt") is not None
needs_modelopt = pytest.mark.skipif(not has_modelopt, reason="nvidia-modelopt is not installed (make test-modelopt)")
EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = EXAMPLES / "documents" / "books" / "amos.txt"
CONTEXT = 512


@pytest.fixture
def hf(tmp_path):
    config = llama_config(
        hidden_size=64, intermediate_size=96, vocab_size=262, max_position_embeddings=CONTEXT, torch_dtype="bfloat16"
    )
    folder = write_folder(tmp_path / "hf", config)
    weights = load_file(folder / "model.safetensors")
    small = {name: (weight if weight.dim() == 1 else weight * 0.05).bfloat16() for name, weight in weights.items()}
    save_file(small, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(EXAMPLES / "tiny-llama" / name, folder / name)
    return folder


def calibrate(hf: Path, *options: object, data: Path = TEXT, lengths: str = "32,256") -> int:
    return main(["quantize", "calibrate", str(hf), str(hf.parent / "out"), "--data", str(data), "--lengths", lengths, *options])


@needs_modelopt
def test_a_folder_appears_with_tokenizer_report_and_manifest_and_says_what_was_found(hf, capsys):
    assert calibrate(hf, "--kv") == 0
    out = hf.parent / "out"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0].split(":")[0].split() == ["32", "tokens", "x", "8"]
    assert "FP8, 14 linear layers and the KV cache; scales grow at most 1." in said[2]
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    assert not (out / "modeling_evil.py").exists()
    AutoTokenizer.from_pretrained(str(out))
    report = json.loads((out / "quantize_report.json").read_text())
    assert report["lengths"] == [32, 256]
    assert {len(row) for kind in report["amax_by_length"].values() for row in kind.values()} == {2}
    assert set(read_manifest(out, "quantized")["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}
    assert {path.name for path in hf.parent.iterdir()} == {"hf", "out"}


@needs_modelopt
def test_what_grows_with_the_length_is_exit_code_1_and_no_folder(hf, capsys):
    weights = load_file(hf / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    # all of the letter Z is in one number, which the norm makes sqrt(64); all of the others are spread evenly
    embedding[:] = embedding.sign() * 0.05
    embedding[ord("Z")] = torch.eye(64)[0]
    weights["model.layers.0.input_layernorm.weight"][:] = 1
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    text = hf.parent / "text.txt"
    text.write_text("a" * 65 + "Z" + "a" * 400)  # between the first and the second of three windows of 64
    assert calibrate(hf, data=text, lengths="64,200") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"mcore-longctx: {hf}: the largest magnitude of model.layers.0.self_attn.")
    assert "times from 64 to 200 tokens" in error
    assert {path.name for path in hf.parent.iterdir()} == {"hf", "text.txt"}
    text.write_text("a" * 10 + "Z" + "a" * 400)  # at every length
    assert calibrate(hf, data=text, lengths="64,200") == 0


@pytest.mark.skipif(has_modelopt, reason="nvidia-modelopt is installed here")
def test_without_modelopt_the_extra_is_named_and_nothing_is_left(hf, capsys):
    assert calibrate(hf) == 2
    assert "pip install 'mcore-longctx[quantize]'" in capsys.readouterr().err
    assert {path.name for path in hf.parent.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("64", "--lengths: '64': expected two or more lengths"),
        ("256,64", "expected two or more lengths of at least 16, ascending"),
        ("64,64", "ascending"),
        ("8,64", "at least 16"),
        ("64,1K", "--lengths: '64,1K' is not a list of lengths; write 512,32768,131072"),
        ("64,513", "--lengths: 513 tokens, the model's context has 512"),
    ],
)
def test_lengths_that_cannot_be_are_refused(hf, capsys, lengths, message):
    assert calibrate(hf, lengths=lengths) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in hf.parent.iterdir()} == {"hf"}


def test_too_little_text_is_refused_by_its_name(hf, capsys):
    text = hf.parent / "short.txt"
    text.write_text("A few words.\n")
    assert calibrate(hf, data=text) == 2
    error = capsys.readouterr().err
    assert f"{text}: " in error
    assert "a window of 256 needs" in error
    assert not (hf.parent / "out").exists()


def test_a_quantised_model_an_existing_folder_and_no_model_are_refused(hf, capsys):
    (hf.parent / "out").mkdir()
    assert calibrate(hf) == 2
    assert "output folder is already there" in capsys.readouterr().err
    (hf.parent / "out").rmdir()
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt"}}))
    assert calibrate(hf) == 2
    assert "quantization_config" in capsys.readouterr().err
    (hf / "config.json").unlink()
    assert calibrate(hf) == 2
    assert f"{hf}: no config.json: not a Hugging Face folder" in capsys.readouterr().err
    assert {path.name for path in hf.parent.iterdir()} == {"hf"}


def test_the_tokens_of_every_length_are_the_same_text(hf):
    from mcore_longctx.cli.quantize import _windows

    windows = _windows(hf, TEXT, [64, 200, 512], 262)
    assert {length: len(rows) for length, rows in windows.items()} == {64: 8, 200: 2, 512: 1}
    prefix = [token for token in windows[512][0].tolist() if token >= 256][:1]
    whole = bytes(token for token in windows[512][0].tolist() if token < 256)
    for length, rows in windows.items():
        for row in rows:
            assert len(row) == length
            assert row.tolist()[: len(prefix)] == prefix
            assert bytes(token for token in row.tolist() if token < 256) in whole
