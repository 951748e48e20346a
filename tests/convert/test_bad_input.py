"""Each bad input of import, export and merge: its one line, before anything is written. Public functions only."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_longctx.convert import Execution, export_hf, import_hf, merge, open_checkpoint, plan_import
from mcore_longctx.convert.checks.served import check_folder
from mcore_longctx.errors import LongctxError
from mcore_longctx.families import read_shape
from mcore_longctx.formats.safetensors_io import read_header
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe import CheckpointCard, read_card, write_card
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, write_folder

INDEX = "model.safetensors.index.json"


def refused(make: Callable[[], object], out: Path) -> str:
    """The message of the error, after checking that nothing was written."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(LongctxError) as caught:
        make()
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert sorted(path.name for path in out.parent.iterdir()) == before
    return message


def import_refused(hf: Path, **options: Any) -> str:
    return refused(lambda: import_hf(hf, hf.parent / "out", **options), hf.parent / "out")


def export_refused(checkpoint: Path, **options: Any) -> str:
    return refused(lambda: export_hf(checkpoint, checkpoint.parent / "out", **options), checkpoint.parent / "out")


# ------------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_bigcode"}, "model_type 'gpt_bigcode' is not supported"),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": True}, "attention_bias without mlp_bias: Megatron has no matching layer"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights cannot be converted; use the bf16 model"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a positive whole number"),
        ({"hidden_size": True}, "hidden_size is True, expected a positive whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a positive whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, no model has more than"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"num_local_experts": 8}, "mixtures of experts (MoE) are not supported"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128},
            "sliding_window is 128, and attention here sees every token",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope type su"),
        ({"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "rope type 'magic' is unknown"),
        ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": {**LLAMA3_ROPE, "factor": 4.0, "rope_theta": 5e5}}, "disagree: factor"),
        ({"hidden_size": 64, "head_dim": 16}, "model.embed_tokens.weight: shape [126, 32], config.json implies [126, 64]"),
        ({"num_hidden_layers": 3}, "9 tensors missing (first: model.layers.2.input_layernorm.weight)"),
        ({"num_hidden_layers": 1}, "(first: model.layers.1.input"),
        ({"vocab_size": 130}, "model.embed_tokens.weight: shape [126, 32], config.json implies [130, 32]"),
        ({"vocab_size": 120}, "model.embed_tokens.weight: shape [126, 32], config.json implies [120, 32]"),
        ({"tie_word_embeddings": True}, "lm_head.weight: differs from model.embed_tokens.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "config.json").write_text(json.dumps(llama_config() | changes))
    assert message in import_refused(hf)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    missing = f"{tmp_path}/meta-llama: no such folder; download the model first and give its folder"
    assert import_refused(tmp_path / "meta-llama") == missing
    (tmp_path / "empty").mkdir()
    assert import_refused(tmp_path / "empty") == f"{tmp_path}/empty/config.json: no such file"
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "config.json").write_text("{")
    assert "not valid JSON" in import_refused(hf)
    (hf / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}')
    assert "key 'vocab_size' twice" in import_refused(hf)
    (hf / "config.json").unlink()
    (hf / "config.json").mkdir()
    assert "is a folder, expected a file" in import_refused(hf)


# ------------------------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(64), "(first: model.layers.0.self_attn.q_proj.bias)"),
        ("model.layers.0.mlp.experts.0.w1.weight", torch.ones(4, 4), "(first: model.layers.0.mlp.experts.0.w1.weight)"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), "model.norm.weight: dtype int8"),
        ("model.norm.weight", torch.ones(32).to(torch.float8_e4m3fn), "model.norm.weight: dtype float8_e4m3fn"),
        ("model.norm.weight", torch.ones(1, 32), "model.norm.weight: shape [1, 32], config.json implies [32]"),
        ("model.norm.weight", torch.ones(31), "model.norm.weight: shape [31], config.json implies [32]"),
        (
            "model.layers.1.self_attn.k_proj.weight",
            torch.ones(32, 32).half(),
            "dtype float16, but its neighbours in decoder.layers.self",
        ),
        (
            "model.layers.1.input_layernorm.weight",
            torch.ones(32).half(),
            "linear_qkv.layer_norm_weight have float32; choose one with --dtype",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), random_weights(llama_config()) | {name: tensor})
    assert message in import_refused(hf)


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file; the data stays."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[NORM].update(dtype="F4"), "tensor 'model.norm.weight': dtype 'F4' is not known"),
        (lambda h: h[NORM].update(shape=[33]), "tensor 'model.norm.weight': 128 bytes, shape [33] needs 132"),
        (lambda h: h[NORM].update(shape=[-32]), "shape is not a list of up to 8 sizes"),
        (lambda h: h[NORM].update(shape=[32.0]), "shape is not a list of up to 8 sizes"),
        (lambda h: h[NORM].update(shape=[2**40, 2**40]), "128 bytes, shape [1099511627776, 1099511627776] needs"),
        (lambda h: h[NORM].update(data_offsets=[0, 2**63]), "data_offsets are not two offsets"),
        (lambda h: h[NORM].update(data_offsets=[True, 129]), "data_offsets are not two offsets"),
        (lambda h: h[NORM].update(data_offsets=[h[Q]["data_offsets"][0], h[Q]["data_offsets"][0] + 128]), "before tensor"),
        (lambda h: h[NORM].update(strides=[1]), "the entry is not dtype, shape and data_offsets"),
        (lambda h: h.pop(Q), "hole before tensor"),
        (lambda h: h.update({"again": h[NORM]}), "overlap before tensor"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    with_header(hf / "model.safetensors", change)
    found = import_refused(hf)
    assert message in found
    assert found.startswith(f"{hf}/model.safetensors: ")


def test_a_header_of_a_strange_length_is_refused_without_reading_it(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    path = hf / "model.safetensors"
    data = path.read_bytes()
    for length, message in (
        (2**63, "is not one of a safetensors file"),
        (10**8, "shorter than its header"),
        (0, "not a safetensors"),
    ):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        assert message in import_refused(hf)
    path.write_bytes(b"version https://git-lfs")
    assert "a Git LFS pointer, not the weights; run `git lfs pull`" in import_refused(hf)


def test_a_missing_or_truncated_shard_is_refused(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), shards=3)
    shard = hf / "model-00002-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    assert import_refused(hf) == f"{shard}: 1 bytes shorter than its header says; download it again"
    with shard.open("ab") as file:
        file.write(b"12")
    assert import_refused(hf) == f"{shard}: 1 bytes after the last tensor; download it again"
    shard.unlink()
    assert import_refused(hf) == f"{shard}: missing; download it again"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.safetensors", "shard name '../secret.safetensors' leaves the folder"),
        ("/etc/passwd.safetensors", "shard name '/etc/passwd.safetensors' leaves the folder"),
        ("a\\b.safetensors", "leaves the folder"),
        ("a\0.safetensors", "leaves the folder"),
        ("x" * 10**6 + ".safetensors", "leaves the folder"),
        ("pytorch_model.bin", "does not end in .safetensors"),
        (7, "shard name"),
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: object, message: str) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), shards=2)
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (hf / INDEX).write_text(json.dumps(index))
    found = import_refused(hf)
    assert found.startswith(f"{hf}/{INDEX}: ")
    assert message in found


def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), shards=2)
    index = json.loads((hf / INDEX).read_text())
    moved = dict(index["weight_map"])
    first, second = sorted(set(moved.values()))
    name = next(key for key, file in moved.items() if file == first)
    for weight_map, message in (
        ({**moved, name: second}, f"holds '{name}', which {INDEX} does not place here"),
        ({**moved, "none.weight": first}, f"'none.weight' is not in {first} (1 such in all)"),
        ({key: file for key, file in moved.items() if key != name}, f"holds '{name}', which {INDEX} does not place here"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        (hf / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert message in import_refused(hf)
    # the same tensor in both files: safetensors allows it, and nobody could say which one is meant
    (hf / INDEX).write_text(json.dumps(index))
    save_file({**load_file(hf / second), name: load_file(hf / first)[name]}, hf / second, {"format": "pt"})
    assert f"{second}: holds '{name}', which {INDEX} does not place here" in import_refused(hf)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    assert "dtype 'int8' is none of" in import_refused(hf, dtype="int8")
    assert "3" in import_refused(hf, chunks_for_tp=3)
    import_refused(hf, chunks_for_tp=0)
    import_refused(hf, vocab_multiple=0)
    import_hf(hf, tmp_path / "ck")
    assert "files of 0 bytes" in export_refused(tmp_path / "ck", shard_bytes=0)
    export_refused(tmp_path / "ck", from_master=True)


# ------------------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron", how=Execution(checksum=True))
    return tmp_path / "megatron"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_where_hashes_were_asked_for(checkpoint: Path) -> None:
    parent, how = checkpoint.parent, Execution(checksum=True)
    export_hf(checkpoint, parent / "export", how=how)
    (path,) = checkpoint.glob("*.distcp")
    flip(path, path.stat().st_size // 2)
    damaged = f"{path}: contents differ from the manifest's sha256; the checkpoint is damaged, use another copy"
    assert export_refused(checkpoint, how=how) == damaged
    path = parent / "export" / "model.safetensors"
    flip(path, -1)
    damaged = f"{path}: contents differ from the manifest's sha256; the export is damaged, use another copy"
    assert refused(lambda: import_hf(parent / "export", parent / "again", how=how), parent / "again") == damaged


def test_checksum_with_nothing_to_compare_with_is_refused_not_promised(tmp_path: Path) -> None:
    how = Execution(checksum=True)
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "ck")
    export_hf(tmp_path / "ck", tmp_path / "export")
    lacks = "1 weight file without a sha256 (written without --checksum): nothing to compare with; write that folder again with"
    assert export_refused(tmp_path / "ck", how=how).startswith(f"{tmp_path}/ck/manifest.json: {lacks}")
    assert import_refused(tmp_path / "export", how=how).startswith(f"{tmp_path}/export/manifest.json: {lacks}")
    assert lacks in refused(lambda: merge(tmp_path / "ck", tmp_path / "ck", tmp_path / "out", how=how), tmp_path / "out")
    import_hf(tmp_path / "hf", tmp_path / "again", how=how)  # of another program, without a manifest: hashes of the output alone


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "LICENSE"]
)
def test_a_carried_file_that_cannot_be_carried_is_refused_before_the_weights_are_copied(name: str, tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "ck")
    write_manifest(tmp_path / "ck", "checkpoint", files=["__0_0.distcp"])  # that which lists all notices a change first
    for folder, refuse in (
        (tmp_path / "hf", import_refused),
        (tmp_path / "ck" / "hf", lambda _: export_refused(tmp_path / "ck")),
    ):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("nowhere")
        assert refuse(folder).startswith(f"{folder / name}: a broken link, to nowhere")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert refuse(folder) == f"{folder / name}: is a FIFO, expected a file"
        (folder / name).unlink()
        (folder / name).write_text("{")
        if "_config" in name:
            assert refuse(folder).startswith(f"{folder / name}: not valid JSON")
            (folder / name).unlink()


def test_a_tokenizer_that_may_not_be_read_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read everything, so opening it is made to fail."""
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "merges.txt").write_text("a b")
    opened = Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "merges.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    assert import_refused(hf) == f"{hf}/merges.txt: cannot be opened (Permission denied)"


def test_links_that_lead_nowhere_and_files_in_place_of_folders_are_named(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "pytorch_model.bin").write_bytes(b"PK")  # must not be taken in its place
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").symlink_to("../blobs/1234")
    assert import_refused(hf).startswith(f"{hf}/model.safetensors: a broken link, to ../blobs/1234")
    assert import_refused(hf / "config.json").startswith(f"{hf}/config.json: is a file, expected a folder")
    with pytest.raises(LongctxError, match=r"config\.json: is a file, expected a folder"):
        check_folder(hf / "config.json")


def test_the_index_of_bin_files_is_a_source(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    weights = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    torch.save(weights, hf / "pytorch_model-00001-of-00001.bin")
    shards = {"weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(shards))
    assert "pytorch_model.bin.index.json" in {source.path.name for source in plan_import(hf).sources}


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_a_surplus_tensor_is_refused_under_the_name_of_its_family(model_type: str, tmp_path: Path) -> None:
    names = {"mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config = llama_config(model_type=model_type, architectures=[names[model_type]], sliding_window=None)
    weights = random_weights(config)
    if model_type == "qwen3":
        norms = {f"model.layers.{i}.self_attn.{part}_norm.weight": torch.ones(16) for i in range(2) for part in "qk"}
        weights |= norms
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    save_file(weights | {"extra.weight": torch.ones(2)}, hf / "model.safetensors")
    assert f"1 tensor without a place in a {model_type} of this config.json (first: extra.weight)" in import_refused(hf)


def test_a_truncated_checkpoint_is_refused_with_and_without_its_manifest(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("*.distcp")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    message = export_refused(checkpoint)
    assert message.startswith(f"{path}: ")
    assert "ends at byte" in message or "the manifest says" in message
    (checkpoint / "manifest.json").unlink()
    assert "ends at byte" in export_refused(checkpoint)
    path.unlink()
    assert export_refused(checkpoint).startswith(f"{path}: missing")


def test_an_unfinished_or_foreign_checkpoint_is_refused(checkpoint: Path) -> None:
    parent = checkpoint.parent
    export_hf(checkpoint, parent / "export")
    export_refused(parent / "export")
    assert "no such folder" in export_refused(parent / "none")
    (checkpoint / "metadata.json").rename(parent / "aside")
    (checkpoint / "manifest.json").unlink()
    assert "no metadata.json: the save was not finished" in export_refused(checkpoint)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    assert "fsdp_dtensor" in export_refused(checkpoint)
    legacy = parent / "legacy" / "iter_0000010" / "mp_rank_00"
    legacy.mkdir(parents=True)
    (legacy / "model_optim_rng.pt").write_bytes(b"PK")
    assert "--ckpt-format torch_dist" in export_refused(parent / "legacy" / "iter_0000010", config=parent / "hf")


def rewritten(checkpoint: Path, **changes: Any) -> Path:
    """The checkpoint with other sizes in card and config, and a manifest that agrees."""
    card = read_card(checkpoint)
    config = json.loads((checkpoint / "hf" / "config.json").read_text()) | changes
    (checkpoint / "hf" / "config.json").write_text(json.dumps(config))
    write_card(checkpoint, CheckpointCard(shape=read_shape(config), rope=card.rope))
    write_manifest(checkpoint, "checkpoint")
    return checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 129}, "embedding.word_embeddings.weight has shape [128, 32]"),
        ({"num_hidden_layers": 1}, "has shape [2, "),
        ({"intermediate_size": 20}, "decoder.layers.mlp.linear_fc1.weight has shape [2, 48, 32]"),
        ({"tie_word_embeddings": True}, "(first: output_layer.weight)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    assert message in export_refused(rewritten(checkpoint, **changes))


def test_a_tied_checkpoint_lacks_the_head_of_an_untied_model(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config(tie_word_embeddings=True)), tmp_path / "megatron")
    assert "output_layer.weight" in export_refused(rewritten(tmp_path / "megatron", tie_word_embeddings=False))


def test_a_config_that_does_not_agree_with_the_card_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "hf" / "config.json").read_text())
    (checkpoint / "hf" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    write_manifest(checkpoint, "checkpoint")
    assert "hf/config.json: sizes differ from those in mcore_longctx.json" in export_refused(checkpoint)


def test_models_of_different_sizes_are_not_merged(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", llama_config())
    second = write_folder(tmp_path / "b", llama_config(num_hidden_layers=1))
    refused(lambda: merge(first, second, tmp_path / "out", weights=(0.5, 0.5)), tmp_path / "out")


def test_an_output_that_exists_is_kept(checkpoint: Path) -> None:
    out = checkpoint.parent / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    for message in (import_refused(checkpoint.parent / "hf"), export_refused(checkpoint)):
        assert message == f"{out}: output is already there; choose another name or remove it"
    shutil.rmtree(out)
    out.symlink_to("nowhere")
    assert "output is already there" in import_refused(checkpoint.parent / "hf")
    assert out.readlink() == Path("nowhere")


def test_conversion_never_imports_torch_or_an_unpickler(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    script = (
        "import sys; from pathlib import Path; from mcore_longctx.convert import *\n"
        "hf, ck, out = map(Path, sys.argv[1:])\n"
        "import_hf(hf, ck); export_hf(ck, out)\n"
        "heavy = {'torch', 'megatron', 'transformers', 'safetensors', 'ml_dtypes', 'multiprocessing'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert compare(hf, out).equal; inspect_folder(ck); open_checkpoint(out)\n"
        "heavy = {'torch', 'megatron', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    paths = [str(hf), str(tmp_path / "ck"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, timeout=60)
    assert read_header(tmp_path / "out" / "model.safetensors")
    assert open_checkpoint(tmp_path / "ck").num_parameters
