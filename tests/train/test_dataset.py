"""The order of samples: each pass a permutation of its own, shares that add up, nothing but (seed, step) behind it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import DataError
from mcore_longctx.recipe import OptimizerSection, Parallel, Stage, TokenCount
from mcore_longctx.train.dataset import StepData
from mcore_longctx.train.order import SampleOrder
from tests.train.jobs import SAMPLES, SEQ_LENGTH, write_data


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mcore_longctx.data import PackedSamples

    return PackedSamples(write_data(tmp_path_factory.mktemp("data") / "data"))


def step_data(
    samples: Any,
    *,
    dp: int = 1,
    cp: int = 1,
    ranks: tuple[int, int] = (0, 0),
    seed: int = 3,
    vocab: int = 126,
    sentence_ends: tuple[int, ...] = (),
    **stage: Any,
):
    fields: dict[str, Any] = {
        "name": "s",
        "kind": "pretrain",
        "data": "d",
        "train_iters": 9,
        "seq_length": TokenCount(SEQ_LENGTH),
    }
    fields |= {"global_batch_size": 8, "optimizer": OptimizerSection(lr=1e-3)}
    parallel = Parallel(data_parallel_size=dp, context_parallel_size=cp)
    return StepData(
        samples,
        Stage(parallel=parallel, **(fields | stage)),
        seed=seed,
        vocab_size=vocab,
        dp_rank=ranks[0],
        cp_rank=ranks[1],
        device=torch.device("cpu"),
        where="here",
        sentence_ends=sentence_ends,
    )


@given(size=st.integers(1, 200), seed=st.integers(0, 2**32), number=st.integers(0, 5))
def test_each_pass_sees_every_sample_once(size: int, seed: int, number: int) -> None:
    order = SampleOrder(size, seed=seed)
    assert sorted(order[number * size + i] for i in range(size)) == list(range(size))


def test_passes_and_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    first, other = SampleOrder(50, seed=1), SampleOrder(50, seed=2)
    orders = [[first[i] for i in range(50)], [first[i] for i in range(50, 100)], [other[i] for i in range(50)]]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    again = SampleOrder(50, seed=1)
    assert [again[i] for i in range(50, 100)] == orders[1]  # asked for in another order


def test_the_order_is_the_one_of_every_version_so_far() -> None:
    # numpy 2.4, Philox of SeedSequence([1234, 0]) and [1234, 1]; a change here breaks the resume of every run there is
    order = SampleOrder(8, seed=1234)
    assert [order[i] for i in range(16)] == [1, 6, 2, 0, 3, 5, 7, 4, 3, 6, 7, 0, 5, 4, 1, 2]


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_the_ranks_share_the_samples_of_a_step(samples: Any, dp: int, micro: int) -> None:
    whole = step_data(samples)
    for iteration in range(4):  # goes over the end of the first pass
        seen: list[int] = []
        for rank in range(dp):
            mine = step_data(samples, dp=dp, ranks=(rank, 0), micro_batch_size=micro)
            batches = list(mine.micro_batches(iteration))
            assert len(batches) == 8 // dp // micro
            seen += [number for batch in batches for number in batch.sample_ids]
            assert all(batch.tokens.shape == (micro, SEQ_LENGTH) for batch in batches)
        assert sorted(seen) == sorted(whole.sample_ids(iteration))
    firsts = [next(step_data(samples, dp=2, ranks=(r, 0)).micro_batches(0)).sample_ids[0] for r in range(2)]
    assert firsts == whole.sample_ids(0)[:2]  # as Megatron's sampler: neighbours go to different ranks


def test_context_parallel_shares_carry_their_own_positions_labels_and_mask(samples: Any) -> None:
    (whole,) = step_data(samples, micro_batch_size=8).micro_batches(2)
    for rank in range(2):
        (mine,) = step_data(samples, cp=2, ranks=(0, rank), micro_batch_size=8).micro_batches(2)
        assert mine.sample_ids == whole.sample_ids
        for row in range(8):
            at = mine.positions[row]
            for name in ("tokens", "labels", "loss_mask", "positions"):
                assert torch.equal(getattr(mine, name)[row], getattr(whole, name)[row][at]), name


def test_a_pass_that_ends_inside_a_step_is_counted(samples: Any) -> None:
    data = step_data(samples)
    assert [data.passes_begun(i) for i in range(6)] == [1, 1, 2, 2, 2, 3]  # 20 samples, 8 a step
    flat = [number for i in range(5) for number in data.sample_ids(i)]
    assert sorted(flat[:SAMPLES]) == sorted(flat[SAMPLES:]) == list(range(SAMPLES))


def test_a_token_outside_the_vocabulary_is_refused_with_its_sample(samples: Any) -> None:
    data = step_data(samples, vocab=125)
    with pytest.raises(DataError, match=r"^here: sample \d+ holds token 125, the vocabulary has 125; build the data again"):
        list(data.micro_batches(0))


def test_samples_of_another_length_and_no_samples_are_refused(samples: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^here: samples have 64 tokens, stage s trains on 128; build the data again"):
        step_data(samples, seq_length=TokenCount(128))

    class Nothing:
        seq_length = SEQ_LENGTH

        def __len__(self) -> int:
            return 0

        cp_slice = None

    with pytest.raises(DataError, match=r"^here: no samples"):
        step_data(Nothing())


@pytest.mark.parametrize(("iteration", "ahead"), [(0, 1), (7, 1), (8, 0)])  # of 9 steps
def test_the_file_is_read_one_batch_ahead_and_not_beyond_the_last_step(samples: Any, iteration: int, ahead: int) -> None:
    asked: list[int] = []

    class Watched:
        seq_length = SEQ_LENGTH

        def __len__(self) -> int:
            return SAMPLES

        def cp_slice(self, index: int, cp_size: int, cp_rank: int) -> Any:
            asked.append(index)
            return samples.cp_slice(index, cp_size, cp_rank)

    data = step_data(Watched())
    count, size = data.stage.num_microbatches, data.stage.micro_batch_size
    steps = data.micro_batches(iteration)
    next(steps)
    wait_for_the_thread(data)
    assert asked == data.sample_ids(iteration)[: 2 * size]  # the first, and the second while the first is trained on
    assert len(list(steps)) == count - 1
    wait_for_the_thread(data)
    assert asked == [*data.sample_ids(iteration), *data.sample_ids(iteration + 1)[: ahead * size]]


def wait_for_the_thread(data: StepData) -> None:
    if data._ahead._ahead is not None:
        data._ahead._ahead[1].result(timeout=10)


def test_two_threads_may_ask_for_the_order_at_once() -> None:
    """5 samples and 64 a step: each step touches 13 passes. The training loop asks while the next step is read."""
    alone = [SampleOrder(5, seed=1)[index] for index in range(64 * 40)]
    order = SampleOrder(5, seed=1)
    assert all(sorted(alone[first : first + 5]) == list(range(5)) for first in range(0, len(alone), 5))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            asked = [
                threads.submit(lambda first=first: [order[first + i] for i in range(64)]) for first in range(0, len(alone), 64)
            ]
            found = [index for step in asked for index in step.result()]
    finally:
        sys.setswitchinterval(interval)
    assert found == alone


def test_an_order_makes_each_pass_once_and_keeps_few(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = SampleOrder._permutation
    monkeypatch.setattr(SampleOrder, "_permutation", lambda self, number: made.append(number) or whole(self, number))
    order = SampleOrder(10, seed=1)
    for step in range(0, 60, 6):
        for first in (step, step + 6, step):  # the step, what is read ahead, and the step again
            _ = [order[index] for index in range(first, first + 6)]
    assert made == list(range(7))
    assert order._order_of_pass.cache_info().currsize == 4
