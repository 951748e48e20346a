"""The price of measuring a model, against worked numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.evaluation import evaluation_lines, evaluation_price, forward_seconds
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.models import known_models, step_flops
from mcore_longctx.recipe.schema import EvaluateSection, LossByPositionSection, NeedleSection, Parallel, TokenCount

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
    assert tuple(lines[5:]) == price.advice


def test_a_kernel_that_the_gpu_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention kernel"):
        evaluation_price(EvaluateSection(needle=needles((M,)), parallel=TP8_CP2), SHAPE, H100, kernel="fa9")
