"""Bytes that our own layers take on one rank for one micro-batch.

Symbols: t tokens of a rank (s / CP), h hidden size, q query heads, g key/value heads, d head dimension, f feed-forward size, v words,
e bytes of an element, T tensor-parallel size (with sequence parallelism), C context-parallel size, L layers of the pipeline stage.
"""

from __future__ import annotations

from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["exchange_bytes", "kept_bytes", "loss_head_bytes", "offloaded_bytes", "position_bytes", "working_set_bytes"]

_LSE = 4  # float32
_LAYERS_IN_FLIGHT = 2
_LOGIT_BYTES = 256 * 2**20


def kept_bytes(setup: Setup) -> Term:
    """What the layers of this stage keep for the backward pass of one micro-batch, on the device."""
    layers = setup.shape.num_layers // setup.parallel.pipeline_model_parallel_size
    away = round(setup.offload_fraction * layers)
    here = layers - away + min(away, _LAYERS_IN_FLIGHT)
    value = here * _kept_of_a_layer(setup)
    return Term("kept activations", value, "t kept L", f"{here} layers x {_kept_of_a_layer(setup):,.0f} B")


def offloaded_bytes(setup: Setup) -> Term:
    """What they keep in host memory instead."""
    layers = setup.shape.num_layers // setup.parallel.pipeline_model_parallel_size
    away = round(setup.offload_fraction * layers)
    return Term("offloaded", away * _kept_of_a_layer(setup), "t kept L", f"{away} layers")


def working_set_bytes(setup: Setup) -> Term:
    """One layer run again and differentiated."""
    shape, tp = setup.shape, setup.parallel.tensor_model_parallel_size
    h, width, groups = shape.hidden_size, shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    own = width + shape.num_attention_heads if setup.recompute == "full" else 0
    split = max(10 * h + 2 * width + 3 * groups, 5 * h + 4 * width + 5 * groups) + own
    tile = _tokens(setup) if setup.mlp_tile is None else min(setup.mlp_tile, _tokens(setup))
    whole = 2 * h if tp > 1 else 0
    value = setup.bytes_per_element * (_tokens(setup) * (split / tp + whole) + 5 * tile * shape.ffn_hidden_size / tp)
    return Term("working set", value, "e t (10 h + 2 q d + 3 g d)", "")


def loss_head_bytes(setup: Setup) -> Term:
    """Chunk of logits, gradients of the hidden states and of the head."""
    shape, tp = setup.shape, setup.parallel.tensor_model_parallel_size
    columns = shape.padded_vocab_size(tp) // tp
    chunk = min(setup.loss_chunk or max(1, _LOGIT_BYTES // (4 * columns) // 128) * 128, _tokens(setup))
    value = chunk * columns * 6 + 4 * columns * shape.hidden_size + setup.bytes_per_element * shape.hidden_size * _tokens(setup) / tp
    return Term("loss head", value, "6 c v / T + 4 v h / T + e t h / T", "")


def exchange_bytes(setup: Setup) -> Term:
    """What context parallelism adds to the working set."""
    shape, p = setup.shape, setup.parallel
    kv = 2 * shape.num_query_groups // p.tensor_model_parallel_size * shape.kv_channels
    if p.context_parallel_size == 1:
        return Term("key/value exchange", 0.0, "0", "0", "one context-parallel rank")
    per_token = {"p2p": 2 * setup.bytes_per_element + 8, "all_gather": p.context_parallel_size * (setup.bytes_per_element + 4)}
    value = max(_tokens(setup) * kv * per_token.get(kind, 2 * setup.bytes_per_element + 8) for kind in p.cp_comm_types)
    return Term("key/value exchange", value, "", "")


def position_bytes(setup: Setup) -> Term:
    """Angles of the tokens, and token ids, labels, positions, loss weights."""
    value = setup.tokens_per_rank * setup.micro_batch_size * (4 * setup.shape.kv_channels + 28)
    return Term("positions and batch", value, "t (4 d + 28)", "")


def _tokens(setup: Setup) -> int:
    return setup.tokens_per_rank * setup.micro_batch_size


def _kept_of_a_layer(setup: Setup) -> float:
    shape, e = setup.shape, setup.bytes_per_element
    h, width = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    groups, lse = shape.num_query_groups * shape.kv_channels, _LSE * shape.num_attention_heads
    bytes_ = {
        "full": h * e,
        "attention_kept": (h + width) * e + lse,
        "none": (4 * h + 3 * width + 3 * groups + (0 if setup.mlp_tile else 3 * shape.ffn_hidden_size)) * e + lse,
    }[setup.recompute if setup.recompute != "selective" else "none"]
    return _tokens(setup) * bytes_ / setup.parallel.tensor_model_parallel_size
