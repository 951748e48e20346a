"""Steps of samples that cost alike: every sample once a pass, a pure function of its place, and less waiting at any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.recipe import TokenCount
from mcore_longctx.train.order import SampleOrder
from tests.train.test_dataset import step_data

costs = st.lists(st.integers(1, 50), min_size=1, max_size=300).map(lambda values: np.array(values, np.float64))


@given(costs=costs, step=st.integers(1, 40), seed=st.integers(0, 2**32), number=st.integers(0, 5))
def test_each_pass_sees_every_sample_once_whatever_they_cost(costs: Any, step: int, seed: int, number: int) -> None:
    order, size = SampleOrder(len(costs), seed=seed, costs=costs, step=step), len(costs)
    assert sorted(order[number * size + i] for i in range(size)) == list(range(size))
    again = SampleOrder(size, seed=seed, costs=costs, step=step)
    places = range(2 * size, 3 * size)
    assert [again[i] for i in reversed(places)] == [order[i] for i in reversed(places)]


@given(
    costs=st.lists(st.integers(1, 10**6), min_size=30, max_size=60).map(lambda values: np.array(values, np.float64)),
    step=st.integers(2, 7),
    seed=st.integers(0, 2**32),
)
def test_costs_fall_inside_a_step_that_lies_in_one_pass(costs: Any, step: int, seed: int) -> None:
    order, size = SampleOrder(len(costs), seed=seed, costs=costs, step=step), len(costs)
    for number in range(3 * size // step):
        places = range(number * step, (number + 1) * step)
        if places[0] // size == places[-1] // size:
            inside = [costs[order[place]] for place in places]
            assert inside == sorted(inside, reverse=True)


def test_a_window_holds_the_samples_that_the_random_order_brings() -> None:
    """Sorting moves a sample by less than 16 steps: the data are not sorted as a whole."""
    step, size = 4, 64 * 4 * 3
    costs = np.arange(size, dtype=np.float64)
    plain, balanced = SampleOrder(size, seed=5), SampleOrder(size, seed=5, costs=costs, step=step)
    for window in range(size // 64):
        places = range(window * 64, (window + 1) * 64)
        assert {plain[place] for place in places} == {balanced[place] for place in places}
    heads = [costs[balanced[step * i]] for i in range(16)]
    assert heads != sorted(heads, reverse=True)  # steps are shuffled


def test_the_order_by_cost_is_the_one_of_every_version_so_far() -> None:
    # numpy 2.4; a change here breaks the resume of every run with balance sum_sq
    order = SampleOrder(10, seed=1234, costs=np.array([5.0, 1, 4, 4, 2, 9, 7, 7, 3, 8]), step=4)
    assert [order[i] for i in range(20)] == GOLDEN


GOLDEN = [0, 2, 3, 8, 5, 9, 6, 7, 4, 1, 3, 8, 0, 2, 4, 1, 5, 9, 6, 7]


def idle_share(data: Any, steps: int, dp: int) -> float:
    """Share of all ranks' time that they wait: before each micro-batch for the dearest sample of the one before."""
    spent = waited = 0.0
    for iteration in range(steps):
        cost = np.array([data._cost(index) for index in data.sample_ids(iteration)]).reshape(-1, dp)
        spent += cost.sum()
        waited += (cost.max(axis=1, keepdims=True) - cost).sum()
    return waited / (spent + waited)


class Skewed:
    """400 samples of 1,024 tokens: one in eight is a single document, the others are packed of short ones."""

    seq_length = 1024

    def __len__(self) -> int:
        return 400

    def document_lengths(self, index: int) -> list[int]:
        return [1024] if index % 8 == 0 else [32 * (1 + index % 7)] * 4 + [1024 - 128 * (1 + index % 7)]


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_ranks_wait_less_for_each_other(dp: int) -> None:
    shares = {}
    for balance in ("none", "sum_sq"):
        data = step_data(
            Skewed(),
            dp=dp,
            cross_document_mask=True,
            balance=balance,
            seq_length=TokenCount(1024),
            global_batch_size=16,
            train_iters=50,
        )
        shares[balance] = idle_share(data, 50, dp)
    assert shares["none"] > 0.2  # the set is skewed
    assert shares["sum_sq"] < shares["none"] / 5
