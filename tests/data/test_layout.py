"""Layout: every token in its place, separators, padding and flags with it, against a packer that goes token by token."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import LITERAL, Runs, open_runs
from mcore_longctx.data.planning import layout
from mcore_longctx.data.planning.layout import Pieces, Separator, Stream, lay_out, stream_of
from tests.data.reference_plan import Doc, make_docs, make_table, packed, read_tokens

SEPARATORS = {
    "none": Separator(),
    "text": Separator(after=(901, 902, 903)),
    "token": Separator(after=(901,), loss=False),
    "bos_eos": Separator(before=(800,), after=(901,), loss=False),
    "two BOS": Separator(before=(800, 801), after=(901,)),
    "BOS alone": Separator(before=(800,)),
    "two EOS": Separator(before=(800,), after=(901, 902)),
}
PACKINGS = ("concatenate", "best_fit", "intact", "first_fit")

parts = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4)


@pytest.fixture(autouse=True, params=[3, 1 << 16], ids=["blocks of 3", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are handled in blocks; what lies across two of them must not differ."""
    monkeypatch.setattr(layout, "_BLOCK", request.param)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(np.memmap, "flush", lambda self: None)


def docs_of(segments: list[list[tuple[int, bool]]]) -> list[Doc]:
    lengths = [sum(length for length, _ in each) for each in segments]
    return make_docs(lengths, segments=dict(enumerate(segments)))


def written(table: DocumentTable, streams: list[Stream], separator: Separator, **how) -> Runs:
    metadata = {"kind": "plan", "seq_length": streams[0].seq_length, "sources": ["source0"], "documents": len(table)}
    literals = separator.before + separator.after
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.runs"
        lay_out(path, streams, literals=literals, metadata=metadata, **({"samples": None, "limit": None} | how))
        return open_runs(path, kind="plan")  # checks that runs add up to whole samples


@pytest.mark.parametrize("packing", PACKINGS)
@given(
    kind=st.sampled_from(sorted(SEPARATORS)),
    segments=st.lists(parts, min_size=1, max_size=12),
    seq_length=st.integers(1, 17),
    limit=st.none() | st.integers(1, 4),
)
@example(kind="two EOS", segments=[[(5, True)]], seq_length=7, limit=None)  # cut between the two EOS
@settings(deadline=None, max_examples=60)
def test_samples_are_those_of_a_packer_that_goes_token_by_token(packing, kind, segments, seq_length, limit) -> None:
    separator, docs = SEPARATORS[kind], docs_of(segments)
    room = seq_length - (separator.wrapping - separator.between)
    if packing in ("intact", "first_fit"):  # their callers hand on what fits
        docs = [doc for doc in docs if doc.length <= room]
    if not docs or room < 1:
        return
    table = make_table(docs)
    rows, length = np.arange(len(docs)), np.array([doc.length for doc in docs], np.int64)
    stream = stream_of(table, rows, length, packing=packing, separator=separator, seq_length=seq_length)
    expected = packed([doc.tokens() for doc in docs], separator, packing, seq_length)[:limit]
    assert stream.samples >= len(expected)
    assert read_tokens(written(table, [stream], separator, limit=limit), table) == expected


@given(segments=st.lists(parts, min_size=1, max_size=8), data=st.data())
@settings(deadline=None, max_examples=40)
def test_stretches_of_documents_keep_their_flags(segments, data) -> None:
    """Cut documents and pieces that start inside, each split where a flag changes and nowhere else."""
    docs = docs_of(segments)
    table, pieces = make_table(docs), []
    for number, doc in enumerate(docs):
        start = data.draw(st.integers(0, doc.length - 1))
        pieces.append((number, start, data.draw(st.integers(1, doc.length - start))))
    document, start, length = (np.array(column) for column in zip(*pieces, strict=True))
    stream = Stream(table, Pieces(document=document, start=start, length=length), Separator(), 1)
    expected = [token for d, s, n in pieces for token in docs[d].tokens()[s : s + n]]
    assert [sample[0] for sample in read_tokens(written(table, [stream], Separator()), table)] == expected
    whole = Stream(table, Pieces(document=document, start=start, length=length), Separator(), int(length.sum()))
    runs = written(table, [whole], Separator())
    changes = sum(a[2] != b[2] for d, s, n in pieces for a, b in pairwise(docs[d].tokens()[s : s + n]))
    assert len(runs.document) == len(pieces) + changes


@given(segments=st.lists(parts, min_size=2, max_size=10), seed=st.integers(0, 99), limit=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_samples_of_several_streams_in_any_order(segments, seed, limit) -> None:
    docs = docs_of(segments)
    table, middle = make_table(docs), len(docs) // 2
    separator = SEPARATORS["text"]
    streams, expected = [], []
    for rows, packing in ((np.arange(middle), "concatenate"), (np.arange(middle, len(docs)), "best_fit")):
        length = table.length[rows]
        streams.append(stream_of(table, rows, length, packing=packing, separator=separator, seq_length=5))
        expected += packed([docs[row].tokens() for row in rows], separator, packing, 5)
    order = np.random.default_rng(seed).permutation(len(expected))
    found = read_tokens(written(table, streams, separator, samples=order, limit=limit), table)
    assert found == [expected[number] for number in order[:limit]]


def test_too_few_tokens_give_no_sample() -> None:
    table = make_table(make_docs([3]))
    stream = stream_of(table, np.arange(1), np.array([3]), packing="concatenate", separator=Separator(), seq_length=4)
    assert stream.samples == 0
    assert len(stream.runs_of_sample) == 0


def test_separators_stand_between_documents_and_wrapping_around_each() -> None:
    table = make_table(make_docs([2, 2]))
    found = {}
    for kind in ("none", "text", "bos_eos"):
        stream = stream_of(table, np.arange(2), table.length, packing="concatenate", separator=SEPARATORS[kind], seq_length=1)
        runs = written(table, [stream], SEPARATORS[kind])
        found[kind] = [int(runs.literals[s]) if d == LITERAL else -1 for d, s in zip(runs.document, runs.start, strict=True)]
    assert found["none"] == [-1] * 4
    assert found["text"] == [-1, -1, 901, 902, 903, -1, -1]
    assert found["bos_eos"] == [800, -1, -1, 901, 800, -1, -1, 901]
