from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_longctx.convert import describe_folder, export_hf, import_hf, inspect_folder
from mcore_longctx.errors import CheckpointError
from mcore_longctx.rope import read_hf_rope
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
    assert (facts["stage"], facts["iteration"], facts["manifest"], facts["optimizer_bytes"]) == ("base", 0, "holds", 0)
    text = describe_folder(facts)
    for words in ("vocabulary 126 (padded to 128)", "stage       base, iteration 0", "manifest    holds", "common.pt"):
        assert words in text


def test_a_broken_manifest_is_said_aloud(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", CONFIG), tmp_path / "megatron")
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
