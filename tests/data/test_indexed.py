"""Our .bin/.idx files are Megatron's, byte for byte, past every border of 32 bits, and damaged ones are refused."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files.index_file import IndexColumns, read_index, write_index
from mcore_longctx.data.files.indexed import IndexedReader, IndexedWriter, find_prefix, token_dtype
from mcore_longctx.errors import DataError

LENGTHS = [5, 1, 0, 700, 3]
DOCUMENTS = [[3, 0, 4], [2], [], [9, 1]]  # lengths of the sequences of each


def sequences(dtype: np.dtype) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, np.iinfo(dtype).max, n, endpoint=True).astype(dtype) for n in LENGTHS]


def write(prefix: Path, dtype: str = "int32") -> list[np.ndarray]:
    rows = sequences(np.dtype(dtype))
    with IndexedWriter(prefix, dtype) as writer:
        for row in rows:
            writer.add(row)
    return rows


def write_documents(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> int:
    count = 0
    with IndexedWriter(prefix, dtype) as writer:
        for lengths in documents:
            for length in lengths:
                writer.add(np.arange(count, count + length, dtype=dtype), ends_document=False)
                count += length
            writer.end_document()
    return count


def megatron_index(path: Path, dtype: Any, lengths: list[int], documents: list[int], modes: list[int] | None = None) -> bytes:
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    with _IndexWriter(str(path), dtype) as writer:
        writer.write(lengths, modes, documents)
    return path.read_bytes()


# ------------------------------------------------------------------ against Megatron
@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int16", "int64", "int8"])
def test_both_files_equal_those_of_megatrons_builder(tmp_path: Path, dtype: str) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rows = write(tmp_path / "ours", dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for row in rows:
        builder.add_document(torch.from_numpy(row.astype(np.int64)), [len(row)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_documents_of_several_sequences_are_written_as_megatrons_builder_writes_them(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    count = write_documents(tmp_path / "ours", DOCUMENTS)
    builder, at = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32), 0
    for lengths in DOCUMENTS:
        for length in lengths:
            builder.add_item(torch.arange(at, at + length))
            at += length
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert count == at
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert IndexedReader(tmp_path / "ours").document_indices.tolist() == [0, 3, 4, 4, 6]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_and_our_reader_read_what_was_written(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = write(tmp_path / "ours", dtype)
    theirs, ours = IndexedDataset(str(tmp_path / "ours")), IndexedReader(tmp_path / "ours")
    assert len(theirs) == len(ours) == len(rows)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(theirs.get(index), row)
        np.testing.assert_array_equal(ours[index], row)
    np.testing.assert_array_equal(ours.get(3, 10, 20), rows[3][10:30])
    np.testing.assert_array_equal(ours.read(3, 10, 20), rows[3][10:30])
    assert [ours.read(index).tolist() for index in range(len(rows))] == [row.tolist() for row in rows]
    np.testing.assert_array_equal(theirs.document_indices, ours.document_indices)


def test_our_reader_reads_what_megatron_wrote(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(7), [3, 4])
    builder.add_document(torch.arange(2), [2])
    builder.finalize(str(tmp_path / "x.idx"))
    reader = IndexedReader(tmp_path / "x")
    assert reader.document_indices.tolist() == [0, 2, 3]
    assert reader[1].tolist() == [3, 4, 5, 6]


def test_modes_of_a_multimodal_index_are_kept(tmp_path: Path) -> None:
    raw = megatron_index(tmp_path / "theirs.idx", np.int32, [3, 0, 4], [0, 1, 3], [0, 1, 1])
    index = read_index(tmp_path / "theirs.idx")
    assert index.sequence_modes is not None
    assert index.sequence_modes.tolist() == [0, 1, 1]
    write_index(tmp_path / "ours.idx", np.int32, [index.columns])
    assert (tmp_path / "ours.idx").read_bytes() == raw


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500, 65_536, 128_256])
def test_the_token_type_is_the_one_megatron_picks(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


# ------------------------------------------------------------------ large
HUGE = [2**31 - 1] * 600 + [0, 1, 17]  # 600 x 2 GiB tokens: pointers past 2^42 bytes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_pointers_are_megatrons_far_past_2_40(tmp_path: Path, dtype: Any) -> None:
    documents = [0, 1, 300, len(HUGE)]
    theirs = megatron_index(tmp_path / "theirs.idx", dtype, HUGE, documents)
    parts = [  # the same in two parts
        IndexColumns(np.array(HUGE[:300], np.int32), np.array([0, 1, 300])),
        IndexColumns(np.array(HUGE[300:], np.int32), np.array([0, len(HUGE) - 300])),
    ]
    assert write_index(tmp_path / "ours.idx", dtype, parts) == crc32(theirs)
    assert (tmp_path / "ours.idx").read_bytes() == theirs
    index = read_index(tmp_path / "ours.idx")
    item = np.dtype(dtype).itemsize
    assert index.sequence_pointers[-1] == (600 * (2**31 - 1) + 1) * item > 2**40
    assert index.bytes == sum(HUGE) * item
    assert index.sequence_at(index.bytes - 1) == len(HUGE) - 1
    assert index.sequence_at(599 * (2**31 - 1) * item) == 599


def test_tokens_past_2_40_bytes_are_read_where_megatron_reads_them(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lengths = [2**30] * 300  # 1.2 TiB of int32, sparse
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(sum(lengths) * 4)
        file.seek(299 * 2**32 + 4 * 12345)
        file.write(np.array([77, 78], "<i4").tobytes())
    write_index(tmp_path / "x.idx", np.int32, [IndexColumns(np.array(lengths, np.int32), np.arange(301))])
    assert IndexedReader(tmp_path / "x").get(299, 12344, 4).tolist() == [0, 77, 78, 0]
    assert IndexedReader(tmp_path / "x").read(299, 12344, 4).tolist() == [0, 77, 78, 0]
    theirs = IndexedDataset(str(tmp_path / "x"))  # its sequences are views that end with it
    assert theirs.get(299, 12344, 4).tolist() == [0, 77, 78, 0]


def test_a_pointer_that_wrapped_is_named(tmp_path: Path) -> None:
    lengths = np.full(600, 1_000_000, np.int32)
    write_index(tmp_path / "x.idx", np.int32, [IndexColumns(lengths, np.arange(601))])
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    with np.errstate(over="ignore"):
        wrapped = (np.cumsum(lengths, dtype=np.int32) - lengths) * np.int32(4)  # what a writer leaves that sums in int32
    raw[34 + 4 * 600 : 34 + 12 * 600] = wrapped.astype("<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(
        DataError, match=r"sequence 537 starts at byte -2,146,967,296, the lengths before it say 2,148,000,000 \(it wrap"
    ):
        read_index(tmp_path / "x.idx")


def test_a_sequence_that_the_index_cannot_hold_is_refused(tmp_path: Path) -> None:
    # a broadcast view: 2^31 tokens without their memory
    giant = np.broadcast_to(np.zeros(1, np.int32), 2**31)
    with pytest.raises(DataError, match="a sequence of 2,147,483,648 tokens"), IndexedWriter(tmp_path / "x", "int32") as writer:
        writer.add(giant)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_keeps_twelve_bytes_a_sequence(tmp_path: Path) -> None:
    one = np.zeros(1, np.uint16)
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        tracemalloc.start()
        for _ in range(200_000):
            writer.add(one)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert kept < 200_000 * 16  # a list of Python's integers needs 40 and more


def test_an_index_of_ten_million_sequences_is_written_and_checked_in_blocks(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from mcore_longctx.data.files.index_file import IndexColumns, read_index, write_index
lengths, ends = np.full(10_000_000, 40_000, np.int32), np.arange(10_000_001)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_index(Path(sys.argv[1]), np.int32, [IndexColumns(lengths, ends)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.idx")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000  # kB; one column of pointers alone is 80 MB
    assert read_index(tmp_path / "x.idx").sequence_pointers[-1] == 9_999_999 * 160_000


# ------------------------------------------------------------------ writing
def test_the_type_holds_the_largest_id_of_the_vocabulary(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        with pytest.raises(DataError, match="token id 65536 does not fit uint16"):
            writer.add(np.array([1, 65_536]))
        with pytest.raises(DataError, match="token id -1 does not fit uint16"):
            writer.add(np.array([-1, 5]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint64", ">i4", "bool"])
def test_a_type_that_no_ids_have_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(DataError, match="has no code in the index; use uint16 or int32"):
        IndexedWriter(tmp_path / "x", dtype)
    if dtype != ">i4":
        with IndexedWriter(tmp_path / "x", "int32") as writer:
            if dtype != "uint64":
                with pytest.raises(DataError, match=f"values of type {dtype} are no token ids"):
                    writer.add(np.zeros(3, dtype))


def test_an_index_of_floats_is_refused_by_its_type(tmp_path: Path) -> None:
    megatron_index(tmp_path / "x.idx", np.float32, [3], [0, 1])
    with pytest.raises(DataError, match=r"x\.idx: holds float32 values, which are no token ids"):
        read_index(tmp_path / "x.idx")


def test_a_document_that_was_not_ended_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the last document was not ended"), IndexedWriter(tmp_path / "x", "int32") as writer:
        writer.add(np.arange(3), ends_document=False)
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_of_the_index_is_known_before_it_appears(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "int32") as writer:
        writer.add(np.arange(3))
        checksum = writer.finish()
        assert not {path.name for path in tmp_path.iterdir()} & {"x.bin", "x.idx"}
    assert checksum == crc32((tmp_path / "x.idx").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def write_half(prefix: Path) -> None:
    with IndexedWriter(prefix, "int32") as writer:
        writer.add(np.arange(10))
        raise RuntimeError


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with pytest.raises(DataError, match=r"x\.bin: file is already there"):
        IndexedWriter(tmp_path / "x", "int32")
    with pytest.raises(DataError, match=r"y\.idx: file is already there"), IndexedWriter(tmp_path / "y", "int32"):
        (tmp_path / "y.idx").write_text("somebody else's")  # while ours is being written
    assert (tmp_path / "y.idx").read_text() == "somebody else's"
    assert not (tmp_path / "y.bin").exists()


def test_an_empty_set_is_fine(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "int32"):
        pass
    assert len(IndexedReader(tmp_path / "x")) == 0


# ------------------------------------------------------------------ damaged
def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: cut(p / "x.bin", 10),
            r"x\.bin: 2,826 bytes, its index says 2,836: cut, sequence 4 of 5 is the first that is not whole",
        ),
        (lambda p: cut(p / "x.bin", 13), r"2,823 bytes, .* cut, sequence 3 of 5 is the first"),
        (lambda p: cut(p / "x.bin", 12), r"2,824 bytes, .* cut, sequence 4 of 5 is the first"),
        (lambda p: cut(p / "x.bin", 2836), r"0 bytes, .* cut, sequence 0 of 5 is the first"),
        (lambda p: (p / "x.bin").write_bytes(bytes(2840)), r"2,840 bytes, its index says 2,836: 4 bytes too many"),
        (lambda p: cut(p / "x.idx", 8), r"x\.idx: 134 bytes, 5 sequences and 6 borders of documents need 142"),
        (lambda p: cut(p / "x.idx", 120), r"x\.idx: too short for an index"),
        (lambda p: (p / "x.idx").write_bytes(b"PK" + bytes(140)), r"x\.idx: not an index of Megatron's indexed dataset"),
        (lambda p: (p / "x.bin").unlink(), r"x\.bin: no such file"),
        (lambda p: (p / "x.idx").unlink(), r"x\.idx: no such file"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "x")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        IndexedReader(tmp_path / "x")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (9, 2, "index version 2 with token type 4 is unknown"),
        (17, 9, "index version 1 with token type 9 is unknown"),
        (18, 2**63, "9,223,372,036,854,775,808 sequences and 6 borders of documents need"),
        (34 + 8, 2**32 - 1, r"sequence 2 has a negative length \(-1\)"),
        (34 + 4, 2, "sequence 2 starts at byte 24, the lengths before it say 28"),
        (34 + 20 + 24, 25, "sequence 3 starts at byte 25, the lengths before it say 24"),
        (34 + 60, 1, "document indices do not go from 0 to 5"),
        (34 + 60 + 16, 5, "document indices do not go from 0 to 5"),
        (34 + 60 + 40, 6, "document indices do not go from 0 to 5"),
    ],
)
def test_every_column_is_held_against_the_others(tmp_path: Path, offset: int, value: int, message: str) -> None:
    write(tmp_path / "x")
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    size = 1 if offset == 17 else 4 if 34 <= offset < 54 else 8
    raw[offset : offset + size] = value.to_bytes(size, "little")
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        IndexedReader(tmp_path / "x")


def test_the_blocks_of_a_long_index_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcore_longctx.data.files.index_file._BLOCK", 3)
    lengths, documents = [4, 0, 9, 1, 1, 5, 2, 7, 7, 3], [0, 1, 4, 4, 6, 9, 10]
    raw = megatron_index(tmp_path / "theirs.idx", np.int32, lengths, documents)
    index = read_index(tmp_path / "theirs.idx")
    write_index(tmp_path / "ours.idx", np.int32, [index.columns])
    assert (tmp_path / "ours.idx").read_bytes() == raw
    for offset, value in (
        (34 + 40 + 8 * 6, 1),
        (34 + 120 + 8 * 3, 2),
    ):  # first of a block of pointers, of borders (the one before is 4)
        changed = bytearray(raw)
        changed[offset] = value
        (tmp_path / "ours.idx").write_bytes(changed)
        with pytest.raises(DataError, match=r"sequence 6 starts at byte|document indices do not go"):
            read_index(tmp_path / "ours.idx")


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 40), max_size=5), max_size=12), dtype=st.sampled_from(["uint16", "int32"]))
def test_any_documents_survive_both_ways(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str
) -> None:
    prefix = tmp_path_factory.mktemp("any") / "x"
    count = write_documents(prefix, documents, dtype)
    reader = IndexedReader(prefix)
    lengths = [length for document in documents for length in document]
    assert reader.sequence_lengths.tolist() == lengths
    assert reader.document_indices.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert [id for index in range(len(reader)) for id in reader[index].tolist()] == list(range(count))
    assert prefix.with_suffix(".idx").read_bytes() == megatron_index(
        prefix.with_suffix(".theirs"), np.dtype(dtype).type, lengths, reader.document_indices.tolist()
    )


def test_one_dataset_is_found_by_folder_prefix_or_file(tmp_path: Path) -> None:
    write(tmp_path / "data.v1")
    prefix = tmp_path / "data.v1"
    for name in (tmp_path, prefix, tmp_path / "data.v1.idx", tmp_path / "data.v1.bin", tmp_path / "data.v1.runs"):
        assert find_prefix(name) == prefix
    write(tmp_path / "other")
    with pytest.raises(DataError, match=r"2 \.idx files in this folder, expected one; give a prefix"):
        find_prefix(tmp_path)


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    rows = write(tmp_path / "x")
    reader = IndexedReader(tmp_path / "x")
    with (tmp_path / "x.bin").open("r+b") as file:
        file.truncate(100)
    assert reader.read(3, 0, 10).tolist() == rows[3][:10].tolist()
    with pytest.raises(DataError, match=r"x\.bin: was cut while it was read"):
        reader.read(3)
