from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from mcore_longctx.convert import Execution, describe_folder, export_hf, import_hf, inspect_folder
from mcore_longctx.errors import CheckpointError
from mcore_longctx.rope import RopeScaling, read_hf_rope
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, write_folder

CONFIG = llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536)
PARAMETERS = sum(tensor.numel() for tensor in random_weights(CONFIG).values())


def test_a_hugging_face_folder_is_described(tmp_path: Path) -> None:
    facts = inspect_folder(write_folder(tmp_path / "hf", CONFIG, shards=3, dtype="bfloat16"))
    assert (facts["format"], facts["parameters"], facts["weight_bytes"]) == ("hf", PARAMETERS, 2 * PARAMETERS)
    assert (facts["dtypes"], facts["files"], facts["context"]) == ({"bfloat16": 21}, 3, 65536)
    assert facts["rope_fingerprint"] == read_hf_rope(CONFIG).fingerprint()
    assert facts["manifest"] == "none"
    assert facts["stage"] is None
    json.dumps(facts)
    text = describe_folder(facts)
    assert f"{PARAMETERS:,} parameters, bfloat16" in text
    assert "llama, 2 layers, hidden 32, ffn 24, 4 heads of 16 in 2 groups, vocabulary 126, untied embeddings" in text
    assert "65,536 tokens" in text
    assert read_hf_rope(CONFIG).describe() in text


def test_a_checkpoint_is_described(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", CONFIG), tmp_path / "megatron")
    facts = inspect_folder(tmp_path / "megatron")
    assert (facts["format"], facts["parameters"], facts["padded_vocab_size"]) == ("torch_dist", PARAMETERS, 128)
    assert (facts["stage"], facts["iteration"], facts["optimizer_bytes"]) == ("base", 0, 0)
    assert facts["manifest"] == "holds; of 1 files the size alone is known"
    text = describe_folder(facts)
    for words in ("vocabulary 126 (padded to 128)", "stage       base, iteration 0", "manifest    holds", "common.pt"):
        assert words in text


def test_a_broken_manifest_is_said_aloud(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", CONFIG), tmp_path / "megatron", how=Execution(checksum=True))
    with (tmp_path / "megatron" / "__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    assert "BROKEN" in describe_folder(inspect_folder(tmp_path / "megatron"))
    assert "contents differ" in inspect_folder(tmp_path / "megatron")["manifest"]


def test_an_edited_rope_is_warned_about(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config |= {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    facts = inspect_folder(tmp_path / "out")
    assert facts["warnings"] == ["config.json's rope is not the one in mcore_longctx.json: none: no scaling, base 500,000"]
    assert "warning" in describe_folder(facts)
    assert facts["manifest"].startswith("BROKEN")


def test_a_foreign_checkpoint_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", CONFIG), tmp_path / "megatron")
    for name in ("mcore_longctx.json", "manifest.json"):
        (tmp_path / "megatron" / name).unlink()
    facts = inspect_folder(tmp_path / "megatron")
    assert facts["tensors"] == 9
    assert "rope        not known: no mcore_longctx.json" in describe_folder(facts)


def test_a_folder_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        inspect_folder(tmp_path)


def test_layers_are_folded_into_a_table(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", CONFIG, dtype="bfloat16")
    import_hf(hf, tmp_path / "megatron")
    table = inspect_folder(hf)["table"]
    assert sum(row["count"] for row in table) == 21
    assert {"name": "model.layers.{0..1}.mlp.up_proj.weight", "shape": [24, 32], "dtype": "bfloat16", "count": 2} in table
    assert {"name": "lm_head.weight", "shape": [126, 32], "dtype": "bfloat16", "count": 1} in table
    stacked = inspect_folder(tmp_path / "megatron")["table"]
    assert {"name": "decoder.layers.mlp.linear_fc1.weight", "shape": [2, 48, 32], "dtype": "bfloat16", "count": 1} in stacked
    assert re.search(
        r"model\.layers\.\{0\.\.1\}\.mlp\.up_proj\.weight +24 x 32 +bfloat16 +2\n", describe_folder(inspect_folder(hf))
    )


def test_readers_that_err_are_named(tmp_path: Path) -> None:
    config = llama_config(rope_scaling={**LLAMA3_ROPE, "low_freq_factor": 2.0}, max_position_embeddings=65536)
    hf = write_folder(tmp_path / "hf", config)
    import_hf(hf, tmp_path / "megatron")
    for folder in (hf, tmp_path / "megatron"):
        facts = inspect_folder(folder)
        assert {"Megatron-LM", "Megatron-Bridge", "mbridge"} <= {one["program"] for one in facts["rope_readers"]}
        assert "misread by  mbridge: makes it linear interpolation by 8" in describe_folder(facts)


def test_a_rope_that_nobody_can_be_told_is_said_aloud(tmp_path: Path) -> None:
    rope = RopeScaling(type="yarn", ramp="rotations", head_dim=16, rope_theta=5e5, factor=8, original_max_position_embeddings=512)
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron", rope=rope)
    (found,) = inspect_folder(tmp_path / "megatron")["rope_readers"]
    assert "an export is refused: yarn with ramp rotations" in found["does"]


def test_the_folder_around_iterations_is_its_newest(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", CONFIG), tmp_path / "out" / "iter_0000020")
    import_hf(tmp_path / "hf", tmp_path / "out" / "iter_0000010")
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").write_text("20")
    facts = inspect_folder(tmp_path / "out")
    assert facts["path"] == str(tmp_path / "out" / "iter_0000020")
    assert f"the newest in {tmp_path / 'out'}" in describe_folder(facts)


def test_the_flags_of_another_program_are_shown(tmp_path: Path) -> None:
    """`common.pt` as Megatron-LM's trainer writes it, by torch itself."""
    import_hf(write_folder(tmp_path / "hf", CONFIG), tmp_path / "megatron")
    for name in ("mcore_longctx.json", "manifest.json"):
        (tmp_path / "megatron" / name).unlink()
    args = argparse.Namespace(num_layers=2, rotary_base=500000, use_rope_scaling=True, rope_scaling_factor=8.0, secret="x")
    torch.save({"args": args, "iteration": 700, "checkpoint_version": 3.0}, tmp_path / "megatron" / "common.pt")
    facts = inspect_folder(tmp_path / "megatron")
    assert facts["iteration"] == 700
    assert facts["arguments"] == {"num_layers": 2, "rotary_base": 500000, "use_rope_scaling": True, "rope_scaling_factor": 8.0}
    assert "flags       rope_scaling_factor 8.0" in describe_folder(facts)
    json.dumps(facts)


def test_a_quantised_folder_is_described(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", CONFIG, dtype="bfloat16"), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "fp8", quantize="fp8")
    facts = inspect_folder(tmp_path / "fp8")
    assert facts["dtypes"] == {"bfloat16": 7, "float8_e4m3fn": 14}
    assert facts["manifest"].startswith("holds")
