"""`compare` finds what is the same, and every negative control that must not pass."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_longctx.convert import compare, export_hf, import_hf, open_checkpoint
from mcore_longctx.errors import CheckpointError, ConfigError, ConversionError
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, write_folder

Weights = dict[str, torch.Tensor]
LAYER = "model.layers.1."


def swap(first: str, second: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[LAYER + first], weights[LAYER + second] = weights[LAYER + second], weights[LAYER + first]

    return change


def rotate_groups(weights: Weights) -> None:
    """Group order off by one: each group gets the queries of its neighbour."""
    name = LAYER + "self_attn.q_proj.weight"
    weights[name] = weights[name].roll(32, 0)


def flip_bit(name: str, row: int) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = weights[name].clone()
        weights[name].view(torch.int32)[row, -1] ^= 1

    return change


CONTROLS: dict[str, tuple[Callable[[Weights], None], set[str]]] = {
    "k and v swapped": (
        swap("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        {LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"},
    ),
    "gate and up swapped": (
        swap("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        {LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"},
    ),
    "groups off by one": (rotate_groups, {LAYER + "self_attn.q_proj.weight"}),
    "norms swapped": (
        swap("input_layernorm.weight", "post_attention_layernorm.weight"),
        {LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"},
    ),
    "one bit in the last row before the padding": (flip_bit("model.embed_tokens.weight", 125), {"model.embed_tokens.weight"}),
    "one bit in the last row of the head": (flip_bit("lm_head.weight", 125), {"lm_head.weight"}),
}


@pytest.mark.parametrize("sides", ["hf and hf", "hf and megatron", "megatron and megatron"])
@pytest.mark.parametrize("name", CONTROLS)
def test_changed_weights_are_found_and_named(tmp_path: Path, name: str, sides: str) -> None:
    change, expected = CONTROLS[name]
    weights = random_weights(llama_config())
    first = write_folder(tmp_path / "a", llama_config(), weights)
    change(weights)
    second = write_folder(tmp_path / "b", llama_config(), weights)
    if "megatron" in sides:
        import_hf(second, tmp_path / "b-megatron")
        second = tmp_path / "b-megatron"
    if sides == "megatron and megatron":
        import_hf(first, tmp_path / "a-megatron")
        first = tmp_path / "a-megatron"
    report = compare(first, second)
    assert not report.equal
    assert {difference.name for difference in report.differences} == expected
    assert all(difference.name in report.text() for difference in report.differences)
    assert report.text().endswith(
        f"DIFFERENT: {len(weights)} tensors compared, {sum(w.nbytes for w in weights.values()):,} bytes"
    )


@pytest.mark.parametrize("band_bytes", [1000, 8 << 20])
def test_one_flipped_bit_is_told_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band_bytes: int) -> None:
    monkeypatch.setattr("mcore_longctx.convert.checks.verify.BAND_BYTES", band_bytes)
    weights = random_weights(llama_config())
    a = write_folder(tmp_path / "a", llama_config(), weights)
    flip_bit("model.embed_tokens.weight", 125)(weights)
    (difference,) = compare(a, write_folder(tmp_path / "b", llama_config(), weights)).differences
    assert (difference.count, difference.first) == (1, (125, 31))
    assert 0 < difference.max_rel < 2e-7
    assert "1 of 4,032 elements differ, first at [125, 31]; max abs" in difference.describe()


def test_a_bit_flipped_on_disk_beside_the_padding_is_found(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron")
    (piece,) = open_checkpoint(tmp_path / "megatron").tensors["model.embed_tokens.weight"].pieces
    last = piece.offset + 126 * 32 * 4 - 1
    assert piece.file is not None
    assert compare(tmp_path / "hf", tmp_path / "megatron").notes == ()  # the padding is zero
    flip_byte(piece.file, last)
    report = compare(tmp_path / "hf", tmp_path / "megatron")
    assert [difference.name for difference in report.differences] == ["model.embed_tokens.weight"]
    flip_byte(piece.file, last)
    assert compare(tmp_path / "hf", tmp_path / "megatron").equal
    flip_byte(piece.file, last + 1)  # the first byte of the padding
    report = compare(tmp_path / "hf", tmp_path / "megatron")
    assert report.equal
    assert any("2 rows of vocabulary padding, not zero" in note for note in report.notes)


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500001.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": None},
        {"rope_scaling": {**LLAMA3_ROPE, "factor": 8.5}},
        {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 5.0}},
        {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
    ],
)
def test_a_changed_rope_is_found(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536)
    hf = write_folder(tmp_path / "hf", config)
    import_hf(hf, tmp_path / "megatron")
    other = write_folder(tmp_path / "other", config | changes)
    for a, b in ((tmp_path / "megatron", other), (hf, other)):
        report = compare(a, b)
        assert report.rope_differs
        assert not report.equal
        assert "differs: the ropes differ" in report.text()
        assert not report.differences


def test_an_export_whose_config_was_edited_disagrees_with_its_card(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    set_config(tmp_path / "out", rope_theta=1e6, rope_parameters={**config["rope_parameters"], "rope_theta": 1e6})
    report = compare(tmp_path / "out", tmp_path / "out")
    assert not report.equal
    assert "mcore_longctx.json says none: no scaling, base 500,000" in report.text()
    with pytest.raises(ConversionError, match=r"is not the one these weights were trained with .*base 500,000"):
        import_hf(tmp_path / "out", tmp_path / "again")


def test_an_inverted_tied_flag_is_found(tmp_path: Path) -> None:
    weights = random_weights(llama_config())
    untied = write_folder(tmp_path / "untied", llama_config(), weights)
    tied = write_folder(
        tmp_path / "tied", llama_config(tie_word_embeddings=True), {k: v for k, v in weights.items() if k != "lm_head.weight"}
    )
    import_hf(tied, tmp_path / "megatron")
    for a in (tied, tmp_path / "megatron"):
        report = compare(a, untied)
        assert not report.equal
        assert report.only_second == ("lm_head.weight",)
        assert report.sizes == ("tie_word_embeddings: True and False",)
    set_config(untied, tie_word_embeddings=True)
    with pytest.raises(
        ConversionError, match=r"lm_head.weight: differs from model.embed_tokens.weight, but config.json says tie"
    ):
        compare(tied, untied)
    set_config(tied, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"1 tensor missing \(first: lm_head.weight\)"):
        compare(tied, tmp_path / "megatron")


def test_another_epsilon_is_a_difference(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", llama_config())
    b = write_folder(tmp_path / "b", llama_config(rms_norm_eps=1e-6))
    assert compare(a, b).sizes == ("layernorm_epsilon: 1e-05 and 1e-06",)
    assert not compare(a, b).equal


def test_another_dtype_is_a_difference_and_the_values_are_compared(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(llama_config()).items()}
    a = write_folder(tmp_path / "a", llama_config(), weights)
    wide = {name: tensor.float() for name, tensor in weights.items()}
    report = compare(a, write_folder(tmp_path / "b", llama_config(), wide))
    assert not report.equal
    assert len(report.differences) == len(weights)
    assert report.differences[0].describe() == "model.embed_tokens.weight: dtype bfloat16 and float32, values equal"
    wide["model.norm.weight"] = wide["model.norm.weight"] + 1
    report = compare(a, write_folder(tmp_path / "c", llama_config(), wide))
    (norm,) = (difference for difference in report.differences if difference.count)
    assert (norm.name, norm.count, round(norm.max_abs, 6)) == ("model.norm.weight", 32, 1.0)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", llama_config())
    b = write_folder(tmp_path / "b", llama_config(intermediate_size=20))
    report = compare(a, b)
    assert len([difference for difference in report.differences if difference.shapes[0] != difference.shapes[1]]) == 6
    assert "model.layers.0.mlp.gate_proj.weight: shape [24, 32] and [20, 32]" in report.text()


def test_nan_and_minus_zero_count_by_their_bits(tmp_path: Path) -> None:
    weights = random_weights(llama_config())
    weights["model.norm.weight"] = torch.tensor([float("nan"), 0.0, float("inf")] + [1.0] * 29)
    a = write_folder(tmp_path / "a", llama_config(), weights)
    assert compare(a, a).equal
    weights["model.norm.weight"] = torch.tensor([float("nan"), -0.0, float("inf")] + [1.0] * 29)
    (difference,) = compare(a, write_folder(tmp_path / "b", llama_config(), weights)).differences
    assert (difference.count, difference.max_abs) == (1, 0.0)
    weights["model.norm.weight"] = torch.tensor([2.0, 0.0, float("inf")] + [1.0] * 29)
    report = compare(a, write_folder(tmp_path / "c", llama_config(), weights))
    assert report.as_dict()["differences"][0]["max_abs"] == "nan"
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_report_for_programs_holds_the_same(tmp_path: Path) -> None:
    weights = random_weights(llama_config())
    a = write_folder(tmp_path / "a", llama_config(), weights)
    flip_bit("lm_head.weight", 3)(weights)
    facts = compare(a, write_folder(tmp_path / "b", llama_config(), weights)).as_dict()
    assert facts["equal"] is False
    assert facts["rope_equal"] is True
    assert [difference["name"] for difference in facts["differences"]] == ["lm_head.weight"]


def test_a_long_list_is_cut_in_the_text_only(tmp_path: Path) -> None:
    config = llama_config(num_hidden_layers=4)
    a = write_folder(tmp_path / "a", config, random_weights(config, seed=1))
    b = write_folder(tmp_path / "b", config, random_weights(config, seed=2))
    report = compare(a, b)
    assert len(report.as_dict()["differences"]) == 39
    assert "... and 19 more" in report.text()


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    with pytest.raises(CheckpointError, match="no such folder; check the path"):
        compare(hf, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither config.json nor .metadata: not a checkpoint"):
        compare(tmp_path / "empty", hf)
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ConversionError, match=r"21 tensors missing \(first: lm_head.weight\)"):
        compare(hf, hf)


def test_another_length_is_a_difference(tmp_path: Path) -> None:
    """The fingerprint of a rope does not hold its length, and servers go by it."""
    a = write_folder(tmp_path / "a", llama_config())
    report = compare(a, write_folder(tmp_path / "b", llama_config(max_position_embeddings=1024)))
    assert not report.rope_differs
    assert report.sizes == ("length: 512 and 1024",)
    assert not report.equal


def test_other_special_tokens_are_noted(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", llama_config(eos_token_id=2))
    report = compare(a, write_folder(tmp_path / "b", llama_config(eos_token_id=[2, 3])))
    assert report.equal
    assert "note: config.json: eos_token_id is 2 in A and [2, 3] in B" in report.text()


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp8")
    import_hf(write_folder(root / "hf", llama_config(), dtype="bfloat16"), root / "megatron")
    export_hf(root / "megatron", root / "fp8", quantize="fp8")
    return root


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("sides", [("fp8", "hf"), ("hf", "fp8"), ("megatron", "fp8")])
def test_fp8_weights_are_compared_with_what_they_stand_for(fp8: Path, sides: tuple[str, str]) -> None:
    report = compare(fp8 / sides[0], fp8 / sides[1])
    assert report.equal
    assert report.text().endswith("equal but for rounding to FP8: 21 tensors compared, " + f"{report.compared_bytes:,} bytes")
    assert len(report.quantised) == 14
    stored, exact = load_file(fp8 / "fp8" / "model.safetensors"), load_file(fp8 / "hf" / "model.safetensors")
    for tensor in report.quantised:
        wide = exact[tensor.name].double()
        error = stored[tensor.name].double() * stored[tensor.name + "_scale"].double() - wide
        assert tensor.relative_rms == pytest.approx(float(error.norm() / wide.norm()), rel=1e-9)
        assert 0.01 < tensor.relative_rms < 0.04
    assert json.loads(json.dumps(report.as_dict()))["quantised"][0]["relative_rms"] > 0.01


@pytest.mark.parametrize("kind", ["tensor", "block", "flat"])
def test_scales_of_every_shape_are_heeded(fp8: Path, tmp_path: Path, kind: str) -> None:
    """One for all, one a block (here of 16 x 8, the last ones cut), one a row without a second axis: made by torch alone."""
    folder = Path(shutil.copytree(fp8 / "fp8", tmp_path / kind))
    stored, exact = load_file(folder / "model.safetensors"), load_file(fp8 / "hf" / "model.safetensors")
    for name in [name for name in stored if stored[name].dtype == torch.float8_e4m3fn]:
        del stored[name + "_scale"]
        wide = exact[name].double()
        rows, columns = wide.shape
        high, low = {"tensor": (rows, columns), "block": (16, 8), "flat": (1, columns)}[kind]
        blocks = torch.nn.functional.pad(wide, (0, -columns % low, 0, -rows % high)).unfold(0, high, high).unfold(1, low, low)
        scale = (blocks.abs().amax((2, 3)) / 448).float()
        full = scale.double().repeat_interleave(high, 0)[:rows].repeat_interleave(low, 1)[:, :columns]
        stored[name] = (wide / full).to(torch.float8_e4m3fn)
        shapes = {"tensor": (), "block": tuple(scale.shape), "flat": (rows,)}
        stored[name + ("_scale_inv" if kind == "block" else "_scale")] = scale.reshape(shapes[kind])
    save_file(stored, folder / "model.safetensors")
    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if kind == "block":
        settings["weight_block_size"] = [16, 8]
    elif kind == "flat":
        settings = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}))
    set_config(folder, quantization_config=settings)
    report = compare(folder, fp8 / "megatron")
    assert report.equal, report.text()
    assert all(0.01 < tensor.relative_rms < 0.04 for tensor in report.quantised)


def damage(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_fp8_weights_that_are_not_those_are_found(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8 / "fp8", tmp_path / "out"))
    damage(folder, DOWN + "_scale", lambda scale: scale.flip(0))
    report = compare(folder, fp8 / "hf")
    assert [tensor.name for tensor in report.too_far] == [DOWN]
    assert f"differs: {DOWN}: FP8, relative RMS" in report.text()
    assert "DIFFERENT: 21" in report.text()
    damage(folder, "model.norm.weight", lambda weight: weight + 1)  # what is not quantised must be the same bits
    assert [difference.name for difference in compare(folder, fp8 / "hf").differences] == ["model.norm.weight"]


def test_two_fp8_folders_are_compared_byte_by_byte(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8 / "fp8", tmp_path / "out"))
    assert compare(folder, fp8 / "fp8").equal
    assert compare(folder, fp8 / "fp8").quantised == ()
    damage(folder, DOWN + "_scale", lambda scale: scale * 1.001)
    assert [difference.name for difference in compare(folder, fp8 / "fp8").differences] == [DOWN + " (scale)"]
    damage(folder, DOWN, lambda weight: weight.view(torch.uint8).bitwise_xor(1).view(torch.float8_e4m3fn))
    report = compare(folder, fp8 / "fp8")
    assert [difference.name for difference in report.differences] == [DOWN, DOWN + " (scale)"]
    json.dumps(report.as_dict(), allow_nan=False)


def test_an_fp8_folder_with_a_hole_in_its_scales_is_refused(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8 / "fp8", tmp_path / "out"))
    damage(folder, DOWN + "_scale", lambda scale: scale * 0)
    with pytest.raises(ConversionError, match=r"down_proj\.weight_scale: holds 0, expected positive finite numbers"):
        compare(folder, fp8 / "hf")


def test_a_foreign_checkpoint_is_compared_by_the_config_given(fp8: Path, tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(fp8 / "megatron", tmp_path / "foreign"))
    (foreign / "mcore_longctx.json").unlink()
    (foreign / "manifest.json").unlink()
    assert compare(foreign, fp8 / "hf", config=fp8 / "hf").equal
    assert compare(fp8 / "hf", foreign, config=fp8 / "hf" / "config.json").equal
    with pytest.raises(ConfigError, match="both folders bring their own"):
        compare(fp8 / "megatron", fp8 / "hf", config=fp8 / "hf")
