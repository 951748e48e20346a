import pytest
import torch

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.models import (
    find_model,
    known_models,
    model_names,
    parameters,
    parameters_per_layer,
    stage_parameters,
    step_flops,
)

transformers = pytest.importorskip("transformers")


def _hf_model(name):
    shape = find_model(name)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_class, model_class = kinds[shape.family]
    config = config_class(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "mistral-7b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b"])
def test_parameters_are_those_of_transformers(name):
    model = _hf_model(name)
    assert parameters(find_model(name)) == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    assert parameters_per_layer(find_model(name)) == sum(p.numel() for p in layer.parameters() if p.dim() == 2)


@pytest.mark.parametrize(
    ("name", "count"),
    [  # model cards
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-2-7b", 6_738_415_616),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_published_counts(name, count):
    assert parameters(find_model(name)) == count


def test_stages_of_a_pipeline_hold_the_whole_model():
    shape = find_model("llama-3.1-70b")
    parts = [stage_parameters(shape, 4, first=i == 0, last=i == 3) for i in range(4)]
    assert sum(parts) == parameters(shape)
    assert parts[0] > parts[1]


def test_flops_of_training_by_hand():
    """6 FLOPs a weight and token; attention two products of s x s/2 forward, twice that backward."""
    s, (linear, head, attention) = 4096, step_flops(find_model("llama-3.1-8b"), 4096)
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert linear == 6 * 32 * layer * s
    assert head == 6 * 128256 * 4096 * s
    assert attention == 32 * 3 * 2 * (2 * s * (s / 2) * 32 * 128)


@pytest.mark.parametrize(("seq", "total", "share"), [(131072, 1.94e16, 0.696), (2**20, 9.12e17, 0.948), (2**22, 1.40e19, 0.987)])
def test_the_share_of_attention_grows_to_all(seq, total, share):
    flops = step_flops(find_model("llama-3.1-8b"), seq)
    assert sum(flops) == pytest.approx(total, rel=0.005)
    assert flops[2] / sum(flops) == pytest.approx(share, abs=0.001)


def test_short_names_are_the_same_models():
    models = known_models()
    pairs = {"llama8b": "llama-3.1-8b", "llama2_7b": "llama-2-7b", "qwen3_06b": "qwen3-0.6b", "llama2_7b_gqa": "llama-2-7b-gqa"}
    assert all(models[short] == models[name] for short, name in pairs.items())
    assert set(model_names()) <= set(models)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no model 'llama-3\.1-8' is known; did you mean 'llama-3\.1-8b'"):
        find_model("llama-3.1-8")
