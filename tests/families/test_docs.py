"""The example of docs/families.md is run as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mcore_longctx.convert import import_hf
from tests.convert.hf_folders import llama_config, random_weights, read_weights, write_folder

ROOT = Path(__file__).parents[2]
# written down independently of the table
ACME_NAMES = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.norm_f.scale",
    "lm_head.weight": "lm_head.weight",
    "input_layernorm.weight": "norm_1.scale",
    "post_attention_layernorm.weight": "norm_2.scale",
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj.weight": "attn.wo.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.up_proj.weight": "mlp.w3.weight",
    "mlp.down_proj.weight": "mlp.w2.weight",
}


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "families.md").read_text(), re.MULTILINE | re.DOTALL)


def acme_name(name: str) -> str:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return ACME_NAMES[name]
    rest = found[2]
    known = ACME_NAMES.get(rest) or ACME_NAMES[rest.rsplit(".", 1)[0]] + "." + rest.rsplit(".", 1)[1]
    return f"transformer.blocks.{found[1]}.{known}"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """`qwen2`: a tiny Qwen2. `acme-7b`: the same tensors under Acme's names."""
    generator = torch.Generator().manual_seed(4)
    config = llama_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    weights = random_weights(config)
    for layer in range(config["num_hidden_layers"]):
        for part, heads in (
            ("q", config["num_attention_heads"]),
            ("k", config["num_key_value_heads"]),
            ("v", config["num_key_value_heads"]),
        ):
            weights[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.randn(
                heads * config["head_dim"], generator=generator
            )
    write_folder(tmp_path / "qwen2", config, weights)
    folder = tmp_path / "acme-7b"
    folder.mkdir()
    save_file({acme_name(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    described: dict[str, Any] = config | {"model_type": "acme", "architectures": ["AcmeForCausalLM"], "use_qkv_bias": True}
    (folder / "config.json").write_text(json.dumps(described))
    return tmp_path


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist folder, read by torch."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size) for key, entry in stored.items() if "_extra_state" not in key}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def test_the_example_converts_a_family_that_was_not_known(acme: Path) -> None:
    ran = run("\n".join(blocks()), acme)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("equal: 27 tensors compared")
    assert read_weights(acme / "acme-back") == read_weights(acme / "acme-7b")
    # the same weights under names that transformers knows give the same Megatron checkpoint
    import_hf(acme / "qwen2", acme / "qwen2-megatron")
    expected, found = tensors_of(acme / "qwen2-megatron"), tensors_of(acme / "acme-megatron")
    assert len(expected) == 10  # lines of the table
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def test_without_registration_it_is_refused_and_so_is_its_option(acme: Path) -> None:
    first, second = blocks()
    ran = run(second, acme)
    assert (
        "model_type 'acme' is not supported; known are llama, mistral, qwen2, qwen3, skywork; docs/families.md adds one"
        in ran.stderr
    )
    config = json.loads((acme / "acme-7b" / "config.json").read_text())
    (acme / "acme-7b" / "config.json").write_text(json.dumps(config | {"memory_tokens": True}))
    assert "memory_tokens is true: attention to tokens that are not in the text" in run(first + second, acme).stderr


def test_every_family_is_in_the_table_of_the_docs() -> None:
    from mcore_longctx.families import FAMILIES

    rows = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "families.md").read_text(), re.MULTILINE)
    assert rows == list(FAMILIES)
