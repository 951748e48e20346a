"""Bytes that the layers of published stacks take: Megatron's own recompute and losses, Hugging Face layers with ZeRO-3 or FSDP.

Symbols as in `own_stack`. All per rank and micro-batch, bf16.
"""

from __future__ import annotations

from mcore_longctx.plan.models import parameters_per_layer
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["exchange_bytes", "gathered_bytes", "is_own", "kept_bytes", "loss_head_bytes", "offloaded_bytes", "working_set_bytes"]

_CHUNK = 1024  # tokens of logits at once, where a chunked loss does not say
_LOGIT_BYTES = {"unfused": 6.0, "native": 10.0, "chunked": 10.0, "hf": 12.0}


def is_own(setup: Setup) -> bool:
    """Whether our own layers and loss run."""
    return setup.sharding == "distributed_optimizer" and setup.loss == "chunked" and setup.recompute != "selective"


def kept_bytes(setup: Setup) -> Term:
    """What the layers of a stage keep on the device for the backward pass of one micro-batch."""
    layers = setup.shape.num_layers / setup.parallel.pipeline_model_parallel_size
    away = setup.offload_fraction * layers
    here = layers - away + min(2.0, away)
    each = _kept(setup) * _tokens(setup)
    return Term("kept activations", here * each, "k t/TP L/PP", f"{here:g} layers x {each:.4g}")


def offloaded_bytes(setup: Setup) -> Term:
    """What they keep in host memory instead."""
    away = setup.offload_fraction * setup.shape.num_layers / setup.parallel.pipeline_model_parallel_size
    each = _kept(setup) * _tokens(setup)
    return Term("offloaded activations", away * each, "k t/TP L/PP", f"{away:g} layers x {each:.4g}")


def working_set_bytes(setup: Setup) -> Term:
    """One layer run again and differentiated."""
    shape = setup.shape
    h, d, q, kv, f = shape.hidden_size, shape.kv_channels, shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size
    attention = 4 * d * (2 * q + 2 * kv) + 4 * q * d
    if shape.qk_layernorm:
        attention += 6 * d * (q + kv)
    mlp = 8 * f + 4 * h if setup.mlp_tile is None else 0
    each = 12 * h + max(attention, mlp)
    return Term("working set", each * _tokens(setup), "(12 h + max(8 d (q + kv) + 4 q d, 8 f + 4 h)) t/TP", f"{each:,} x {_tokens(setup):,.0f}")


def loss_head_bytes(setup: Setup) -> Term:
    """Materialised logits, or a chunk of them with the float32 gradient of the head."""
    shape, tp = setup.shape, setup.parallel.tensor_model_parallel_size
    tokens = _tokens(setup) * tp
    words = shape.vocab_size / tp
    each = _LOGIT_BYTES[setup.loss]
    if setup.loss == "chunked":
        chunk = min(setup.loss_chunk or _CHUNK, tokens)
        value = each * words * chunk + 4 * words * shape.hidden_size
        return Term("loss head", value, "10 c V/TP + 4 V h/TP", f"{each:g} x {chunk:g} x {words:g} + 4 x {words:g} x {shape.hidden_size}")
    return Term("loss head", each * words * tokens, f"{each:g} t V/TP", f"{each:g} x {tokens:g} x {words:g}")


def exchange_bytes(setup: Setup) -> Term:
    """What context parallelism adds to the working set."""
    shape, p = setup.shape, setup.parallel
    if p.context_parallel_size == 1:
        return Term("key/value exchange", 0.0, "0", "0", "one context-parallel rank")
    kv = 4 * max(1.0, shape.num_query_groups / p.tensor_model_parallel_size) * shape.kv_channels
    t = setup.tokens_per_rank * setup.micro_batch_size
    sizes = {"p2p": 4 * kv * t, "all_gather": 2 * kv * t * p.context_parallel_size, "a2a": 0.0, "a2a+p2p": 4 * kv * t}
    kind = max(p.cp_comm_types, key=sizes.__getitem__)
    formula = {"p2p": "16 kv/TP d t", "all_gather": "8 kv/TP d s", "a2a": "0", "a2a+p2p": "16 kv/TP d t"}[kind]
    return Term("key/value exchange", sizes[kind], formula, f"{kind}: {kv:g} B of keys and values a token")


def gathered_bytes(setup: Setup) -> Term:
    """Weights that ZeRO-3 has gathered: the largest of a layer, the embedding and the head, twice (one prefetched)."""
    shape = setup.shape
    largest = max(parameters_per_layer(shape), shape.vocab_size * shape.hidden_size) / setup.parallel.tensor_model_parallel_size
    return Term("gathered weights", 4 * largest, "2 x 2 max(P_layer, V h)/TP", f"4 x {largest:.4g}")


def _tokens(setup: Setup) -> float:
    """Of a rank, as sequence parallelism divides them."""
    return setup.tokens_per_rank * setup.micro_batch_size / setup.parallel.tensor_model_parallel_size


def _kept(setup: Setup) -> float:
    """Bytes of a token and layer."""
    shape = setup.shape
    x, o, lse = 2 * shape.hidden_size, 2 * shape.num_attention_heads * shape.kv_channels, 4 * shape.num_attention_heads
    qkv = 2 * shape.kv_channels * (shape.num_attention_heads + 2 * shape.num_query_groups)
    return {
        "full": x,
        "attention_kept": x + o + lse,
        "selective": 3 * x + qkv + o + lse,
        "none": 4 * x + qkv + o + lse + 6 * shape.ffn_hidden_size,
    }[setup.recompute]
