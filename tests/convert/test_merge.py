"""Weighted sums of two checkpoints, against torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.cli.main import main
from mcore_longctx.convert import export_hf, import_hf, merge, plan_merge
from mcore_longctx.errors import CheckpointError, ConfigError, ConversionError, LongctxError
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import sha256_file, verify_manifest, write_manifest
from mcore_longctx.recipe import CheckpointCard, read_card, write_card
from mcore_longctx.rope import RopeScaling
from tests.convert.hf_folders import llama_config, random_weights, read_weights, write_folder

CONFIG = llama_config(num_key_value_heads=4, num_attention_heads=8, head_dim=6)


def blended(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], x: float, y: float) -> dict[str, torch.Tensor]:
    """In float32, rounded to the first's element type."""
    return {name: (x * first[name].float() + y * second[name].float()).to(first[name].dtype) for name in first}


def assert_close(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Float32 sums of two products differ in the last bit where a machine fuses them."""
    found = read_weights(folder)
    assert set(found) == set(expected)
    for name, (dtype, shape, data) in found.items():
        tensor = torch.frombuffer(bytearray(data), dtype=expected[name].dtype).reshape(shape)
        assert dtype == str(expected[name].dtype)
        epsilon = torch.finfo(expected[name].dtype).eps
        torch.testing.assert_close(tensor, expected[name], rtol=2 * epsilon, atol=epsilon)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75), (1.0, -0.5), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hugging_face_folders_are_merged_in_the_files_of_the_first(
    tmp_path: Path, dtype: str, weights: tuple[float, float]
) -> None:
    a, b = random_weights(CONFIG, dtype, seed=1), random_weights(CONFIG, "float32", seed=2)
    write_folder(tmp_path / "a", CONFIG, a, shards=3)
    write_folder(tmp_path / "b", CONFIG, b, shards=2)
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "out", weights=weights)
    assert_close(tmp_path / "out", blended(a, b, *weights))
    if weights == (1.0, 0.0):
        assert read_weights(tmp_path / "out") == read_weights(tmp_path / "a")
    name = "model.safetensors.index.json"
    first, merged = (json.loads((tmp_path / folder / name).read_text()) for folder in ("a", "out"))
    assert merged["weight_map"] == first["weight_map"]
    assert merged["metadata"]["total_size"] == first["metadata"]["total_size"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG if key not in ("torch_dtype", "rope_scaling")}.items() <= CONFIG.items()
    assert (config["torch_dtype"], config["dtype"]) == (dtype, dtype)
    for name in ("tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    manifest = verify_manifest(tmp_path / "out", "export")
    assert manifest["merge"] == {"weights": list(weights), "source_manifest_sha256": [None, None]}


@pytest.mark.parametrize(
    "layout", [{}, {"chunks_for_tp": 4, "vocab_multiple": 3}, {"stacked": False, "chunks_for_tp": 2}], ids=str
)
def test_megatron_checkpoints_are_merged_in_the_layout_of_the_first(tmp_path: Path, layout: dict[str, Any]) -> None:
    a, b = random_weights(CONFIG, "bfloat16", seed=1), random_weights(CONFIG, "float32", seed=2)
    import_hf(write_folder(tmp_path / "hf-a", CONFIG, a), tmp_path / "a", **layout)
    import_hf(write_folder(tmp_path / "hf-b", CONFIG, b), tmp_path / "b")
    card = read_card(tmp_path / "a")
    write_card(
        tmp_path / "a",
        CheckpointCard(shape=card.shape, rope=card.rope, tokenizer_sha256=card.tokenizer_sha256, stage="x", iteration=7),
    )
    write_manifest(tmp_path / "a", "checkpoint")
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "out", weights=(0.25, 0.75))
    assert read_torch_dist(tmp_path / "out").tensors.keys() == read_torch_dist(tmp_path / "a").tensors.keys()
    for key, tensor in read_torch_dist(tmp_path / "out").tensors.items():
        first = read_torch_dist(tmp_path / "a").tensors[key]
        assert (tensor.dtype, tensor.shape) == (first.dtype, first.shape)
        assert [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks] == [
            (chunk.offsets, chunk.sizes) for chunk in first.chunks
        ]
    assert read_card(tmp_path / "out") == read_card(tmp_path / "a")
    manifest = verify_manifest(tmp_path / "out", "checkpoint")
    hashes = [sha256_file(tmp_path / name / "manifest.json") for name in "ab"]
    assert manifest["merge"] == {"weights": [0.25, 0.75], "source_manifest_sha256": hashes}
    assert (manifest["stage"], manifest["iteration"]) == ("x", 7)
    export_hf(tmp_path / "out", tmp_path / "out-hf")
    assert_close(tmp_path / "out-hf", blended(a, b, 0.25, 0.75))


def test_shards_that_torch_wrote_become_safetensors(tmp_path: Path) -> None:
    a, b = random_weights(CONFIG, seed=1), random_weights(CONFIG, seed=2)
    write_folder(tmp_path / "a", CONFIG, a)
    write_folder(tmp_path / "b", CONFIG, b)
    (tmp_path / "a" / "model.safetensors").unlink()
    names = list(a)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: a[name] for name in part}, tmp_path / "a" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert_close(tmp_path / "out", blended(a, b, 0.5, 0.5))
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, file in weight_map.items() if file == "model-00001-of-00002.safetensors"} == set(names[:9])


def test_a_merged_folder_sends_nobody_to_code_or_to_a_stale_length(tmp_path: Path) -> None:
    stale = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "_name_or_path": "x", "max_seq_len": 77}
    for name in "ab":
        write_folder(tmp_path / name, CONFIG | stale)
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert not stale.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    assert "max_length" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())


def foreign(folder: Path, hf: Path) -> Path:
    """A checkpoint without our card and config."""
    import_hf(hf, folder)
    for name in ("mcore_longctx.json", "manifest.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "hf")
    return folder


def test_a_checkpoint_without_a_card_is_merged_with_the_config_of_its_model(tmp_path: Path, capsys) -> None:
    a, b = random_weights(CONFIG, "float32", seed=1), random_weights(CONFIG, "float32", seed=2)
    folders = {name: write_folder(tmp_path / f"hf-{name}", CONFIG, part) for name, part in (("a", a), ("b", b))}
    first, second = foreign(tmp_path / "a", folders["a"]), foreign(tmp_path / "b", folders["b"])
    import_hf(folders["b"], tmp_path / "own")
    assert "give the model's config.json with --config" in refused(tmp_path)
    for other in (second, tmp_path / "own"):
        out = tmp_path / f"out-{other.name}"
        assert main(["convert", "merge", str(first), str(other), str(out), "--config", str(folders["a"])]) == 0
        assert export_hf(out, tmp_path / f"back-{other.name}")
        assert_close(tmp_path / f"back-{other.name}", blended(a, b, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"--config: both checkpoints bring their own config\.json; leave it out"):
        plan_merge(tmp_path / "own", tmp_path / "own", config=folders["a"])


def refused(folder: Path, **arguments: Any) -> str:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(LongctxError) as caught:
        merge(folder / "a", folder / "b", folder / "out", **arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before
    return str(caught.value)


def other_tokenizer(b: Path) -> None:
    (b / "tokenizer.json").write_text("{}")


def no_tokenizer(b: Path) -> None:
    (b / "tokenizer.json").unlink()


def megatron(b: Path) -> None:
    import_hf(b, b.with_name("c"))
    b.rename(b.with_name("old"))
    b.with_name("c").rename(b)


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        ({"intermediate_size": 28}, None, "b: another model (ffn_hidden_size 28, not 24) than {folder}/a"),
        ({"rms_norm_eps": 1e-6}, None, "b: another model (layernorm_epsilon 1e-06, not 1e-05)"),
        ({"rope_theta": 10000.0}, None, "b: another rope ("),
        ({}, other_tokenizer, "b: another tokenizer than {folder}/a; a token must mean the same in both"),
        ({}, no_tokenizer, "b: another tokenizer than"),
        ({}, megatron, "b: another format (torch_dist) than {folder}/a; convert one of them first"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], change: Callable[[Path], None] | None, message: str
) -> None:
    write_folder(tmp_path / "a", CONFIG)
    write_folder(tmp_path / "b", CONFIG | changes)
    if change is not None:
        change(tmp_path / "b")
    assert message.format(folder=tmp_path) in refused(tmp_path)


@pytest.mark.parametrize("weights", [(math.nan, 0.5), (0.5, math.inf), (1e39, 0.0), (0.5, -3.5e38)])
def test_weights_must_be_finite(tmp_path: Path, weights: tuple[float, float]) -> None:
    write_folder(tmp_path / "a", CONFIG)
    write_folder(tmp_path / "b", CONFIG)
    assert "--weights: weights" in (line := refused(tmp_path, weights=weights))
    assert line.endswith("expected two numbers that are finite in float32")


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("x", "y", "weights"),
    [(2.0, 2.0, (3e38, 3e38)), (4.0, 4.0, (3e38, -3e38)), (1e300, 1.0, (0.5, 0.5)), (1.0, 1e300, (0.5, 0.0))],
)
def test_a_sum_that_is_not_finite_though_its_parts_are_is_refused(
    tmp_path: Path, x: float, y: float, weights: tuple[float, float], target: str
) -> None:
    parts = {name: random_weights(CONFIG, "float64" if max(x, y) > 1e38 else target, seed=1) for name in "ab"}
    for name, number in (("a", x), ("b", y)):
        parts[name] = {key: tensor.clone().fill_(0.0) for key, tensor in parts[name].items()}
        parts[name]["model.norm.weight"][3] = number
        write_folder(tmp_path / name, CONFIG, parts[name])
    with pytest.raises(ConversionError, match=r"^model\.norm\.weight: 1 of \d+ sums looked at are too large for float32"):
        merge(tmp_path / "a", tmp_path / "b", tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_in_a_part_may_be_so_in_the_sum(tmp_path: Path) -> None:
    a, b = random_weights(CONFIG, "float32", seed=1), random_weights(CONFIG, "float32", seed=2)
    a["model.norm.weight"][:3] = torch.tensor([math.inf, math.nan, -math.inf])
    b["model.norm.weight"][:3] = torch.tensor([-math.inf, 1.0, 1.0])
    for name, weights in (("a", a), ("b", b)):
        write_folder(tmp_path / name, CONFIG, weights)
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    data = read_weights(tmp_path / "out")["model.norm.weight"][2]
    found = torch.frombuffer(bytearray(data), dtype=torch.float32)
    assert found[:2].isnan().all()
    assert found[2] == -math.inf


def test_an_output_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    for name in ("a", "b", "out"):
        write_folder(tmp_path / name, CONFIG)
    before = read_weights(tmp_path / "out")
    with pytest.raises(ConfigError, match="already there"):
        merge(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert read_weights(tmp_path / "out") == before


def test_a_source_of_another_size_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_hf(write_folder(tmp_path / f"{name}-hf", CONFIG), tmp_path / name)
    with (tmp_path / "b" / "hf" / "LICENSE").open("a") as file:
        file.write("!")
    assert "the manifest says" in refused(tmp_path)
    with pytest.raises(CheckpointError, match="the manifest says"):
        plan_merge(tmp_path / "a", tmp_path / "b")


def test_a_dry_run_says_what_a_merge_would_write(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", CONFIG, shards=2)
    write_folder(tmp_path / "b", CONFIG)
    plan = plan_merge(tmp_path / "a", tmp_path / "b")
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert {file.name: file.bytes for file in plan.files} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert {source.path.name for source in plan.sources} >= {
        "model.safetensors",
        "config.json",
        "model-00001-of-00002.safetensors",
    }


def test_the_rope_is_compared_by_its_numbers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_hf(write_folder(tmp_path / f"{name}-hf", CONFIG), tmp_path / name)
    rope = RopeScaling(type="llama3", head_dim=6, rope_theta=500000.0, factor=8.0, original_max_position_embeddings=512)
    import_hf(tmp_path / "b-hf", tmp_path / "c", rope=rope)
    with pytest.raises(LongctxError, match="c: another rope"):
        merge(tmp_path / "a", tmp_path / "c", tmp_path / "out")
