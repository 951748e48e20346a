"""The price of measuring a model, against worked numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.evaluation import (
    check_budget,
    evaluation_lines,
    evaluation_price,
    evaluation_work,
    forward_seconds,
    pass_seconds,
    work_line,
)
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.models import known_models, step_flops
from mcore_longctx.plan.stages import price_stage
from mcore_longctx.recipe.load import load_recipe
from mcore_longctx.recipe.schema import (
    EvaluateSection,
    LossByPositionSection,
    NeedleSection,
    Parallel,
    RulerSection,
    ShortSuiteSection,
    TokenCount,
)

M = 1 << 20
SHAPE = known_models()["llama-3.1-8b"]
H100 = find_gpu("h100")
TP8_CP2 = Parallel(tensor_model_parallel_size=8, sequence_parallel=True, context_parallel_size=2)


def needles(lengths: tuple[int, ...], depths: int = 6, samples: int = 10) -> NeedleSection:
    return NeedleSection(haystack=Path("text"), lengths=tuple(TokenCount(n) for n in lengths), depths=depths, samples=samples)


def forward(length: int, parallel: Parallel, *, every_token: bool = False) -> float:
    return forward_seconds(SHAPE, H100, parallel, length, every_token=every_token).value


@pytest.mark.parametrize(
    ("length", "petaflop"), [(M // 8, 6.3), (M // 4, 21.7), (M // 2, 79.4), (M, 302.9), (2 * M, 1182), (4 * M, 4670)]
)
def test_work_of_a_forward_pass(length: int, petaflop: float) -> None:
    """13.96 GFLOP a token and 262,144 s^2 of causal attention."""
    linear, _, attention = step_flops(SHAPE, length)
    assert (linear + attention) / 3 / 1e15 == pytest.approx(petaflop, rel=0.01)
    assert (linear + attention) / 3 == pytest.approx(13.96e9 * length + 262_144 * length**2, rel=0.001)


@pytest.mark.parametrize(("gpus", "seconds"), [(256, 34), (16, 9 * 60), (8, 18 * 60)])
def test_one_sequence_of_4m_with_cudnn_on_256_16_and_8_gpus(gpus: int, seconds: float) -> None:
    """34 s, 9 and 18 minutes: worked for kernels alone; 10 % for rounding and for what is exchanged."""
    parallel = Parallel(tensor_model_parallel_size=8, sequence_parallel=True, context_parallel_size=gpus // 8)
    assert forward(4 * M, parallel) == pytest.approx(seconds, rel=0.1)


def test_a_forward_pass_is_never_faster_than_its_kernels() -> None:
    rate = H100.kernel().forward
    for length in (M // 8, M, 4 * M):
        attention = step_flops(SHAPE, length)[2] / 3 / 16
        assert forward(length, TP8_CP2) > attention / rate


def test_logits_of_every_token_cost_more_than_those_of_an_answer() -> None:
    head = step_flops(SHAPE, M)[1] / 3 / 16
    more = forward(M, TP8_CP2, every_token=True) - forward(M, TP8_CP2)
    assert more == pytest.approx(head / (0.6 * 989e12), rel=0.1)


@given(st.integers(8, 11), st.sampled_from(["p2p", "all_gather"]), st.sampled_from([2, 8, 32]))
@settings(deadline=None)
def test_time_grows_faster_than_the_length_and_falls_with_ranks(doublings: int, kind: str, cp: int) -> None:
    """From 1M on, where a rank of 64 still has 16K tokens: below, a ring waits for the network."""
    parallel = Parallel(context_parallel_size=cp, cp_comm_type=kind)
    length = 4096 << doublings
    assert forward(2 * length, parallel) > 2 * forward(length, parallel)
    assert forward(length, replace(parallel, context_parallel_size=2 * cp)) < forward(length, parallel)


def test_each_sample_and_each_window_is_one_forward_pass_and_all_columns_are_counted() -> None:
    loss = LossByPositionSection(path=Path("text"), seq_length=TokenCount(M), short_length=TokenCount(M // 8))
    section = EvaluateSection(needle=needles((M // 2, M)), loss_by_position=loss, parallel=TP8_CP2)
    price = evaluation_price(section, SHAPE, H100, columns=3)
    assert price is not None
    assert [(row.task, row.length, row.sequences) for row in price.rows] == [
        ("needle", M // 2, 60),
        ("needle", M, 60),
        ("loss by position", M, 12),
        ("short context", M // 8, 96),
    ]
    by_hand = (
        60 * forward(M // 2, TP8_CP2)
        + 60 * forward(M, TP8_CP2)
        + 12 * forward(M, TP8_CP2, every_token=True)
        + 96 * forward(M // 8, TP8_CP2, every_token=True)
    )
    assert price.gpus == 16
    assert price.seconds == pytest.approx(by_hand)
    assert price.gpu_hours == pytest.approx(3 * 16 * by_hand / 3600)


def test_nothing_to_measure_costs_nothing() -> None:
    assert evaluation_price(EvaluateSection(), SHAPE, H100) is None


def test_even_lengths_and_many_needles_are_told_to_be_fewer() -> None:
    """Ten lengths from 0.4M to 4M cost 3.85 times the longest; doubled 1.33 times."""
    even = tuple(i * 4 * M // 10 for i in range(1, 11))
    price = evaluation_price(EvaluateSection(needle=needles(even), parallel=TP8_CP2), SHAPE, H100)
    assert price is not None
    assert any("cost 3.85 times their longest" in line and "cost 1.33 times" in line for line in price.advice)
    assert any("60 needles of 4M" in line and "18 of 18 found still mean at least 82%" in line for line in price.advice)
    doubled = tuple(4 * M >> i for i in (3, 2, 1, 0))
    price = evaluation_price(EvaluateSection(needle=needles(doubled, samples=3), parallel=TP8_CP2), SHAPE, H100)
    assert price is not None
    assert price.advice == ()


def test_the_page_has_every_row_the_sum_and_the_advice() -> None:
    price = evaluation_price(EvaluateSection(needle=needles((M, 2 * M, 4 * M)), parallel=TP8_CP2), SHAPE, H100, columns=3)
    assert price is not None
    lines = evaluation_lines(price)
    assert [line.split()[:3] for line in lines[1:4]] == [["needle", "1M", "60"], ["needle", "2M", "60"], ["needle", "4M", "60"]]
    assert "on 16 GPUs" in lines[4]
    assert f"{price.gpu_hours:,.1f} GPU-hours" in lines[4]
    assert lines[5].startswith("this is level standard; others would take, in GPU-hours: quick ")
    assert tuple(lines[6:]) == price.advice


def test_a_kernel_that_the_gpu_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention kernel"):
        evaluation_price(EvaluateSection(needle=needles((M,)), parallel=TP8_CP2), SHAPE, H100, kernel="fa9")


def test_tasks_count_their_forwards_and_what_follows_them() -> None:
    """13 tasks x samples prefills; one prefill for all depths of a shared text; a pass for each decoded token."""
    text = Path("text")
    ruler = RulerSection(haystack=text, lengths=(TokenCount(M // 8), TokenCount(M)), samples=25)
    shared = replace(needles((M,), depths=20, samples=5), shared=True)
    section = EvaluateSection(needle=shared, ruler=ruler, short_suite=ShortSuiteSection(questions=50), parallel=TP8_CP2)
    work = {(it.task, it.length): (it.sequences, it.passes) for it in evaluation_work(section)}
    assert work == {
        ("needles, shared text", M): (5, 40),
        ("ruler-like", M // 8): (13 * 25, 0),
        ("ruler-like", M): (13 * 25, 0),
        ("short suite", 256): (50, 4),
    }
    few = replace(section, needle=None, short_suite=None, ruler=replace(ruler, tasks=("vt", "cwe"), scoring="greedy"))
    assert [(it.sequences, it.passes) for it in evaluation_work(few)] == [(50, 128), (50, 128)]
    price = evaluation_price(few, SHAPE, H100)
    assert price is not None
    for row, length in zip(price.rows, (M // 8, M), strict=True):
        one = pass_seconds(SHAPE, H100, TP8_CP2, length).value
        assert row.seconds == pytest.approx(50 * (forward(length, TP8_CP2) + 128 * one))


def test_a_pass_after_a_million_tokens_reads_weights_and_cache_once() -> None:
    """137.4 GB of keys and values and 16 GB of weights over 16 GPUs at 0.7 of 3.35 TB/s: 4.1 ms, and 16 ms of kernels."""
    seconds = pass_seconds(SHAPE, H100, TP8_CP2, M).value
    assert seconds == pytest.approx((137.4e9 / 16 + 16.06e9 / 8) / (0.7 * 3.35e12) + 0.016, rel=0.01)


def test_a_level_is_what_is_priced_and_the_others_are_named() -> None:
    section = EvaluateSection(needle=needles((M // 2, M)), parallel=TP8_CP2, level="quick")
    price = evaluation_price(section, SHAPE, H100, columns=3)
    assert price is not None
    assert [(row.task, row.length, row.sequences, row.passes) for row in price.rows] == [("needles, shared text", M, 1, 40)]
    others = dict(price.other_levels)
    for level in ("standard", "publish"):
        other = evaluation_price(replace(section, level=level), SHAPE, H100, columns=3)
        assert other is not None
        assert others[level] == pytest.approx(other.gpu_hours)
    assert others["publish"] == pytest.approx(10 * others["standard"])


def test_a_cache_that_does_not_fit_is_told() -> None:
    """4M: 550 GB of keys and values; 69 GB a GPU on 8, beside 2 GB of weights, and 137 GB on 4."""
    section = EvaluateSection(needle=replace(needles((4 * M,)), shared=True), parallel=replace(TP8_CP2, context_parallel_size=1))
    price = evaluation_price(section, SHAPE, H100)
    assert price is not None
    assert not any("keys and values" in line for line in price.advice)
    tight = replace(section, parallel=Parallel(tensor_model_parallel_size=4, sequence_parallel=True))
    price = evaluation_price(tight, SHAPE, H100)
    assert price is not None
    assert any("keys and values of 4M take 137 GB a GPU" in line for line in price.advice)


def test_what_costs_too_much_of_the_training_is_refused_with_both_hours_and_a_way_out() -> None:
    recipe = load_recipe("ultralong-8b-1m")
    shape = known_models()["llama-3.1-8b"]
    price = evaluation_price(recipe.evaluate, shape, replace(find_gpu("h100-80gb"), gpus_per_node=8), columns=4)
    assert price is not None
    gpu = replace(find_gpu("h100-80gb"), gpus_per_node=8)
    training = sum(price_stage(stage, shape, gpu).hours * stage.parallel.world_size for stage in recipe.stages)
    share = price.gpu_hours / training
    for allowed in (share * 1.001, 10.0):
        check_budget(replace(recipe, evaluate=replace(recipe.evaluate, max_budget_share=allowed)), shape)
    tight = replace(recipe, evaluate=replace(recipe.evaluate, max_budget_share=share * 0.999))
    with pytest.raises(ConfigError) as raised:
        check_budget(tight, shape, where="r.yaml:9: evaluate.max_budget_share")
    said = str(raised.value)
    assert said.startswith(
        f"r.yaml:9: evaluate.max_budget_share: measuring 4 models takes {price.gpu_hours:,.4g} GPU-hours [planned], "
    )
    assert f"{share:.1%} of the {training:,.4g} GPU-hours of the training" in said
    assert "evaluate.level=quick (2." in said
    assert raised.value.exit_code == 2


def test_ranks_on_cpus_are_counted_in_operations() -> None:
    recipe = load_recipe("tiny-cpu")
    shape = replace(
        SHAPE, num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2, kv_channels=32
    )
    shape = replace(shape, vocab_size=262)
    work = evaluation_work(recipe.evaluate)
    by_hand = sum(it.sequences * sum(step_flops(shape, it.length)[:: 1 if it.every_token else 2]) / 3 for it in work)
    said = work_line(recipe.evaluate, shape, columns=4)
    assert (
        f"{sum(it.sequences for it in work):,} forward passes over {sum(it.sequences * it.length for it in work):,} tokens"
        in said
    )
    assert f"{by_hand / 1e12:,.3g} TFLOP a model, 4 models (there is no formula for time on CPUs)" in said
    training = sum(s.iterations * s.global_batch_size * sum(step_flops(shape, s.seq_length)) for s in recipe.stages)
    share = 4 * by_hand / training
    check_budget(replace(recipe, evaluate=replace(recipe.evaluate, max_budget_share=share * 1.001)), shape)
    with pytest.raises(
        ConfigError, match=r"measuring 4 models takes [\d.]+ PFLOP .*; evaluate.level=quick \([\d.]+ PFLOP\), fewer"
    ):
        check_budget(replace(recipe, evaluate=replace(recipe.evaluate, max_budget_share=share * 0.999)), shape)
