"""Each bad input of import and export: its one line, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.convert import export_hf, import_hf, open_checkpoint
from mcore_longctx.errors import CheckpointError, ConfigError, ConversionError, LongctxError
from mcore_longctx.families import read_shape
from mcore_longctx.formats.safetensors_io import read_header
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe import CheckpointCard, read_card, write_card
from tests.convert.fuzz import mutations, only_our_errors, strange_values
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, write_folder


def refused(make: Callable[[], None], out: Path) -> str:
    """The message of the error, after checking that nothing was left behind."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(LongctxError) as caught:
        make()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in out.parent.iterdir()) == before
    return str(caught.value)


def import_refused(hf: Path) -> str:
    return refused(lambda: import_hf(hf, hf.parent / "out"), hf.parent / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"attention_bias": True}, "attention_bias is True, only False is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights cannot be converted; use the bf16 model"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a positive whole number"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope type su"),
        ({"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "rope type 'magic' is unknown"),
        ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": {**LLAMA3_ROPE, "factor": 4.0, "rope_theta": 5e5}}, "disagree: factor"),
        ({"hidden_size": 64, "head_dim": 16}, "model.embed_tokens.weight: shape [126, 32], config.json implies [126, 64]"),
        ({"num_hidden_layers": 3}, "9 tensors missing (first: model.layers.2.input_layernorm.weight)"),
        ({"num_hidden_layers": 1}, "9 tensors without a place in a Llama of this config.json (first: model.layers.1.input"),
        ({"vocab_size": 130}, "model.embed_tokens.weight: shape [126, 32], config.json implies [130, 32]"),
        ({"tie_word_embeddings": True}, "lm_head.weight: differs from model.embed_tokens.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "config.json").write_text(json.dumps(llama_config() | changes))
    assert message in import_refused(hf)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(64),
            "1 tensor without a place in a Llama of this config.json (first: model.l",
        ),
        (
            "model.layers.0.mlp.experts.0.w1.weight",
            torch.ones(4, 4),
            "biases, experts, adapters and other heads are not supported",
        ),
        ("model.norm.weight", torch.ones(32).half(), None),
        (
            "model.norm.weight",
            torch.ones(32).to(torch.int8),
            "model.norm.weight: dtype int8: quantised or integer weights cannot",
        ),
        ("model.norm.weight", torch.ones(1, 32), "model.norm.weight: shape [1, 32], config.json implies [32]"),
        (
            "model.layers.1.self_attn.k_proj.weight",
            torch.ones(32, 32).half(),
            "dtype float16, but its neighbours in decoder.layers.self",
        ),
        (
            "model.layers.1.input_layernorm.weight",
            torch.ones(32).half(),
            "linear_qkv.layer_norm_weight have float32; save the model",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, message: str | None) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), random_weights(llama_config()) | {name: tensor})
    if message is None:  # a tensor of its own may have a dtype of its own
        import_hf(hf, tmp_path / "out")
    else:
        assert message in import_refused(hf)


def test_a_missing_or_truncated_shard_is_refused(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config(), shards=3)
    shard = hf / "model-00002-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    assert import_refused(hf) == f"{shard}: 1 bytes shorter than its header says; download it again"
    shard.unlink()
    assert import_refused(hf) == f"{shard}: missing; download it again"


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert (
        import_refused(tmp_path / "meta-llama")
        == f"{tmp_path}/meta-llama: no such folder; download the model first and give its folder"
    )
    (tmp_path / "empty").mkdir()
    assert import_refused(tmp_path / "empty") == f"{tmp_path}/empty/config.json: no such file"
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "config.json").write_text("{")
    assert "not valid JSON" in import_refused(hf)
    (hf / "config.json").unlink()
    (hf / "config.json").mkdir()
    assert "is a folder, expected a file" in import_refused(hf)


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "output folder is already there; choose another name" in import_refused(hf)
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_full_disk_is_said_before_and_during_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    with monkeypatch.context() as patch:
        patch.setattr("mcore_longctx.convert.disk.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
        assert re.search(r"needs [\d.]+ kB, 0 bytes are free on its file system; free some space", import_refused(hf))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.distcp")

    monkeypatch.setattr("mcore_longctx.convert.hf_import.TorchDistWriter.add_chunk", full)
    assert import_refused(hf) == "x.distcp: No space left on device"


def test_a_shard_that_shrinks_during_the_work_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())

    def shrink(*args: Any) -> None:
        os.truncate(hf / "model.safetensors", 5000)

    monkeypatch.setattr("mcore_longctx.convert.hf_import.check_free_space", shrink)
    assert import_refused(hf) == f"{hf}/model.safetensors: ended while it was read; it changed or is damaged"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import_hf(write_folder(tmp_path / "hf", llama_config()), tmp_path / "megatron")
    return tmp_path / "megatron"


def export_refused(checkpoint: Path) -> str:
    return refused(lambda: export_hf(checkpoint, checkpoint.parent / "out"), checkpoint.parent / "out")


def test_one_flipped_bit_in_a_checkpoint_stops_the_export(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert (
        export_refused(checkpoint)
        == f"{path}: contents differ from the manifest's sha256; the checkpoint is damaged, use another copy"
    )


def test_a_checkpoint_without_manifest_or_card_is_refused(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    assert "no manifest.json: this checkpoint was not finished" in export_refused(checkpoint)
    (checkpoint / "mcore_longctx.json").unlink()
    assert "a torch_dist folder without mcore_longctx.json: its model and rope are not known" in export_refused(checkpoint)
    assert "no such folder" in export_refused(checkpoint.parent / "none")


def test_an_export_is_not_a_checkpoint(checkpoint: Path) -> None:
    export_hf(checkpoint, checkpoint.parent / "first")
    assert "is a folder of kind 'export', expected checkpoint" in export_refused(checkpoint.parent / "first")


def test_one_flipped_bit_in_an_export_stops_the_import(checkpoint: Path) -> None:
    out = checkpoint.parent / "export"
    export_hf(checkpoint, out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    message = refused(lambda: import_hf(out, checkpoint.parent / "again"), checkpoint.parent / "again")
    assert (
        message == f"{out}/model.safetensors: contents differ from the manifest's sha256; the export is damaged, use another copy"
    )


@pytest.mark.parametrize(
    "name", ["hf/config.json", "megatron/hf/config.json", "megatron/mcore_longctx.json", "megatron/metadata.json"]
)
def test_damaged_settings_give_only_our_errors(tmp_path: Path, name: str) -> None:
    config = llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536)
    import_hf(write_folder(tmp_path / "hf", config), tmp_path / "megatron")
    path = tmp_path / name
    data = path.read_bytes()
    refusals = 0
    for damaged in (*mutations(data, 150, seed=5), *strange_values(json.loads(data), 250, seed=6)):
        path.write_bytes(damaged)
        refusals += only_our_errors(lambda: open_checkpoint(tmp_path / Path(name).parts[0]))
    assert refusals > 100


def rewritten(checkpoint: Path, **changes: Any) -> Path:
    """The checkpoint with other sizes in card and config, and a manifest that agrees."""
    card = read_card(checkpoint)
    config = json.loads((checkpoint / "hf" / "config.json").read_text()) | changes
    (checkpoint / "hf" / "config.json").write_text(json.dumps(config))
    shape = read_shape(config)
    write_card(checkpoint, CheckpointCard(shape=shape, rope=card.rope))
    write_manifest(checkpoint, "checkpoint")
    return checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 129}, "embedding.word_embeddings.weight has shape [128, 32], hf/config.json implies [129, 32]"),
        ({"num_hidden_layers": 1}, "has shape [2, 32], hf/config.json implies [1, 32]"),
        (
            {"intermediate_size": 20},
            "decoder.layers.mlp.linear_fc1.weight has shape [2, 48, 32], hf/config.json implies [2, 40, 32]",
        ),
        ({"tie_word_embeddings": True}, "1 tensor without a place in a Llama of hf/config.json (first: output_layer.weight)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    assert message in export_refused(rewritten(checkpoint, **changes))


def test_a_tied_checkpoint_lacks_the_head_of_an_untied_model(tmp_path: Path) -> None:
    import_hf(write_folder(tmp_path / "hf", llama_config(tie_word_embeddings=True)), tmp_path / "megatron")
    assert "tensor output_layer.weight is missing" in export_refused(rewritten(tmp_path / "megatron", tie_word_embeddings=False))


def test_a_config_that_does_not_agree_with_the_card_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "hf" / "config.json").read_text())
    (checkpoint / "hf" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    write_manifest(checkpoint, "checkpoint")
    assert "hf/config.json: sizes differ from those in mcore_longctx.json" in export_refused(checkpoint)


def test_an_import_that_is_killed_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    script = (
        "import os, signal, sys; from pathlib import Path; from mcore_longctx.convert import hf_import\n"
        "hf_import.write_card = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "hf_import.import_hf(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(hf), str(tmp_path / "out")], check=False, timeout=60)
    assert killed.returncode == -9
    (partial,) = tmp_path.glob("out.partial-*")
    assert not (tmp_path / "out").exists()
    with pytest.raises((CheckpointError, ConfigError, ConversionError)):
        export_hf(partial, tmp_path / "exported")
    import_hf(hf, tmp_path / "out")
    assert not list(tmp_path.glob("*.partial-*"))


def test_conversion_never_imports_torch(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    script = (
        "import sys; from pathlib import Path; from mcore_longctx.convert import *\n"
        "hf, ck, out = map(Path, sys.argv[1:])\n"
        "import_hf(hf, ck); export_hf(ck, out); assert compare(hf, out).equal; inspect_folder(ck)\n"
        "heavy = {'torch', 'megatron', 'transformers', 'safetensors', 'pickle'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy - {'pickle'} else 0)"
    )
    paths = [str(hf), str(tmp_path / "ck"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, timeout=60)
    assert read_header(tmp_path / "out" / "model.safetensors")
