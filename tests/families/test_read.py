"""config.json of every family: published ones are read, and what changes the mathematics is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.families import FAMILIES, Family, ModelShape, config_for_export, hf_shapes, model_tensors, read_shape, register

BASE: dict[str, Any] = {
    "vocab_size": 126,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
TYPES = ("llama", "mistral", "qwen2", "qwen3", "skywork")


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    window = {"sliding_window": None} if model_type == "mistral" else {}  # transformers' default is a window of 4,096
    return {"model_type": model_type, **BASE, **window, **changes}


# From the published config.json files: sizes, and keys that must not disturb.
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_with_the_parameters_that_they_are_known_for(name: str) -> None:
    published = PUBLISHED[name]
    shape = read_shape(published["config"])
    assert {key: getattr(shape, key) for key in published["shape"]} == published["shape"]
    parameters = sum(tensor.rows * (tensor.columns or 1) for tensor in model_tensors(shape))
    assert round(parameters / 1e6) == published["million_parameters"]
    assert ModelShape.from_dict(json.loads(json.dumps(shape.as_dict()))) == shape


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((model_type, {"tie_word_embeddings": tied}) for model_type in TYPES for tied in (False, True)),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_names_and_shapes_are_those_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    """On torch's meta device: no weight is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**config_for_export(config_of(model_type, **changes)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if changes.get("tie_word_embeddings") else set()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert hf_shapes(model_tensors(read_shape(config_of(model_type, **changes)))) == expected


@pytest.mark.parametrize(
    "harmless",
    [
        {"architectures": None},
        {"dtype": "bfloat16", "torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "5.0.0"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6},
        {"layer_types": ["full_attention"] * 2, "max_window_layers": 2},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0, "attention_multiplier": 8**-0.5},
        {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 0.0},
        {"num_experts": 0, "num_local_experts": None, "quantization_config": None, "partial_rotary_factor": 1},
        {"is_encoder_decoder": False, "vision_config": None, "a_key_of_tomorrow": {"x": [1, 2]}, "attention_dropout": 0.1},
        {"hidden_act": None},
        {"is_causal": True, "is_decoder": False, "pruned_heads": {}, "num_kv_shared_layers": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("model_type", TYPES)
def test_keys_that_change_nothing_pass(model_type: str, harmless: dict[str, Any]) -> None:
    assert read_shape(config_of(model_type, **harmless)) == read_shape(config_of(model_type))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "num_experts is 8: mixtures of experts (MoE) are not supported"),
        ({"num_local_experts": 8}, "num_local_experts is 8: mixtures of experts (MoE) are not supported"),
        ({"moe_intermediate_size": 768}, "moe_intermediate_size is 768: mixtures of experts (MoE) are not supported"),
        (
            {"embedding_multiplier": 12.0},
            "embedding_multiplier is 12.0: it changes what the model computes, and is not supported",
        ),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22: it changes"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0: it changes"),
        ({"scale_emb": 12}, "scale_emb is 12: it changes"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: it changes"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0: it changes"),
        ({"attention_multiplier": 0.0078125}, "attention_multiplier is 0.0078125: attention is scaled by 1/sqrt(head_dim) here"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256: attention is scaled by 1/sqrt(head_dim) here"),
        ({"use_qk_norm": True}, "use_qk_norm is True: it changes"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]: it changes"),
        ({"rope_interleaved": True}, "rope_interleaved is True: it changes"),
        ({"is_causal": False}, "is_causal is False: it changes"),
        ({"is_causal": 0}, "is_causal is 0: it changes"),
        (
            {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
            "per_layer_config is {'0': {'num_key_value_heads': 1}}: it changes",
        ),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}: it changes"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1: it changes"),
        ({"kv_sharing_modes": ["own", "reuse"]}, "kv_sharing_modes is ['own', 'reuse']: it changes"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors': it changes"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1; partly rotated heads are not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full_attention', 'sliding_attention']: layers that do not attend to every token before them",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights cannot be converted; use the bf16 model"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures names 'LlamaForSequenceClassification'; only a language",
        ),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list of names"),
        ({"vision_config": {}}, "vision_config is set: a vision model; only a decoder of text is supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is set: an encoder beside the decoder"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive whole number"),
        ({"hidden_size": True}, "hidden_size is True, expected a positive whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, no model has more than 4,096"),
        ({"vocab_size": 10**40}, "vocab_size is a number of more than 30 digits, no model has more than 16,777,216"),
        ({"num_attention_heads": -8}, "num_attention_heads is -8, expected a positive whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a small number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a small number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("model_type", TYPES)
def test_what_changes_the_mathematics_or_has_no_place_is_refused_by_name(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_shape(config_of(model_type, **changes), where="here")
    assert str(caught.value).startswith(f"here: {message}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            config_of("llama", attention_bias=True),
            "attention_bias without mlp_bias: Megatron has no matching layer; see docs/families.md, biases",
        ),
        (config_of("llama", mlp_bias=True), "mlp_bias without attention_bias: Megatron has no matching layer"),
        (
            config_of("mistral", sliding_window=4096),
            "sliding_window is 4,096, and attention here sees every token before it: another model; set sliding_window to null",
        ),
        (
            {key: value for key, value in config_of("mistral").items() if key != "sliding_window"},
            "sliding_window is missing, and transformers then takes 4,096; set it to null if the model has no window",
        ),
        (config_of("llama", sliding_window=4096), "sliding_window is 4,096, and attention here sees every token before it"),
        (config_of("skywork", sliding_window=4096), "sliding_window is 4,096, and attention here sees every token before it"),
        (config_of("qwen2", use_sliding_window=True), "use_sliding_window is true: attention here sees every token before it"),
        (config_of("qwen3", use_sliding_window=True), "use_sliding_window is true: attention here sees every token before it"),
        (config_of("qwen3", attention_bias=True), "attention_bias is true: Megatron has no matching layer; see docs/families.md"),
        (config_of("qwen3", head_dim=None), "head_dim is missing; write it down"),
        (config_of("mistral", head_dim=None, hidden_size=65), "hidden_size 65 is not a multiple of num_attention_heads 8"),
        (
            config_of("qwen2", architectures=["Qwen3ForCausalLM"]),
            "architectures names 'Qwen3ForCausalLM'; only a language model, Qwen2",
        ),
        (config_of("gemma3_text"), "model_type 'gemma3_text' is not supported; known are llama, mistral, qwen2, qwen3, skywork"),
        ({**BASE}, "model_type is missing; known are llama"),
        ({**BASE, "model_type": ["llama"]}, "model_type \"['llama']\" is not supported"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_shape(config)
    assert str(caught.value).startswith(f"config.json: {message}"), caught.value


def test_a_window_that_is_not_switched_on_is_carried() -> None:
    assert read_shape(config_of("qwen2", sliding_window=32, use_sliding_window=False)).add_qkv_bias
    assert config_for_export(config_of("qwen2", sliding_window=32))["sliding_window"] == 32


def test_sizes_of_a_damaged_config_cost_nothing() -> None:
    start = time.perf_counter()
    for key in ("num_hidden_layers", "num_key_value_heads", "num_attention_heads", "vocab_size", "hidden_size", "head_dim"):
        for value in (2**31, 2**63, 10**4000):
            with pytest.raises(ConfigError):
                read_shape(config_of("llama", **{key: value}))
    with pytest.raises(LongctxError, match="no model is that large"):
        model_tensors(read_shape(config_of("llama", num_hidden_layers=4096, num_attention_heads=4096, num_key_value_heads=4096)))
    assert time.perf_counter() - start < 1.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *BASE,
    "model_type",
    "architectures",
    "layer_types",
    "quantization_config",
    "num_experts",
    "logit_scale",
    "query_pre_attn_scalar",
]


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_whatever_a_config_holds_ends_in_sizes_or_in_one_line(model_type: str, damage: dict[str, Any]) -> None:
    said = ""
    try:
        assert len(model_tensors(read_shape(config_of(model_type) | damage))) <= 4096 * 14
    except LongctxError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 400


def test_a_family_is_registered_once() -> None:
    family = Family("llama", ("OtherForCausalLM",), (), lambda config, where: read_shape(config))
    with pytest.raises(ConfigError, match="model_type 'llama' is registered already"):
        register(family)
    register(FAMILIES["llama"])  # the same again is no mistake


def test_families_need_neither_numpy_nor_torch() -> None:
    check = "import mcore_longctx.families, sys; print(sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
