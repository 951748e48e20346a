"""A tiny model in transformers (a Llama, or of another family) and the same weights under Megatron's names: the independent oracle of the model tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_longctx.families import ModelShape
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import LongContextGPTModel, build_gpt_model, init_process_groups
from mcore_longctx.model.initial_weights import global_name, tensor_parallel_shard
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling, write_hf_rope

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=264,  # padded to 384 at TP 1 and 512 at TP 2
)
SEQ_LENGTH = 64
PLAIN_ROPE = RopeScaling(type="none", head_dim=8, rope_theta=10_000.0)


def hf_llama(shape: ModelShape = SHAPE, rope: RopeScaling = PLAIN_ROPE, seed: int = 0) -> Any:
    """LlamaForCausalLM in float32 with weights large enough for gradients to matter."""
    return hf_model(replace(shape, family="llama"), rope, seed)


def hf_model(shape: ModelShape, rope: RopeScaling = PLAIN_ROPE, seed: int = 0) -> Any:
    """What transformers makes of these sizes, in float32. Biases are set to numbers that are not 0, norms of heads to other than 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    biases = {"attention_bias": shape.add_bias_linear, "mlp_bias": shape.add_bias_linear} if shape.family == "llama" else {}
    window = {"sliding_window": None} if shape.family == "mistral" else {}  # its default is a window of 4,096
    config = AutoConfig.for_model(
        shape.family,
        **biases,
        **window,
        **write_hf_rope(replace(rope, max_position_embeddings=rope.resolved_max_position_embeddings or 1024)),
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        rms_norm_eps=shape.layernorm_epsilon,
        tie_word_embeddings=shape.tie_word_embeddings,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
    return model


def megatron_names(tensors: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Tensors of transformers' names and shapes (weights or gradients) under Megatron's global names; padding is not added."""
    named = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    if not shape.tie_word_embeddings:
        named["output_layer.weight"] = tensors["lm_head.weight"]
    groups, width = shape.num_query_groups, shape.kv_channels
    for i in range(shape.num_layers):
        hf, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
        named |= {
            f"{ours}input_layernorm.weight": tensors[f"{hf}input_layernorm.weight"],
            f"{ours}pre_mlp_layernorm.weight": tensors[f"{hf}post_attention_layernorm.weight"],
        }
        for part in ("q", "k"):
            if f"{hf}self_attn.{part}_norm.weight" in tensors:
                named[f"{ours}self_attention.{part}_layernorm.weight"] = tensors[f"{hf}self_attn.{part}_norm.weight"]
        for kind in ("weight", "bias"):
            if f"{hf}self_attn.q_proj.{kind}" in tensors:
                q, k, v = (tensors[f"{hf}self_attn.{name}_proj.{kind}"].unflatten(0, (groups, -1, width)) for name in "qkv")
                named[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat((q, k, v), dim=1).flatten(0, 2)
            if f"{hf}self_attn.o_proj.{kind}" in tensors:
                named[f"{ours}self_attention.linear_proj.{kind}"] = tensors[f"{hf}self_attn.o_proj.{kind}"]
            if f"{hf}mlp.gate_proj.{kind}" in tensors:
                gate_up = [tensors[f"{hf}mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
                named[f"{ours}mlp.linear_fc1.{kind}"] = torch.cat(gate_up)
                named[f"{ours}mlp.linear_fc2.{kind}"] = tensors[f"{hf}mlp.down_proj.{kind}"]
    return named


def own_part(model: LongContextGPTModel, name: str, parameter: Tensor, whole: dict[str, Tensor]) -> Tensor:
    """What this rank should hold of the tensor that `name` stands for, padded with zeros where it is a vocabulary."""
    key = global_name(name, model.config)
    if key == "output_layer.weight" and key not in whole:
        key = "embedding.word_embeddings.weight"
    tensor = whole[key]
    if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = parameter.size(0) * model.config.tensor_model_parallel_size
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.size(0)))
    return tensor_parallel_shard(key, tensor, parameter, model.pg_collection.tp)


def fill(model: LongContextGPTModel, whole: dict[str, Tensor]) -> None:
    """Give the model this rank's part of the whole weights."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(own_part(model, name, parameter, whole))


@dataclass(frozen=True)
class Batch:
    """Whole samples: tokens and labels [n, s], mask [n, s]."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor

    def on_rank(self, cp_size: int, cp_rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Zigzag slice: tokens, positions, labels, mask, each [n, s/c]."""
        positions = torch.from_numpy(zigzag_positions(self.tokens.size(1), cp_size, cp_rank))
        parts = [tensor[:, positions].contiguous() for tensor in (self.tokens, self.labels, self.mask)]
        return parts[0], positions.expand(self.tokens.size(0), -1), parts[1], parts[2]


def build(
    parallel: Parallel, weights: dict[str, Tensor] | None = None, *, new_groups: bool = True, **options: Any
) -> LongContextGPTModel:
    """Process groups, model and weights of one layout. Groups cost half a second: keep them where the layout stays."""
    if new_groups:
        init_process_groups(parallel, seed=1)
    settings = {"shape": SHAPE, "rope": PLAIN_ROPE, "precision": "fp32", "seq_length": SEQ_LENGTH} | options
    with device_context():
        model = build_gpt_model(parallel=parallel, **settings)
        if weights is not None:
            fill(model, weights)
    return model


def save_torch_dist(model: LongContextGPTModel, folder: Path) -> None:
    """Save the model's weights with megatron-core's own writer."""
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    with device_context():
        state = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False}), "iteration": 7}
        dist_checkpointing.save(state, str(folder))
    assert (folder / "metadata.json").is_file(), json.dumps([path.name for path in folder.iterdir()])
