"""Why the best layout is the best, what breaks beside it, and the way out where nothing fits. In words, from the numbers of a search."""

from __future__ import annotations

import math

from mcore_longctx.plan.layouts import SAME_TIME, Candidate, Search
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.tables import duration, gigabytes

__all__ = ["against", "breaks_nearby", "describe", "nearest_fitting", "overrides", "smallest_miss", "why_best"]

_MOVES = ((1, -1, 0, 0), (-1, 1, 0, 0), (0, -1, 0, 1), (0, 1, 0, -1), (1, 0, 0, -1), (-1, 0, 0, 1), (0, -1, 1, 0), (0, 0, 1, -1))
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
    """Lines: the best against the fastest of the others, against other exchanges on its layout, against the recipe's own layout."""
    best = search.best
    if best is None:
        return []
    lines = [f"best: {describe(best)}: {duration(best.seconds)} a step"]
    fastest = search.fitting[0]
    if fastest is not best and _spare_gb(fastest, best) > 0:
        lines.append(
            f"  {describe(fastest)} is as fast (within {SAME_TIME - 1:.0%}: {duration(fastest.seconds)}), but takes"
            f" {gigabytes(_spare_gb(fastest, best))} GB more of a GPU"
        )
    runner_up = next((c for c in search.by_layout if c.layout != best.layout), None)
    if runner_up is None:
        lines.append("  no other layout fits")
    else:
        lines.append(f"  against the next layout, {describe(runner_up)}: {against(best, runner_up)}")
    others = {exchange_name(c.setup): c for c in reversed(search.fitting) if c.layout == best.layout and c is not best}
    others.pop(exchange_name(best.setup), None)
    if others:
        text = ", ".join(
            f"{name} {duration(c.seconds)}" for name, c in sorted(others.items(), key=lambda item: item[1].seconds)[:3]
        )
        lines.append(f"  other exchanges on the same layout: {text}")
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
    if abs(change) < (SAME_TIME - 1) * other.seconds:
        return f"the same time (within {SAME_TIME - 1:.0%}), {memory}"
    words = f"{duration(abs(change))} {'less' if change < 0 else 'more'} a step ({abs(change) / other.seconds:.0%})"
    return f"{words}{f': {terms}' if terms else ''}; {memory}"


def breaks_nearby(search: Search, most: int = 6) -> list[str]:
    """What does not work one step from the best: a faster policy, half or twice a size. With the reason."""
    best = search.best
    if best is None:
        return []
    lines, refused = [], dict(search.refused)
    for candidate in search.candidates:
        if candidate.layout == best.layout and exchange_name(candidate.setup) == exchange_name(best.setup) and candidate.problem:
            lines.append(f"{policy_name(candidate.setup)} on the same layout: {candidate.problem.what}")
    by_layout: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in search.candidates:
        by_layout.setdefault(candidate.layout, []).append(candidate)
    for move in _MOVES:
        sizes = [size * 2.0**step for size, step in zip(best.layout, move, strict=True)]
        if min(sizes) < 1 or any(size % 1 for size in sizes):
            continue
        layout = tuple(int(size) for size in sizes)
        tried = [
            c for c in by_layout.get(layout, []) if c.problem is not None and policy_name(c.setup) == policy_name(best.setup)
        ]
        impossible = [
            f"{name} {size}" for name, size in zip(("TP", "CP", "PP", "DP"), layout, strict=True) if f"{name} {size}" in refused
        ]
        words = _layout_words(layout)
        if impossible:
            lines.append(f"{words}: {impossible[0]}: {refused[impossible[0]]}")
        elif tried and not any(c.problem is None for c in by_layout[layout]):
            problem = min((c.problem for c in tried if c.problem is not None), key=lambda p: p.excess)
            lines.append(f"{words}: {problem.what}")
    return list(dict.fromkeys(lines))[:most]


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


def _layout_words(layout: tuple[int, ...]) -> str:
    return (
        " x ".join(f"{name} {size}" for name, size in zip(("TP", "CP", "PP", "DP"), layout, strict=True) if size > 1) or "one GPU"
    )


def _spare_gb(one: Candidate, other: Candidate) -> float:
    assert one.memory is not None
    assert other.memory is not None
    return one.memory.total - other.memory.total
