"""The benchmark of the converters: its models, its comparisons, its page cache, its judgements, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import convert
import convert_files
import ml_dtypes
import numpy as np
import pytest
import random_llama
from convert import CP, ONE, TWO, Measured
from process_tree import Cost
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.test_benchmarks import output, rows


def cost(wall: float, largest: int = 0) -> Cost:
    return Cost(cpu=wall, wall=wall, peak=0, peak_anonymous=0, largest=largest, code=0)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama.write_model(tmp_path_factory.mktemp("models") / "hf", "tiny")


def test_the_random_llama_is_one_that_transformers_loads(hf: Path) -> None:
    model, told = LlamaForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    largest = [float(weight.detach().abs().max()) for weight in model.parameters()]
    assert all(0.01 < value < 0.1 for value in largest)


@pytest.mark.parametrize("size", ["1.5b", "8b", "70b", "405b"])
def test_sizes_are_those_that_their_names_say(size: str) -> None:
    billions = random_llama.tensor_bytes(size) / 2e9
    assert billions == pytest.approx(float(size[:-1]), rel=0.04)
    config = LlamaConfig(**random_llama.config_of(size))
    assert config.hidden_size == random_llama.SIZES[size][1]


def test_a_sparse_model_takes_no_room(tmp_path: Path) -> None:
    folder = random_llama.write_model(tmp_path / "sparse", "8b", sparse=True)
    files = list(folder.glob("*.safetensors"))
    assert len(files) == len(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    assert sum(path.stat().st_size for path in files) > 16e9
    assert sum(path.stat().st_blocks for path in files) * 512 < 2e6


def test_one_number_that_differs_is_named(hf: Path, tmp_path: Path) -> None:
    tensors = {name: array for path in sorted(hf.glob("*.safetensors")) for name, array in load_file(path).items()}
    (tmp_path / "same").mkdir()
    save_file(tensors, tmp_path / "same" / "model.safetensors")
    assert convert_files.difference(hf, tmp_path / "same") is None
    name = "model.layers.1.mlp.up_proj.weight"
    changed = tensors[name].copy()
    changed[-1, -1] *= 2
    save_file({**tensors, name: changed}, tmp_path / "same" / "model.safetensors")
    assert convert_files.difference(hf, tmp_path / "same") == name
    save_file({key: array for key, array in tensors.items() if key != name}, tmp_path / "same" / "model.safetensors")
    assert convert_files.difference(hf, tmp_path / "same") == f"names: ['{name}']"


def test_numbers_in_fp8_may_be_off_by_what_the_type_allows_and_no_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(64, 48)).astype(ml_dtypes.bfloat16)
    scale = (np.abs(exact.astype(np.float32)).max(1, keepdims=True) / 448).astype(np.float32)
    stored = (exact.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
    assert convert_files._near(exact.view(np.uint8), stored.view(np.uint8), scale)
    assert not convert_files._near(exact.view(np.uint8), stored.view(np.uint8), scale * np.float32(1.2))
    assert not convert_files._near(exact.view(np.uint8), np.roll(stored, 1, 0).view(np.uint8), scale)
    stored[3, 3] = np.nan
    assert not convert_files._near(exact.view(np.uint8), stored.view(np.uint8), scale)


def test_files_with_weights_are_compared_to_the_last_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(bytes(5000))
        (tmp_path / name / ".metadata").write_bytes(b"same")
    assert convert_files.same_weights(tmp_path / "a", tmp_path / "b") is None
    (tmp_path / "b" / "__0_0.distcp").write_bytes(bytes(4999) + b"x")
    assert convert_files.same_weights(tmp_path / "a", tmp_path / "b") == "__0_0.distcp"


def test_a_file_that_was_read_is_in_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    convert_files.make_cached(tmp_path)
    assert convert_files.cached_share(tmp_path) == 1.0
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(300 << 20)  # nobody has read it
    assert convert_files.cached_share(tmp_path) < 0.02


def test_ratios_are_of_the_same_round() -> None:
    limit = Measured({1: cost(1.0), 2: cost(4.0), 3: cost(2.0)})
    ours = Measured({1: cost(2.0), 2: cost(4.0), 3: cost(3.0)})
    against = ours.against(limit)
    assert against is not None
    assert (against.low, against.median, against.high) == (1.0, 1.5, 2.0)
    assert Measured({9: cost(1.0)}).against(limit) is None


def test_targets_say_met_and_by_how_much_they_are_missed() -> None:
    mib = 2**20
    results = {name: Measured(error="no Python with it was given") for name in convert.PEERS}
    results |= {CP: Measured({1: cost(2.0)}), ONE: Measured({1: cost(2.5)}, cost(2.5, 40 * mib)), TWO: Measured({1: cost(3.0)})}
    results["modelopt"] = Measured({1: cost(40.0)}, told=[15.0])
    judged = [row[1:] for row in convert.targets("import", results, 13 * mib)]
    assert judged == [
        ("1.25", "at most 1.30", "met"),
        ("1.50", "at most 1.00", "missed: 1.50 of it"),
        ("27.0", "at most 32.0", "met"),
        ("6.0", "at least 8", "missed: 0.75 of it"),
    ]


def test_it_runs_and_tells_who_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--work", str(tmp_path), "--size", "tiny", "--rounds", "1", "--planned", "8b"]
    told = rows(output("convert", arguments, monkeypatch, capsys))
    names = [row[0] for row in told]
    for name in (CP, ONE, TWO, "1 process, `--no-fsync --quantize fp8`", "mbridge", "8b, 16 GB"):
        assert name in names
    assert sum("no Python with it was given" in row for row in told) == 2 * len(convert.PEERS)
    assert not any("failed" in cell for row in told for cell in row)
    assert not list(tmp_path.iterdir())
