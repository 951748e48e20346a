"""A Megatron model of one's own with the long-context parts: attention, recompute, rotary embedding, loss head.

Check it on the CPU:  mcore-longctx parity examples/own_model_spec.py:build_model
"""

from mcore_longctx.model import LongContextRotary, chunked_loss_head, longctx_layer_spec  # isort: skip  # imports Megatron quietly
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mcore_longctx.model.norm import RMSNorm
from mcore_longctx.rope import RopeScaling

ROPE = RopeScaling(type="yarn", head_dim=8, rope_theta=10_000.0, factor=4, original_max_position_embeddings=32)


class MyGPT(GPTModel):
    """Megatron's model with long-context angles and a loss that never makes logits."""

    def __init__(self, config, spec):
        super().__init__(config, spec, vocab_size=256, max_sequence_length=128, position_embedding_type="rope")
        self.rotary_pos_emb = LongContextRotary(ROPE, self.pg_collection.cp, phase_dtype="float64")

    def _postprocess(self, hidden_states, *args, labels=None, **kwargs):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        return chunked_loss_head(self.output_layer, hidden_states, labels)  # per-token losses [b, s/c], without logits


def build_model(config):
    """The model of a TransformerConfig."""
    layer = longctx_layer_spec(recompute="attention_kept", mlp_tile=32)  # change it at will: it is Megatron's layer spec
    return MyGPT(config, TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=RMSNorm))
