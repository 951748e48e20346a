"""Lengths before and after: exact counts for any borders, and a picture that is one."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.planning import lengths as lengths_module
from mcore_longctx.data.planning.layout import Separator
from mcore_longctx.data.planning.lengths import length_name, measure_lengths, plot_lengths, source_borders, tokens_used
from mcore_longctx.data.planning.plan import make_plan, read_plan
from mcore_longctx.recipe.schema import DataSection, DocumentSource, LengthSampling, TokenCount
from tests.data.reference_plan import make_docs, make_table


@given(
    rows=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2), st.integers(0, 900)), min_size=1, max_size=40),
    border=st.integers(0, 400),
    block=st.sampled_from([3, 1 << 18]),
)
@settings(deadline=None)
def test_counts_are_those_of_the_documents_one_by_one(rows, border, block) -> None:
    docs = make_docs([length for length, _, _ in rows], [source for _, source, _ in rows])
    table = make_table(docs, sources=3)
    used_of = {doc.key: used for doc, (_, _, used) in zip(docs, rows, strict=True)}
    used = np.array([used_of[int(key)] for key in table.key], np.int64)
    before, lengths_module._BLOCK = lengths_module._BLOCK, block
    try:
        found = measure_lengths(table, used, [border])
    finally:
        lengths_module._BLOCK = before
    assert source_borders(table) == np.cumsum([0, *np.bincount(table.source, minlength=3)]).tolist()
    for index, source in enumerate(found):
        mine = [(doc.length, used_of[doc.key]) for doc in docs if doc.source == index]

        def expected(low: int, high: int, mine: list[tuple[int, int]] = mine) -> tuple[int, int, int, int]:
            inside = [row for row in mine if low <= row[0] < high]
            taken = [used for _, used in inside if used]
            return len(inside), sum(length for length, _ in inside), len(taken), sum(taken)

        assert source.name == f"source{index}"
        for low, high in ((0, border), (border, None), (0, None), (16, 64)):
            assert source.between(low, high) == expected(low, high if high is not None else 10**9)
        buckets = source.buckets()
        for bucket in buckets:
            cells = (bucket[key] for key in ("documents_before", "tokens_before", "documents_after", "tokens_after"))
            assert tuple(cells) == expected(bucket["from"], bucket["to"] + 1)
            assert bucket["to"] == 2 * bucket["from"] - 1
        facts = source.as_dict()
        assert sum(bucket["tokens_before"] for bucket in buckets) == facts["tokens_before"]
        assert facts["max_length"] == max((length for length, _ in mine), default=0)
        assert facts["median_length"] == (int(np.median([length for length, _ in mine])) if mine else 0)


def test_lengths_have_short_names() -> None:
    assert [length_name(tokens) for tokens in (100, 1024, 4096, 6000, 1 << 20, 3 << 20)] == [
        "100",
        "1K",
        "4K",
        "6000",
        "1M",
        "3M",
    ]


def test_the_picture_shows_what_was_read_and_what_is_in_the_samples(tmp_path: Path) -> None:
    table = make_table(make_docs([50] * 40 + [5000] * 10, [0] * 40 + [1] * 10), sources=2)
    sources = tuple(DocumentSource(name=name, path=Path("x")) for name in table.sources)
    how = LengthSampling(short_below=TokenCount(100), keep_probability=0.5, long_above=TokenCount(1000), repetition=2.0)
    section = DataSection(sources=sources, length_sampling=how)
    make_plan(tmp_path, table, section, name="$x_1$", seed=1, seq_length=128, separator=Separator(after=(1,)))
    raw = (tmp_path / "lengths.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(raw[16:20], "big") > 600  # pixels wide
    runs, _ = read_plan(tmp_path)
    used = tokens_used(table, runs)
    assert int(used.sum()) == int(runs.length[runs.document >= 0].sum())
    # another plan gives another picture, the same plan the same
    plot_lengths(measure_lengths(table, used), tmp_path / "other.png", title="$x_1$", words=("a", "b"))
    assert (tmp_path / "other.png").read_bytes() != raw
    make_plan(tmp_path, table, section, name="$x_1$", seed=1, seq_length=128, separator=Separator(after=(1,)))
    assert (tmp_path / "lengths.png").read_bytes() == raw


def test_a_border_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    table = make_table(make_docs([50] * 40))
    how = LengthSampling(short_below=TokenCount(0), keep_probability=0.5, long_above=TokenCount(0), repetition=2.0)
    section = DataSection(sources=(DocumentSource(name="source0", path=Path("x")),), length_sampling=how)
    facts = make_plan(tmp_path, table, section, name="x", seed=1, seq_length=128, separator=Separator())
    assert facts["left_out"]["source0"]["drawn"] == {"documents": 80, "tokens": 4000}  # every one is long
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
