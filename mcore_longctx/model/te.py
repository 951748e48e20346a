"""`backend: te`: Megatron's own TransformerEngine layers instead of ours.

What stays ours: the rotary embedding (explicit positions), the vocabulary padding, the loss head. What becomes theirs: layers, core
attention with every `cp_comm_type` (TransformerEngine exchanges keys and values itself), norms, recompute and offload. Their nearest
settings:

    recompute          TransformerConfig                                              kept per token and layer, 8B, bf16 (ours)
    none               -                                                              139 KB
    full               recompute_granularity full, method uniform, 1 layer            8 KB (8 KB)
    attention_kept     recompute_granularity selective, modules layernorm and mlp     45-57 KB (16.5 KB)

`offload_fraction` becomes `fine_grained_activation_offloading` of attention inputs and outputs; megatron-core has a fraction from 0.19
on. Rope is never fused: TransformerEngine's fused rope knows neither angles per position nor YaRN's attention factor. The MLP is not
tiled.

Not run here: no machine with TransformerEngine was at hand. Tests build the configs, and the refusals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import offload_fraction_fields

if TYPE_CHECKING:
    from mcore_longctx.recipe.schema import Activations

__all__ = ["check_backend", "te_config_fields", "te_layer_spec"]

# what a layer keeps around its attention: the input of its norm, q k v, the attention output, the input of the MLP's norm
_OFFLOADED = ["attn_norm", "core_attn", "attn_proj", "mlp_norm"]


def check_backend(backend: str) -> None:
    """Raise ConfigError when `backend` is `te` and TransformerEngine is not installed. Before any process group is built."""
    if backend == "te" and not gpt_layer_specs.HAVE_TE:
        raise ConfigError(
            "TransformerEngine is not installed",
            where="model.backend: te",
            fix="pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]' (needs a CUDA toolkit), or set backend: local",
        )


def te_layer_spec(*, qk_layernorm: bool = False) -> ModuleSpec:
    """Megatron's TransformerEngine layer, with norms of query and key heads on demand; ConfigError without TransformerEngine."""
    check_backend("te")
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)


def te_config_fields(activations: Activations) -> dict[str, Any]:
    """TransformerConfig fields of a TE model, to be laid over those of `transformer_config`.

    Raises:
        ConfigError: a fraction that this megatron-core cannot do.
    """
    fields: dict[str, Any] = {"transformer_impl": "transformer_engine", "apply_rope_fusion": False}
    if activations.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif activations.recompute == "attention_kept":
        fields |= {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    if activations.offload_fraction:
        fields |= {"fine_grained_activation_offloading": True, "offload_modules": list(_OFFLOADED)}
        fields |= offload_fraction_fields(activations.offload_fraction)
    return fields
