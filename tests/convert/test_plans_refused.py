"""Settings and sources that no plan is made of: one line each, before a byte is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.convert import Execution, export_hf, import_hf, plan_export, plan_import
from mcore_longctx.errors import LongctxError
from mcore_longctx.rope import RopeScaling
from tests.convert.hf_folders import llama_config, random_weights, read_weights, write_folder

OTHER_HEADS = RopeScaling(type="none", head_dim=8, rope_theta=500000.0)
FOUR_GROUPS = llama_config(num_key_value_heads=4)


def refused(folder: Path, make: Callable[[], Any]) -> str:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(LongctxError) as caught:
        make()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"chunks_for_tp": 3}, "num_attention_heads 4 is not divisible by tensor_model_parallel_size 3; use one of 1, 2, 4"),
        ({}, {"chunks_for_tp": 4}, "num_query_groups 2 is not divisible by tensor_model_parallel_size 4; use one of 1, 2"),
        (FOUR_GROUPS | {"intermediate_size": 22}, {"chunks_for_tp": 4}, "ffn_hidden_size 22 is not divisible"),
        ({}, {"chunks_for_tp": 0}, "--chunks-for-tp: chunks for 0 tensor-parallel ranks; expected 1 or more"),
        ({}, {"chunks_for_tp": -2}, "expected 1 or more"),
        ({}, {"vocab_multiple": 0}, "--vocab-multiple: a vocabulary multiple of 0; expected 1 to 1,048,576"),
        ({}, {"dtype": "int8"}, "--dtype: dtype 'int8' is none of"),
        ({}, {"dtype": "float8_e4m3fn"}, "--dtype: dtype 'float8_e4m3fn' is none of"),
        ({}, {"rope": OTHER_HEADS}, "hf: a rope of head_dim 8, the model has 16"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_by_import(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(**changes))
    assert message in refused(tmp_path, lambda: import_hf(hf, tmp_path / "out", **arguments))
    assert message in refused(tmp_path, lambda: plan_import(hf, **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_bytes": 0}, "--shard-size: files of 0 bytes"),
        ({"dtype": "bool"}, "--dtype: dtype 'bool' is none of"),
        ({"rope": OTHER_HEADS}, "ck: a rope of head_dim 8, the model has 16"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_by_export(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "ck")
    assert message in refused(tmp_path, lambda: export_hf(tmp_path / "ck", tmp_path / "out", **arguments))
    assert message in refused(tmp_path, lambda: plan_export(tmp_path / "ck", **arguments))


@pytest.mark.parametrize(
    ("name", "stacked", "message"),
    [
        (
            "model.layers.1.self_attn.k_proj.weight",
            True,
            "dtype bfloat16, but its neighbours in decoder.layers.self_attention.linear_qkv",
        ),
        (
            "model.layers.1.self_attn.k_proj.weight",
            False,
            "its neighbours in decoder.layers.1.self_attention.linear_qkv.weight have float32",
        ),
        ("model.layers.1.input_layernorm.weight", True, "layer_norm_weight have float32; choose one with --dtype"),
        ("model.layers.1.input_layernorm.weight", False, None),
        ("model.norm.weight", True, None),
    ],
)
def test_tensors_of_one_name_must_agree_in_type(tmp_path: Path, name: str, stacked: bool, message: str | None) -> None:
    weights = random_weights(llama_config())
    weights[name] = weights[name].to(torch.bfloat16)
    hf = write_folder(tmp_path / "hf", llama_config(), weights)
    if message is None:
        import_hf(hf, tmp_path / "out", stacked=stacked)
        export_hf(tmp_path / "out", tmp_path / "back")
        assert read_weights(tmp_path / "back") == read_weights(hf)
    else:
        assert message in refused(tmp_path, lambda: import_hf(hf, tmp_path / "out", stacked=stacked))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_a_source_is_noticed_with_checksum(tmp_path: Path) -> None:
    """Both ways, and only where the source has hashes: sizes alone do not see it."""
    hashed = Execution(checksum=True)
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "ck", how=hashed)
    export_hf(tmp_path / "ck", tmp_path / "export", how=hashed)
    flip(tmp_path / "ck" / "__0_0.distcp")
    flip(tmp_path / "export" / "model.safetensors")
    plan_export(tmp_path / "ck")
    plan_import(tmp_path / "export")
    assert "contents differ from the manifest's sha256" in refused(
        tmp_path, lambda: export_hf(tmp_path / "ck", tmp_path / "out", how=hashed)
    )
    assert "contents differ from the manifest's sha256" in refused(
        tmp_path, lambda: import_hf(tmp_path / "export", tmp_path / "out", how=hashed)
    )
    import_hf(tmp_path / "export", tmp_path / "out")


def test_a_source_of_another_size_than_its_manifest_says_is_always_refused(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "ck")
    with (tmp_path / "ck" / "__0_0.distcp").open("ab") as file:
        file.write(b"x")
    assert "bytes, the manifest says" in refused(tmp_path, lambda: plan_export(tmp_path / "ck"))


def test_an_output_that_is_there_is_refused(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    import_hf(hf, tmp_path / "ck")
    assert "already there; choose another name" in refused(tmp_path, lambda: import_hf(hf, tmp_path / "ck"))
    assert "already there; choose another name" in refused(tmp_path, lambda: export_hf(tmp_path / "ck", tmp_path / "hf"))
