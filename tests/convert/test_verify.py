"""`compare` finds what is the same, and every negative control that must not pass."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.convert import compare, export_hf, import_hf, open_checkpoint
from mcore_longctx.errors import CheckpointError, ConversionError
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
