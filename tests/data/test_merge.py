"""Merged files are Megatron's, byte for byte; a damaged input is refused, and what is there is never touched."""

import errno
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files.index_file import IndexColumns, write_index
from mcore_longctx.data.files.indexed import IndexedReader, IndexedWriter
from mcore_longctx.data.files.sidecar import read_runs
from mcore_longctx.data.inspect import merge
from mcore_longctx.data.inspect.merge import merge_in_words, merge_indexed
from mcore_longctx.data.inspect.verify import verify_data
from mcore_longctx.data.samples import PackedSamples
from mcore_longctx.errors import DataError
from mcore_longctx.manifest import partial_path
from tests.data.limits import died_at, few_descriptors
from tests.data.packed import make_packed


def write(prefix: Path, documents: list[list[int]], dtype: str = "int32", first: int = 0) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for lengths in documents:
            for length in lengths:
                writer.add(np.arange(first, first + length) % 50_000, ends_document=False)
                first += length
            writer.end_document()
    return prefix


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.lists(st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=5), min_size=1, max_size=4),
    dtype=st.sampled_from(["uint16", "int32"]),
)
def test_both_files_equal_those_of_megatrons_merge(tmp_path_factory: pytest.TempPathFactory, inputs, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("merge")
    prefixes = [write(folder / f"in{n}", documents, dtype, 1000 * n) for n, documents in enumerate(inputs)]
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.dtype(dtype).type)
    for prefix in prefixes:
        if prefix.with_suffix(".bin").stat().st_size:  # Megatron maps an empty file, which fails
            builder.add_index(str(prefix))
    builder.finalize(str(folder / "theirs.idx"))
    full = [prefix for prefix in prefixes if prefix.with_suffix(".bin").stat().st_size] or prefixes[:0]
    if full:
        merge_indexed(full, folder / "ours")
        for suffix in (".bin", ".idx"):
            assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()
    facts = merge_indexed(prefixes, folder / "all")
    reader = IndexedReader(folder / "all")
    assert len(reader) == facts["sequences"] == sum(len(lengths) for documents in inputs for lengths in documents)
    assert len(reader.document_indices) - 1 == facts["documents"] == sum(map(len, inputs))


def test_the_order_is_the_one_that_is_given_and_suffixes_are_taken(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [[2]]), write(tmp_path / "b", [[3]], first=100)
    facts = merge_indexed([f"{b}.bin", f"{a}.idx"], tmp_path / "out")
    assert [row.tolist() for row in map(IndexedReader(tmp_path / "out").get, range(2))] == [[100, 101, 102], [0, 1]]
    assert merge_in_words(facts) == (
        f"{tmp_path}/out: 2 inputs, 2 sequences in 2 documents, 5 tokens (int32, 20 bytes), "
        f"without a sidecar: 2 of 2 inputs have none, first {b}"
    )


def test_a_cut_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5], [6]])
    write(tmp_path / "b", [[5], [6]])
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-18])
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"a\.bin: 26 bytes, its index says 44: cut, sequence 1 of 2 is the first"):
        merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert files(tmp_path) == before


def test_types_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5]])
    write(tmp_path / "b", [[5]], "uint16")
    with pytest.raises(DataError, match=r"b: holds uint16 tokens, .*a holds int32; merge what one tokenizer made"):
        merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(DataError, match="nothing to merge"):
        merge_indexed([], tmp_path / "out")


def test_multimodal_files_are_merged_with_their_modes_and_not_with_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(12))
        write_index(
            tmp_path / f"{name}.idx", np.int32, [IndexColumns(np.array([1, 2]), np.array([0, 2]), np.array([0, 1], np.int8))]
        )
    merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    modes = IndexedReader(tmp_path / "out").index.sequence_modes
    assert modes is not None
    assert modes.tolist() == [0, 1, 0, 1]
    write(tmp_path / "c", [[1]])
    with pytest.raises(DataError, match="is multimodal, the other is not"):
        merge_indexed([tmp_path / "a", tmp_path / "c"], tmp_path / "out2")


@pytest.mark.parametrize("suffix", ["bin", "idx", "runs"])
def test_what_is_there_is_kept(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[5]])
    (tmp_path / f"out.{suffix}").write_text("mine")
    before, copy = files(tmp_path), merge._copy_tokens
    monkeypatch.setattr(merge, "_copy_tokens", None)  # refused before anything is copied
    with pytest.raises(DataError, match=rf"out\.{suffix}: file is already there.*; choose another name or remove"):
        merge_indexed([tmp_path / "a"], tmp_path / "out")
    assert files(tmp_path) == before

    def and_then_it_appears(*args) -> None:
        copy(*args)
        (tmp_path / f"late.{suffix}").write_text("mine")

    monkeypatch.setattr(merge, "_copy_tokens", and_then_it_appears)
    with pytest.raises(DataError, match=rf"late\.{suffix}: file is already there"):
        merge_indexed([tmp_path / "a"], tmp_path / "late")
    assert files(tmp_path) == before | {f"late.{suffix}": b"mine"}


def test_an_input_cannot_be_the_output(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5]])
    with pytest.raises(DataError, match=r"a\.bin: file is already there"):
        merge_indexed([tmp_path / "a", tmp_path / "a"], tmp_path / "a")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[5]])
    before = files(tmp_path)

    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\); make room"):
        merge_indexed([tmp_path / "a"], tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("kernel", ["refuses", "copies nothing", "copies a little"])
def test_tokens_are_copied_whole_whatever_the_kernel_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    prefixes = [write(tmp_path / name, [[700], [900]], first=n) for n, name in enumerate("abc")]
    monkeypatch.setattr(merge, "_COPY", 1000)
    real, calls = os.copy_file_range, []

    def copy(source: int, target: int, count: int) -> int:
        calls.append(count)
        if kernel == "refuses":
            raise OSError(errno.EXDEV, "other file system")
        if kernel == "copies nothing" or len(calls) % 3 == 0:
            return 0
        return real(source, target, min(count, 333))

    monkeypatch.setattr(os, "copy_file_range", copy)
    merge_indexed(prefixes, tmp_path / "out")
    assert calls
    assert (tmp_path / "out.bin").read_bytes() == b"".join((tmp_path / f"{name}.bin").read_bytes() for name in "abc")


def test_an_input_that_shrinks_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[500]])

    def shrink(*_: int) -> int:
        os.truncate(tmp_path / "a.bin", 100)
        return 0

    monkeypatch.setattr(os, "copy_file_range", shrink)
    with pytest.raises(DataError, match=r"a\.bin: became shorter while it was copied"):
        merge_indexed([tmp_path / "a"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_merged_pointers_are_exact_past_2_40_and_megatron_reads_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for name, value in (("a", 11), ("b", 22)):  # 0.6 TiB each, sparse
        with (tmp_path / f"{name}.bin").open("wb") as file:
            file.truncate(150 * 2**32)
            file.seek(149 * 2**32 + 4 * 99)
            file.write(np.array([value], "<i4").tobytes())
        write_index(tmp_path / f"{name}.idx", np.int32, [IndexColumns(np.full(150, 2**30, np.int32), np.arange(151))])

    def copy_ends(source: Path, target: int, size: int) -> int:  # a copy that leaves the holes out
        at = os.lseek(target, 0, os.SEEK_END)
        os.ftruncate(target, at + size)
        with source.open("rb") as file:
            file.seek(149 * 2**32)
            os.pwrite(target, file.read(4096), at + 149 * 2**32)
        return size

    monkeypatch.setattr(merge, "_copy", copy_ends)
    facts = merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert facts["bytes"] == 300 * 2**32 > 2**40
    for reader in (IndexedReader(tmp_path / "out"), IndexedDataset(str(tmp_path / "out"))):
        assert reader.get(149, 98, 3).tolist() == [0, 11, 0]
        assert reader.get(299, 98, 3).tolist() == [0, 22, 0]


def test_memory_does_not_grow_with_the_sequences(tmp_path: Path) -> None:
    count = 4_000_000
    for name in "ab":  # sequences without tokens: only the index counts
        (tmp_path / f"{name}.bin").touch()
        write_index(tmp_path / f"{name}.idx", np.int32, [IndexColumns(np.zeros(count, np.int32), np.arange(count + 1))])
    tracemalloc.start()
    merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45e6  # the pointers alone are 64 MB
    assert IndexedReader(tmp_path / "out").document_indices[-1] == 2 * count


# ------------------------------------------------------------------ sidecars
def described(prefix: Path) -> list[tuple]:
    """Each sample: its tokens and its runs with sources and ids."""
    samples = PackedSamples(prefix)
    return [(samples.tokens(index).tolist(), samples.runs.sample(index)) for index in range(len(samples))]


@pytest.mark.parametrize("rows", [3, 1 << 20])
def test_samples_and_their_runs_are_those_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(merge, "_ROWS", rows)
    make_packed(tmp_path / "a", 5)
    make_packed(tmp_path / "b", 7, seed=1, sources=("wiki", "code", "books"))
    make_packed(tmp_path / "c", 2, seed=2, sources=("wiki",))
    facts = merge_indexed([tmp_path / name for name in "abc"], tmp_path / "out")
    assert facts["runs"]
    assert facts["note"] is None
    assert described(tmp_path / "out") == [sample for name in "abc" for sample in described(tmp_path / name)]
    assert verify_data(tmp_path / "out", separator=[7, 8])["fault_count"] == 0
    runs = read_runs(tmp_path / "out")
    assert runs.sources == ("books", "wiki", "code")
    assert runs.literals.tolist() == [7, 8]
    assert runs.facts["vocab_size"] == 1000
    assert [row["seed"] for row in runs.facts["merged"]] == [0, 1, 2]
    again = merge_indexed([tmp_path / "out", tmp_path / "a"], tmp_path / "more")
    assert again["sequences"] == 19
    assert described(tmp_path / "more")[14:] == described(tmp_path / "a")


def test_other_separators_keep_their_tokens(tmp_path: Path) -> None:
    make_packed(tmp_path / "a", 4)
    make_packed(tmp_path / "b", 4, seed=1, separator=(9, 5, 6))
    merge_indexed([tmp_path / name for name in "ab"], tmp_path / "out")
    assert read_runs(tmp_path / "out").literals.tolist() == [7, 8, 9, 5, 6]
    assert verify_data(tmp_path / "out")["fault_count"] == 0
    make_packed(tmp_path / "c", 4, seed=1, separator=(9, 5), begin_tokens=1)
    make_packed(tmp_path / "d", 4, seed=1, separator=(4, 5), begin_tokens=1)
    with pytest.raises(DataError, match=r"d: has other separators than .*c; merge what was made in one way"):
        merge_indexed([tmp_path / name for name in "cd"], tmp_path / "out2")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    make_packed(tmp_path / "a")
    make_packed(tmp_path / "b", tokenizer_sha256="cd" * 32)
    with pytest.raises(
        DataError, match=r"b: has tokenizer_sha256 'cdcd.* an input before it has 'abab.*; merge what was made in one way"
    ):
        merge_indexed([tmp_path / name for name in "ab"], tmp_path / "out")


def test_data_without_padding_goes_with_any(tmp_path: Path) -> None:
    make_packed(tmp_path / "a", pad_token_id=None)
    make_packed(tmp_path / "b", seed=1)
    merge_indexed([tmp_path / name for name in "ab"], tmp_path / "out")
    assert read_runs(tmp_path / "out").facts["pad_token_id"] == 3
    make_packed(tmp_path / "c", pad_token_id=4)
    with pytest.raises(DataError, match="c: has pad_token_id 4, an input before it has 3"):
        merge_indexed([tmp_path / name for name in "abc"], tmp_path / "out2")


def test_without_common_sidecars_it_is_said_that_there_is_none(tmp_path: Path) -> None:
    make_packed(tmp_path / "a")
    make_packed(tmp_path / "b", seq_length=32)
    assert merge_indexed([tmp_path / name for name in "ab"], tmp_path / "x")["note"] == "samples of 64 and of 32 tokens"
    (tmp_path / "b.runs").unlink()
    facts = merge_indexed([tmp_path / name for name in "ab"], tmp_path / "y")
    assert facts["note"] == f"1 of 2 inputs have none, first {tmp_path}/b"
    assert not (tmp_path / "x.runs").exists()
    assert not (tmp_path / "y.runs").exists()


def test_a_sidecar_of_other_files_is_refused(tmp_path: Path) -> None:
    make_packed(tmp_path / "a")
    make_packed(tmp_path / "b", 3)
    (tmp_path / "b.runs").write_bytes((tmp_path / "a.runs").read_bytes())
    with pytest.raises(DataError, match=r"b\.idx: is not the index that the sidecar was written with"):
        merge_indexed([tmp_path / name for name in "ab"], tmp_path / "out")
    raw = bytearray((tmp_path / "a.runs").read_bytes())
    raw[-50] ^= 1
    (tmp_path / "a.runs").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.runs: damaged"):
        merge_indexed([tmp_path / "a"], tmp_path / "out")


def test_a_merge_that_was_killed_says_what_to_remove_and_leaves_no_partial_files(tmp_path: Path) -> None:
    """A child dies at each of its renames and unlinks. What may be somebody else's is never removed."""
    make_packed(tmp_path / "a")
    merge_indexed([tmp_path / "a"], tmp_path / "whole")
    whole = {name.removeprefix("whole"): raw for name, raw in files(tmp_path).items() if name.startswith("whole.")}
    others = {"out.txt": b"", "out.bin.partial-elsewhere-1": b"", f"out2.bin{partial_path(Path('x')).name[1:-1]}999999": b""}
    messages = []
    for number in range(1, 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in others:
            (folder / name).touch()
        killed = died_at(number, lambda out=folder / "out": merge_indexed([tmp_path / "a"], out))
        left = {name for name in files(folder) if name.startswith("out.") and "partial" not in name} - {"out.txt"}
        assert ("out.idx" in left) <= (left == {"out.bin", "out.idx", "out.runs"})
        if left and "out.idx" not in left:
            with pytest.raises(DataError, match="an earlier merge was killed") as raised:
                merge_indexed([tmp_path / "a"], folder / "out")
            messages.append(str(raised.value))
            for name in left:
                assert name in str(raised.value)
                (folder / name).unlink()
        if "out.idx" not in left:
            merge_indexed([tmp_path / "a"], folder / "out")
        made = {name: raw for name, raw in files(folder).items() if name not in others}
        if not killed:
            break
        assert {name.removeprefix("out"): raw for name, raw in made.items() if "partial" not in name} == whole
        assert set(others) <= set(files(folder))
        if "out.idx" not in left:
            assert len(made) == 3
    assert len(messages) >= 2
    assert messages[0].endswith("choose another name or remove out.runs")
    assert messages[1].endswith("choose another name or remove out.runs and out.bin")


@pytest.mark.parametrize("given", ["out", "out.bin", "out.idx", "out.runs"])
def test_a_suffix_of_the_output_is_not_doubled(tmp_path: Path, given: str) -> None:
    make_packed(tmp_path / "a")
    assert merge_indexed([tmp_path / "a"], tmp_path / given)["prefix"] == str(tmp_path / "out")
    assert set(files(tmp_path)) == {f"{name}.{suffix}" for name in ("a", "out") for suffix in ("bin", "idx", "runs")}


@pytest.mark.parametrize("given", ["", ".", "..", ".bin", "/"])
def test_an_output_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    write(tmp_path / "a", [[5]])
    monkeypatch.chdir(tmp_path)
    for out in (given, Path(given)):
        with pytest.raises(DataError, match="names no file"):
            merge_indexed([tmp_path / "a"], out)
    assert set(files(tmp_path)) == {"a.bin", "a.idx"}


def test_more_pairs_than_a_process_may_open_files(tmp_path: Path) -> None:
    one = make_packed(tmp_path / "a", samples=2)
    with few_descriptors(64):
        facts = merge_indexed([tmp_path / "a"] * 300, tmp_path / "out")
    assert (facts["sequences"], facts["runs"]) == (600, True)
    assert [PackedSamples(tmp_path / "out").tokens(index).tolist() for index in (0, 599)] == one.samples
