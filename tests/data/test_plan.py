"""Length sampling, shares and order: exact in what they promise, and the same for any order of reading."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.plan import Plan, document_copies, plan_concatenated, plan_single
from mcore_longctx.data.shards import DocumentTable, TokenWriter, hash64
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import LengthSampling, TokenCount
from tests.data.conftest import make_table

PLAIN = LengthSampling()


def sampling(short: int, keep: float, long: int, repetition: float) -> LengthSampling:
    return LengthSampling(
        short_below=TokenCount(short), keep_probability=keep, long_above=TokenCount(long), repetition=repetition
    )


def table_of(
    lengths: list[int], sources: list[int] | None = None, count: int = 1, order: list[int] | None = None
) -> DocumentTable:
    """Documents named after their number, read in `order`."""
    sources = sources or [0] * len(lengths)
    documents = [(sources[i], f"d{i}", [(lengths[i], True)]) for i in (order or range(len(lengths)))]
    with TemporaryDirectory() as folder:
        return make_table(Path(folder) / "tokens", documents, count)[0]


def test_the_hash_is_the_reference_splitmix64() -> None:
    # first outputs of the reference implementation for seed 0 (https://prng.di.unimi.it/splitmix64.c)
    assert hash64(np.zeros(1, np.int64)).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0x6E789E6AA1B965F4]


def test_short_documents_are_kept_and_long_ones_repeated_at_the_given_rates() -> None:
    lengths = [10] * 20_000 + [100] * 2_000 + [101] * 2_000 + [200] * 2_000 + [201] * 20_000
    copies = document_copies(table_of(lengths), sampling(100, 0.3, 200, 2.25), seed=5)
    names = table_of(lengths).length
    short, middle, long = (copies[names < 100], copies[(names >= 100) & (names <= 200)], copies[names > 200])
    assert set(short.tolist()) == {0, 1}
    assert (middle == 1).all()
    assert set(long.tolist()) == {2, 3}
    # five standard deviations of a binomial of 20,000
    assert abs(short.mean() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert abs(long.mean() - 2.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


def test_whole_weights_leave_nothing_to_chance() -> None:
    table = table_of([10, 300] * 50)
    copies = document_copies(table, sampling(100, 0.0, 200, 3.0), seed=1)
    assert copies.tolist() == [0 if length == 10 else 3 for length in table.length]


def pieces(plan: Plan, table: DocumentTable) -> list[tuple[str, int, int]]:
    return [(table.ids[d], s, n) for d, s, n in zip(plan.document, plan.start, plan.length, strict=True)]


@given(data=st.data(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), seed=st.integers(-5, 2**70))
@settings(deadline=None)
def test_the_plan_does_not_depend_on_the_order_of_reading(data: st.DataObject, lengths: list[int], seed: int) -> None:
    sources = [i % 2 for i in range(len(lengths))]
    shuffled = data.draw(st.permutations(range(len(lengths))))
    one, other = table_of(lengths, sources, 2), table_of(lengths, sources, 2, order=shuffled)
    how = sampling(10, 0.5, 20, 1.5)
    for budget in (None, 50):
        plans = [
            plan_concatenated(table, how, None, seed=seed, separator_length=2, token_budget=budget) for table in (one, other)
        ]
        assert pieces(plans[0], one) == pieces(plans[1], other)
        plans = [plan_single(table, how, None, seed=seed, seq_length=4, sample_budget=budget) for table in (one, other)]
        assert pieces(plans[0], one) == pieces(plans[1], other)


def test_documents_of_one_id_are_decided_one_by_one_and_in_any_order(tmp_path: Path) -> None:
    decided = []
    for order in (range(1, 201), range(200, 0, -1)):
        with TokenWriter(tmp_path / "tokens", np.dtype("<i4"), ["books"]) as writer:
            for length in order:
                writer.add(0, "same", [(np.full(length, length, np.int32), True)])
            table = writer.table()
        copies = document_copies(table, sampling(1000, 0.5, 1000, 1.0), seed=3)
        decided.append(dict(zip(table.length.tolist(), copies.tolist(), strict=True)))
    assert decided[0] == decided[1]
    assert 60 < sum(decided[0].values()) < 140


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_without_a_budget_every_copy_is_laid_out_once_and_whole(lengths: list[int], seed: int) -> None:
    table, how = table_of(lengths), sampling(10, 0.5, 20, 2.5)
    plan = plan_concatenated(table, how, None, seed=seed, separator_length=2, token_budget=None)
    assert np.bincount(plan.document, minlength=len(table)).tolist() == document_copies(table, how, seed).tolist()
    assert (plan.start == 0).all()
    assert (plan.length == table.length[plan.document]).all()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=40),
    shares=st.tuples(*[st.floats(0.05, 1.0)] * 3),
    budget=st.none() | st.integers(1, 500),
    separator=st.integers(0, 3),
)
@settings(deadline=None)
def test_shares_hold_to_a_token(lengths, shares, budget, separator) -> None:
    lengths = [*lengths, (7, 0), (9, 1), (30, 2)]  # none without a document
    table = table_of([n for n, _ in lengths], [s for _, s in lengths], 3)
    plan = plan_concatenated(table, PLAIN, shares, seed=1, separator_length=separator, token_budget=budget)
    cost = np.bincount(table.source[plan.document], weights=plan.length + separator, minlength=3)
    have = np.bincount(table.source, weights=table.length + separator, minlength=3)
    fraction = np.array(shares) / sum(shares)
    total = min((have / fraction).min(), np.inf if budget is None else budget + separator)
    # the budget ends inside a document; at least one token of it is kept
    assert (cost >= np.floor(fraction * total - 1e-6) - 1).all()
    assert (cost <= fraction * total + 2 + separator).all()
    assert (cost <= have).all()
    if budget is not None and total == budget + separator:
        assert cost.sum() - separator >= budget
    assert (np.bincount(plan.document) <= 1).all()


def test_a_budget_without_shares_keeps_the_mixture() -> None:
    # the second source is one long document: drawing whole documents would take all of it or nothing
    table = table_of([50] * 40 + [6000], [0] * 40 + [1], 2)
    plan = plan_concatenated(table, PLAIN, None, seed=1, separator_length=0, token_budget=1000)
    assert np.bincount(table.source[plan.document], weights=plan.length).tolist() == [250, 750]


def test_a_budget_without_shares_is_met() -> None:
    table = table_of([50] * 40)
    plan = plan_concatenated(table, PLAIN, None, seed=1, separator_length=3, token_budget=1000)
    assert plan.length.sum() + 3 * (len(plan) - 1) == 1000
    plan = plan_concatenated(table, PLAIN, None, seed=1, separator_length=3, token_budget=10**9)
    assert plan.length.tolist() == [50] * 40


def test_sources_are_mixed_not_laid_one_behind_the_other() -> None:
    # of the first source a tenth is wanted: its smallest hashes; they must not come first in the order too
    table = table_of([10] * 2000, [i % 2 for i in range(2000)], 2)
    plan = plan_concatenated(table, PLAIN, [0.1, 0.9], seed=1, separator_length=0, token_budget=None)
    at = np.flatnonzero(table.source[plan.document] == 0) / len(plan)
    assert abs(at.mean() - 0.5) < 5 * (1 / 12 / len(at)) ** 0.5


def test_another_seed_decides_otherwise() -> None:
    table = table_of([10] * 50)
    one, other = (plan_concatenated(table, PLAIN, None, seed=s, separator_length=0, token_budget=None) for s in (1, 2))
    assert one.document.tolist() != other.document.tolist()


def test_a_share_of_a_source_that_holds_nothing_is_refused() -> None:
    table = table_of([10, 500], [0, 1], 2)
    with pytest.raises(DataError, match="source source0: nothing is left of this source after length sampling; change its share"):
        plan_concatenated(table, sampling(100, 0.0, 200, 1.0), [1, 1], seed=1, separator_length=0, token_budget=None)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), seq_length=st.integers(1, 20))
@settings(deadline=None)
def test_single_packing_cuts_each_document_alone(lengths: list[int], seq_length: int) -> None:
    table = table_of(lengths)
    plan = plan_single(table, PLAIN, None, seed=1, seq_length=seq_length, sample_budget=None)
    assert (plan.length == seq_length).all()
    expected = {(d, k * seq_length) for d in range(len(table)) for k in range(int(table.length[d]) // seq_length)}
    assert sorted(zip(plan.document.tolist(), plan.start.tolist(), strict=True)) == sorted(expected)


def test_single_packing_keeps_shares_and_budget() -> None:
    table = table_of([100] * 30, [i % 2 for i in range(30)], 2)
    plan = plan_single(table, PLAIN, [3, 1], seed=1, seq_length=10, sample_budget=80)
    assert np.bincount(table.source[plan.document]).tolist() == [60, 20]
    plan = plan_single(table, PLAIN, [3, 1], seed=1, seq_length=10, sample_budget=None)
    assert np.bincount(table.source[plan.document]).tolist() == [150, 50]
