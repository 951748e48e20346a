"""A sample is shown with its borders, and lengths are counted as plain Python counts them."""

import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.build import build
from mcore_longctx.data.files.index_file import IndexColumns, write_index
from mcore_longctx.data.files.indexed import IndexedWriter
from mcore_longctx.data.inspect.show import sample_in_words, show_sample, stats, stats_in_words
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import DataSection, DocumentSource
from tests.data.conftest import words
from tests.data.packed import make_packed


class Letters:
    """A tokenizer whose token n is the n-th letter."""

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(97 + int(token) % 26) for token in ids)


def test_a_sample_is_its_runs_with_place_source_loss_and_ends(tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "x", 8)
    decode = Letters().decode
    for index, (ids, runs) in enumerate(zip(packed.samples, packed.runs, strict=True)):
        facts = show_sample(tmp_path / "x", index, Letters(), first_tokens=3, last_tokens=2)
        json.dumps(facts)
        assert (facts["sample"], facts["samples"], facts["tokens"], facts["has_runs"]) == (index, 8, 64, True)
        begin = 0
        for row, (what, document, start, length) in zip(facts["runs"], runs, strict=True):
            stop = begin + length
            assert (row["what"], row["begin"], row["stop"], row["start"]) == (what, begin, stop, start)
            assert (row["source"], row["document"]) == (packed.names[document] if what == "document" else (None, None))
            if length <= 5:
                assert (row["head"], row["tail"]) == (decode(ids[begin:stop]), None)
            else:
                assert (row["head"], row["tail"]) == (decode(ids[begin : begin + 3]), decode(ids[stop - 2 : stop]))
            begin = stop
    flags = [row["loss"] for index in range(8) for row in show_sample(tmp_path / "x", index)["runs"]]
    assert flags == [at % 3 != 0 for at in range(len(flags))]


def test_the_words_mark_separators_padding_and_what_is_not_learned(tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "x", 30)
    index = next(n for n, runs in enumerate(packed.runs) if {row[0] for row in runs} >= {"separator", "padding"})
    text = sample_in_words(show_sample(tmp_path / "x", index, Letters()))
    assert text.startswith(f"{tmp_path}/x: sample {index} of 30, 64 tokens\n")
    assert "---- separator ----" in text
    assert "---- padding ----" in text
    assert "  no loss\n" in text
    source, name = packed.names[packed.runs[index][0][1]]
    assert f"{source} / {name} from token {packed.runs[index][0][2]}" in text


def test_without_a_tokenizer_ids_are_shown_and_without_a_sidecar_the_documents_of_the_index(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add(np.array([1, 2, 3]))
        writer.add(np.arange(100), ends_document=False)
        writer.add(np.array([4]))
    facts = show_sample(tmp_path, 1, first_tokens=2, last_tokens=1)
    assert (facts["document"], facts["documents"], facts["sequences_of_document"]) == (1, 2, [1, 3])
    (row,) = facts["runs"]
    assert (row["what"], row["head"], row["tail"], row["loss"]) == ("sequence", [0, 1], [99], None)
    assert sample_in_words(facts) == (
        f"{tmp_path}/x: sample 1 of 3, 100 tokens\n"
        "  document 1 of 2, which has the sequences 1 to 2; no sidecar says more\n"
        "  0 .. 100  sequence\n"
        "    0 1\n"
        "    ... 99"
    )
    assert "which is all of it" in sample_in_words(show_sample(tmp_path, 0))
    for index in (3, -1):
        with pytest.raises(DataError, match=f"no sample {index}, there are 3"):
            show_sample(tmp_path, index)


def test_damaged_data_is_not_shown(tmp_path: Path) -> None:
    make_packed(tmp_path / "x")
    make_packed(tmp_path / "y", 5)
    (tmp_path / "x.runs").write_bytes((tmp_path / "y.runs").read_bytes())
    for look in (lambda: show_sample(tmp_path / "x", 0), lambda: stats(tmp_path / "x")):
        with pytest.raises(DataError, match="is not the index that the sidecar was written with"):
            look()


# ------------------------------------------------------------------ lengths
def assert_counted(row: dict, lengths: list[int]) -> None:
    """Compare a row of `stats` with plain Python."""
    ordered = sorted(lengths)
    assert (row["count"], row["tokens"]) == (len(lengths), sum(lengths))
    if not lengths:
        assert (row["min"], row["median"], row["p90"], row["max"], row["buckets"]) == (0, 0, 0, 0, [])
        return
    p90 = next(value for at, value in enumerate(ordered, 1) if 10 * at >= 9 * len(ordered))  # nearest rank
    assert (row["min"], row["median"], row["p90"], row["max"]) == (ordered[0], statistics.median_low(ordered), p90, ordered[-1])
    expected: dict[int, list[int]] = {}
    for length in lengths:
        expected.setdefault(length.bit_length(), []).append(length)
    assert row["buckets"] == [
        {"from": 2**bits // 2, "to": 2**bits - 1, "count": len(group), "tokens": sum(group)}
        for bits, group in sorted(expected.items())
    ]


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 70), max_size=4), max_size=20))
def test_lengths_of_any_dataset(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("stats") / "x"
    with IndexedWriter(prefix, "int32") as writer:
        for lengths in documents:
            for length in lengths:
                writer.add(np.zeros(length, np.int32), ends_document=False)
            writer.end_document()
    facts = stats(prefix)
    json.dumps(facts)
    sequences, whole = facts["lengths"]
    assert_counted(sequences, [length for lengths in documents for length in lengths])
    assert_counted(whole, [sum(lengths) for lengths in documents])
    assert stats_in_words(facts).splitlines()[2].split()[:2] == ["sequences", str(sum(map(len, documents)))]


def test_lengths_by_source_with_a_sidecar(tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "x", 40)
    facts = stats(tmp_path / "x")
    rows = {(row["what"], row["source"]): row for row in facts["lengths"]}
    runs = [row for sample in packed.runs for row in sample]
    assert_counted(rows["sequences", None], [64] * 40)
    for source in ("books", "wiki"):
        mine = [length for what, document, _, length in runs if what == "document" and packed.names[document][0] == source]
        assert_counted(rows["runs", source], mine)
        ends = [at + length for what, document, at, length in runs if what == "document" and packed.names[document][0] == source]
        assert_counted(rows["documents", source], ends)  # each is used once here
    for name, what in (("separators", "separator"), ("padding", "padding")):
        assert_counted(rows[name, None], [row[3] for row in runs if row[0] == what])
    text = stats_in_words(facts)
    assert "documents of books" in text
    assert "padding" in text


def test_a_document_that_is_taken_twice_does_not_count_as_a_longer_one(tmp_path: Path, tokenizer_folder: Path, jsonl) -> None:
    """Whole documents, each repeated: their lengths are those of the texts."""
    texts = {f"{i}": words(i, 5 + 7 * i) for i in range(12)}
    path = jsonl("a.jsonl", [{"id": name, "text": text} for name, text in texts.items()])
    section = DataSection(sources=(DocumentSource(name="a", path=path),), repeat_to_fill=True)
    lengths = [len(load_tokenizer(tokenizer_folder).encode(text)) for text in texts.values()]
    arguments = {"chats": False, "model_vocab_size": 512, "seq_length": 32, "seed": 1, "out": tmp_path / "out"}
    build(section, "a", tokenizer=tokenizer_folder, num_samples=3 * sum(lengths) // 32, **arguments)
    (row,) = [row for row in stats(tmp_path / "out")["lengths"] if row["what"] == "documents"]
    assert_counted(row, lengths)


def test_ten_million_sequences_are_counted_without_a_loop(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 200, 10_000_000).astype(np.int32)
    write_index(tmp_path / "x.idx", "uint8", [IndexColumns(lengths, np.arange(10_000_001))])
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(int(lengths.sum()))
    begin = time.process_time()
    sequences, documents = stats(tmp_path / "x")["lengths"]
    assert time.process_time() - begin < 6  # a loop in Python takes longer
    assert sequences["tokens"] == documents["tokens"] == int(lengths.sum())
    assert sequences["median"] == int(np.sort(lengths)[4_999_999])
