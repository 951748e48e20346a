"""Bytes that our own layers take on one rank for one micro-batch, counted tensor by tensor.

Symbols: t tokens of a rank (s b / CP), h hidden size, q and g query and key/value heads, d head dimension, f feed-forward size, v rows of
the vocabulary, e bytes of an element, T tensor-parallel size (with sequence parallelism), C context-parallel size, c tokens of a chunk.

Each formula adds up the tensors that live at one moment of a step; where several moments can be the largest, all are there and the largest
counts. `tests/plan/test_own_stack.py` runs the real model and holds every one of them to the bytes that live there. What a CPU cannot
show, and where it stands in for a GPU:

- RMSNorm keeps its input and one float32 number of a row, as torch's CUDA operator does. On a CPU torch takes it apart into operators that
  keep float32 copies: the tests put one operator in its place.
- The scratch of an attention kernel's backward (`_SCRATCH`) is read in the sources of the kernels.
- Memory that torch's allocator loses, and that of cuBLAS and NCCL: terms of their own in `memory`.

Not in here: gradients of one weight at a time in e bytes (50 MB for an 8B model without TP), and documents that do not see each other, which
need less of the exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

from mcore_longctx.layout.heads import key_head_replicas
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["exchange_bytes", "kept_bytes", "loss_head_bytes", "offloaded_bytes", "position_bytes", "working_set_bytes"]

_FLOAT = 4
_LAYERS_IN_FLIGHT = 2  # of model/offload.py: on their way to the host, and on their way back
_LOGIT_BYTES = 256 * 2**20  # LOGIT_BYTES of parallel/chunked_loss.py: float32 logits of one chunk
_BATCH_BYTES = 3 * 8 + 4  # of a token: ids, labels and positions in int64, its loss weight in float32
_MASK_BYTES = 8 + 1  # Megatron's embedding keeps a token's row in this rank's shard, and whether it has one


def kept_bytes(setup: Setup) -> Term:
    """What the layers of a stage keep on the device from the forward to the backward pass.

    An offloaded layer counts as long as its copy is under way: two of them are.
    """
    layers, away = _layers(setup)
    here = layers - away + min(away, _LAYERS_IN_FLIGHT)
    note = f"{away} of {layers} layers offloaded, {min(away, _LAYERS_IN_FLIGHT)} of them in flight" if away else ""
    return _kept(setup).term("kept activations", here, "layers", note)


def offloaded_bytes(setup: Setup) -> Term:
    """What they keep in host memory instead."""
    _, away = _layers(setup)
    return _kept(setup).term("offloaded activations", away, "offloaded layers")


def _once_a_layer(formula: Callable[[Setup], Term]) -> Callable[[Setup], Term]:
    """Remember a term: a search asks for the same layer under many PP, DP and shares on the host."""
    known: dict[tuple[object, ...], Term] = {}

    @wraps(formula)
    def remembered(setup: Setup) -> Term:
        p = setup.parallel
        key = (
            *(setup.shape, setup.seq_length, setup.micro_batch_size, setup.bytes_per_element, setup.recompute, setup.mlp_tile),
            *(p.tensor_model_parallel_size, p.context_parallel_size, p.cp_comm_type, p.hierarchical_context_parallel_sizes),
            setup.kernel or setup.gpu.default_kernel,
        )
        if key not in known:
            known[key] = formula(setup)
        return known[key]

    return remembered


@_once_a_layer
def working_set_bytes(setup: Setup) -> Term:
    """The largest moment while one layer is run again and differentiated, beside what all layers keep. Without the exchange."""
    return max((moment.term("working set") for moment in _moments(setup)), key=lambda term: term.value)


@_once_a_layer
def exchange_bytes(setup: Setup) -> Term:
    """What context parallelism adds to the working set: 0 where the largest moment has no exchange."""
    if setup.parallel.context_parallel_size == 1:
        return Term("key/value exchange", 0.0, "0", "0", "one context-parallel rank")
    alone = working_set_bytes(setup).value
    moments = [(kind, moment) for kind in sorted(set(setup.parallel.cp_comm_types)) for moment in _exchange_moments(setup, kind)]
    kind, largest = max(moments, key=lambda pair: pair[1].bytes)
    formula = f"max(0, t ({largest.formula}) - working set)"
    note = f"{kind}, while {largest.name}"
    return Term("key/value exchange", max(0.0, largest.bytes - alone), formula, f"{largest.bytes:.4g} - {alone:.4g}", note)


def loss_head_bytes(setup: Setup) -> Term:
    """The largest moment of the loss, which is over before the first layer is run again.

    A chunk of logits (float32, and their gradient in e bytes), the float32 gradient of the head, and three tensors of hidden states: what the
    last layer gave, its norm, and their gradient.
    """
    shape, e, tp = setup.shape, setup.bytes_per_element, setup.parallel.tensor_model_parallel_size
    h, columns = shape.hidden_size, shape.padded_vocab_size(tp) // tp
    chunk = min(loss_chunk(setup), _tokens(setup))
    logits = columns * (_FLOAT + (e if e < _FLOAT else 0))  # float32 models: the gradient takes the place of the logits
    gathered = 6 * e * h if tp > 1 else 0  # rows of this chunk and the next, summands of this one and the last
    per_token = 3 * e * h / tp + _FLOAT / tp + _FLOAT + (e * h if tp > 1 else 0)
    angles = (
        _FLOAT * shape.kv_channels * setup.tokens_per_rank if setup.recompute == "none" else 0
    )  # else they are there all the time
    value = per_token * _tokens(setup) + chunk * (logits + gathered) + _FLOAT * columns * h + angles
    low = " + e" if e < _FLOAT else ""
    formula = f"t (3 e h/T + 4/T + 4{' + e h' if tp > 1 else ''}) + c ((4{low}) v/T{' + 6 e h' if tp > 1 else ''}) + 4 v h/T"
    formula += " + 4 d s/CP" if angles else ""
    numbers = f"{_tokens(setup):,} x {per_token:,.0f} + {chunk:,} x {logits + gathered:,} + 4 x {columns:,} x {h:,}"
    numbers += f" + {angles:,}" if angles else ""
    return Term("loss head", value, formula, numbers, "a chunk of logits, gradients of head and hidden states")


def loss_chunk(setup: Setup) -> int:
    """Tokens of logits at once: the stage's own, or as many as 256 MiB of float32 hold (`default_chunk` of parallel/chunked_loss.py)."""
    tp = setup.parallel.tensor_model_parallel_size
    columns = setup.shape.padded_vocab_size(tp) // tp
    return setup.loss_chunk or max(1, _LOGIT_BYTES // (_FLOAT * columns) // 128) * 128


def position_bytes(setup: Setup) -> Term:
    """What is there all the time: the batch, and the float32 angles of its positions (only `none` lets them go after the forward pass)."""
    d, tokens = setup.shape.kv_channels, _tokens(setup)
    angles = 0 if setup.recompute == "none" else _FLOAT * d * setup.tokens_per_rank
    batch = _BATCH_BYTES + (_MASK_BYTES if setup.parallel.tensor_model_parallel_size > 1 else 0)
    formula = f"{batch} t" + (" + 4 d s/CP" if angles else "")
    numbers = f"{batch} x {tokens:,}" + (f" + 4 x {d} x {setup.tokens_per_rank:,}" if angles else "")
    return Term("positions and batch", batch * tokens + angles, formula, numbers, "ids, labels, positions, weights, angles")


# ---------------------------------------------------------------------------------------------------------------- moments


@dataclass(frozen=True)
class _Moment:
    """Bytes of one token of this rank, part by part as (formula, bytes), and bytes that do not grow with tokens."""

    name: str
    tokens: int
    parts: tuple[tuple[str, float], ...]
    fixed: tuple[str, float] = ("", 0.0)

    @property
    def bytes(self) -> float:
        return self.tokens * sum(value for _, value in self.parts) + self.fixed[1]

    @property
    def formula(self) -> str:
        return " + ".join(text for text, value in self.parts if value)

    def term(self, name: str, times: int = 1, times_of: str = "", note: str = "") -> Term:
        """The moment as a term, for `times` layers."""
        each, (fixed_formula, fixed) = sum(value for _, value in self.parts), self.fixed
        formula, numbers = f"t ({self.formula})", f"{self.tokens:,} x {each:,.0f}"
        if fixed:
            formula, numbers = f"{formula} + {fixed_formula}", f"{numbers} + {fixed:.4g}"
        if times_of:
            formula, numbers = f"{times_of} x {formula}", f"{times} x {numbers}"
        return Term(name, times * self.bytes, formula, numbers, note or self.name)


class _Sizes:
    """The symbols of a setup, and parts of a moment made of them."""

    def __init__(self, setup: Setup) -> None:
        shape = setup.shape
        self.e, self.tp = setup.bytes_per_element, setup.parallel.tensor_model_parallel_size
        d = shape.kv_channels
        self.of = {
            "h": shape.hidden_size,
            "q d": shape.num_attention_heads * d,
            "g d": shape.num_query_groups * d,
            "q": shape.num_attention_heads,
            "g": shape.num_query_groups,
            "d": d,
            "f": shape.ffn_hidden_size,
            "1": 1,
        }

    def split(self, **counts: float) -> tuple[str, float]:
        """Elements of e bytes that tensor parallelism divides; `qd` is q d."""
        return self._part("e", self.e, counts, divided=True)

    def floats(self, **counts: float) -> tuple[str, float]:
        """The same in float32."""
        return self._part("4", _FLOAT, counts, divided=True)

    def whole(self, **counts: float) -> tuple[str, float]:
        """Elements of e bytes that every rank has of each of its tokens."""
        return self._part("e", self.e, counts, divided=False)

    def _part(self, size: str, width: int, counts: dict[str, float], *, divided: bool) -> tuple[str, float]:
        names = {"qd": "q d", "gd": "g d", "one": "1"}
        terms = [(names.get(key, key), count) for key, count in counts.items() if count]
        total = width * sum(count * self.of[name] for name, count in terms) / (self.tp if divided else 1)
        text = " + ".join(f"{count:g} {name}" if name != "1" else f"{count:g}" for name, count in terms).replace("+ -", "- ")
        text = f"({text})" if len(terms) > 1 else text
        return f"{size} {text}{'/T' if divided and self.tp > 1 else ''}", total


def _kept(setup: Setup) -> _Moment:
    """One layer.

    full            layer input
    attention_kept  and output and log-sum-exp of the attention
    none            input, two norms with their statistics, residual; q, k, v as one tensor, q and k after the rope, its cosines and sines;
                    output, log-sum-exp; the MLP's gate and up, up again, silu(gate) and their product: 5 f, and none of it with a tile
    """
    of = _Sizes(setup)
    if setup.recompute == "full":
        parts = [of.split(h=1)]
    elif setup.recompute == "attention_kept":
        parts = [of.split(h=1, qd=1), of.floats(q=1)]
    else:
        parts = [of.split(h=4, qd=3, gd=3, f=0 if setup.mlp_tile else 5), of.whole(d=4), of.floats(q=1, one=2)]
        parts += _head_norms(setup, of)
    return _Moment(f"recompute {setup.recompute}", _tokens(setup), tuple(parts))


def _head_norms(setup: Setup, of: _Sizes) -> list[tuple[str, float]]:
    """Norms of query and key heads keep a copy of the queries, which lie apart in q, k, v, and their statistics."""
    return [of.split(qd=1), of.floats(q=1, g=1)] if setup.shape.qk_layernorm else []


def _moments(setup: Setup) -> list[_Moment]:
    """In the backward pass of a layer, beside what is kept: those that can be the largest."""
    of, attention, (of_mlp, tile) = _Sizes(setup), _attention(setup), _mlp(setup)
    gathered = [of.whole(h=1)] if of.tp > 1 else []  # Megatron's buffer for gathered inputs, there once and for all
    again = [] if setup.recompute == "none" else [of.whole(d=4), *_attention_again(setup, of), *_head_norms(setup, of)]
    tokens, scratch = _tokens(setup), _scratch(setup, of)
    moments = [
        _Moment("the attention is differentiated", tokens, (*attention, of.split(qd=1, gd=2), *gathered, *again, *scratch))
    ]
    if of.tp > 1:
        # the gradient of the output projection's result is gathered
        projected = of.split(h=-1, qd=1) if setup.recompute == "none" else of.split(h=4, qd=3, gd=3)
        parts = (projected, of.whole(h=1), *gathered, *again, *([] if setup.recompute == "none" else [of.floats(one=1)]))
        moments.append(_Moment("the output projection is differentiated", tokens, parts))
        if setup.recompute != "none":
            # and the gradient of q, k, v's input, before it is scattered
            parts = (of.split(h=5, qd=1, gd=2), of.whole(h=1), *gathered, of.floats(one=1))
            moments.append(_Moment("q, k and v are differentiated", tokens, parts))
    moments.append(_Moment("the MLP is differentiated", tokens, (*of_mlp, *gathered, *again), tile))
    return moments


def _attention(setup: Setup) -> list[tuple[str, float]]:
    """At the attention's backward, before it has given anything: without its gradients.

    Run again: norm, the layer's result, its gradient and that of the residual (4 h); q, k, v, and q and k after the rope; gradient of the
    output. Under `none` these are kept, and what comes after the attention is gone already.
    """
    of = _Sizes(setup)
    if setup.recompute == "none":
        return [of.split(h=-1, qd=1), of.floats(one=-1)]
    return [of.split(h=4, qd=3, gd=3), of.floats(one=1)]


def _attention_again(setup: Setup, of: _Sizes) -> list[tuple[str, float]]:
    """Output and log-sum-exp, where they are not kept."""
    return [of.split(qd=1), of.floats(q=1)] if setup.recompute == "full" else []


def _mlp(setup: Setup) -> tuple[list[tuple[str, float]], tuple[str, float]]:
    """At the MLP's backward: parts, and the buffers of a tile (gate and up, their gradients, the gradient of the product)."""
    of, tokens = _Sizes(setup), _tokens(setup)
    if setup.recompute == "none" and setup.mlp_tile is None:  # Megatron's MLP: gradients of silu's input and up, less the product
        return [of.split(h=1, f=2)], ("", 0.0)
    base = [of.split(h=2)] if setup.recompute == "none" else [of.split(h=6, qd=2, gd=3), of.floats(one=2)]
    tile = tokens if setup.mlp_tile is None else min(setup.mlp_tile, tokens)
    rows = (
        6 if of.tp > 1 and tile < tokens else 3 if of.tp > 1 else 0
    )  # gathered: x and gradient of this tile and the next, two summands
    each = of.e * (5 * of.of["f"] / of.tp + rows * of.of["h"])
    text = f"tile e (5 f{'/T' if of.tp > 1 else ''}{f' + {rows} h' if rows else ''})"
    return base, (text, tile * each)


def _scratch(setup: Setup, of: _Sizes) -> list[tuple[str, float]]:
    """Memory of the attention kernel's own backward.

    A float32 sum of the queries' gradient and the row sums of output x gradient. Grouped queries: flash attention 2 writes a key gradient of
    each query head, flash attention 3 and 4 sum those of a group in float32. Sources: csrc/flash_attn/flash_api.cpp (`dq_accum`,
    `softmax_d`, `dk_expanded`) and hopper/flash_api.cpp (`dq_accum`, `softmax_lse_log2`, `dk_accum`) of Dao-AILab/flash-attention.
    cuDNN does not publish its workspace: the first two are taken. None on CPUs.
    """
    kernel = setup.kernel or setup.gpu.default_kernel
    grouped = setup.shape.num_query_groups < setup.shape.num_attention_heads
    if kernel.startswith("cpu"):
        return []
    if kernel.startswith("fa2"):
        return [of.floats(qd=1, q=1), *([of.split(qd=2)] if grouped else [])]
    if kernel.startswith(("fa3", "fa4")):
        return [of.floats(qd=1, q=2, gd=2 if grouped else 0)]
    return [of.floats(qd=1, q=1)]


def _exchange_moments(setup: Setup, kind: str) -> list[_Moment]:
    """In the backward pass of the attention with an exchange: everything that is there, working set included."""
    of, ranks, tokens = _Sizes(setup), setup.parallel.context_parallel_size, _tokens(setup)
    base = [*_attention(setup), *([of.whole(h=1)] if of.tp > 1 else [])]
    if setup.recompute != "none":
        base += [of.whole(d=4), *_attention_again(setup, of), *_head_norms(setup, of)]
    scratch = _scratch(setup, of)
    if kind == "p2p":
        return [_Moment("keys and values go round the ring", tokens, (*base, *_ring(of, ranks, 1), *scratch))]
    if kind == "all_gather":
        return [
            _Moment("the last rows see all keys", tokens, (*base, *_all_keys(of, ranks), *scratch, ("8 C", 8.0 * ranks))),
            _Moment("key gradients are scattered", tokens, (*base, *_scattered(of, ranks), ("8 C", 8.0 * ranks))),
        ]
    sizes = setup.parallel.hierarchical_context_parallel_sizes
    inner = ranks if kind == "a2a" or sizes is None else sizes[0]
    shape = setup.shape
    copies = key_head_replicas(shape.num_attention_heads // of.tp, shape.num_query_groups // of.tp, inner)
    base += [("8 C" if inner == ranks else "8 a", 8.0 * inner)]  # the order of the joined rows
    if copies > 1:
        base.append(of.split(gd=2 * copies))
    joined = of.split(qd=3, gd=2 * copies)  # gradient of the output, q, k, v, output: all rows, some heads
    sent = of.split(qd=9, gd=6 * copies)  # sent, received and put in order
    back = of.split(qd=4, gd=8 * copies)  # gradients of q, k, v: computed, sent, received, cut into three
    ring = _ring(of, ranks // inner, copies) if inner < ranks else [of.split(qd=1, gd=2 * copies)]
    return [
        _Moment("rows become heads", tokens, (*base, sent)),
        _Moment("the attention of some heads is differentiated", tokens, (*base, joined, *ring, *scratch)),
        _Moment("heads become rows", tokens, (*base, joined, back)),
    ]


def _ring(of: _Sizes, ranks: int, copies: int) -> list[tuple[str, float]]:
    """Sums of the queries' gradient; the travelling sums of key and value gradients, twice; keys and values on their way.

    And the results of the first step, which are still there while the second step makes its own: dq, dk and dv of all rows, then those of
    all queries and half of the keys, or of half of the queries and all keys, as the rank has it.
    """
    late = of.split(qd=1, gd=copies), of.split(qd=0.5, gd=2 * copies)
    return [
        of.floats(qd=1, gd=4 * copies),
        of.split(gd=2 * copies * min(ranks - 1, 2)),
        of.split(qd=1, gd=2 * copies),
        max(late, key=lambda part: part[1]),
    ]


def _all_keys(of: _Sizes, ranks: int) -> list[tuple[str, float]]:
    """Gradients of this rank; gathered keys and values; float32 sums of all their gradients, and of half of the queries'.

    And the results of two calls of the kernel: of the last chunk on all keys before it, then on its own.
    """
    return [
        of.split(qd=1, gd=2),
        of.split(gd=2 * ranks),
        of.floats(gd=2 * ranks, qd=0.5),
        of.split(qd=0.5, gd=2 * ranks - 1),
        of.split(qd=0.5, gd=1),
    ]


def _scattered(of: _Sizes, ranks: int) -> list[tuple[str, float]]:
    """Gradients of this rank; float32 sums of all key and value gradients, those of keys in the order of ranks, and this rank's part."""
    return [of.split(qd=1, gd=2), of.floats(gd=3 * ranks + 1, qd=0.5), of.split(qd=0.5, gd=1)]


def _layers(setup: Setup) -> tuple[int, int]:
    """Layers of a stage, and how many of them are offloaded (whole ones, as `ActivationOffload` rounds)."""
    layers = setup.shape.num_layers // setup.parallel.pipeline_model_parallel_size
    return layers, round(setup.offload_fraction * layers)


def _tokens(setup: Setup) -> int:
    return setup.tokens_per_rank * setup.micro_batch_size
