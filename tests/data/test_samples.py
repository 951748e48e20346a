"""A packed sample: shifted labels, a mask that follows the predicted token, and context-parallel shares that add up."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data import IndexedWriter, PackedSamples, Runs, read_runs
from mcore_longctx.data.sidecar import LITERAL, PADDING, write_runs
from mcore_longctx.errors import DataError, LayoutError
from mcore_longctx.layout import zigzag_positions

SEQ_LENGTH, SAMPLES = 48, 3


def packed(folder: Path, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """Samples of random tokens in random runs, with the flat tokens and flags that they hold."""
    rng = np.random.default_rng(seed)
    prefix, total = folder / f"set{seed}", SEQ_LENGTH * SAMPLES
    tokens = rng.integers(0, 500, total).astype(np.uint16)
    cuts = np.union1d(rng.choice(total, 20, replace=False), np.arange(SAMPLES + 1) * SEQ_LENGTH)
    loss = rng.random(len(cuts) - 1) < 0.5
    with IndexedWriter(prefix, "uint16") as writer:
        for row in tokens.reshape(SAMPLES, SEQ_LENGTH):
            writer.add(row)
    count = len(cuts) - 1
    runs = Runs(
        seq_length=SEQ_LENGTH,
        sources=("books",),
        document_ids=("a", "b"),
        first_run=np.searchsorted(cuts, np.arange(SAMPLES + 1) * SEQ_LENGTH),
        source=np.zeros(count, np.int32),
        document=np.arange(count) % 2,
        start=cuts[:-1],
        length=np.diff(cuts),
        loss=loss,
        literals=np.zeros(0, np.int32),
        crc32=np.array([zlib.crc32(row.tobytes()) for row in tokens.reshape(SAMPLES, SEQ_LENGTH)], np.uint32),
    )
    write_runs(prefix, runs)
    return prefix, tokens.astype(np.int64), np.repeat(loss, np.diff(cuts))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, np.ndarray, np.ndarray]]:
    folder = tmp_path_factory.mktemp("packed")
    return [packed(folder, seed) for seed in range(4)]


def test_labels_are_the_next_tokens_and_the_mask_is_theirs(made) -> None:
    for prefix, tokens, flags in made:
        samples = PackedSamples(prefix)
        assert (len(samples), samples.seq_length) == (SAMPLES, SEQ_LENGTH)
        for index in range(SAMPLES):
            part = slice(index * SEQ_LENGTH, (index + 1) * SEQ_LENGTH)
            got, labels, mask = samples.sample(index)
            assert (got.dtype, labels.dtype, mask.dtype) == (np.int64, np.int64, np.bool_)
            np.testing.assert_array_equal(got, tokens[part])
            np.testing.assert_array_equal(labels, np.append(tokens[part][1:], 0))
            np.testing.assert_array_equal(mask, np.append(flags[part][1:], False))


@settings(deadline=None)
@given(seed=st.integers(0, 3), index=st.integers(0, SAMPLES - 1), cp_size=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_the_shares_of_all_ranks_are_the_sample(made, seed: int, index: int, cp_size: int) -> None:
    samples = PackedSamples(made[seed][0])
    whole = samples.sample(index)
    for rank in range(cp_size):
        *share, positions = samples.cp_slice(index, cp_size, rank)
        np.testing.assert_array_equal(positions, zigzag_positions(SEQ_LENGTH, cp_size, rank))
        for part, full in zip(share, whole, strict=True):
            np.testing.assert_array_equal(part, full[positions])
            assert part.dtype == full.dtype


def test_a_share_reads_only_its_own_tokens(made, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = PackedSamples(made[0][0])
    read: list[tuple[int, int]] = []
    get = samples._tokens.get
    monkeypatch.setattr(samples._tokens, "get", lambda i, at, n: read.append((at, n)) or get(i, at, n))
    samples.cp_slice(1, 4, 1)
    assert read == [(6, 7), (36, 7)]  # two chunks of 6 and the token behind each


def test_a_length_that_does_not_divide_is_refused(made) -> None:
    with pytest.raises(LayoutError, match="not a multiple of 2 x context_parallel_size"):
        PackedSamples(made[0][0]).cp_slice(0, 5, 0)


def test_a_sidecar_of_another_build_is_refused(made, tmp_path: Path) -> None:
    (one, *_), (other, *_) = made[:2]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").write_bytes(Path(f"{one}{suffix}").read_bytes())
    (tmp_path / "x.runs.npz").write_bytes(Path(f"{other}.runs.npz").read_bytes())
    with pytest.raises(DataError, match=r"sample 0 is not the one that the sidecar describes"):
        PackedSamples(tmp_path / "x")


def test_documents_of_a_sample_are_told_apart(tmp_path: Path) -> None:
    """Two samples: a document that began before, a separator, a chat in three stretches, the same chat again, padding; one document."""
    a, b, literal, padding = (0, 0), (0, 1), (LITERAL, -1), (PADDING, -1)
    rows = [  # (source, document), start, length
        *((literal, 1, 1), (a, 7, 3), (literal, 0, 2), (b, 0, 2), (b, 2, 1), (b, 3, 4), (b, 0, 3), (padding, 0, 4)),
        (a, 10, 20),
    ]
    runs = Runs(
        seq_length=20,
        sources=("books",),
        document_ids=("moby", "chat"),
        first_run=np.array([0, 8, 9]),
        source=np.array([row[0][0] for row in rows], np.int32),
        document=np.array([row[0][1] for row in rows]),
        start=np.array([row[1] for row in rows]),
        length=np.array([row[2] for row in rows]),
        loss=np.array([i % 2 == 0 for i in range(9)]),
        literals=np.array([60, 115], np.int32),
        crc32=np.array([zlib.crc32(np.zeros(20, np.uint16).tobytes())] * 2, np.uint32),
    )
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        for _ in range(2):
            writer.add(np.zeros(20, np.uint16))
    write_runs(tmp_path / "x", runs)
    samples = PackedSamples(tmp_path / "x")
    assert samples.document_lengths(0) == [6, 7, 3]
    assert samples.document_lengths(1) == [20]


def test_runs_come_back_as_written_and_in_words(tmp_path: Path) -> None:
    runs = Runs(
        seq_length=6,
        sources=("books",),
        document_ids=("moby",),
        first_run=np.array([0, 3]),
        source=np.array([0, LITERAL, PADDING], np.int32),
        document=np.array([0, -1, -1]),
        start=np.array([9, 0, 0]),
        length=np.array([3, 2, 1]),
        loss=np.array([True, True, False]),
        literals=np.array([60, 115], np.int32),
        crc32=np.array([1], np.uint32),
    )
    write_runs(tmp_path / "x", runs)
    back = read_runs(tmp_path / "x")
    assert back.sample(0) == runs.sample(0)
    assert [(r.source, r.document, r.start, r.length, r.loss, r.is_padding) for r in back.sample(0)] == [
        ("books", "moby", 9, 3, True, False),
        (None, None, 0, 2, True, False),
        (None, None, 0, 1, False, True),
    ]
    again = tmp_path / "again"
    write_runs(again, back)
    assert Path(f"{again}.runs.npz").read_bytes() == (tmp_path / "x.runs.npz").read_bytes()


def test_damaged_sidecars_are_refused(made, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.runs\.npz: no such file"):
        read_runs(tmp_path / "x")
    whole = Path(f"{made[0][0]}.runs.npz").read_bytes()
    (tmp_path / "x.runs.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a runs file, or damaged"):
        read_runs(tmp_path / "x")
    runs = read_runs(made[0][0])
    for change, message in (
        ({"length": runs.length + (np.arange(len(runs.length)) == 2)}, "runs do not add up to whole samples"),
        ({"first_run": runs.first_run[:-1]}, "first_run does not go over all runs"),
        ({"length": np.zeros_like(runs.length)}, "a run without tokens"),
        ({"source": np.full_like(runs.source, 1)}, "a run of an unknown source"),
        ({"document": np.full_like(runs.document, 2)}, "a run of an unknown document"),
        ({"source": np.full_like(runs.source, LITERAL)}, "a run of more literal tokens than there are"),
        ({"loss": runs.loss[1:]}, "arrays of different lengths"),
    ):
        write_runs(tmp_path / "y", replace(runs, **change))
        with pytest.raises(DataError, match=message):
            read_runs(tmp_path / "y")


def test_a_pickled_sidecar_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.runs.npz", words=np.array([{"code": "runs"}], dtype=object))
    with pytest.raises(DataError, match="not a runs file, or damaged"):
        read_runs(tmp_path / "x")
