"""A tiny model of every family as transformers makes and saves it, with norms, biases and everything else at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 126  # Megatron's model has 128 rows, at TP 2 256
LENGTH = 64

# name -> what differs from the sizes below; model_type is what transformers builds
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with biases, tied": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "skywork": {"model_type": "llama", "num_key_value_heads": 8},
}


def make(folder: Path, name: str, **changes: Any) -> torch.Tensor:
    """Save the model in `folder` and return transformers' logits of `token_ids()`, float32 [LENGTH, VOCABULARY]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "rms_norm_eps": 1e-5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 500000.0, "max_position_embeddings": 512}
    settings = {"attn_implementation": "eager", "initializer_range": 0.2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(**{**sizes, **heads, **settings, **FAMILIES[name], **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)  # at one, where transformers begins, a mix-up would not show
            elif parameter_name.endswith(".bias"):
                parameter.normal_(std=0.5)
        logits: torch.Tensor = model(token_ids()).logits[0]
    model.save_pretrained(folder)
    if name == "skywork":
        as_skywork(folder)
    return logits


def as_skywork(folder: Path) -> None:
    """Change config.json into one of Skywork's kind: a name and code of its own, no keys that only Llama has."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("attention_bias", "mlp_bias", "head_dim", "pretraining_tp"):
        config.pop(key, None)
    code = {"AutoConfig": "configuration_skywork.SkyworkConfig", "AutoModelForCausalLM": "modeling_skywork.SkyworkForCausalLM"}
    config |= {"model_type": "skywork", "architectures": ["SkyworkForCausalLM"], "auto_map": code}
    path.write_text(json.dumps(config))
    (folder / "configuration_skywork.py").write_text("raise SystemExit('code of a checkpoint was run')\n")


def token_ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(7))
