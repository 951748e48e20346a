"""Calibrated FP8 through nvidia-modelopt: what is written, against the original weights and against hooks of our own.

They run where nvidia-modelopt is installed: `make test-modelopt`. What needs none of it runs everywhere.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mcore_longctx.convert.copying.fp8 import quantize_rows
from mcore_longctx.convert.quantization import MAX_RELATIVE_RMS
from mcore_longctx.errors import CheckpointError, ConfigError, DifferenceFound
from mcore_longctx.model import quantize
from mcore_longctx.model.quantize import calibrate
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, write_folder

needs_modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed (make test-modelopt)"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 4096, "head_dim": 16}
LENGTHS = (32, 256)
SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def _folder(path: Path, **changes: object) -> Path:
    """A random Llama of bf16 weights of about the size that training gives them."""
    config = llama_config(**SIZES, torch_dtype="bfloat16", rope_scaling=LLAMA3_ROPE, **changes)
    write_folder(path, config)
    weights = load_file(path / "model.safetensors")
    small = {name: (w if w.dim() == 1 else w * 0.05).bfloat16() for name, w in weights.items()}
    save_file(small, path / "model.safetensors", {"format": "pt"})
    return path


def _windows(lengths: tuple[int, ...] = LENGTHS) -> dict[int, list[torch.Tensor]]:
    ids = torch.randint(0, SIZES["vocab_size"], (lengths[-1],), generator=torch.Generator().manual_seed(3))
    return {length: list(ids.view(-1, length)) for length in lengths}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrated")
    hf = _folder(root / "hf")
    (root / "out").mkdir()
    return hf, root / "out", calibrate(hf, root / "out", _windows(), kv=True)


@needs_modelopt
def test_amax_of_every_length_is_what_hooks_on_the_plain_model_see(calibrated):
    hf, _, found = calibrated
    model = AutoModelForCausalLM.from_pretrained(str(hf), dtype=torch.bfloat16).eval()
    seen: dict[str, float] = {}

    def hook(name):
        def look(_module, args):
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

        return look

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    for place, length in enumerate(LENGTHS):
        seen.clear()
        with torch.no_grad():
            for ids in _windows()[length]:
                model(ids[None])
        assert {name: row[place] for name, row in found.inputs.items()} == seen


@needs_modelopt
def test_keys_are_measured_after_the_rope_and_values_as_they_are(calibrated):
    hf, _, found = calibrated
    model = AutoModelForCausalLM.from_pretrained(str(hf), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        caches = [model(ids[None], use_cache=True).past_key_values for ids in _windows()[256]]
    for layer in range(2):
        for letter, name in (("k", "keys"), ("v", "values")):
            largest = max(float(getattr(cache.layers[layer], name).abs().max()) for cache in caches)
            assert found.keys_values[f"model.layers.{layer}.self_attn.{letter}"][1] == largest


@needs_modelopt
def test_written_scales_are_the_largest_over_all_lengths_and_shared_by_what_is_fused(calibrated):
    _, out, found = calibrated
    written = load_file(out / "model.safetensors")
    for layer, row in found.inputs.items():
        assert float(written[f"{layer}.input_scale"]) == pytest.approx(max(row) / 448, rel=1e-6)
    for layer in range(2):
        for letter in "kv":
            scale = float(written[f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"])
            assert scale == pytest.approx(max(found.keys_values[f"model.layers.{layer}.self_attn.{letter}"]) / 448, rel=1e-6)
        for names in SHARED:
            for kind in ("weight_scale", "input_scale"):
                assert len({float(written[f"model.layers.{layer}.{name}.{kind}"]) for name in names}) == 1


@needs_modelopt
def test_dequantised_weights_are_the_original_ones_within_what_fp8_can_say(calibrated):
    hf, out, found = calibrated
    before, after = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert len(found.weights) == 14
    for layer, row in found.weights.items():
        weight = before[f"{layer}.weight"].float()
        error = after[f"{layer}.weight"].float() * after[f"{layer}.weight_scale"] - weight
        relative = float(error.norm() / weight.norm())
        assert row["relative_rms"] == pytest.approx(relative, rel=1e-3)
        assert 0.02 < relative < 0.04
        assert row["amax"] == float(weight.abs().max())
    others = set(before) - {f"{layer}.weight" for layer in found.weights}
    assert all(torch.equal(before[name], after[name]) for name in others)


@needs_modelopt
def test_config_is_the_original_one_with_the_settings_that_servers_read(calibrated):
    hf, out, _ = calibrated
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((hf / "config.json").read_text())
    assert (settings["quant_method"], settings["quant_algo"]) == ("modelopt", "FP8")
    assert settings["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    other = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (other["quant_algo"], other["kv_cache_quant_algo"]) == ("FP8", "FP8")
    assert sorted(other["exclude_modules"]) == sorted(settings["ignore"])


@needs_modelopt
def test_without_kv_no_scale_of_the_cache_is_measured_or_written(tmp_path):
    hf = _folder(tmp_path / "hf", tie_word_embeddings=True)
    (tmp_path / "out").mkdir()
    found = calibrate(hf, tmp_path / "out", _windows(), kv=False)
    assert found.keys_values == {}
    assert not [name for name in load_file(tmp_path / "out/model.safetensors") if name.endswith(("k_scale", "v_scale"))]
    assert "kv_cache_scheme" not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]


@needs_modelopt
def test_a_model_that_gives_nan_is_refused(tmp_path):
    hf = _folder(tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3, 3] = float("nan")
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"hf: NaN or infinity in model\.layers\.1\.self_attn\.q_proj\.weight"):
        calibrate(hf, tmp_path / "out", _windows(), kv=True)
    weights["model.layers.1.self_attn.q_proj.weight"][3, 3] = 1.0
    weights["model.layers.0.mlp.down_proj.weight"][0] = 3e38
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="hf: the model gives NaN or infinity at 32 tokens"):
        calibrate(hf, tmp_path / "out", _windows(), kv=True)
    assert not list((tmp_path / "out").iterdir())


@needs_modelopt
def test_inputs_that_grow_with_the_length_are_an_error_that_names_the_worst(tmp_path):
    hf = _folder(tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    # all of token 5 is in one number, which the norm makes sqrt(64); those of the others are below 3
    weights["model.embed_tokens.weight"][5] = torch.eye(64)[0]
    weights["model.layers.0.input_layernorm.weight"][:] = 1
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    windows = {length: [ids % 5 for ids in rows] for length, rows in _windows().items()}
    windows[256][0][200] = 5  # only there
    (tmp_path / "out").mkdir()
    with pytest.raises(DifferenceFound, match=r"grows \d+\.\d+ times from 32 to 256 tokens .*more than 2; \d+ of \d+ do"):
        calibrate(hf, tmp_path / "out", windows, kv=True)
    assert not list((tmp_path / "out").iterdir())


@needs_modelopt
def test_our_rows_are_those_of_modelopt_per_channel(tmp_path):
    from modelopt.torch.export.quant_utils import to_quantized_weight

    weight = (torch.randn(200, 300, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    ours = quantize_rows(weight.float().numpy(), name="w")
    scales = weight.float().abs().amax(1) / 448
    theirs = to_quantized_weight(weight, scales, "fp8_pc_pt")
    assert np.array_equal(ours.scales, scales.numpy())
    assert np.array_equal(ours.bits, theirs.view(torch.uint8).numpy())


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is not None, reason="nvidia-modelopt is installed here")
def test_without_modelopt_the_extra_is_named(tmp_path):
    hf = _folder(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"needs nvidia-modelopt.*pip install 'mcore-longctx\[quantize\]'"):
        calibrate(hf, tmp_path, _windows(), kv=True)


@pytest.mark.parametrize(
    ("row", "growth"), [((1.0, 3.0), 3.0), ((2.0, 9.0, 1.0), 0.5), ((0.0, 0.0), 1.0), ((0.0, 1.0), float("inf")), ((4.0,), 1.0)]
)
def test_growth_is_the_last_over_the_first(row, growth):
    assert quantize._growth(row) == growth


def test_growth_of_exactly_two_passes_and_more_does_not():
    quantize._check_growth({"a": (1.0, 2.0)}, (8, 16), Path("hf"))
    with pytest.raises(DifferenceFound, match=r"^hf: the largest magnitude of b grows 2\.01 times .*; 1 of 2 do"):
        quantize._check_growth({"a": (1.0, 2.0), "b": (1.0, 2.01)}, (8, 16), Path("hf"))


def _written(path: Path, **changes: torch.Tensor) -> Path:
    """A folder as calibration writes it, of one layer; `changes` replace tensors (`weight`, `weight_scale`, ...)."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().max() / 448
    tensors = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    path.mkdir()
    save_file({f"k_proj.{name}": tensor for name, tensor in (tensors | changes).items()}, path / "model.safetensors")
    settings = {"quant_algo": "FP8", "ignore": ["lm_head"]}
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    other = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": other}))
    (path.parent / "hf").mkdir()
    save_file({"k_proj.weight": weight}, path.parent / "hf" / "model.safetensors")
    return path


def test_a_written_folder_is_read_back(tmp_path):
    out = _written(tmp_path / "out")
    assert quantize._check_written(tmp_path / "hf", out, ["k_proj"], kv=False)["k_proj"]["relative_rms"] < 0.04
    assert quantize.MAX_RELATIVE_RMS == MAX_RELATIVE_RMS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": torch.tensor(1.0)}, "relative error of"),
        ({"weight_scale": torch.tensor(0.0)}, "weight_scale is 0.0, expected one positive number"),
        ({"input_scale": torch.tensor(float("nan"))}, "input_scale is nan"),
        ({"input_scale": torch.ones(3)}, "input_scale is "),
        ({"weight": torch.zeros(8, 8)}, "relative error of 1"),
    ],
)
def test_a_folder_with_a_wrong_scale_or_weight_is_an_error(tmp_path, changes, message):
    out = _written(tmp_path / "out", **changes)
    with pytest.raises(DifferenceFound, match=message):
        quantize._check_written(tmp_path / "hf", out, ["k_proj"], kv=False)


def test_settings_that_disagree_or_lack_the_cache_are_an_error(tmp_path):
    out = _written(tmp_path / "out")
    with pytest.raises(DifferenceFound, match="expected FP8 and the same in both"):
        quantize._check_written(tmp_path / "hf", out, ["k_proj"], kv=True)
    with pytest.raises(DifferenceFound, match="missing"):
        quantize._check_written(tmp_path / "hf", out, ["v_proj"], kv=False)
    other = json.loads((out / "hf_quant_config.json").read_text())
    other["quantization"]["exclude_modules"] = []
    (out / "hf_quant_config.json").write_text(json.dumps(other))
    with pytest.raises(DifferenceFound, match="the same in both"):
        quantize._check_written(tmp_path / "hf", out, ["k_proj"], kv=False)
