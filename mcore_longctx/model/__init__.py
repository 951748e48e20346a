"""What plugs into Megatron-Core: layer spec, core attention, rotary embedding, model builder, process groups, weights."""

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # must come before any module of megatron
from mcore_longctx.model.attention import LongContextAttention
from mcore_longctx.model.builder import LongContextGPTModel, build_gpt_model, transformer_config
from mcore_longctx.model.loss_head import chunked_loss_head
from mcore_longctx.model.process_groups import destroy_process_groups, init_process_groups
from mcore_longctx.model.rotary import LongContextRotary
from mcore_longctx.model.spec import longctx_block_spec, longctx_layer_spec

__all__ = [
    "LongContextAttention",
    "LongContextGPTModel",
    "LongContextRotary",
    "build_gpt_model",
    "chunked_loss_head",
    "destroy_process_groups",
    "init_process_groups",
    "longctx_block_spec",
    "longctx_layer_spec",
    "transformer_config",
]
