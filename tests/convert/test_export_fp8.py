"""`export --quantize fp8`: what transformers and compressed-tensors make of the folder, and what it says about itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mcore_longctx.convert import Execution, export_hf, import_hf
from mcore_longctx.convert.copying import fp8, units
from mcore_longctx.convert.copying.execute import QuantizedRows
from mcore_longctx.convert.copying.fp8 import quantize_rows
from mcore_longctx.convert.quantization import quantization_config, quantized_weights, write_quantize_report
from mcore_longctx.errors import ConversionError
from mcore_longctx.families import read_shape
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, write_folder

SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 500, "head_dim": 32, "max_position_embeddings": 8192 * 8}


def _source(root: Path, **changes: Any) -> tuple[Path, Path]:
    """(Hugging Face folder, checkpoint) of a random bf16 Llama with weights of the size that transformers begins with."""
    config = llama_config(**SIZES, rope_scaling=LLAMA3_ROPE, torch_dtype="bfloat16", **changes)
    weights = {
        name: (torch.ones_like(weight) if weight.dim() == 1 else weight * 0.02).bfloat16()
        for name, weight in random_weights(config).items()
    }
    hf = write_folder(root / "hf", config, weights)
    import_hf(hf, root / "checkpoint")
    return hf, root / "checkpoint"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    hf, checkpoint = _source(root)
    export_hf(checkpoint, root / "fp8", quantize="fp8", shard_bytes=150_000)
    return hf, checkpoint, root / "fp8"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _logits(folder: Path, fp8: Path | None = None) -> torch.Tensor:
    """Logits as transformers computes them; with `fp8`, by plain torch: its weights times their scales, inputs rounded per token."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    if fp8 is not None:
        tensors = _tensors(fp8)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                scaled = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
                module.weight.data = scaled
                module.register_forward_pre_hook(lambda _, args: (_rounded_per_token(args[0]),))
    with torch.no_grad():
        return model(torch.arange(64)[None]).logits.float()


def _rounded_per_token(inputs: torch.Tensor) -> torch.Tensor:
    scale = inputs.float().abs().amax(-1, keepdim=True) / 448
    return ((inputs.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)


def test_transformers_loads_the_folder_on_the_cpu_and_computes_about_the_same_logits(folders):
    hf, _, fp8 = folders
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    before, after, expected = _logits(hf), _logits(fp8), _logits(hf, fp8)
    scale = before.abs().max()
    error = float((after - before).abs().max() / scale)
    assert 0.005 < error < 0.12  # 0.07 was measured; weights and activations have three bits of fraction
    assert float((after - expected).abs().max() / scale) < 1e-5


def test_every_linear_weight_is_fp8_with_a_scale_a_row_and_nothing_else_has_changed(folders):
    hf, _, fp8 = folders
    before, after = _tensors(hf), _tensors(fp8)
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert set(after) == set(before) | {f"{name}_scale" for name in linear}
    for name in set(before) - linear:
        assert torch.equal(before[name], after[name])
    for name in linear:
        weight, scale = before[name].float(), after[f"{name}_scale"]
        assert after[name].dtype == torch.float8_e4m3fn
        assert (scale.dtype, scale.shape) == (torch.float32, (len(weight), 1))
        assert torch.equal(scale, weight.abs().amax(1, keepdim=True) / 448)
        assert torch.equal(after[name].view(torch.uint8), (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8))


def test_the_report_says_of_each_tensor_what_torch_computes_from_the_files(folders):
    hf, _, fp8 = folders
    before, after = _tensors(hf), _tensors(fp8)
    report = json.loads((fp8 / "quantize_report.json").read_text())
    assert set(report["tensors"]) == {name for name in before if name.endswith("_proj.weight")}
    errors = squares = 0.0
    for name, row in report["tensors"].items():
        weight = before[name].double()
        error = after[name].double() * after[f"{name}_scale"].double() - weight
        assert row["rows"] == len(weight)
        assert row["amax"] == float(weight.abs().max())
        assert row["relative_rms"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)
        assert 0.02 < row["relative_rms"] < 0.04
        errors, squares = errors + float(error.square().sum()), squares + float(weight.square().sum())
    assert report["total"]["tensors"] == 14
    assert report["total"]["relative_rms"] == pytest.approx(math.sqrt(errors / squares), rel=1e-4)


def test_the_settings_are_what_compressed_tensors_itself_would_write():
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    numbers = {"num_bits": 8, "type": "float"}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**numbers, strategy="channel"),
        input_activations=quantization.QuantizationArgs(**numbers, strategy="token", dynamic=True),
    )
    theirs = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="float-quantized",
        quantization_status="compressed",
    )
    ours = quantization.QuantizationConfig.model_validate(quantization_config())
    assert ours.model_dump() == theirs.model_dump()


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=["untied", "tied", "bias"]
)
def test_config_and_weights_agree_about_what_is_quantised(changes):
    config = llama_config(**changes)
    names = quantized_weights(read_shape(config, where="config.json"))
    model = AutoModelForCausalLM.from_config(_transformers_config(config))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == linear - {"lm_head.weight"}


def _transformers_config(config: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")})


@pytest.mark.multiproc
def test_the_same_bytes_with_any_number_of_workers(folders, tmp_path):
    _, checkpoint, fp8 = folders
    export_hf(checkpoint, tmp_path / "out", quantize="fp8", shard_bytes=150_000, how=Execution(workers=3))
    names = {path.name for path in fp8.iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    for name in names:
        assert (fp8 / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_run_that_was_stopped_goes_on_and_the_report_counts_its_rows(folders, tmp_path, monkeypatch):
    _, checkpoint, _ = folders
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    often = Execution(fsync=False)  # the journal does not wait for 256 MB
    export_hf(checkpoint, tmp_path / "whole", quantize="fp8", how=often)
    calls = []

    def stop_after(count):
        def quantize(rows, **names):
            calls.append(names)
            if len(calls) == count:
                raise KeyboardInterrupt
            return quantize_rows(rows, **names)

        return quantize

    monkeypatch.setattr(fp8, "quantize_rows", stop_after(10))
    with pytest.raises(KeyboardInterrupt):
        export_hf(checkpoint, tmp_path / "out", quantize="fp8", how=often)
    assert not (tmp_path / "out").exists()
    assert len(calls) == 10
    calls.clear()
    monkeypatch.setattr(fp8, "quantize_rows", stop_after(None))
    export_hf(checkpoint, tmp_path / "out", quantize="fp8", how=often)
    again = len(calls)
    calls.clear()
    export_hf(checkpoint, tmp_path / "third", quantize="fp8", how=often)
    assert 0 < again < len(calls)  # what the journal says is done is not done again
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_row_with_nan_is_refused_by_tensor_and_row_and_nothing_looks_finished(tmp_path):
    config = llama_config()
    weights = random_weights(config, "bfloat16")
    weights["model.layers.1.mlp.down_proj.weight"][7, 5] = float("nan")
    import_hf(write_folder(tmp_path / "hf", config, weights), tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: NaN or infinity in row 7;"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", quantize="fp8")
    assert not (tmp_path / "out").exists()


def test_weights_too_small_for_fp8_are_an_error_that_names_the_worst(tmp_path):
    config = llama_config()
    weights = random_weights(config)
    for layer in range(2):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1e-42
    import_hf(write_folder(tmp_path / "hf", config, weights), tmp_path / "checkpoint")
    with pytest.raises(
        ConversionError, match=r"relative error of model\.layers\.\d\.mlp\.up_proj\.weight .* 2 tensors are above"
    ):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", quantize="fp8")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- the report alone
def _fp8_folder(folder: Path, rows: int = 6) -> Path:
    weight = torch.ones(rows, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.weight_scale": torch.ones(rows, 1)}, folder / "model.safetensors")
    return folder


def test_the_report_does_not_depend_on_the_order_of_the_bands(tmp_path):
    bands = [QuantizedRows("a.weight", 1, float(row), 10.0**row / 3, 10.0**-row / 7) for row in range(6)]
    texts = set()
    for facts in (bands, bands[::-1], bands[3:] + bands[:3]):
        write_quantize_report(_fp8_folder(tmp_path), facts)
        texts.add((tmp_path / "quantize_report.json").read_text())
    assert len(texts) == 1


@pytest.mark.parametrize("rows", [5, 7, 0])
def test_a_report_of_other_rows_than_the_folder_has_is_refused(tmp_path, rows):
    facts = [QuantizedRows("a.weight", rows, 1.0, 1.0, 0.0)] if rows else []
    with pytest.raises(ConversionError, match=f"{rows} rows of a.weight were quantised, it has 6"):
        write_quantize_report(_fp8_folder(tmp_path), facts)
    assert not (tmp_path / "quantize_report.json").exists()


@pytest.mark.parametrize(("error", "refused"), [(0.0599, False), (0.0601, True), (math.nan, True)])
def test_a_relative_error_above_the_limit_is_refused(tmp_path, error, refused):
    facts = [QuantizedRows("a.weight", 6, 1.0, 4.0, 4.0 * error**2)]
    if not refused:
        write_quantize_report(_fp8_folder(tmp_path), facts)
        return
    with pytest.raises(ConversionError, match=r"relative error of a.weight in fp8, more than 0.06"):
        write_quantize_report(_fp8_folder(tmp_path), facts)
    assert not (tmp_path / "quantize_report.json").exists()
