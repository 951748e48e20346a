"""The TransformerEngine path, as far as a machine without TransformerEngine allows."""

from __future__ import annotations

from typing import Any

import pytest

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.megatron_compat import MEGATRON_VERSION, device_context
from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.model.builder import transformer_config
from mcore_longctx.model.te import check_backend, te_config_fields
from mcore_longctx.recipe.schema import Activations, Parallel
from tests.model.llama import PLAIN_ROPE, SHAPE, build

HAS_FRACTION = not MEGATRON_VERSION.startswith(("0.16", "0.17", "0.18"))


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ({"recompute": "none"}, {"recompute_granularity": None, "fine_grained_activation_offloading": False}),
        ({"recompute": "full"}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ({"recompute": "attention_kept"}, {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}),
        (
            {"recompute": "attention_kept", "offload_fraction": 1.0},
            {
                "fine_grained_activation_offloading": True,
                "offload_modules": ["attn_norm", "core_attn", "attn_proj", "mlp_norm"],
            },
        ),
    ],
)
def test_megatron_accepts_the_nearest_settings(activations: Any, expected: dict[str, Any]) -> None:
    init_process_groups(Parallel(), seed=1)
    with device_context():
        config = transformer_config(
            SHAPE, PLAIN_ROPE, Parallel(), precision="bf16", **te_config_fields(Activations(**activations))
        )
    assert config.transformer_impl == "transformer_engine"
    assert not config.apply_rope_fusion
    assert config.softmax_scale == pytest.approx(SHAPE.kv_channels**-0.5)
    assert {name: getattr(config, name) for name in expected} == expected
    destroy_process_groups()


def test_a_part_of_the_layers_is_offloaded_where_megatron_can() -> None:
    if HAS_FRACTION:
        assert te_config_fields(Activations(offload_fraction=0.5))["activation_offload_fraction"] == 0.5
    else:
        with pytest.raises(ConfigError, match=r"offload_fraction is 0\.5, and megatron-core .* offloads all or nothing"):
            te_config_fields(Activations(offload_fraction=0.5))


def test_without_transformer_engine_the_message_says_how_to_install_it() -> None:
    check_backend("local")
    with pytest.raises(ConfigError, match="TransformerEngine is not installed") as refused:
        check_backend("te")
    assert "pip install" in str(refused.value)
    assert "set backend: local" in str(refused.value)
    with pytest.raises(ConfigError, match="TransformerEngine is not installed"):
        build(Parallel(), backend="te")
    destroy_process_groups()


def test_a_model_whose_key_heads_transformer_engine_would_have_to_repeat_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcore_longctx.model.te.gpt_layer_specs.HAVE_TE", True)
    parallel = Parallel(context_parallel_size=SHAPE.num_attention_heads, cp_comm_type="a2a")
    parallel.check_attention(SHAPE.num_layers, SHAPE.num_attention_heads, SHAPE.num_query_groups)  # ours repeats them
    with pytest.raises(LayoutError, match=r"TransformerEngine's a2a over \d+ ranks cannot divide \d+ key heads"):
        build(parallel, new_groups=False, backend="te")
