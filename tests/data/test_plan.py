"""The plan: exact in what it promises, the same for any order of reading, and against a plain plan that goes token by token."""

import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files.shards import DocumentTable, hash64
from mcore_longctx.data.planning import draw as draw_module
from mcore_longctx.data.planning import layout as layout_module
from mcore_longctx.data.planning import lengths as lengths_module
from mcore_longctx.data.planning import plan as plan_module
from mcore_longctx.data.planning.draw import document_copies, draw, hash_order
from mcore_longctx.data.planning.layout import Separator
from mcore_longctx.data.planning.plan import make_chat_plan, make_plan, plan_text, read_plan
from mcore_longctx.data.planning.shares import apportion
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe.schema import ChunkSet, DataSection, DocumentSource, LengthSampling, TokenCount
from tests.data.reference_plan import (
    CHATS,
    Doc,
    Token,
    copies_of,
    make_docs,
    make_table,
    packed,
    read_tokens,
    reference_plan,
    split_mix,
)

SEPARATORS = [
    Separator(),
    Separator(after=(901, 902)),
    Separator(after=(901,), loss=False),
    Separator(before=(800,), after=(901,), loss=False),
]


@pytest.fixture(autouse=True, scope="module")
def no_picture() -> Iterator[None]:
    """A picture costs a second and waiting for the disk more, and hundreds of plans are made here; test_lengths.py draws it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr(np.memmap, "flush", lambda self: None)
        patch.setattr(plan_module, "plot_lengths", lambda lengths, path, **_: path.write_bytes(b""))
        yield


def sampling(short: int = 4096, keep: float = 1.0, long: int = 8192, repetition: float = 1.0, **more: int) -> LengthSampling:
    return LengthSampling(
        short_below=TokenCount(short),
        keep_probability=keep,
        long_above=TokenCount(long),
        repetition=repetition,
        **{name: TokenCount(value) for name, value in more.items()},
    )


def section_of(shares: list[float | None], chunks: dict[int, list[tuple[int, float | None]]] | None = None, **how) -> DataSection:
    sources = []
    for index, share in enumerate(shares):
        sets = tuple(ChunkSet(length=TokenCount(n), share=s) for n, s in (chunks or {}).get(index, []))
        sources.append(DocumentSource(name=f"source{index}", path=Path("x"), share=None if sets else share, chunks=sets))
    return DataSection(sources=tuple(sources), **how)


def planned(table: DocumentTable, section: DataSection, **how) -> tuple[list[list[Token]], dict]:
    with TemporaryDirectory() as folder:
        settings_ = {"name": "x", "seed": 1, "seq_length": 5, "separator": Separator()} | how
        made = make_plan(Path(folder) / "plan", table, section, **settings_)
        runs, facts = read_plan(Path(folder) / "plan")
        assert facts == made
        return read_tokens(runs, table), facts


def drawn(table: DocumentTable, section: DataSection, budget: int | None, *, separator: int = 0, seq_length: int = 10):
    return draw(table, section, seed=1, seq_length=seq_length, wrapping=separator, between=separator, token_budget=budget)


def held_by(table: DocumentTable, found, separator: int = 0) -> list[int]:
    """Tokens with separators that each source gives."""
    source = table.source[found.document]
    return np.bincount(source, found.length + separator, len(table.sources)).astype(int).tolist()


# ------------------------------------------------------------------ copies
def test_the_hash_is_the_reference_splitmix64() -> None:
    # first outputs of the reference implementation for seed 0 (https://prng.di.unimi.it/splitmix64.c)
    assert hash64(np.zeros(1, np.int64)).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0x6E789E6AA1B965F4]


def test_short_documents_are_kept_and_long_ones_repeated_at_the_given_rates() -> None:
    lengths = [10] * 20_000 + [100] * 2_000 + [101] * 2_000 + [200] * 2_000 + [201] * 20_000
    table = make_table(make_docs(lengths))
    copies = document_copies(table, sampling(100, 0.3, 200, 2.25), seed=5)
    short, middle, long = (
        copies[mask] for mask in (table.length < 100, (table.length > 99) & (table.length < 201), table.length > 200)
    )
    assert set(short.tolist()) == {0, 1}
    assert (middle == 1).all()
    assert set(long.tolist()) == {2, 3}
    # five standard deviations of a binomial of 20,000
    assert abs(short.mean() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert abs(long.mean() - 2.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


def test_whole_weights_leave_nothing_to_chance_and_lengths_outside_are_dropped() -> None:
    table = make_table(make_docs([10, 300, 4, 301] * 50))
    copies = document_copies(table, sampling(100, 0.0, 200, 3.0), seed=1)
    assert copies.tolist() == [0 if length < 100 else 3 for length in table.length]
    copies = document_copies(table, sampling(min_length=5, max_length=300), seed=1)
    assert copies.tolist() == [int(5 <= length <= 300) for length in table.length]


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_equal_hashes_are_ordered_by_all_bits_and_then_by_the_ties(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    upper = rng.integers(0, 4, 300, np.uint64) << np.uint64(60)  # few upper bits, so that lower ones must decide
    hashes = upper | rng.integers(0, 40, 300, np.uint64)
    copy, part = rng.integers(0, 3, 300), rng.permutation(300)
    found = hash_order(300, lambda rows: hashes[rows], copy, part)
    expected = sorted(range(300), key=lambda i: (int(hashes[i]), int(copy[i]), int(part[i])))
    assert found.tolist() == expected
    for count in (0, 1, 2):
        assert hash_order(count, lambda rows: hashes[rows], copy).tolist() == np.argsort(hashes[:count]).tolist()


# ------------------------------------------------------------------ whole plans
lengths_and_sources = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1)), min_size=1, max_size=20)


@given(
    rows=lengths_and_sources,
    packing=st.sampled_from(["concatenate", "single", "best_fit", "intact"]),
    separator=st.sampled_from(SEPARATORS),
    seq_length=st.integers(3, 24),
    seed=st.integers(-5, 2**70),
    limit=st.none() | st.integers(1, 3),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_the_plan_is_that_of_plain_python_for_any_order_of_reading(
    rows, packing, separator, seq_length, seed, limit, data
) -> None:
    flags = {
        number: [(1, False), (length - 1, True)] for number, (length, _) in enumerate(rows) if length > 1 and number % 3 == 0
    }
    docs = make_docs([length for length, _ in rows], [source for _, source in rows], flags)
    order = data.draw(st.permutations(range(len(docs))))
    section = section_of([None, None], packing=packing, length_sampling=sampling(10, 0.5, 20, 1.5, min_length=2, max_length=38))
    expected = reference_plan(docs, section, seed, seq_length, separator)[:limit]
    how = {"seed": seed, "seq_length": seq_length, "separator": separator, "max_samples": limit}
    tables = [make_table(docs, sources=2), make_table(docs, order, sources=2)]
    if not expected:
        with pytest.raises(DataError, match=r"left for packing 'single'|not one sample of"):
            planned(tables[0], section, **how)
        return
    plans = [planned(table, section, **how) for table in tables]
    assert plans[0][0] == expected
    assert plans[1][0] == expected
    names = ("plan_sha256", "lengths_sha256", "shares", "left_out", "lengths")
    assert [plans[0][1][name] for name in names] == [plans[1][1][name] for name in names]


@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=20),
    packing=st.sampled_from(["concatenate", "single", "best_fit", "intact"]),
    separator=st.sampled_from(SEPARATORS),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_chunks_are_of_one_document_and_lengths_are_disjoint(rows, packing, separator, data) -> None:
    docs = make_docs([length for length, _ in rows], [source for _, source in rows])
    chunks = {0: [(24, None), (6, None)], 1: [(12, None)]}
    section = section_of([None] * 3, chunks, mode="prolong", packing=packing, length_sampling=sampling(8, 0.5, 20, 1.5))
    expected = reference_plan(docs, section, 3, 24, separator)
    assume(expected)
    table = make_table(docs, data.draw(st.permutations(range(len(docs)))), sources=3)
    samples, _ = planned(table, section, seed=3, seq_length=24, separator=separator)
    assert samples == expected
    by_key = {doc.key: doc for doc in docs}
    for sample in samples:
        keys = [token[0] for token in sample]
        sources = {by_key[key].source for key in keys if isinstance(key, int)}
        if sources <= {0, 1}:  # no separator, no padding, exact pieces
            assert len(sources) == 1
            length = {0: 24 if by_key[keys[0]].length >= 24 else 6, 1: 12}[sources.pop()]
            for at in range(0, 24, length):
                piece = sample[at : at + length]
                assert len({key for key, *_ in piece}) == 1
                assert [token[1] for token in piece] == list(range(piece[0][1], piece[0][1] + length))
                assert (by_key[piece[0][0]].length >= 24) == (length == 24) or length == 12
        else:
            assert sources == {2}


def test_a_chunk_that_does_not_divide_the_sample_is_refused() -> None:
    table = make_table(make_docs([50]))
    section = section_of([None], {0: [(7, None)]}, mode="prolong")
    with pytest.raises(DataError, match="source source0: seq_length 24 is no multiple of the chunk length 7; choose chunks"):
        planned(table, section, seq_length=24)


@given(rows=lengths_and_sources, seed=st.integers(0, 1000), packing=st.sampled_from(["concatenate", "best_fit"]))
@settings(deadline=None, max_examples=60)
def test_every_kept_token_is_there_exactly_as_often_as_promised(rows, seed, packing) -> None:
    docs = make_docs([length for length, _ in rows], [source for _, source in rows])
    how = sampling(10, 0.5, 20, 2.5)
    copies = {doc.key: copies_of(doc, how, seed) for doc in docs}
    assume(any(copies.values()))
    # samples of one token: nothing is lost at the end
    samples, facts = planned(
        make_table(docs, sources=2), section_of([None, None], packing=packing, length_sampling=how), seed=seed, seq_length=1
    )
    found = Counter(token[:2] for sample in samples for token in sample)
    assert found == {(doc.key, at): copies[doc.key] for doc in docs if copies[doc.key] for at in range(doc.length)}
    assert sum(row["tail"]["tokens"] for row in facts["left_out"].values()) == 0


@given(
    rows=lengths_and_sources,
    budget=st.none() | st.integers(20, 400),
    repeat=st.booleans(),
    packing=st.sampled_from(["concatenate", "single", "best_fit", "intact"]),
)
@settings(deadline=None, max_examples=60)
def test_the_account_of_what_was_left_out_adds_up(rows, budget, repeat, packing) -> None:
    docs = make_docs([length for length, _ in rows], [source for _, source in rows])
    section = section_of(
        [None, None],
        packing=packing,
        repeat_to_fill=repeat,
        length_sampling=sampling(8, 0.5, 20, 2.0, min_length=3, max_length=38),
    )
    try:
        samples, facts = planned(
            make_table(docs, sources=2), section, separator=Separator(after=(901,)), token_budget=budget, seq_length=7
        )
    except DataError:
        return
    by_key = {doc.key: doc for doc in docs}
    used = Counter(by_key[token[0]].source for sample in samples for token in sample if isinstance(token[0], int))
    for index in range(2):
        row = facts["left_out"][f"source{index}"]
        mine = [doc for doc in docs if doc.source == index]
        assert row["in_samples"]["tokens"] == used[index]
        drawn_tokens = sum(doc.length * copies_of(doc, section.length_sampling, 1) for doc in mine)
        assert row["drawn"]["tokens"] == drawn_tokens
        assert (
            drawn_tokens
            - row["remainder"]["tokens"]
            - row["cut"]["tokens"]
            - row["over_budget"]["tokens"]
            + row["repeated"]["tokens"]
            - row["tail"]["tokens"]
            == used[index]
        )
        for name, chosen in (
            ("read", mine),
            ("too_short", [doc for doc in mine if doc.length < 3]),
            ("too_long", [doc for doc in mine if doc.length > 38]),
            ("not_drawn", [doc for doc in mine if 3 <= doc.length <= 38 and not copies_of(doc, section.length_sampling, 1)]),
        ):
            assert row[name] == {"documents": len(chosen), "tokens": sum(doc.length for doc in chosen)}
        assert all(value >= 0 for counts in row.values() for value in counts.values())


# ------------------------------------------------------------------ shares and budget
@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=40),
    shares=st.tuples(*[st.floats(0.05, 1.0)] * 3),
    budget=st.none() | st.integers(1, 500),
    separator=st.integers(0, 3),
)
@settings(deadline=None)
def test_shares_hold_to_a_token(rows, shares, budget, separator) -> None:
    rows = [*rows, (7, 0), (9, 1), (30, 2)]  # none without a document
    table = make_table(make_docs([n for n, _ in rows], [s for _, s in rows]), sources=3)
    have = np.bincount(table.source, weights=table.length + separator, minlength=3).astype(int).tolist()
    fraction = [Fraction(share) / sum(map(Fraction, shares)) for share in shares]
    possible = min(held / part for held, part in zip(have, fraction, strict=True))
    section = section_of(list(shares))
    total = math.floor(possible) if budget is None else budget + separator
    if total > possible:
        exact = [part * total for part in fraction]
        if any(math.floor(part) > held for part, held in zip(exact, have, strict=True)):
            with pytest.raises(DataError, match="they would be taken"):
                drawn(table, section, budget, separator=separator)
        return
    found = drawn(table, section, budget, separator=separator)
    for cost, held, part in zip(held_by(table, found, separator), have, fraction, strict=True):
        # parts are rounded to whole tokens; of the document that is cut at least one token and its separator stay
        assert math.floor(part * total) <= cost <= min(held, math.ceil(part * total) + separator)
    assert (found.length >= 1).all()
    if separator == 0:
        assert int(found.length.sum()) == total
    assert (np.bincount(found.document) <= 1).all()


@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=8), total=st.integers(0, 10**13))
def test_parts_add_up_and_are_off_by_less_than_one(weights, total) -> None:
    assume(sum(weights))
    parts = apportion([Fraction(weight) for weight in weights], total)
    assert sum(parts) == total
    assert all(abs(part - Fraction(weight * total, sum(weights))) < 1 for part, weight in zip(parts, weights, strict=True))


def test_a_budget_without_shares_keeps_the_mixture() -> None:
    # the second source is one long document: drawing whole documents would take all of it or nothing
    table = make_table(make_docs([50] * 40 + [6000], [0] * 40 + [1]), sources=2)
    assert held_by(table, drawn(table, section_of([None, None]), 1000)) == [250, 750]


def test_a_budget_without_shares_is_met() -> None:
    table = make_table(make_docs([50] * 40))
    found = drawn(table, section_of([None]), 1000, separator=3)
    assert int(found.length.sum()) + 3 * (len(found.length) - 1) == 1000


def test_fu_keeps_the_mixture_that_was_read_and_ultralong_that_after_length_sampling() -> None:
    # half of the first source is short and dropped; both hold 6,000 tokens as read
    table = make_table(make_docs([10] * 300 + [300] * 10 + [300] * 20, [0] * 310 + [1] * 20), sources=2)
    how = sampling(100, 0.0, 200, 1.0)
    got = {
        mode: held_by(table, drawn(table, section_of([None] * 2, mode=mode, length_sampling=how), 3000))
        for mode in ("fu", "ultralong")
    }
    assert got == {"fu": [1500, 1500], "ultralong": [1000, 2000]}
    # without a budget fu takes what the scarcer source allows, ultralong everything
    got = {
        mode: held_by(table, drawn(table, section_of([None] * 2, mode=mode, length_sampling=how), None))
        for mode in ("fu", "ultralong")
    }
    assert got == {"fu": [3000, 3000], "ultralong": [3000, 6000]}


def test_given_shares_win_over_the_mode() -> None:
    table = make_table(make_docs([10] * 200, [i % 2 for i in range(200)]), sources=2)
    for mode in ("fu", "ultralong", "prolong"):
        assert held_by(table, drawn(table, section_of([3, 1], mode=mode), 400)) == [300, 100]


def test_single_packing_keeps_shares_and_budget_in_whole_samples() -> None:
    table = make_table(make_docs([100] * 30, [i % 2 for i in range(30)]), sources=2)
    for budget, expected in ((809, [60, 20]), (None, [150, 50])):
        found = drawn(table, section_of([3, 1], packing="single"), budget)
        assert [len(chunks.document) for chunks in found.chunks] == expected


def test_shares_of_chunks_and_packed_sources_hold_in_samples() -> None:
    lengths, sources = [100] * 60 + [40] * 100 + [7] * 900, [0] * 60 + [0] * 100 + [1] * 900
    table = make_table(make_docs(lengths, sources), sources=2)
    section = section_of([None, 0.5], {0: [(80, 0.3), (20, 0.2)]}, mode="prolong")
    samples, facts = planned(table, section, seq_length=80, token_budget=1600, separator=Separator(after=(901,)), max_samples=20)
    assert len(samples) == 20
    kinds = Counter(
        "packed" if ("literal", 901, True) in sample else len({token[0] for token in sample}) == 1 for sample in samples
    )
    assert kinds == {"packed": 10, True: 6, False: 4}
    rows = [(row["source"], row["chunk_length"], row["share_asked"]) for row in facts["shares"]]
    assert rows == [("source0", 80, 0.3), ("source0", 20, 0.2), ("source1", None, 0.5)]
    assert [row["tokens_got"] for row in facts["shares"][:2]] == [480, 320]
    assert "chunks of 80" in plan_text(facts)


def test_a_share_of_a_source_that_holds_nothing_is_refused() -> None:
    table = make_table(make_docs([10, 500], [0, 1]), sources=2)
    with pytest.raises(
        DataError, match="source source0: no document is left of this source after length sampling; keep more short documents"
    ):
        drawn(table, section_of([1, 1], length_sampling=sampling(100, 0.0, 200, 1.0)), None)


def test_a_source_too_small_for_its_share_says_what_it_lacks_and_the_ways_out() -> None:
    table = make_table(make_docs([10] * 10 + [10] * 90, [0] * 10 + [1] * 90), sources=2)
    message = (
        "source source0: holds 100 tokens after length sampling, its share 0.5 of the token budget asks for 400: they would be taken "
        "4.00 times; set repeat_to_fill: true, lower its share, or lower the budget to at most 200 tokens"
    )
    with pytest.raises(DataError) as caught:
        drawn(table, section_of([1, 1]), 800)
    assert str(caught.value) == message
    drawn(table, section_of([1, 1]), 200)
    with pytest.raises(DataError):
        drawn(table, section_of([1, 1]), 202)
    with pytest.raises(
        DataError,
        match=r"0.1 of the token budget asks for 101: .* 1.01 times \(and 1 more would run short\); set repeat_to_fill: true, or lower",
    ):
        drawn(table, section_of([None, None]), 1010)
    with pytest.raises(DataError, match=r"holds 1,000 tokens after length sampling, the token budget asks for 1,010"):
        drawn(make_table(make_docs([10] * 100)), section_of([None]), 1010)
    with pytest.raises(DataError, match=r"5.00 times \(and 1 more would run short\)"):
        drawn(table, section_of([None, None]), 5000)


@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=30),
    shares=st.none() | st.tuples(*[st.floats(0.05, 1.0)] * 3),
    separator=st.integers(0, 3),
    packing=st.sampled_from(["concatenate", "single", "intact", "best_fit"]),
    chunks=st.booleans(),
)
@settings(deadline=None)
def test_the_largest_budget_that_an_error_names_is_enough_and_one_more_is_not(rows, shares, separator, packing, chunks) -> None:
    rows = [*rows, (27, 0), (29, 1), (30, 2)]
    table = make_table(make_docs([n for n, _ in rows], [s for _, s in rows]), sources=3)
    sets = {0: [(5, shares[0] if shares else None)]} if chunks else None
    section = section_of(list(shares) if shares else [None] * 3, sets, packing=packing, mode="prolong")
    with pytest.raises(DataError) as caught:
        drawn(table, section, 10**6, separator=separator)
    largest = int(str(caught.value).rsplit("at most ", 1)[1].split()[0].replace(",", ""))
    drawn(table, section, largest, separator=separator)
    step = 10 if chunks or packing == "single" else 1
    with pytest.raises(DataError, match="they would be taken"):
        drawn(table, section, largest + step, separator=separator)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    times=st.floats(0.1, 4.0),
    packing=st.sampled_from(["concatenate", "single"]),
)
@settings(deadline=None)
def test_a_source_that_is_taken_again_is_taken_in_whole_rounds(lengths, times, packing) -> None:
    docs = make_docs([*lengths, 30])
    how = sampling(10, 0.5, 20, 1.5)
    table = make_table(docs)
    section = section_of([None], packing=packing, repeat_to_fill=True, length_sampling=how)
    unit = 10 if packing == "single" else 1
    copies = {doc.key: copies_of(doc, how, 1) for doc in docs}
    held = sum(copies[doc.key] * (doc.length // unit) for doc in docs)
    assume(int(held * times) > 0)
    found = drawn(table, section, int(held * times) * unit)
    chunks = found.chunks[0] if packing == "single" else None
    document = chunks.document if chunks else found.document
    got = len(chunks.document) if chunks else int(found.length.sum())
    assert got == int(held * times)
    whole, taken = int(held * times) // held, Counter(document.tolist())
    for row in range(len(table)):
        once = copies[int(table.key[row])] * (int(table.length[row]) // 10 if chunks else 1)
        assert whole * once <= taken[row] <= (whole + 1) * once
    # at most one document is cut
    if not chunks:
        assert int((found.length < table.length[found.document]).sum()) <= 1


@pytest.mark.parametrize("packing", ["concatenate", "single"])
def test_copies_of_a_document_are_drawn_apart(packing: str) -> None:
    # repeated by length sampling and again by repeat_to_fill: side by side only by accident, about once in the number of documents
    table = make_table(make_docs([10] * 300))
    section = section_of([None], packing=packing, repeat_to_fill=True, length_sampling=sampling(1, 1.0, 1, 2.0))
    found = drawn(table, section, 300 * 10 * 6)
    document = found.chunks[0].document if packing == "single" else found.document
    assert np.bincount(document).tolist() == [6] * 300
    assert int((document[1:] == document[:-1]).sum()) < 25  # 5 are expected


def test_sources_are_mixed_not_laid_one_behind_the_other() -> None:
    # of the first source a tenth is wanted: its smallest hashes; they must not come first in the order too
    table = make_table(make_docs([10] * 2000, [i % 2 for i in range(2000)]), sources=2)
    found = drawn(table, section_of([0.1, 0.9]), None)
    at = np.flatnonzero(table.source[found.document] == 0) / len(found.document)
    assert abs(at.mean() - 0.5) < 5 * (1 / 12 / len(at)) ** 0.5


def test_another_seed_decides_otherwise_and_the_same_seed_the_same() -> None:
    table = make_table(make_docs([10] * 50))
    how = {"seq_length": 20}
    hashes = [planned(table, section_of([None]), seed=seed, **how)[1]["plan_sha256"] for seed in (1, 2, 1)]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("packing", ["concatenate", "single", "best_fit", "intact"])
def test_blocks_change_nothing(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    flags = {number: [(5, False), (20, True)] for number in range(0, 90, 7)}
    lengths = [25 if number in flags else int(rng.integers(1, 60)) for number in range(90)]
    table = make_table(make_docs(lengths, [number % 3 for number in range(90)], flags), sources=3)
    section = section_of([0.5, 0.3, 0.2], packing=packing, length_sampling=sampling(10, 0.5, 30, 1.5), repeat_to_fill=True)
    how = {"name": "x", "seed": 3, "seq_length": 16, "separator": Separator(after=(1, 2, 3)), "token_budget": 1600}
    at_once = make_plan(tmp_path / "at once", table, section, **how)
    for module, name in (
        (draw_module, "_BLOCK"),
        (lengths_module, "_BLOCK"),
        (layout_module, "_BLOCK"),
        (layout_module, "_ROWS"),
    ):
        monkeypatch.setattr(module, name, 4)
    monkeypatch.setattr(layout_module, "_RELEASE", 2)
    assert make_plan(tmp_path / "in blocks", table, section, **how) == at_once


@pytest.mark.parametrize("rows", [1, 2, 3, 1 << 18])
def test_samples_in_which_nothing_is_learned_are_counted_and_said(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "_ROWS", rows)
    # learned: every second token of a document, all of it, the middle, nothing
    segments = {0: [(1, number % 2 == 0) for number in range(23)], 2: [(4, False), (2, True), (9, False)], 3: [(12, False)]}
    table = make_table(make_docs([23, 7, 15, 12], segments=segments))
    samples, facts = planned(table, section_of([None]), separator=Separator(after=(901,), loss=False))
    unlearned = sum(not any(loss for _, _, loss in sample) for sample in samples)
    assert facts["samples_without_loss"] == unlearned > 0
    assert f"nothing is learned in {unlearned} of {len(samples)} samples: a training step" in plan_text(facts)
    _, all_learned = planned(make_table(make_docs([23, 7, 15, 12])), section_of([None]))
    assert all_learned["samples_without_loss"] == 0
    assert "nothing is learned" not in plan_text(all_learned)


# ------------------------------------------------------------------ chats
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=25), data=st.data())
@settings(deadline=None, max_examples=50)
def test_chats_are_whole_first_fit_in_an_order_of_hashes(lengths, data) -> None:
    docs = make_docs(lengths, segments={number: [(length, number % 2 == 0)] for number, length in enumerate(lengths)})
    assume(min(lengths) <= 10)
    table = make_table(docs, data.draw(st.permutations(range(len(docs)))))
    order = sorted((doc for doc in docs if doc.length <= 10), key=lambda doc: split_mix(7, CHATS, doc.key))
    with TemporaryDirectory() as name:
        facts = make_chat_plan(Path(name), table, name="chats", seed=7, seq_length=10)
        runs, read = read_plan(Path(name))
        assert read == facts
        assert read_tokens(runs, table) == packed([doc.tokens() for doc in order], Separator(), "first_fit", 10)
    too_long = [length for length in lengths if length > 10]
    assert facts["left_out"]["source0"]["too_long"] == {"documents": len(too_long), "tokens": sum(too_long)}
    if too_long:
        assert "longer than 10 tokens" in plan_text(facts)


def test_chats_that_are_all_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chats: no conversation of at most 10 tokens"):
        make_chat_plan(tmp_path, make_table(make_docs([11])), name="chats", seed=7, seq_length=10)


# ------------------------------------------------------------------ files
def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(folder: Path, seed: int = 1) -> dict:
    table = make_table(make_docs([40] * 20))
    return make_plan(folder, table, section_of([None]), name="x", seed=seed, seq_length=16, separator=Separator(after=(9,)))


def test_a_plan_is_read_back_and_the_same_twice(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two")
    assert files(tmp_path / "one") == ["lengths.json", "lengths.png", "plan.json", "plan.runs"]
    for name in ("plan.json", "plan.runs", "lengths.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    make(tmp_path / "two", seed=2)  # replaced
    assert read_plan(tmp_path / "two")[1]["seed"] == 2


def pack_by(folder: Path, facts: dict) -> None:
    """A manifest of packed data beside the plan."""
    write_manifest(folder.parent, "data", files=(), name="long", plan_sha256=facts["plan_sha256"])


OTHER_SETTINGS = [
    {"seed": 2},
    {"seq_length": 8},
    {"separator": Separator(after=(8,))},
    {"token_budget": 64},
    {"max_samples": 3},
    {"section": section_of([None], packing="best_fit")},
    {"section": section_of([1.0])},
    {"table": make_table(make_docs([40] * 19 + [41]))},
]


def test_the_same_plan_is_not_made_twice_and_another_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plan"
    how = {"table": make_table(make_docs([40] * 20)), "section": section_of([None]), "name": "x", "seed": 1, "seq_length": 16}
    how |= {"separator": Separator(after=(9,))}
    facts = make_plan(folder, **how)
    made: list[Path] = []
    lay_out = plan_module.lay_out
    monkeypatch.setattr(plan_module, "lay_out", lambda path, *args, **named: (made.append(path), lay_out(path, *args, **named)))
    other_place = DataSection(sources=(DocumentSource(name="source0", path=Path("y")),), max_bad=3)
    for same in ({}, {"name": "y"}, {"max_samples": facts["samples"]}, {"section": other_place}):
        assert make_plan(folder, **how | same) == facts
    assert not made
    for number, other in enumerate(OTHER_SETTINGS):
        assert make_plan(folder, **how | other) != facts
        assert len(made) == 2 * number + 1
        assert make_plan(folder, **how)["plan_sha256"] == facts["plan_sha256"]
    assert make_chat_plan(folder, how["table"], name="x", seed=1, seq_length=64)["method"] == "sft"
    made.clear()
    chats = make_chat_plan(folder, how["table"], name="x", seed=1, seq_length=64)
    assert not made
    assert make_chat_plan(folder, how["table"], name="x", seed=2, seq_length=64) != chats
    (folder / "lengths.png").unlink()
    make_chat_plan(folder, how["table"], name="x", seed=2, seq_length=64)
    assert (folder / "lengths.png").exists()


def test_a_plan_that_was_cut_at_its_limit_is_another_one_without_it(tmp_path: Path) -> None:
    how = {"table": make_table(make_docs([40] * 20)), "section": section_of([None]), "name": "x", "seed": 1, "seq_length": 16}
    how |= {"separator": Separator()}
    assert make_plan(tmp_path / "plan", **how, max_samples=3)["samples"] == 3
    assert make_plan(tmp_path / "plan", **how, max_samples=4)["samples"] == 4
    assert make_plan(tmp_path / "plan", **how)["samples"] == 50
    assert make_plan(tmp_path / "plan", **how, max_samples=4)["samples"] == 4


@pytest.mark.parametrize("other", OTHER_SETTINGS, ids=lambda other: next(iter(other)))
def test_the_plan_of_packed_data_stays_as_it_is(tmp_path: Path, other: dict) -> None:
    folder = tmp_path / "plan"
    how = {"table": make_table(make_docs([40] * 20)), "section": section_of([None]), "name": "x", "seed": 1, "seq_length": 16}
    how |= {"separator": Separator(after=(9,))}
    facts = make_plan(folder, **how)
    pack_by(folder, facts)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ConfigError, match="holds packed data 'long', made by a plan with other settings; use another output folder"
    ):
        make_plan(folder, **how | other)
    with pytest.raises(ConfigError, match="holds packed data 'long'"):
        make_chat_plan(folder, how["table"], name="x", seed=1, seq_length=64)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert make_plan(folder, **how) == facts


def test_a_plan_that_the_packed_data_was_not_made_by_is_replaced(tmp_path: Path) -> None:
    pack_by(tmp_path / "plan", make(tmp_path / "plan"))
    packed_by = read_plan(tmp_path / "plan")[1]["plan_sha256"]
    (tmp_path / "plan" / "plan.json").unlink()
    make(tmp_path / "plan", seed=2)
    assert make(tmp_path / "plan")["plan_sha256"] == packed_by


def test_what_a_killed_plan_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], check=True, capture_output=True, text=True)
    pid = int(dead.stdout)
    mine = [tmp_path / f"{name}.partial-{socket.gethostname()}-{pid}" for name in ("plan.runs", "lengths.png")]
    others = [tmp_path / f"plan.runs.partial-{host}" for host in (f"elsewhere-{pid}", f"{socket.gethostname()}-{os.getppid()}")]
    for path in (*mine, *others):
        path.write_bytes(b"x")
    make(tmp_path)
    assert [path.exists() for path in (*mine, *others)] == [False, False, True, True]


@pytest.mark.parametrize("seq_length", [0, -1, 2**31])
def test_a_length_that_the_index_cannot_hold_is_refused(tmp_path: Path, seq_length: int) -> None:
    table = make_table(make_docs([40] * 20))
    with pytest.raises(ConfigError, match=r"seq_length is [\d,-]+, expected 1 to 2,147,483,647"):
        make_plan(tmp_path, table, section_of([None]), name="x", seed=1, seq_length=seq_length, separator=Separator())
    with pytest.raises(ConfigError, match=r"seq_length is [\d,-]+, expected 1 to 2,147,483,647"):
        make_chat_plan(tmp_path, table, name="x", seed=1, seq_length=seq_length)
    assert not files(tmp_path)


def test_a_plan_that_is_not_whole_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no finished plan here; run `data plan`"):
        read_plan(tmp_path)
    make(tmp_path)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("lay_out", "open_runs", "plot_lengths", "write_atomic"):
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, step, killed)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path, seed=2)
        assert not (tmp_path / "plan.json").exists()
        assert not any("partial" in name for name in files(tmp_path))
        with pytest.raises(DataError, match="no finished plan here"):
            read_plan(tmp_path)
        make(tmp_path)


def test_a_plan_of_other_runs_or_changed_by_hand_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    path, runs = tmp_path / "plan.json", tmp_path / "plan.runs"
    whole = path.read_text(encoding="utf-8")
    for changed in (whole.replace('"seed": 1', '"seed": 2'), whole[:-20], "[]", "{}", "", "null", '{"checksum": 3}'):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(DataError, match=r"plan\.json: damaged"):
            read_plan(tmp_path)
    path.write_text(whole, encoding="utf-8")
    make(tmp_path / "other", seed=2)
    runs.write_bytes((tmp_path / "other" / "plan.runs").read_bytes())
    with pytest.raises(DataError, match=r"plan.runs: is not the file that plan.json was written with; run `data plan` again"):
        read_plan(tmp_path)
    runs.write_bytes(runs.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"plan\.runs: damaged"):
        read_plan(tmp_path)


def test_what_intact_cuts_off_has_a_reason_of_its_own(tmp_path: Path) -> None:
    table = make_table(make_docs([50] * 3 + [5] * 8))
    how = {"name": "demo", "seed": 1, "seq_length": 20}
    intact = make_plan(tmp_path / "a", table, section_of([None], packing="intact"), separator=Separator(), **how)
    assert {reason: intact["left_out"]["source0"][reason]["tokens"] for reason in ("cut", "remainder")} == {
        "cut": 3 * (50 - 20),
        "remainder": 0,
    }
    assert "left out: 90 tokens cut off documents longer than a sample" in plan_text(intact)
    pieces = make_plan(tmp_path / "b", table, section_of([None], packing="single"), separator=Separator(), **how)
    assert {reason: pieces["left_out"]["source0"][reason]["tokens"] for reason in ("cut", "remainder")} == {
        "cut": 0,
        "remainder": 3 * 10 + 8 * 5,
    }
    chunked = section_of([None], {0: [(10, None)]}, packing="intact", mode="prolong")
    chunks = make_plan(tmp_path / "c", table, chunked, separator=Separator(), **how)
    assert chunks["left_out"]["source0"]["remainder"] == {"tokens": 8 * 5}


def test_what_is_left_out_is_read_in_plan_json_and_on_the_screen(tmp_path: Path) -> None:
    table = make_table(make_docs([5] * 10 + [50] * 10, [0] * 10 + [1] * 10), sources=2)
    section = section_of([None, None], length_sampling=sampling(10, 0.0, 20, 2.0, max_length=60))
    facts = make_plan(tmp_path, table, section, name="demo", seed=1, seq_length=64, separator=Separator(after=(9,)))
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["packing"] == "concatenate"
    assert facts["samples"] == 15
    assert facts["tokens_of_separators"] + sum(row["in_samples"]["tokens"] for row in facts["left_out"].values()) == 15 * 64
    assert facts["left_out"]["source0"]["not_drawn"] == {"documents": 10, "tokens": 50}
    text = plan_text(facts, samples_needed=14)
    assert "demo: 15 samples of 64 tokens (14 needed; one more, because" in text
    assert "FEWER than the 16" in plan_text(facts, samples_needed=16)
    assert "source1         10          500" in text
    assert "0 % -> 0 %" in text or "100 % -> 100 %" in text


def test_too_few_tokens_are_named() -> None:
    section = section_of([None])
    for table, budget, message in (
        (make_table([]), None, "not one sample of 64 tokens: the documents have 0 tokens before length sampling; add documents"),
        (make_table(make_docs([30])), None, "not one sample of 64 tokens: the documents have 30 tokens before"),
        (make_table(make_docs([300])), 63, "a budget of 63 tokens is less than one sample of 64"),
    ):
        with pytest.raises(DataError, match=message):
            planned(table, section, seq_length=64, token_budget=budget)
    with pytest.raises(DataError, match="no document of 64 tokens left for packing 'single'; the longest has 63"):
        planned(make_table(make_docs([63] * 9)), section_of([None], packing="single"), seq_length=64)
    with pytest.raises(DataError, match="x: BOS and EOS leave no room in samples of 2 tokens"):
        planned(make_table(make_docs([63])), section_of([None], packing="intact"), seq_length=2, separator=SEPARATORS[3])


def test_documents_of_one_id_are_decided_one_by_one() -> None:
    # equal ids have told-apart keys in the table: the plan sees different documents
    table = make_table([Doc(split_mix(5, number), 0, length) for number, length in enumerate(range(1, 201))])
    copies = document_copies(table, sampling(1000, 0.5, 1000, 1.0), seed=3)
    assert 60 < copies.sum() < 140
