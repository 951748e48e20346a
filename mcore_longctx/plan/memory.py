"""Memory of one GPU, and of the host, term by term. Symbols as in `step_time`.

What a layer and the loss need comes from formulas of our own stack, counted on our own layers (`own_stack`), or from those of published
stacks (`other_stacks`), which exist to hold the plan against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.plan import other_stacks, own_stack
from mcore_longctx.plan.calibration import CALIBRATION, Calibration
from mcore_longctx.plan.models import parameters, stage_parameters
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["Memory", "memory"]

_SAMPLE_BYTES = 28  # of a token in the data loader: ids, labels, positions in int64, loss weights in float32
_SAMPLES_WAITING = 4  # prefetched by the loader's workers, of a rank


@dataclass(frozen=True)
class Memory:
    """Bytes. `terms` are what is there, `total` the peak of the worst rank: the loss and a layer's backward are not there together."""

    terms: tuple[Term, ...]
    total: float
    host: tuple[Term, ...]  # bytes of a node
    host_total: float


def memory(setup: Setup, calibration: Calibration = CALIBRATION) -> Memory:
    """The peak of the worst rank and of its node.

    The worst rank of a pipeline is one of its first stage, which waits for the most micro-batches, or of its last one, which has the loss.
    On a rank the loss is over before a layer is run again, so the total is the sum of all terms less the smaller of these two.
    """
    pp = setup.parallel.pipeline_model_parallel_size
    stages = [_stage(setup, calibration, first=True, last=pp == 1)]
    if pp > 1:
        stages.append(_stage(setup, calibration, first=False, last=True))
    terms, total = max(stages, key=lambda stage: stage[1])
    host = _host_terms(setup)
    return Memory(terms, total, host, sum(term.value for term in host))


def _stage(setup: Setup, calibration: Calibration, *, first: bool, last: bool) -> tuple[tuple[Term, ...], float]:
    own = other_stacks.is_own(setup)
    stack = own_stack if own else other_stacks
    states = _sharded_states(setup, first, last) if setup.sharding == "zero3" else _states(setup, first, last)
    kept = _in_flight(setup, stack.kept_bytes(setup), first)
    layer = (own_stack.working_set_bytes(setup), own_stack.exchange_bytes(setup)) if own else other_stacks.layer_bytes(setup)
    if not last:
        loss = Term("loss head", 0.0, "0", "0", "on the last stage")
    else:
        loss = own_stack.loss_head_bytes(setup) if own else other_stacks.loss_head_bytes(setup, calibration)
    needed = sum(term.value for term in layer)
    rest = (*states, kept, own_stack.position_bytes(setup))
    allocated = sum(term.value for term in rest) + max(needed, loss.value)
    lost = Term(
        "fragmentation",
        calibration.fragmentation * allocated,
        "x of all that is allocated",
        f"{calibration.fragmentation} x {allocated:.3g}",
    )
    context = Term(
        "context and NCCL",
        calibration.context_bytes,
        "constant",
        f"{calibration.context_bytes:.3g}",
        "CUDA, cuBLAS, communicators",
    )
    if loss.value <= needed:
        loss = _with_note(loss, "not at the peak: it is over before a layer is run again")
    else:
        layer = (_with_note(layer[0], "not at the peak: the loss needs more"), _with_note(layer[1], "not at the peak"))
    return (*rest, *layer, loss, lost, context), allocated + lost.value + context.value


def _states(setup: Setup, first: bool, last: bool) -> tuple[Term, ...]:
    """Megatron's distributed optimizer: weights and gradients whole on each rank, the optimizer's state divided."""
    p = setup.parallel
    weights = stage_parameters(setup.shape, p.pipeline_model_parallel_size, first=first, last=last) / p.tensor_model_parallel_size
    shards = p.data_parallel_size * p.context_parallel_size
    e = setup.bytes_per_element
    state = {"adam": 12.0 if e < 4 else 8.0, "adam_bf16": 4.0, "adam_cpu": 0.0}[setup.optimizer]  # float32 weights are no copy
    return (
        Term("weights", e * weights, "e P/(TP PP)", f"{e} x {weights:.4g}"),
        Term("gradients", 4 * weights, "4 P/(TP PP)", f"4 x {weights:.4g}", "float32"),
        Term(
            "optimizer",
            state * weights / shards,
            f"{state:g} P/(TP PP n), n = DP CP",
            f"{state:g} x {weights:.4g} / {shards}",
            "float32 weights and two moments" if state == 12 else "",
        ),
    )


def _sharded_states(setup: Setup, first: bool, last: bool) -> tuple[Term, ...]:
    """ZeRO-3 and FSDP: everything divided over the ranks, layers gathered as they are needed.

    With a pipeline FSDP leaves a stage's weights gathered and its gradients undivided from one micro-batch to the next.
    """
    p = setup.parallel
    weights = stage_parameters(setup.shape, p.pipeline_model_parallel_size, first=first, last=last) / p.tensor_model_parallel_size
    shards = p.data_parallel_size * p.context_parallel_size
    each = {"adam": 16.0, "adam_bf16": 8.0, "adam_cpu": 4.0}[setup.optimizer]
    value = 0.0 if setup.parameters_on_host else each * weights / shards
    terms = [Term("states", value, f"{each:g} P/N", f"{each:g} x {weights:.4g} / {shards}")]
    if p.pipeline_model_parallel_size > 1:
        terms += [
            Term(
                "gathered weights",
                2 * weights,
                "2 P/(TP PP)",
                f"2 x {weights:.4g}",
                "of the stage, from one micro-batch to the next",
            ),
            Term("undivided gradients", 4 * weights, "4 P/(TP PP)", f"4 x {weights:.4g}", "float32, until the last micro-batch"),
        ]
    else:
        terms += other_stacks.gathered_bytes(setup)
    return tuple(terms)


def _in_flight(setup: Setup, kept: Term, first: bool) -> Term:
    """Micro-batches whose activations a stage keeps: PP on the first stage (fewer if the step has fewer), one on the last."""
    pp, chunks = setup.parallel.pipeline_model_parallel_size, setup.virtual_pipeline_chunks
    if pp == 1:
        return kept
    waiting = pp + (pp - 1) * (chunks - 1) / chunks if first else 1 + (pp - 1) * (chunks - 1) / chunks
    waiting = min(waiting, max(1.0, setup.global_batch_size / setup.parallel.data_parallel_size / setup.micro_batch_size))
    return Term(kept.name, kept.value * waiting, f"({kept.formula}) in flight", f"({kept.numbers}) x {waiting:g}", kept.note)


def _host_terms(setup: Setup) -> tuple[Term, ...]:
    """Of a node: the pool of offloaded activations never shrinks."""
    p, per_node = setup.parallel, setup.gpu.gpus_per_node
    ranks = min(p.world_size, per_node)
    nodes = max(1.0, p.world_size / per_node)
    terms = []
    if setup.offload_fraction:
        stack = own_stack if other_stacks.is_own(setup) else other_stacks
        away = stack.offloaded_bytes(setup)
        terms.append(
            Term(away.name, ranks * away.value, f"ranks of a node x {away.formula}", f"{ranks} x ({away.numbers})", "pinned")
        )
    count = parameters(setup.shape)
    if setup.optimizer == "adam_cpu":
        terms.append(
            Term(
                "optimizer",
                16 * count / nodes,
                "16 P / nodes",
                f"16 x {count:.4g} / {nodes:g}",
                "float32 weights, gradients, two moments",
            )
        )
    if setup.parameters_on_host:
        terms.append(Term("parameters", 2 * count / nodes, "2 P / nodes", f"2 x {count:.4g} / {nodes:g}"))
    sample = _SAMPLE_BYTES * setup.seq_length * setup.micro_batch_size
    terms.append(
        Term(
            "data loader",
            ranks * _SAMPLES_WAITING * sample,
            "ranks of a node x 4 x 28 s",
            f"{ranks} x {_SAMPLES_WAITING} x {sample:.4g}",
            "ids, labels, positions, loss weights; never a mask",
        )
    )
    return tuple(terms)


def _with_note(term: Term, note: str) -> Term:
    return Term(term.name, term.value, term.formula, term.numbers, f"{term.note}; {note}" if term.note else note)
