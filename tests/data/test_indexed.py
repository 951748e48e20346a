"""Our .bin/.idx files are Megatron's, byte for byte, and damaged ones are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from mcore_longctx.data import IndexedReader, IndexedWriter
from mcore_longctx.data.indexed import token_dtype
from mcore_longctx.errors import DataError

LENGTHS = [5, 1, 0, 700, 3]


def sequences(dtype: np.dtype) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, np.iinfo(dtype).max, n, endpoint=True).astype(dtype) for n in LENGTHS]


def write(prefix: Path, dtype: str = "int32") -> list[np.ndarray]:
    rows = sequences(np.dtype(dtype))
    with IndexedWriter(prefix, dtype) as writer:
        for row in rows:
            writer.add(row)
    return rows


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_both_files_equal_those_of_megatrons_builder(tmp_path: Path, dtype: str) -> None:
    rows = write(tmp_path / "ours", dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for row in rows:
        builder.add_document(torch.from_numpy(row.astype(np.int64)), [len(row)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_and_our_reader_read_what_was_written(tmp_path: Path, dtype: str) -> None:
    rows = write(tmp_path / "ours", dtype)
    theirs, ours = IndexedDataset(str(tmp_path / "ours")), IndexedReader(tmp_path / "ours")
    assert len(theirs) == len(ours) == len(rows)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(theirs.get(index), row)
        np.testing.assert_array_equal(ours[index], row)
    np.testing.assert_array_equal(ours.get(3, 10, 20), rows[3][10:30])
    np.testing.assert_array_equal(theirs.document_indices, ours.document_indices)


def test_our_reader_reads_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(7), [3, 4])
    builder.add_document(torch.arange(2), [2])
    builder.finalize(str(tmp_path / "x.idx"))
    reader = IndexedReader(tmp_path / "x")
    assert reader.document_indices.tolist() == [0, 2, 3]
    assert reader[1].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500, 65_536, 128_256])
def test_the_token_type_is_the_one_megatron_picks(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_the_type_holds_the_largest_id_of_the_vocabulary(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "uint16") as writer, pytest.raises(DataError, match="token id 65536 does not fit uint16"):
        writer.add(np.array([1, 65_536]))


def test_a_sequence_that_the_index_cannot_hold_is_refused(tmp_path: Path) -> None:
    # a broadcast view: 2^31 tokens without their memory
    giant = np.broadcast_to(np.zeros(1, np.int32), 2**31)
    with pytest.raises(DataError, match="a sequence of 2,147,483,648 tokens"), IndexedWriter(tmp_path / "x", "int32") as writer:
        writer.add(giant)
    assert list(tmp_path.iterdir()) == []


def test_pointers_past_2_gib_do_not_wrap(tmp_path: Path) -> None:
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(3 * 1_200_000_000)  # sparse
    lengths = np.full(3, 1_200_000_000, "<i4")
    pointers = np.arange(3, dtype="<i8") * 1_200_000_000
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 1, 3, 4)  # one byte a token
    (tmp_path / "x.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + np.arange(4, dtype="<i8").tobytes())
    assert IndexedReader(tmp_path / "x").get(2, 1_199_999_999, 1).tolist() == [0]
    wrapped = pointers.astype("<i4").astype("<i8")  # what a writer that sums in int32 leaves
    (tmp_path / "x.idx").write_bytes(header + lengths.tobytes() + wrapped.tobytes() + np.arange(4, dtype="<i8").tobytes())
    with pytest.raises(DataError, match="sequence 2 starts at byte -1894967296, the lengths disagree"):
        IndexedReader(tmp_path / "x")


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


def test_an_empty_set_is_fine(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "int32"):
        pass
    assert len(IndexedReader(tmp_path / "x")) == 0


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / "x.bin", 18), r"x\.bin: 2,818 bytes, its index says 2,836"),
        (lambda p: cut(p / "x.idx", 8), r"x\.idx: 134 bytes, 5 sequences need 142"),
        (lambda p: cut(p / "x.idx", 120), r"x\.idx: too short for an index"),
        (lambda p: (p / "x.idx").write_bytes(b"PK" + bytes(140)), r"x\.idx: not an index of Megatron's indexed dataset"),
        (lambda p: (p / "x.bin").unlink(), r"x\.bin: no such file"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "x")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        IndexedReader(tmp_path / "x")
