"""Layer specs of a Llama with long-context attention, for `GPTModel` and for Megatron-LM's `--spec`.

--spec mcore_longctx.model.spec llama           a ready ModuleSpec (every Megatron-LM version)
--spec mcore_longctx.model.spec llama_block     a function (0.19 calls it): needed under sequence parallelism, where the final
                                                norm must be ours as well
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mcore_longctx.megatron_compat import layer_offset, num_layers_to_build
from mcore_longctx.model.attention import LongContextAttention
from mcore_longctx.model.mlp import tiled_mlp_spec
from mcore_longctx.model.norm import RMSNorm
from mcore_longctx.model.offload import ActivationOffload
from mcore_longctx.model.recompute import LongContextLayer, RecomputePolicy

__all__ = ["llama", "llama_block", "longctx_block_spec", "longctx_layer_spec"]


def longctx_layer_spec(
    *,
    recompute: RecomputePolicy = "none",
    mlp_tile: int | None = None,
    offload: ActivationOffload | None = None,
    qk_layernorm: bool = False,
) -> ModuleSpec:
    """One layer: Megatron's local layer with `LongContextAttention`, `TiledMLP` and an RMSNorm that knows sequence parallelism.

    A fresh object each time, to be changed at will. Checkpoint names are those of Megatron's local and TransformerEngine specs.

    Args:
        recompute: what is kept for the backward pass, see `mcore_longctx.model.recompute`.
        mlp_tile: tokens of the MLP at once; None: all.
        offload: where kept activations go (one object for all layers of a stage); None: they stay on the device.
        qk_layernorm: RMSNorm over each head of queries and keys before the rope (Qwen3); the config must say the same.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module = LongContextLayer
    spec.params = {**(spec.params or {}), "recompute": recompute, "offload": offload}
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = LongContextAttention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec.submodules.mlp = tiled_mlp_spec(mlp_tile)
    return spec


def longctx_block_spec(
    config: Any,
    vp_stage: int | None = None,
    *,
    recompute: RecomputePolicy = "none",
    mlp_tile: int | None = None,
    offload_fraction: float = 0.0,
) -> TransformerBlockSubmodules:
    """All layers of this pipeline stage and the final norm.

    `config` is a TransformerConfig. With a bare layer spec Megatron chooses the final norm itself: one that refuses sequence
    parallelism. `offload_fraction` is the share of the layers whose kept activations go to host memory.
    """
    num_layers = num_layers_to_build(config, vp_stage)
    offload = ActivationOffload(offload_fraction, num_layers, layer_offset(config, vp_stage) + 1) if offload_fraction else None
    layer = longctx_layer_spec(recompute=recompute, mlp_tile=mlp_tile, offload=offload, qk_layernorm=config.qk_layernorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def llama_block(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """`longctx_block_spec` as Megatron-LM 0.19 calls it: with its GPTModelConfig, whose `transformer` is the TransformerConfig."""
    return longctx_block_spec(getattr(config, "transformer", config), vp_stage)


llama = longctx_layer_spec()
"""The layer spec, ready: for Megatron-LM versions that take the attribute of `--spec` as it is."""
