"""HF -> Megatron -> HF without Megatron: bit-exact, with the right files beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcore_longctx.convert import Execution, compare, export_hf, import_hf, open_checkpoint
from mcore_longctx.errors import ConfigError
from mcore_longctx.manifest import sha256_file, verify_manifest, write_manifest
from mcore_longctx.recipe import CheckpointCard, read_card, write_card
from mcore_longctx.rope import RopeScaling, read_hf_rope
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, read_weights, write_folder

ONE_LIST = {"rope_type": "longrope", "short_factor": [1.0, 1.5] * 4, "long_factor": [1.0, 1.5] * 4, "attention_factor": 1.0}
MODELS = {
    "untied": llama_config(),
    "tied": llama_config(tie_word_embeddings=True),
    "no GQA, head_dim from hidden": llama_config(num_key_value_heads=4, head_dim=8),
    "one group": llama_config(num_key_value_heads=1),
    "vocabulary of 128": llama_config(vocab_size=128),
    "vocabulary of 129": llama_config(vocab_size=129),
    "longrope of one list": llama_config(rope_scaling=ONE_LIST, max_position_embeddings=65536),
    "llama3 rope": llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_export_of_import_has_the_same_bytes(tmp_path: Path, name: str, dtype: str) -> None:
    config = MODELS[name]
    hf = write_folder(tmp_path / "hf", config, dtype=dtype)
    import_hf(hf, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert read_weights(tmp_path / "out") == read_weights(hf)
    assert compare(hf, tmp_path / "megatron").equal
    assert compare(tmp_path / "megatron", tmp_path / "out").equal
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["dtype"] == exported["torch_dtype"] == dtype
    assert read_hf_rope(exported).fingerprint() == read_hf_rope(config).fingerprint()


def test_sharded_folders_of_any_cut_go_in_and_come_out(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), shards=5)
    import_hf(hf, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out", shard_bytes=20_000)
    assert read_weights(tmp_path / "out") == read_weights(hf)
    shards = sorted(tmp_path.glob("out/model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in read_weights(hf).values())
    assert compare(tmp_path / "out", hf).equal


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.integers(1, 4),
    queries=st.integers(1, 3),
    half_head=st.integers(1, 5),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 9),
    vocab=st.integers(1, 300),
    tied=st.booleans(),
)
def test_any_sizes_survive(
    tmp_path_factory: pytest.TempPathFactory,
    groups: int,
    queries: int,
    half_head: int,
    layers: int,
    ffn: int,
    vocab: int,
    tied: bool,
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    config = llama_config(
        num_key_value_heads=groups,
        num_attention_heads=groups * queries,
        head_dim=2 * half_head,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        vocab_size=vocab,
        hidden_size=6,
        tie_word_embeddings=tied,
    )
    hf = write_folder(folder / "hf", config)
    import_hf(hf, folder / "megatron")
    export_hf(folder / "megatron", folder / "out")
    assert read_weights(folder / "out") == read_weights(hf)


def test_large_tensors_are_read_in_several_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    for module in ("views.rows", "copying.kernels", "checks.verify"):
        monkeypatch.setattr(f"mcore_longctx.convert.{module}.BAND_BYTES", 1000)
    import_hf(hf, tmp_path / "megatron", chunks_for_tp=2)
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert read_weights(tmp_path / "out") == read_weights(hf)
    assert compare(hf, tmp_path / "megatron").equal


def test_several_distcp_files_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    monkeypatch.setattr("mcore_longctx.convert.plans.torch_dist_layout.FILE_BYTES", 20_000)
    import_hf(hf, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 2
    assert compare(hf, tmp_path / "megatron").equal


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_ways_write_the_same_bytes_every_time(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    for name in ("one", "two"):
        import_hf(hf, tmp_path / name)
        export_hf(tmp_path / name, tmp_path / f"{name}-hf", shard_bytes=20_000)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one-hf") == files_of(tmp_path / "two-hf")


def test_the_manifest_lists_sizes_and_with_checksum_hashes(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    for name, how in (("plain", Execution()), ("hashed", Execution(checksum=True))):
        import_hf(hf, tmp_path / name, how=how)
        export_hf(tmp_path / name, tmp_path / f"{name}-hf", how=how)
        for folder, weights, kind in (
            (tmp_path / name, "__0_0.distcp", "checkpoint"),
            (tmp_path / f"{name}-hf", "model.safetensors", "export"),
        ):
            manifest = verify_manifest(folder, kind)
            listed = dict(manifest["files"])
            assert listed.pop(weights)["sha256"] == (sha256_file(folder / weights) if how.checksum else None)
            assert all(row["sha256"] for row in listed.values())
            assert set(files_of(folder)) == {*manifest["files"], "manifest.json"}
    export = verify_manifest(tmp_path / "plain-hf", "export")
    assert export["source_manifest_sha256"] == sha256_file(tmp_path / "plain" / "manifest.json")


def test_an_import_may_change_the_rope_that_training_and_export_follow(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    rope = RopeScaling(type="yarn", head_dim=16, rope_theta=500000.0, factor=16.0, original_max_position_embeddings=512)
    import_hf(hf, tmp_path / "megatron", rope=rope)
    assert (tmp_path / "megatron" / "hf" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert read_card(tmp_path / "megatron").rope == open_checkpoint(tmp_path / "megatron").rope == rope
    manifest = verify_manifest(tmp_path / "megatron", "checkpoint")
    own = read_hf_rope(llama_config())
    assert manifest["rope_fingerprint"] == rope.fingerprint()
    assert manifest["source_rope"] == {"fingerprint": own.fingerprint(), "in_words": own.describe()}
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert read_hf_rope(json.loads((tmp_path / "out" / "config.json").read_text())).fingerprint() == rope.fingerprint()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 8192
    assert read_weights(tmp_path / "out") == read_weights(hf)


def test_an_export_may_change_the_rope(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron")
    rope = RopeScaling(type="llama3", head_dim=16, rope_theta=500000.0, factor=8.0, original_max_position_embeddings=512)
    export_hf(tmp_path / "megatron", tmp_path / "out", rope=rope)
    assert read_hf_rope(json.loads((tmp_path / "out" / "config.json").read_text())).fingerprint() == rope.fingerprint()
    assert read_card(tmp_path / "out").rope == rope
    assert open_checkpoint(tmp_path / "out").rope.fingerprint() == rope.fingerprint()
    assert read_weights(tmp_path / "out") == read_weights(tmp_path / "hf")


def test_import_leaves_what_others_need(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    import_hf(hf, tmp_path / "megatron")
    names = sorted(path.relative_to(tmp_path / "megatron").as_posix() for path in (tmp_path / "megatron").rglob("*"))
    assert names == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "hf",
        "hf/LICENSE",
        "hf/config.json",
        "hf/generation_config.json",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
        "manifest.json",
        "mcore_longctx.json",
        "metadata.json",
    ]
    card = read_card(tmp_path / "megatron")
    assert card.rope == read_hf_rope(llama_config())
    assert (card.stage, card.iteration) == ("base", 0)
    verify_manifest(tmp_path / "megatron", "checkpoint")
    assert not list(tmp_path.glob("*.partial*"))


def retrained(checkpoint: Path, rope: RopeScaling) -> None:
    """Give a checkpoint the card that training with another rope would write."""
    card = read_card(checkpoint)
    write_card(
        checkpoint,
        CheckpointCard(shape=card.shape, rope=rope, tokenizer_sha256=card.tokenizer_sha256, stage="extend", iteration=36),
    )
    write_manifest(checkpoint, "checkpoint")


def test_export_writes_the_rope_that_was_trained_with(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(original_max_position_embeddings=512, auto_map={"AutoModel": "x.Y"}))
    import_hf(hf, tmp_path / "megatron")
    rope = RopeScaling(type="llama3", head_dim=16, rope_theta=500000.0, factor=8.0, original_max_position_embeddings=512)
    retrained(tmp_path / "megatron", rope)
    export_hf(tmp_path / "megatron", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings_of_4096 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    assert config["rope_scaling"] == settings_of_4096
    assert config["rope_parameters"] == settings_of_4096 | {"rope_theta": 500000.0}
    assert config["rope_theta"] == 500000.0
    assert config["max_position_embeddings"] == 4096
    assert "original_max_position_embeddings" not in config
    assert "auto_map" not in config
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"model_max_length": 4096, "eos_token": "</s>"}
    assert "max_length" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not (tmp_path / "out" / "README.md").exists()
    card = read_card(tmp_path / "out")
    assert (card.stage, card.iteration, card.rope) == ("extend", 36, rope)
    verify_manifest(tmp_path / "out", "export")
    assert compare(tmp_path / "megatron", tmp_path / "out").equal
    assert compare(hf, tmp_path / "out").rope_differs


def test_export_refuses_a_rope_that_has_no_name_in_hugging_face(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron")
    rope = RopeScaling(
        type="yarn", ramp="rotations", head_dim=16, rope_theta=500000.0, factor=8.0, original_max_position_embeddings=512
    )
    retrained(tmp_path / "megatron", rope)
    with pytest.raises(ConfigError, match="no name in a Hugging Face config"):
        export_hf(tmp_path / "megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_an_export_can_be_imported_again(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536))
    import_hf(hf, tmp_path / "one")
    export_hf(tmp_path / "one", tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "two")
    assert compare(tmp_path / "one", tmp_path / "two").equal


def test_a_tied_head_in_the_file_is_accepted_if_it_is_the_embedding(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    hf = write_folder(tmp_path / "hf", config, weights)
    import_hf(hf, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert "lm_head.weight" not in read_weights(tmp_path / "out")
    assert "output_layer.weight" not in open_checkpoint(tmp_path / "megatron").tensors


def test_rotary_frequencies_of_old_files_are_left_out_knowingly(tmp_path: Path) -> None:
    weights = random_weights(llama_config())
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    hf = write_folder(tmp_path / "hf", llama_config(), weights | buffers)
    import_hf(hf, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert set(read_weights(tmp_path / "out")) == set(weights)
    assert open_checkpoint(hf).dropped == tuple(sorted(buffers))
