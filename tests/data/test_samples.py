"""A packed sample: shifted labels, a mask that follows the predicted token, and context-parallel shares that add up."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data import IndexedWriter, PackedSamples, read_runs
from mcore_longctx.data.files.sidecar import LITERAL, PADDING
from mcore_longctx.data.samples import ReadAhead
from mcore_longctx.errors import DataError, LayoutError
from mcore_longctx.layout import zigzag_positions
from tests.sidecars import write_runs

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
    write_runs(
        prefix,
        seq_length=SEQ_LENGTH,
        documents=[("books", "a"), ("books", "b")],
        first_run=np.searchsorted(cuts, np.arange(SAMPLES + 1) * SEQ_LENGTH),
        document=np.arange(count) % 2,
        start=cuts[:-1],
        length=np.diff(cuts),
        loss=loss,
    )
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
    tokens = samples._tokens.read
    monkeypatch.setattr(samples._tokens, "read", lambda i, at, n: read.append((at, n)) or tokens(i, at, n))
    samples.cp_slice(1, 4, 1)
    assert read == [(6, 7), (36, 7)]  # two chunks of 6 and the token behind each


@settings(deadline=None)
@given(seed=st.integers(0, 3), index=st.integers(0, SAMPLES - 1), data=st.data())
def test_gathered_places_are_those_of_the_sample(made, seed: int, index: int, data) -> None:
    samples = PackedSamples(made[seed][0])
    places = np.array(data.draw(st.lists(st.integers(-1, SEQ_LENGTH - 1), max_size=30)), np.int64)
    for part, full in zip(samples.gather(index, places), samples.sample(index), strict=True):
        assert part.tolist() == [full[place] if place >= 0 else 0 for place in places]
        assert part.dtype == full.dtype


def test_a_length_that_does_not_divide_is_refused(made) -> None:
    with pytest.raises(LayoutError, match="not a multiple of 2 x context_parallel_size"):
        PackedSamples(made[0][0]).cp_slice(0, 5, 0)


def test_a_sidecar_of_another_build_is_refused(made, tmp_path: Path) -> None:
    (one, *_), (other, *_) = made[:2]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").write_bytes(Path(f"{one}{suffix}").read_bytes())
    (tmp_path / "x.runs").write_bytes(Path(f"{other}.runs").read_bytes())
    with pytest.raises(DataError, match=r"sample 0 is not the one that the sidecar describes"):
        PackedSamples(tmp_path / "x")


def zeros_with_runs(prefix: Path, seq_length: int, rows: list, *, first_run: list[int], literals=(), facts=None) -> PackedSamples:
    """Samples of zeros whose runs are `rows`: (document, start, length), all learned."""
    with IndexedWriter(prefix, "uint16") as writer:
        for _ in range(len(first_run) - 1):
            writer.add(np.zeros(seq_length, np.uint16))
    document, start, length = zip(*rows, strict=True)
    write_runs(
        prefix,
        seq_length=seq_length,
        documents=[("books", "moby"), ("chats", "chat")],
        literals=literals,
        facts=facts,
        first_run=first_run,
        document=document,
        start=start,
        length=length,
        loss=np.ones(len(rows)),
    )
    return PackedSamples(prefix)


def test_documents_of_a_sample_are_told_apart(tmp_path: Path) -> None:
    """Two samples: a document that began before, a separator, a chat in three stretches, the same chat again, padding; one document."""
    a, b = 0, 1
    rows = [
        *((LITERAL, 1, 1), (a, 7, 3), (LITERAL, 0, 2), (b, 0, 2), (b, 2, 1), (b, 3, 4), (b, 0, 3), (PADDING, 0, 4)),
        (a, 10, 20),
    ]
    samples = zeros_with_runs(tmp_path / "x", 20, rows, first_run=[0, 8, 9], literals=[60, 115])
    assert samples.document_lengths(0) == [6, 7, 3]
    assert samples.document_lengths(1) == [20]


def test_a_begin_token_belongs_to_the_document_behind_it(tmp_path: Path) -> None:
    # literals: one begin token, then one end token
    rows = [(0, 5, 4), (LITERAL, 1, 1), (LITERAL, 0, 1), (1, 0, 3), (LITERAL, 1, 1), (LITERAL, 0, 1), (0, 0, 2), (PADDING, 0, 2)]
    samples = zeros_with_runs(tmp_path / "x", 15, rows, first_run=[0, 8], literals=[1, 2], facts={"begin_tokens": 1})
    assert samples.document_lengths(0) == [5, 5, 3]
    rows = [(LITERAL, 0, 1), (1, 0, 3), (LITERAL, 1, 1)]
    samples = zeros_with_runs(tmp_path / "y", 5, rows, first_run=[0, 3], literals=[1, 2], facts={"begin_tokens": 1})
    assert samples.document_lengths(0) == [5]


def test_padding_before_the_end_is_refused(tmp_path: Path) -> None:
    samples = zeros_with_runs(tmp_path / "x", 6, [(PADDING, 0, 2), (0, 0, 4)], first_run=[0, 2])
    with pytest.raises(DataError, match="sample 0 has padding before its end"):
        samples.document_lengths(0)


def test_runs_in_words(tmp_path: Path) -> None:
    samples = zeros_with_runs(
        tmp_path / "x", 6, [(0, 9, 3), (LITERAL, 0, 2), (PADDING, 0, 1)], first_run=[0, 3], literals=[60, 115]
    )
    assert [(r.source, r.document, r.start, r.length, r.loss, r.is_padding) for r in read_runs(tmp_path / "x").sample(0)] == [
        ("books", "moby", 9, 3, True, False),
        (None, None, 0, 2, True, False),
        (None, None, 0, 1, True, True),
    ]
    assert len(samples) == 1


def test_what_comes_next_is_read_in_a_thread() -> None:
    """Every value is that of its key, whatever the order; one is read ahead and not twice."""
    calls: list[tuple[int, bool]] = []
    here = threading.get_ident()

    def read(key: int) -> int:
        calls.append((key, threading.get_ident() == here))
        if key == 13:
            raise DataError("bad luck")
        return key * key

    ahead = ReadAhead(read)
    assert [ahead.get(key, key + 1) for key in range(4)] == [0, 1, 4, 9]
    assert ahead.get(9, 13) == 81
    with pytest.raises(DataError, match="bad luck"):
        ahead.get(13, 2)
    assert ahead.get(5, 6) == 25
    assert calls[:4] == [(0, True), (1, False), (2, False), (3, False)]
    assert {(9, True), (13, False)} <= set(calls)


def test_nothing_is_read_behind_the_last_value() -> None:
    calls: list[int] = []
    ahead: ReadAhead[int, int] = ReadAhead(lambda key: calls.append(key) or key)
    assert [ahead.get(1, 2), ahead.get(2, None)] == [1, 2]
    assert calls == [1, 2]
    assert ahead._ahead is None


def test_the_end_of_the_process_does_not_wait_for_what_is_read_ahead() -> None:
    """A run that is stopped between two steps leaves in the middle of a read that may take minutes."""
    code = (
        "import time\nfrom mcore_longctx.data.samples import ReadAhead\n"
        "ahead = ReadAhead(lambda key: time.sleep(60 * key))\nahead.get(0, 1)\nprint('done')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
