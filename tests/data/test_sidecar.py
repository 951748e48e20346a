"""The sidecar says what stands where, and neither it nor the index beside it can be damaged unseen."""

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from mcore_longctx.data.files.arrays import map_arrays, write_arrays
from mcore_longctx.data.files.sidecar import check_index, read_runs
from mcore_longctx.data.samples import PackedSamples
from mcore_longctx.errors import DataError, LongctxError
from tests.data.mutations import mutations
from tests.data.packed import VOCABULARY, make_packed

HEADER = [(9, 8), (17, 1), (18, 8), (26, 8)]


def test_the_runs_of_a_sample_in_words_are_those_that_were_written(tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "x", 6)
    runs = read_runs(tmp_path / "x")
    assert len(runs) == 6
    for index, expected in enumerate(packed.runs):
        found = runs.sample(index)
        assert [(run.start, run.length) for run in found] == [row[2:] for row in expected]
        for run, (what, document, _, _) in zip(found, expected, strict=True):
            assert (run.source, run.document) == (packed.names[document] if what == "document" else (None, None))
            assert run.is_padding == (what == "padding")
    with pytest.raises(IndexError, match="sample 6 of 6"):
        runs.sample(6)


def refusal(prefix: Path) -> str:
    """In which words the reader of training refuses the data; anything else than one of our errors is none."""
    try:
        PackedSamples(prefix)
    except LongctxError as error:
        return str(error)
    return ""


def test_every_one_of_1500_mutations_of_the_index_is_refused_by_the_reader_of_training(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 5)
    raw = (tmp_path / "x.idx").read_bytes()
    lengths, pointers, borders = 34, 34 + 20, 34 + 60
    fields = HEADER * 3 + [(lengths + 4 * n, 4) for n in range(5)] + [(pointers + 8 * n, 8) for n in range(5)]
    fields += [(borders + 8 * n, 8) for n in range(6)]
    for what, changed in mutations(raw, 1500, seed=3, fields=fields):
        (tmp_path / "x.idx").write_bytes(changed)
        assert str(tmp_path) in refusal(tmp_path / "x"), what


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (17, 5),  # int64 for int32 would need twice the bytes, so .bin disagrees
        (34 + 60 + 8, 0),  # a document less: nothing else in the index says so
        (34 + 60 + 16, 3),
    ],
)
def test_an_index_that_agrees_with_itself_is_held_against_the_sidecar(tmp_path: Path, offset: int, value: int) -> None:
    make_packed(tmp_path / "x", 5)
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[offset] = value
    (tmp_path / "x.idx").write_bytes(raw)
    assert str(tmp_path) in refusal(tmp_path / "x")


def test_uint16_that_is_called_int16_is_noticed(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 2, dtype="<u2")
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    assert raw[17] == 8
    raw[17] = 3
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.idx: is not the index that the sidecar was written with"):
        PackedSamples(tmp_path / "x")


def test_a_sidecar_that_does_not_know_its_index_is_refused(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 2, idx_crc32=None)
    with pytest.raises(DataError, match="is not the index that the sidecar was written with"):
        check_index(tmp_path / "x", read_runs(tmp_path / "x"))


def test_every_one_of_1500_mutations_of_the_sidecar_is_refused_by_the_reader_of_training(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 5)
    raw = (tmp_path / "x.runs").read_bytes()
    body = 8 + int.from_bytes(raw[:8], "little")
    fields = [(0, 8), (len(raw) - 4, 4), *((offset, 4) for offset in range(body, len(raw) - 4, 4))]
    for what, changed in mutations(raw, 1500, seed=4, fields=fields):
        (tmp_path / "x.runs").write_bytes(changed)
        assert str(tmp_path) in refusal(tmp_path / "x"), what


def test_wrong_columns_under_a_right_checksum_end_in_our_error_or_in_whole_samples(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 5)
    raw = (tmp_path / "x.runs").read_bytes()
    body = 8 + int.from_bytes(raw[:8], "little")
    fields = [(offset, width) for width in (4, 8) for offset in range(body, len(raw) - 8, width)]
    refused = 0
    for _what, changed in mutations(raw, 1500, seed=5, fields=fields):
        (tmp_path / "x.runs").write_bytes(changed[:-4] + crc32(changed[:-4]).to_bytes(4, "little"))
        try:
            samples = PackedSamples(tmp_path / "x")
            for index in range(len(samples)):
                samples.runs.sample(index)
                assert len(samples.runs.loss_flags(index, 0, samples.seq_length)) == samples.seq_length
                tokens, labels, loss_mask = samples.sample(index)
                assert len(tokens) == len(labels) == len(loss_mask) == samples.seq_length
        except LongctxError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("first_run", 0, 1, "first_run does not go over all runs"),
        ("first_run", -1, 10**6, "first_run does not go over all runs"),
        ("first_run", 2, 2**62, "first_run does not go over all runs"),
        ("length", 0, 0, "a run without tokens"),
        ("length", 1, 2**31 - 1, "more literal tokens than there are"),
        ("length", 2, 63, "runs do not add up to whole samples"),
        ("start", 0, -1, "a run without tokens"),
        ("start", 1, 2**63 - 1, "more literal tokens than there are"),  # start + length wraps
        ("document", 0, -3, "a run of an unknown document"),
        ("document", 0, 10**9, "a run of an unknown document"),
        ("document_source", 0, 2, "a document of an unknown source"),
        ("id_stop", 0, -5, "ids of documents that do not add up"),
        ("id_stop", -1, 10**9, "ids of documents that do not add up"),
        ("id_stop", 1, 0, "ids of documents that do not add up"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path: Path, column: str, row: int, value: int, message: str) -> None:
    make_packed(tmp_path / "x", 5)
    arrays, facts = map_arrays(tmp_path / "x.runs")
    changed = {name: np.array(values) for name, values in arrays.items()}
    changed[column][row] = value
    write_arrays(tmp_path / "x.runs", changed, facts)
    with pytest.raises(DataError, match=message):
        read_runs(tmp_path / "x")


def test_a_loss_flag_is_true_or_false(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 5)
    arrays, facts = map_arrays(tmp_path / "x.runs")
    changed = {name: np.array(values) for name, values in arrays.items()}
    changed["loss"].view(np.uint8)[3] = 2
    write_arrays(tmp_path / "x.runs", changed, facts)
    with pytest.raises(DataError, match="a loss flag that is neither true nor false"):
        read_runs(tmp_path / "x")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "plan"}, "a plan, expected a sidecar"),
        ({"seq_length": 0}, "a seq_length of 0"),
        ({"seq_length": 10**30}, "a seq_length of 1"),
        ({"seq_length": "64"}, "a seq_length of '64'"),
        ({"seq_length": 32}, "runs do not add up to whole samples"),
        ({"documents": True}, "a number of documents of True"),
        ({"documents": -1}, "a number of documents of -1"),
        ({"documents": 3}, "columns of different lengths"),
        ({"sources": ["books", 3]}, "a source whose name is no text"),
        ({"sources": ["books"]}, "a document of an unknown source"),
        ({"sources": 3}, "not a file of runs"),
        ({"begin_tokens": 3}, "3 tokens that begin a document"),
    ],
)
def test_facts_that_do_not_fit_are_named(tmp_path: Path, facts: dict, message: str) -> None:
    make_packed(tmp_path / "x", 5)
    arrays, known = map_arrays(tmp_path / "x.runs")
    write_arrays(tmp_path / "x.runs", {name: np.array(values) for name, values in arrays.items()}, known | facts)
    with pytest.raises(DataError, match=message):
        read_runs(tmp_path / "x")


@pytest.mark.parametrize("name", ["loss", "crc32", "document", "literals", "first_run"])
def test_a_column_that_is_missing_too_short_or_of_another_type_is_refused(tmp_path: Path, name: str) -> None:
    make_packed(tmp_path / "x", 5)
    arrays, facts = map_arrays(tmp_path / "x.runs")
    whole = {name: np.array(values) for name, values in arrays.items()}
    other = np.uint16 if name != "loss" else np.uint8
    for changed in (
        {k: v for k, v in whole.items() if k != name},
        whole | {name: whole[name][:-1]},
        whole | {name: whole[name].astype(other)},
    ):
        write_arrays(tmp_path / "x.runs", changed, facts)
        with pytest.raises(DataError, match=r"not a file of runs|different lengths|another type|first_run does not|more literal"):
            read_runs(tmp_path / "x")


def test_blocks_of_runs_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_packed(tmp_path / "x", 40)
    arrays, facts = map_arrays(tmp_path / "x.runs")
    whole = {name: np.array(values) for name, values in arrays.items()}
    for block in (1, 2, 3, 7):
        monkeypatch.setattr("mcore_longctx.data.files.sidecar._BLOCK", block)
        assert len(read_runs(tmp_path / "x")) == 40
        for row in (20, len(whole["length"]) - 1):
            changed = whole["length"].copy()
            changed[row] += 1 if changed[row] > 1 else 2
            write_arrays(tmp_path / "y.runs", whole | {"length": changed}, facts)
            with pytest.raises(DataError, match=r"add up|more literal"):
                read_runs(tmp_path / "y")


def test_the_vocabulary_of_the_test_data_is_what_it_says(tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "x", 3)
    assert max(map(max, packed.samples)) < VOCABULARY
    assert {row[0] for sample in make_packed(tmp_path / "y", 30).runs for row in sample} == {"document", "separator", "padding"}
