"""What an export has beside its weights, read by transformers, the tokenizers library and nobody of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_longctx.convert import export_hf, import_hf
from mcore_longctx.convert.sidecars import carried_files
from mcore_longctx.rope import RopeScaling, parse_rope_spec
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, write_folder

OWN = RopeScaling(type="none", head_dim=16, rope_theta=5e5, max_position_embeddings=512)


def export(tmp_path: Path, config: dict[str, Any], spec: str = "keep") -> Path:
    hf = write_folder(tmp_path / "hf", config, dtype="bfloat16")
    import_hf(hf, tmp_path / "megatron")
    rope = None if spec == "keep" else parse_rope_spec(spec, OWN)
    export_hf(tmp_path / "megatron", tmp_path / "out", rope=rope)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "spec",
    ["none", "llama3:128", "llama3:8,low=2,high=8", "yarn:32", "yarn:32,beta_fast=4,truncate=false", "linear:8", "ntk:8", "abf,theta=5e6,max=4K"],
)  # fmt: skip
def test_transformers_turns_an_export_by_the_frequencies_asked_for(tmp_path: Path, spec: str) -> None:
    config = AutoConfig.from_pretrained(export(tmp_path, llama_config(), spec))
    rotary = LlamaRotaryEmbedding(config)
    inv_freq, attention_factor = parse_rope_spec(spec, OWN).frequencies()
    np.testing.assert_allclose(rotary.inv_freq.numpy(), inv_freq, rtol=2e-5)
    assert rotary.attention_scaling == pytest.approx(attention_factor, rel=1e-12)


def test_config_holds_what_servers_look_for_and_nothing_stale(tmp_path: Path) -> None:
    stale = {
        "max_sequence_length": 7,
        "seq_length": 7,
        "max_seq_len": 7,
        "model_max_length": 7,
        "auto_map": {"AutoModel": "evil.Evil"},
        "_name_or_path": "/somewhere",
        "quantization_config": {},
        "original_max_position_embeddings": 8192,
        "eos_token_id": [2, 3],
        "made_up": 1,
    }
    given = llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536, architectures=None, **stale)
    config = json.loads((export(tmp_path, given) / "config.json").read_text())
    assert set(stale) & set(config) == {"eos_token_id", "made_up"}
    assert (config["eos_token_id"], config["made_up"]) == ([2, 3], 1)
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (config["head_dim"], config["num_key_value_heads"]) == (16, 2)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_parameters"] == {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    assert config["rope_scaling"] == LLAMA3_ROPE


def test_settings_of_generation_and_tokenizer_follow_the_length(tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf", llama_config())
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 9], "max_length": 512, "temperature": 0.6}))
    (hf / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, "chat_template": "{{ x }}", "auto_map": {}}))
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "tekken.json").write_text("{}")
    (hf / "tokenization_skywork.py").write_text("raise SystemExit('ran')")
    import_hf(hf, tmp_path / "megatron")
    assert (
        json.loads((tmp_path / "megatron" / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 512
    )  # as it came
    out = tmp_path / "out"
    export_hf(tmp_path / "megatron", out, rope=parse_rope_spec("llama3:128", OWN))
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 5, 9], "temperature": 0.6}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 65536, "chat_template": "{{ x }}"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tekken.json").exists()
    assert not list(out.glob("*.py"))
    assert not (out / "README.md").exists()


def test_only_named_files_travel(tmp_path: Path) -> None:
    for name in (
        "tokenizer.model.v3",
        "LICENSE.txt",
        "vocab.json",
        "merges.txt",
        "weights.bin",
        "tokenizer.py",
        "LICENSE.py",
        "x.json",
    ):
        (tmp_path / name).write_text("x")
    assert carried_files(tmp_path) == ["LICENSE.txt", "merges.txt", "tokenizer.model.v3", "vocab.json"]
