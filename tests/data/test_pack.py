"""Packing: every token of the plan in its place, separators and flags with it, against a packer that goes token by token."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data import IndexedReader, PackedSamples, read_runs
from mcore_longctx.data.pack import Filler, first_fit, lay_out, pack_whole, separators, write_samples
from mcore_longctx.data.plan import Plan, document_copies, plan_concatenated
from mcore_longctx.data.shards import DocumentTable
from mcore_longctx.data.sidecar import LITERAL, PADDING
from mcore_longctx.recipe.schema import LengthSampling, TokenCount
from tests.data.conftest import make_table

Token = tuple[int, bool]  # id and loss flag

documents = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4).filter(
        lambda parts: sum(n for n, _ in parts) > 0
    ),
    min_size=1,
    max_size=12,
)


def build(folder: Path, parts: list[list[tuple[int, bool]]]) -> tuple[DocumentTable, np.ndarray]:
    return make_table(folder / "tokens", [(0, f"d{i}", segments) for i, segments in enumerate(parts)])


def token_by_token(table: DocumentTable, tokens: np.ndarray, plan: Plan, separator: list[int]) -> Iterator[Token]:
    """The stream as a reader would write it down."""
    for number in range(len(plan)):
        d = plan.document[number]
        if number:
            yield from ((token, True) for token in separator)
        segments = slice(table.segment_first[d], table.segment_first[d + 1])
        for at in range(plan.start[number], plan.start[number] + plan.length[number]):
            loss = table.segment_loss[segments][np.argmax(table.segment_stop[segments] > at)]
            yield int(tokens[table.offset[d] + at]), bool(loss)


def read_back(prefix: Path) -> list[list[Token]]:
    samples, reader = PackedSamples(prefix), IndexedReader(prefix)
    return [
        list(zip(reader[i].tolist(), samples.runs.loss_flags(i, 0, samples.seq_length).tolist(), strict=True))
        for i in range(len(samples))
    ]


@given(parts=documents, seq_length=st.integers(1, 17), separator=st.integers(0, 3), limit=st.none() | st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_samples_are_the_stream_cut_at_every_seq_length_tokens(parts, seq_length, separator, limit) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, tokens = build(folder, parts)
        literals = np.arange(9000, 9000 + separator, dtype=np.int32)
        plan = plan_concatenated(table, LengthSampling(), None, seed=1, separator_length=separator, token_budget=None)
        runs = lay_out(table, plan, separators(plan, separator), literals, seq_length=seq_length, max_samples=limit)
        write_samples(folder / "x", runs, table, tokens, dtype=np.dtype("<i4"))
        stream = list(token_by_token(table, tokens, plan, literals.tolist()))
        expected = [stream[at : at + seq_length] for at in range(0, len(stream) - seq_length + 1, seq_length)][:limit]
        assert read_back(folder / "x") == expected


@given(parts=documents, seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_every_kept_token_is_there_exactly_as_often_as_its_document(parts, seed) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, tokens = build(folder, parts)
        how = LengthSampling(short_below=TokenCount(4), keep_probability=0.5, long_above=TokenCount(8), repetition=1.5)
        plan = plan_concatenated(table, how, None, seed=seed, separator_length=1, token_budget=None)
        # samples of one token: nothing is lost at the end
        runs = lay_out(table, plan, separators(plan, 1), np.array([9000], np.int32), seq_length=1, max_samples=None)
        write_samples(folder / "x", runs, table, tokens, dtype=np.dtype("<i4"))
        found = np.array([token for sample in read_back(folder / "x") for token, _ in sample], dtype=np.int64)
        copies = document_copies(table, how, seed)
        counts = np.bincount(found, minlength=9001)
        for d in range(len(table)):
            assert (counts[tokens[table.offset[d] :][: table.length[d]]] == copies[d]).all()
        assert counts[9000] == max(0, copies.sum() - 1)


@given(parts=documents)
@settings(deadline=None, max_examples=40)
def test_the_sidecar_names_the_origin_of_every_token(parts) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, tokens = build(folder, parts)
        plan = plan_concatenated(table, LengthSampling(), None, seed=2, separator_length=2, token_budget=None)
        literals = np.array([9000, 9001], np.int32)
        runs = lay_out(table, plan, separators(plan, 2), literals, seq_length=5, max_samples=None)
        write_samples(folder / "x", runs, table, tokens, dtype=np.dtype("<i4"))
        reader, rows = IndexedReader(folder / "x"), {name: row for row, name in enumerate(table.ids)}
        sidecar = read_runs(folder / "x")
        for index in range(len(reader)):
            expected = []
            for run in sidecar.sample(index):
                source = literals if run.document is None else tokens[table.offset[rows[run.document]] :]
                expected += source[run.start : run.start + run.length].tolist()
            assert reader[index].tolist() == expected


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(deadline=None)
def test_first_fit_takes_the_first_bin_with_room(lengths: list[int]) -> None:
    room: list[int] = []
    expected = []
    for length in lengths:
        index = next((i for i, free in enumerate(room) if free >= length), len(room))
        if index == len(room):
            room.append(20)
        room[index] -= length
        expected.append(index)
    assert first_fit(np.array(lengths), 20).tolist() == expected


def test_whole_pieces_are_padded_and_padding_is_not_learned(tmp_path: Path) -> None:
    table, tokens = build(tmp_path, [[(3, False), (4, True)], [(6, True)], [(2, True)], [(10, True)]])
    rows = {name: row for row, name in enumerate(table.ids)}
    order = np.array([rows[f"d{i}"] for i in range(4)])
    plan, filler = pack_whole(Plan(document=order, start=np.zeros(4, np.int64), length=table.length[order]), 10)
    runs = lay_out(table, plan, filler, np.zeros(0, np.int32), seq_length=10, max_samples=None)
    write_samples(tmp_path / "x", runs, table, tokens, dtype=np.dtype("<u2"), pad_id=99)
    off, on = False, True
    assert read_back(tmp_path / "x") == [
        [(0, off), (1, off), (2, off), (3, on), (4, on), (5, on), (6, on), (13, on), (14, on), (99, off)],
        [*((token, on) for token in range(7, 13)), *[(99, off)] * 4],
        [(token, on) for token in range(15, 25)],
    ]
    assert [run.is_padding for run in read_runs(tmp_path / "x").sample(1)] == [False, True]
    assert set(runs.source.tolist()) == {0, PADDING}


def test_without_a_separator_documents_touch(tmp_path: Path) -> None:
    table, _ = build(tmp_path, [[(3, True)], [(3, True)]])
    plan = plan_concatenated(table, LengthSampling(), None, seed=1, separator_length=0, token_budget=None)
    runs = lay_out(table, plan, separators(plan, 0), np.zeros(0, np.int32), seq_length=2, max_samples=None)
    assert LITERAL not in runs.source
    assert len(runs) == 3


def test_too_few_tokens_give_no_sample(tmp_path: Path) -> None:
    table, _ = build(tmp_path, [[(3, True)]])
    plan = plan_concatenated(table, LengthSampling(), None, seed=1, separator_length=0, token_budget=None)
    nothing = Filler(source=LITERAL, after=np.zeros(0, np.int64), length=np.zeros(0, np.int64), loss=True)
    assert len(lay_out(table, plan, nothing, np.zeros(0, np.int32), seq_length=4, max_samples=None)) == 0


def test_padding_without_a_token_is_a_bug(tmp_path: Path) -> None:
    table, tokens = build(tmp_path, [[(3, True)]])
    plan, filler = pack_whole(Plan(document=np.zeros(1, np.int64), start=np.zeros(1, np.int64), length=table.length), 4)
    runs = lay_out(table, plan, filler, np.zeros(0, np.int32), seq_length=4, max_samples=None)
    with pytest.raises(AssertionError):
        write_samples(tmp_path / "x", runs, table, tokens, dtype=np.dtype("<i4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == []
