"""The search: what divides, what fits, what is best, and what it says where nothing does."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import LayoutError
from mcore_longctx.families import ModelShape
from mcore_longctx.plan.advice import breaks_nearby, nearest_fitting, overrides, remedy, smallest_miss, why_best
from mcore_longctx.plan.candidates import COMFORTABLE, HOST_USABLE, SAME_TIME, USABLE, Candidate, Search, at_peak, fit_problem
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.layouts import nearest_counts, search, smallest_count
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.models import find_model
from mcore_longctx.plan.setup import stage_setup
from mcore_longctx.recipe import OptimizerSection, Stage, TokenCount
from mcore_longctx.recipe.load import load_recipe

M = 1 << 20
H100 = find_gpu("h100-80gb")
LLAMA = find_model("llama-3.1-8b")


def stage(seq_length: int = 4 * M, global_batch_size: int = 2) -> Stage:
    return Stage(
        name="extend",
        kind="pretrain",
        data="-",
        seq_length=TokenCount(seq_length),
        global_batch_size=global_batch_size,
        optimizer=OptimizerSection(lr=1e-5),
        train_iters=150,
    )


def divides(shape: ModelShape, seq: int, batch: int, gpus: int, per_node: int) -> Iterator[tuple[int, int, int, int]]:
    """TP, CP, PP, DP by the rules in plain words."""
    for tp in range(1, gpus + 1):
        for cp in range(1, gpus // tp + 1):
            for pp in range(1, gpus // tp // cp + 1):
                dp = gpus // tp // cp // pp
                if tp * cp * pp * dp != gpus:
                    continue
                heads = (
                    shape.num_attention_heads % tp == 0 and shape.num_query_groups % tp == 0 and shape.ffn_hidden_size % tp == 0
                )
                in_a_node = per_node % tp == 0
                chunks = cp == 1 or seq % (2 * cp) == 0
                rows = tp == 1 or (seq // cp) % tp == 0
                if heads and in_a_node and chunks and rows and shape.num_layers % pp == 0 and batch % dp == 0:
                    yield tp, cp, pp, dp


def test_an_all_to_all_of_transformer_engine_divides_the_key_value_heads() -> None:
    """Ours sends a head to several ranks: 32 ranks of 8 heads work there."""

    def exchanged(backend: str) -> set[tuple[int, int]]:
        found = search(stage(), LLAMA, H100, 32, backend=backend)
        layouts = [
            c
            for c in found.candidates
            if c.setup.parallel.cp_comm_type == "a2a" and (c.problem is None or c.problem.kind != "sizes")
        ]
        return {c.layout[:2] for c in layouts}

    assert (1, 32) in exchanged("local")
    assert exchanged("te")
    assert all(8 // tp % cp == 0 for tp, cp in exchanged("te"))


@settings(max_examples=40)
@given(
    groups=st.sampled_from([1, 2, 3, 4, 8]),
    per_group=st.sampled_from([1, 2, 3, 4]),
    layers=st.sampled_from([1, 2, 6, 32]),
    seq=st.sampled_from([4096, 6144, 8190, 1000, 30]),
    batch=st.integers(1, 12),
    gpus=st.integers(1, 64),
    per_node=st.sampled_from([1, 4, 6, 8]),
)
def test_all_layouts_that_divide_are_tried_and_no_others(
    groups: int, per_group: int, layers: int, seq: int, batch: int, gpus: int, per_node: int
) -> None:
    shape = replace(LLAMA, num_layers=layers, num_attention_heads=groups * per_group, num_query_groups=groups)
    gpu = replace(H100, gpus_per_node=per_node)
    wanted = set(divides(shape, seq, batch, gpus, per_node))
    if not wanted or (gpus > per_node and gpus % per_node):
        with pytest.raises(LayoutError):
            search(stage(seq, batch), shape, gpu, gpus)
        return
    found = search(stage(seq, batch), shape, gpu, gpus)
    assert {candidate.layout for candidate in found.candidates} == wanted
    for candidate in found.candidates:
        parallel = candidate.setup.parallel
        cp, tp, sizes = (
            parallel.context_parallel_size,
            parallel.tensor_model_parallel_size,
            parallel.hierarchical_context_parallel_sizes,
        )
        ranks = {"a2a": cp, "a2a+p2p": sizes[0] if sizes else 1}.get(str(parallel.cp_comm_type), 1)
        replicas = ranks // math.gcd(groups // tp, ranks)  # of a key head; whole groups of query heads are left to each rank
        shares = (groups * per_group // tp) % ranks == 0 and per_group % replicas == 0
        assert (candidate.problem is not None and candidate.problem.kind == "sizes") == (not shares)
        assert candidate.stage.parallel.sequence_parallel == (tp > 1)


@pytest.fixture(scope="module")
def on_256() -> Search:
    return search(stage(), LLAMA, H100, 256)


@pytest.fixture(scope="module")
def on_64() -> Search:
    return search(stage(), LLAMA, H100, 64)


def test_what_fits_is_within_the_board_and_the_host_and_what_does_not_is_beyond(on_64: Search) -> None:
    assert on_64.fitting
    for candidate in on_64.candidates:
        if candidate.problem is not None and candidate.problem.kind == "sizes":
            assert candidate.memory is None
            continue
        assert candidate.memory is not None
        fits = candidate.memory.total <= USABLE * 80e9 and candidate.memory.host_total <= HOST_USABLE * 2e12
        assert fits == (candidate.problem is None)
        assert (candidate.time is not None) == fits


def test_a_problem_names_the_largest_term_and_how_far_over(on_64: Search) -> None:
    too_large = [c for c in on_64.candidates if c.problem is not None and c.problem.kind == "memory"]
    assert too_large
    for candidate in too_large:
        assert candidate.memory is not None
        assert candidate.problem is not None
        largest = max((t for t in candidate.memory.terms if at_peak(t)), key=lambda term: term.value)
        over = (candidate.memory.total - 0.92 * 80e9) / 1e9
        text = candidate.problem.what
        assert f"largest: {largest.name} " in text
        assert (f"{over:,.1f}".removesuffix(".0") if over < 99.95 else f"{over:,.0f}") + " GB over 73.6" in text


def test_terms_at_the_peak_add_up_to_the_total(on_256: Search) -> None:
    for candidate in on_256.candidates:
        if candidate.memory is not None:
            assert sum(t.value for t in candidate.memory.terms if at_peak(t)) == pytest.approx(candidate.memory.total)


def test_each_term_that_can_be_too_large_has_a_remedy(on_64: Search) -> None:
    problems = [c.problem for c in on_64.candidates if c.problem is not None and c.problem.kind != "sizes"]
    assert problems
    assert all(remedy(problem) for problem in problems)


def test_as_little_as_possible_waits_on_the_host(on_64: Search) -> None:
    offloaded = [c for c in on_64.fitting if c.setup.offload_fraction]
    assert {c.setup.offload_fraction for c in offloaded} - {1.0}
    for candidate in offloaded:
        less = replace(candidate.setup, offload_fraction=candidate.setup.offload_fraction - 1 / 8)
        problem = fit_problem(less, memory(less))
        assert problem is not None
        assert problem.kind == "memory"


def test_the_best_is_the_fastest_unless_as_fast_a_one_is_more_careful(on_256: Search, on_64: Search) -> None:
    for found in (on_256, on_64):
        best, fastest = found.best, found.fitting[0]
        assert best is not None
        assert best.seconds <= SAME_TIME * fastest.seconds
        close = [c for c in found.fitting if c.seconds <= SAME_TIME * fastest.seconds]
        if best.setup.offload_fraction:
            assert all(c.setup.offload_fraction for c in close)
        without = [c for c in close if not c.setup.offload_fraction]
        assert best.memory is not None
        if best.memory.total > COMFORTABLE * 80e9:
            assert all(c.memory is not None and c.memory.total > COMFORTABLE * 80e9 for c in without)
    assert on_64.best is not None
    assert not on_64.best.setup.offload_fraction  # 1.3 % slower than the fastest, which keeps 7/8 of its activations on the host
    assert on_64.fitting[0].setup.offload_fraction


def test_the_table_has_each_layout_once_the_best_first(on_256: Search) -> None:
    layouts = [c.layout for c in on_256.by_layout]
    assert len(set(layouts)) == len(layouts) == len({c.layout for c in on_256.fitting})
    assert on_256.by_layout[0] is on_256.best
    seconds = [c.seconds for c in on_256.by_layout[1:]]
    assert seconds == sorted(seconds)


def test_the_reason_compares_with_the_next_layout_and_the_other_policies(on_256: Search) -> None:
    text = "\n".join(why_best(on_256))
    assert on_256.best is not None
    assert on_256.best.layout == (8, 16, 1, 2)  # that of the UltraLong paper
    assert "best: TP 8 x CP 16 p2p x DP 2, attention_kept, 25" in text
    assert "against the next layout, TP 4 x CP 32 p2p x DP 2" in text
    assert "other policies on the same layout: full 3" in text
    assert "other exchanges on the same layout: all_gather 2" in text


def test_what_breaks_beside_the_best_is_told_with_numbers(on_256: Search) -> None:
    lines = breaks_nearby(on_256)
    assert any(line.startswith("none on the same layout: ") and "largest: kept activations" in line for line in lines)
    assert (
        "TP 16: num_query_groups 8 is not divisible by tensor_model_parallel_size 16, use one of 1, 2, 4, 8 (nor 32, 64, 128, 256)"
        in lines
    )
    assert any(line.startswith("DP 4: global_batch_size 2 is not a multiple of") for line in lines)


def test_counts_that_do_not_fill_nodes_name_the_nearest_that_work() -> None:
    with pytest.raises(LayoutError, match=r"250 GPUs do not fill nodes of 8; nearest that work: 128 and 256"):
        search(stage(), LLAMA, H100, 250)
    with pytest.raises(LayoutError, match=r"no layout divides 480 GPUs \(TP 3: .*CP 3: .*DP 3: .*nearest that work: 256 and 512"):
        search(stage(), LLAMA, H100, 480)


@settings(max_examples=15)
@given(gpus=st.integers(1, 300), batch=st.integers(1, 6), seq=st.sampled_from([4 * M, 3 * M, 1000, 999]))
def test_the_nearest_counts_are_the_nearest(gpus: int, batch: int, seq: int) -> None:
    def works(count: int) -> bool:
        return (count <= 8 or count % 8 == 0) and any(divides(LLAMA, seq, batch, count, 8))

    below, above = nearest_counts(stage(seq, batch), LLAMA, H100, gpus)
    assert below == next((n for n in range(gpus - 1, 0, -1) if works(n)), None)
    if above is None:
        assert not any(works(n) for n in range(gpus + 1, gpus + 100))
    else:
        assert works(above)
        assert not any(works(n) for n in range(gpus + 1, above))


def test_where_nothing_fits_the_smallest_count_that_does_is_found() -> None:
    found = search(stage(), LLAMA, H100, 8)
    assert not found.fitting
    miss = smallest_miss(found)
    assert miss is not None
    assert miss.problem is not None
    assert miss.problem.excess == min(
        c.problem.excess for c in found.candidates if c.problem is not None and c.problem.kind == "memory"
    )
    smallest = smallest_count(stage(), LLAMA, H100, above=8)
    assert smallest is not None
    assert smallest.gpus == 32
    assert not search(stage(), LLAMA, H100, 16).fitting


def test_what_is_nearest_to_a_recipe_differs_in_one_thing(on_64: Search) -> None:
    """CP 8 x TP 8 without recompute does not fit; the same layout that keeps attention alone does."""
    tried = next(c for c in on_64.candidates if c.layout == (8, 8, 1, 1) and c.setup.recompute == "none")
    near = nearest_fitting(on_64, tried.setup)
    assert near is not None
    assert (near.layout, near.setup.recompute, near.setup.offload_fraction) == ((8, 8, 1, 1), "attention_kept", 0.0)


def test_the_overrides_of_each_exchange_give_its_layout_to_a_recipe(on_256: Search, on_64: Search) -> None:
    kinds: dict[str, Candidate] = {}
    for candidate in (*on_256.fitting, *on_64.fitting):
        kinds.setdefault(str(candidate.stage.parallel.cp_comm_type), candidate)
    assert set(kinds) == {"p2p", "all_gather", "a2a", "a2a+p2p"}
    for candidate in kinds.values():
        given = [shlex.split(text)[0] for text in overrides(candidate)]
        read = load_recipe("ultralong-8b-4m", given).stages[0]
        assert read.parallel == candidate.stage.parallel
        assert read.activations == candidate.stage.activations


def test_tensor_parallelism_stays_in_a_node() -> None:
    found = search(stage(), LLAMA, replace(H100, gpus_per_node=4), 256)
    assert max(candidate.layout[0] for candidate in found.candidates) == 4
    assert dict(found.refused)["TP 8"] == "tensor parallelism leaves the node of 4 GPUs"


def test_transformer_engine_layers_are_priced_without_our_policies() -> None:
    found = search(stage(), LLAMA, H100, 256, backend="te")
    priced = {(c.setup.recompute, c.setup.mlp_tile) for c in found.candidates if c.memory is not None}
    assert priced == {("none", None), ("selective", None), ("full", None)}


def test_megatron_accepts_what_is_proposed(on_256: Search, on_64: Search) -> None:
    """megatron-core's own checks of heads, sizes and hierarchical context parallelism."""
    from mcore_longctx.model.builder import transformer_config
    from mcore_longctx.rope import RopeScaling

    rope = RopeScaling(type="none", head_dim=128, rope_theta=500000.0)
    for candidate in (*on_256.by_layout[:10], *on_64.by_layout[:10]):
        config = transformer_config(LLAMA, rope, candidate.stage.parallel, precision="bf16")
        assert config.context_parallel_size == candidate.layout[1]


def test_a_candidate_is_priced_as_its_stage_would_be(on_256: Search) -> None:
    best: Candidate | None = on_256.best
    assert best is not None
    assert stage_setup(best.stage, LLAMA, H100) == best.setup
