"""Bytes that the layers of published stacks take: Megatron's own recompute and losses, Hugging Face layers under ZeRO-3 or FSDP.

A layer is counted tensor by tensor: what its second forward saves, and the gradients that are alive at the worst point of its backward,
which is that of the attention or that of the MLP. Three kinds of layer:

    fused     Megatron with TransformerEngine; DeepSpeed with Liger's kernels. Norms save their bf16 output, SwiGLU works in place
    eager     Hugging Face's layer as it stands: each norm saves a float32 copy, SwiGLU four products of [t, f]

Symbols as in `step_time`. All per rank and micro-batch, activations in bf16.
"""

from __future__ import annotations

from mcore_longctx.plan.calibration import CALIBRATION, Calibration
from mcore_longctx.plan.models import parameters_per_layer
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = [
    "elementwise_bytes",
    "gathered_bytes",
    "is_deepspeed",
    "is_own",
    "kept_bytes",
    "layer_bytes",
    "loss_head_bytes",
    "offloaded_bytes",
]

_CHUNK = 1024  # tokens of logits at once, where a chunked loss does not say
_LOGIT_BYTES = {"unfused": 6.0, "native": 10.0, "chunked": 10.0}
_REDUCE_BUCKETS = 2 * 5e8 * 2  # DeepSpeed's reduce_bucket_size, bf16, twice for overlap_comm: its defaults


def is_own(setup: Setup) -> bool:
    """Whether our own layers and loss run."""
    return setup.sharding == "distributed_optimizer" and setup.loss == "chunked" and setup.recompute != "selective"


def is_deepspeed(setup: Setup) -> bool:
    """ZeRO-3 with Ulysses or without context parallelism and with host memory: DeepSpeed. The other ZeRO-3 is torch's FSDP."""
    p = setup.parallel
    ulysses = p.context_parallel_size > 1 and set(p.cp_comm_types) == {"a2a"}
    alone = p.context_parallel_size == 1 and (setup.optimizer == "adam_cpu" or setup.parameters_on_host)
    return setup.sharding == "zero3" and (ulysses or alone)


def _is_eager(setup: Setup) -> bool:
    """Hugging Face's own layers; with DeepSpeed a chunked loss is Liger's, and its kernels come with it."""
    return setup.sharding == "zero3" and not (is_deepspeed(setup) and setup.loss == "chunked") and setup.gemm == "bf16"


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


def layer_bytes(setup: Setup) -> tuple[Term, Term]:
    """One layer run again and differentiated, at the worse of two points of its backward, and what its context parallelism adds there."""
    shape = setup.shape
    h, f, qd = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads * shape.kv_channels
    kvd = _kv_heads(setup) * shape.kv_channels
    eager = _is_eager(setup)
    norm = 8 * h if eager else 2 * h  # float32 copy, its bf16 form and the output, or the output alone
    saved = norm + 4 * qd + 4 * kvd  # norm, q, k, v, o
    if shape.qk_layernorm:
        saved += 6 * (qd + shape.num_query_groups * shape.kv_channels)  # float32 and bf16
    # of the residual stream, o, q, k, v, and the float32 sum of dq that every kernel makes
    attention = 2 * h + 2 * qd + 2 * qd + 4 * kvd + 4 * qd + _grouped_bytes(setup)
    mlp_saved = norm + 2 * h + (8 * f if eager else 6 * f)
    mlp = 2 * h + (4 * f if eager else 2 * f)
    if setup.recompute == "none":  # what a layer has saved is kept
        saved, mlp_saved = 0, 0
    points = {"attention": saved + attention, "MLP": saved + mlp_saved + mlp}
    if setup.mlp_tile is not None:
        points["MLP"] = saved + norm + 2 * h + 4 * h  # its input and both gradients of [t, h]
    exchange = _exchange(setup)
    worst = "MLP" if points["MLP"] * _tokens(setup) > points["attention"] * _tokens(setup) + exchange.value else "attention"
    layer = Term(
        "working set",
        points[worst] * _tokens(setup),
        "w t/TP",
        f"{points[worst]:,} x {_tokens(setup):,.0f}",
        f"one {'eager' if eager else 'fused'} layer in the backward of its {worst}",
    )
    if worst == "MLP":
        exchange = Term(exchange.name, 0.0, "0", exchange.numbers, "not at the peak, which is in the backward of the MLP")
    return layer, exchange


def elementwise_bytes(setup: Setup) -> int:
    """Bytes that the forward of a layer reads and writes for one token outside of its matrix products and its attention, before TP.

    Fused kernels read and write each tensor once: two norms (8 h), two residual sums (12 h), the rotary embedding, SwiGLU. Eager layers
    do so operation by operation: 36 h for a norm in float32, 18 for an element that is rotated, 10 f for SwiGLU. FP8 casts the input of
    each product and its transpose.
    """
    shape = setup.shape
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    rotated = (shape.num_attention_heads + shape.num_query_groups) * d
    casts = 4 * (2 * h + shape.num_attention_heads * d + f) if setup.gemm == "fp8" else 0
    if _is_eager(setup):
        return 84 * h + 18 * rotated + 10 * f + casts + (36 * rotated if shape.qk_layernorm else 0)
    return 20 * h + 4 * rotated + 6 * f + casts + (4 * rotated if shape.qk_layernorm else 0)


def loss_head_bytes(setup: Setup, calibration: Calibration = CALIBRATION) -> Term:
    """Materialised logits, or a chunk of them with the float32 gradient of the head."""
    shape, tp = setup.shape, setup.parallel.tensor_model_parallel_size
    tokens = _tokens(setup) * tp
    words = shape.vocab_size / tp
    if setup.loss == "chunked":
        chunk = min(setup.loss_chunk or _CHUNK, tokens)
        value = _LOGIT_BYTES["chunked"] * words * chunk + 4 * words * shape.hidden_size
        return Term(
            "loss head", value, "10 c V/TP + 4 V h/TP", f"10 x {chunk:g} x {words:g} + 4 x {words:g} x {shape.hidden_size}"
        )
    each = calibration.hf_logit_bytes if setup.loss == "hf" else _LOGIT_BYTES[setup.loss]
    return Term("loss head", each * words * tokens, f"{each:g} t V/TP", f"{each:g} x {tokens:g} x {words:g}")


def _exchange(setup: Setup) -> Term:
    """Buffers beyond the tensors of the layer."""
    shape, p = setup.shape, setup.parallel
    if p.context_parallel_size == 1:
        return Term("key/value exchange", 0.0, "0", "0", "one context-parallel rank")
    tp, t, s = (
        p.tensor_model_parallel_size,
        setup.tokens_per_rank * setup.micro_batch_size,
        setup.seq_length * setup.micro_batch_size,
    )
    kvd = max(1.0, shape.num_query_groups / tp) * shape.kv_channels
    qd = shape.num_attention_heads / tp * shape.kv_channels
    if setup.sharding == "zero3":  # torch: sums of dq, dk, dv and the travelling dk, dv in float32, twice; k and v twice
        ring, formula = (8 * kvd + 4 * qd + 2 * 8 * kvd + 2 * 4 * kvd) * t, "(32 kv + 4 q) d t/TP"
    else:
        ring, formula = 16 * kvd * t, "16 kv/TP d t"
    if (
        setup.sharding == "zero3"
    ):  # torchtitan: k and v repeated to the query heads and gathered, dk and dv of all tokens in float32
        gathered = 4 * qd * s + 8 * qd * s + 4 * qd * t
    else:
        gathered = 8 * kvd * s
    sizes = {"p2p": ring, "all_gather": gathered, "a2a": 0.0, "a2a+p2p": ring}
    kind = max(p.cp_comm_types, key=sizes.__getitem__)
    texts = {"p2p": formula, "all_gather": "k, v, dk, dv of all s", "a2a": "0", "a2a+p2p": formula}
    return Term(
        "key/value exchange",
        sizes[kind],
        texts[kind],
        f"{kind}, {t:,} tokens",
        "in the working set already" if kind == "a2a" else "",
    )


def gathered_bytes(setup: Setup) -> tuple[Term, Term]:
    """Weights and gradients that ZeRO-3 has whole for a while."""
    shape, tp = setup.shape, setup.parallel.tensor_model_parallel_size
    layer, words = parameters_per_layer(shape) / tp, shape.vocab_size * shape.hidden_size / tp
    weights = Term(
        "gathered weights", 4 * max(layer, words), "2 x 2 max(P_layer, V h)/TP", f"4 x {max(layer, words):.4g}", "one prefetched"
    )
    if is_deepspeed(setup):
        return weights, Term(
            "gradient buckets", _REDUCE_BUCKETS, "2 x 5e8 x 2", "2 x 5e8 x 2", "reduce_bucket_size and overlap_comm"
        )
    return weights, Term(
        "undivided gradients", 6 * layer, "(2 + 4) P_layer/TP", f"6 x {layer:.4g}", "of a layer, bf16 and float32"
    )


def _tokens(setup: Setup) -> float:
    """Of a rank, as sequence parallelism divides them."""
    return setup.tokens_per_rank * setup.micro_batch_size / setup.parallel.tensor_model_parallel_size


def _kv_heads(setup: Setup) -> int:
    """Key/value heads, replicated where an all-to-all has more ranks than there are heads."""
    p, groups = setup.parallel, setup.shape.num_query_groups
    return max(groups, p.attention_neighbours) if p.context_parallel_size > 1 else groups


def _grouped_bytes(setup: Setup) -> int:
    """What kernels need for dk and dv of grouped heads: FlashAttention 2 expands them to the query heads, 3 sums them in float32."""
    shape, heads = setup.shape, _kv_heads(setup)
    if heads >= shape.num_attention_heads:
        return 0
    kernel = setup.kernel or setup.gpu.default_kernel
    return 4 * shape.num_attention_heads * shape.kv_channels if kernel == "fa2" else 8 * heads * shape.kv_channels


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
