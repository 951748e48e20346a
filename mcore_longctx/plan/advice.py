"""Why the best layout is the best, what breaks beside it, and the way out where nothing fits. In words, from the numbers of a search."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mcore_longctx.plan.candidates import NO_DIFFERENCE, Candidate, Problem, Search, drawbacks
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.tables import duration, gigabytes

__all__ = [
    "against",
    "breaks_nearby",
    "describe",
    "nearest_fitting",
    "overrides",
    "refused_sizes",
    "remedy",
    "smallest_miss",
    "why_best",
]

_MOVES = ((1, -1, 0, 0), (-1, 1, 0, 0), (0, -1, 0, 1), (0, 1, 0, -1), (1, 0, 0, -1), (-1, 0, 0, 1), (0, -1, 1, 0), (0, 0, 1, -1))
# what makes a term of the memory smaller
_REMEDIES = {
    "kept activations": "activations.offload_fraction, or a larger CP or TP",
    "working set": "activations.mlp_tile, or a larger CP or TP",
    "key/value exchange": "cp_comm_type p2p, or a larger TP",
    "loss head": "activations.loss_chunk, or a larger TP",
    "positions and batch": "a larger CP",
    "weights": "a larger TP or PP",
    "gradients": "a larger TP or PP",
    "optimizer": "more GPUs (it is divided over DP x CP)",
    "offloaded activations": "a smaller activations.offload_fraction, or more nodes",
    "data loader": "fewer GPUs in a node",
}
# what the best has over a faster one, in the order of `layouts.drawbacks`
_CARES = ("needs no host memory", "leaves a quarter of the board free", "needs no pipeline", "exchanges in one level")
_POLICIES = ("none", "selective", "attention_kept", "full")  # fastest first


def describe(candidate: Candidate, *, policy: bool = True) -> str:
    """For example `TP 8 x CP 16 all_gather x DP 2, attention_kept, 25% on the host`. PP and DP of 1 are left out."""
    tp, cp, pp, dp = candidate.layout
    exchange = f" {exchange_name(candidate.setup)}" if cp > 1 else ""
    sizes = [f"TP {tp}", f"CP {cp}{exchange}", *([f"PP {pp}"] if pp > 1 else []), *([f"DP {dp}"] if dp > 1 else [])]
    return " x ".join(sizes) + (f", {policy_name(candidate.setup)}" if policy else "")


def exchange_name(setup: Setup) -> str:
    """`p2p`, `a2a+p2p 4x8`, or `-` for one context-parallel rank."""
    parallel = setup.parallel
    if parallel.context_parallel_size == 1:
        return "-"
    sizes = parallel.hierarchical_context_parallel_sizes
    return "/".join(sorted(set(parallel.cp_comm_types))) + (f" {sizes[0]}x{sizes[1]}" if sizes is not None else "")


def policy_name(setup: Setup) -> str:
    """`attention_kept`, `none, MLP in tiles`, `full, 50% on the host`."""
    tiles = ", MLP in tiles" if setup.recompute == "none" and setup.mlp_tile else ""
    host = f", {setup.offload_fraction:.0%} on the host" if setup.offload_fraction else ""
    return f"{setup.recompute}{tiles}{host}"


def why_best(search: Search, own: Candidate | None = None) -> list[str]:
    """Lines: the best against the next layout, the other policies and exchanges on its layout, and the recipe's own layout."""
    best = search.best
    if best is None:
        return []
    lines, fastest = [f"best: {describe(best)}, {duration(best.seconds)} a step, because"], search.fitting[0]
    better = [words for words, his, mine in zip(_CARES, drawbacks(fastest), drawbacks(best), strict=True) if his and not mine]
    if better:
        lines.append(f"  it {better[0]}; {describe(fastest)} is faster by {1 - fastest.seconds / best.seconds:.1%} only")
    runner_up = next((c for c in search.by_layout if c.layout != best.layout), None)
    if runner_up is None:
        lines.append("  no other layout fits")
    else:
        lines.append(f"  against the next layout, {describe(runner_up)}: {against(best, runner_up)}")
    lines += _same_layout(search, best)
    if own is not None and own.time is not None:
        same = describe(own) == describe(best)
        lines.append(f"  the recipe's own layout{' is this one' if same else f': {against(best, own)}'}")
    return lines


def against(one: Candidate, other: Candidate) -> str:
    """Where the time of two layouts differs: `12.3 s less a step (4.5 %): exchange -6.4 s, ...`; and the memory, where it does not."""
    assert one.time is not None
    assert other.time is not None
    assert one.memory is not None
    assert other.memory is not None
    change = one.seconds - other.seconds
    mine, theirs = ({term.name: term.value for term in time.terms} for time in (one.time, other.time))
    parts = {name: mine.get(name, 0.0) - theirs.get(name, 0.0) for name in {**mine, **theirs}}
    large = sorted((item for item in parts.items() if abs(item[1]) >= 0.1 * abs(change) + 0.05), key=lambda item: -abs(item[1]))[
        :3
    ]
    terms = ", ".join(f"{name} {'-' if value < 0 else '+'}{duration(abs(value))}" for name, value in large)
    memory_change = one.memory.total - other.memory.total
    memory = f"{gigabytes(abs(memory_change))} GB {'less' if memory_change < 0 else 'more'} of a GPU"
    if abs(change) < (NO_DIFFERENCE - 1) * other.seconds:
        return f"the same time (within {NO_DIFFERENCE - 1:.0%}), {memory}"
    words = f"{duration(abs(change))} {'less' if change < 0 else 'more'} a step ({abs(change) / other.seconds:.1%})"
    return f"{words}{f': {terms}' if terms else ''}; {memory}"


def breaks_nearby(search: Search) -> list[str]:
    """What does not work beside the best, with the reason: faster policies, half or twice a size, sizes that no layout can have."""
    best = search.best
    if best is None:
        return []
    exchange, policy = exchange_name(best.setup), policy_name(best.setup)
    lines = [
        f"{policy_name(c.setup)} on the same layout: {c.problem.what}"
        for c in search.candidates
        if c.layout == best.layout and exchange_name(c.setup) == exchange and c.problem is not None
    ]
    near = [tuple(size * 2.0**step for size, step in zip(best.layout, move, strict=True)) for move in _MOVES]
    lines += [
        f"{describe(c)}: {c.problem.what}"
        for c in search.candidates
        if c.layout in near and exchange_name(c.setup) == exchange and policy_name(c.setup) == policy and c.problem is not None
    ]
    return lines + refused_sizes(search)


def refused_sizes(search: Search) -> list[str]:
    """Sizes that no layout can have: the smallest of each kind with its reason, the others named behind it."""
    lines = []
    for kind in ("TP", "PP", "CP", "DP"):
        sizes = [(int(name.split()[1]), why) for name, why in search.refused if name.split()[0] == kind]
        if sizes:
            size, why = sizes[0]
            others = ", ".join(f"{other:,}" for other, _ in sizes[1:])
            lines.append(f"{kind} {size:,}: {why}{f' (nor {others})' if others else ''}")
    return lines


def nearest_fitting(search: Search, setup: Setup) -> Candidate | None:
    """What fits and differs least from `setup`: halvings and doublings of sizes, then steps of the policy, then time."""

    def steps(candidate: Candidate) -> tuple[float, float]:
        p, own = candidate.setup.parallel, setup.parallel
        pairs = (
            (p.tensor_model_parallel_size, own.tensor_model_parallel_size),
            (p.context_parallel_size, own.context_parallel_size),
            (p.pipeline_model_parallel_size, own.pipeline_model_parallel_size),
            (p.data_parallel_size, own.data_parallel_size),
        )
        sizes = sum(abs(math.log2(a / b)) for a, b in pairs)
        policy = abs(_POLICIES.index(candidate.setup.recompute) - _POLICIES.index(setup.recompute))
        host = 0.5 * (candidate.setup.offload_fraction > setup.offload_fraction)
        exchange = 0.25 * (exchange_name(candidate.setup) != exchange_name(setup))
        return sizes + policy + host + exchange, candidate.seconds

    return min(search.fitting, key=steps, default=None)


def smallest_miss(search: Search) -> Candidate | None:
    """Of what does not fit, the one that misses by least."""
    return min(
        (c for c in search.candidates if c.problem is not None and c.problem.kind != "sizes"),
        key=lambda c: c.problem.excess if c.problem is not None else 0.0,
        default=None,
    )


def remedy(problem: Problem) -> str:
    """What to change about the largest term of what does not fit; empty for a term that nothing changes."""
    return _REMEDIES.get(problem.largest, "")


def overrides(candidate: Candidate) -> list[str]:
    """What to append to a command so that the recipe's stage is laid out like this."""
    stage = candidate.stage
    p, a, at = stage.parallel, stage.activations, f"stages.{stage.name}"
    sizes = p.hierarchical_context_parallel_sizes
    parallel = {
        "tensor_model_parallel_size": p.tensor_model_parallel_size,
        "sequence_parallel": str(p.sequence_parallel).lower(),
        "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
        "context_parallel_size": p.context_parallel_size,
        "cp_comm_type": p.cp_comm_type,
        **({"hierarchical_context_parallel_sizes": f"[{sizes[0]},{sizes[1]}]"} if sizes is not None else {}),
        "data_parallel_size": p.data_parallel_size,
    }
    inner = ", ".join(f"{name}: {value}" for name, value in parallel.items())
    return [
        f"'{at}.parallel={{{inner}}}'",
        f"{at}.activations.recompute={a.recompute}",
        f"{at}.activations.mlp_tile={'null' if a.mlp_tile is None else int(a.mlp_tile)}",
        f"{at}.activations.offload_fraction={a.offload_fraction:g}",
    ]


def _same_layout(search: Search, best: Candidate) -> Iterator[str]:
    """The best with the other policies, and with the other exchanges (each with its fastest policy)."""
    same = [c for c in search.fitting if c.layout == best.layout and c is not best]
    exchange = exchange_name(best.setup)
    policies = [f"{policy_name(c.setup)} {duration(c.seconds)}, {_gb(c)} GB" for c in same if exchange_name(c.setup) == exchange]
    if policies:
        yield f"  other policies on the same layout: {'; '.join(policies)}"
    fastest = {exchange_name(c.setup): c for c in reversed(same) if exchange_name(c.setup) != exchange}
    if fastest:
        text = [f"{name} {duration(c.seconds)}" for name, c in sorted(fastest.items(), key=lambda item: item[1].seconds)]
        yield f"  other exchanges on the same layout: {', '.join(text)}"


def _gb(candidate: Candidate) -> str:
    return gigabytes(candidate.memory.total) if candidate.memory is not None else ""


def _difference(one: Candidate, other: Candidate) -> float:
    assert one.memory is not None
    assert other.memory is not None
    return one.memory.total - other.memory.total
