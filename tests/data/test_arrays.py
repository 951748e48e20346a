"""Columns in one file: safetensors reads them, equal input gives equal bytes, and no damage goes unseen."""

import errno
import os
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files import arrays
from mcore_longctx.data.files.arrays import file_crc32, map_arrays, map_file, new_arrays, write_arrays
from mcore_longctx.errors import DataError, LongctxError
from tests.data.mutations import mutations

DTYPES = [np.bool_, np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


def columns(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        np.dtype(dtype).name: rng.integers(0, 2 if dtype is np.bool_ else 200, 5 + n).astype(dtype)
        for n, dtype in enumerate(DTYPES)
    }
    return made | {"empty": np.zeros(0, np.int64)}


def test_safetensors_reads_the_columns(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_arrays(tmp_path / "x", columns(), {"seed": 3})
    with safe_open(tmp_path / "x", framework="numpy") as file:
        assert set(file.keys()) == {*columns(), "checksum"}
        for name, column in columns().items():
            np.testing.assert_array_equal(file.get_tensor(name), column)
        assert file.metadata() == {"mcore_longctx": '{"seed": 3}'}
        raw = (tmp_path / "x").read_bytes()
        assert file.get_tensor("checksum").tolist() == [crc32(raw[:-4])]


def test_columns_and_metadata_come_back_read_only_and_aligned(tmp_path: Path) -> None:
    metadata = {"a": [1, "ü", None, 2.5], "b": {"c": True}}
    write_arrays(tmp_path / "x", columns(), metadata)
    arrays, found = map_arrays(tmp_path / "x")
    assert found == metadata
    assert set(arrays) == set(columns())
    for name, column in columns().items():
        np.testing.assert_array_equal(arrays[name], column)
        assert arrays[name].dtype == column.dtype
        assert arrays[name].ctypes.data % column.itemsize == 0 or not len(column)
    with pytest.raises(ValueError, match="read-only"):
        arrays["int64"][0] = 1


@settings(max_examples=40, deadline=None)
@given(
    made=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name not in ("checksum", "__metadata__")),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 1), max_size=9)),
        max_size=5,
    )
)
def test_any_columns_survive(tmp_path_factory: pytest.TempPathFactory, made) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    arrays = {name: np.array(values, dtype) for name, (dtype, values) in made.items()}
    write_arrays(path, arrays, {})
    found, _ = map_arrays(path)
    assert {name: (column.dtype, column.tolist()) for name, column in found.items()} == {
        name: (column.dtype, column.tolist()) for name, column in arrays.items()
    }


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", columns(), {"seed": 3})
    with new_arrays(
        tmp_path / "b", {name: (column.dtype, len(column)) for name, column in columns().items()}, {"seed": 3}
    ) as filled:
        for name, column in columns().items():
            assert not filled[name].any()
            filled[name][:] = column
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def fail_half_way(path: Path, error: Exception) -> None:
    with new_arrays(path, {"a": (np.int64, 4)}, {}) as made:
        made["a"][0] = 7
        assert [entry.name.split("-")[0] for entry in path.parent.iterdir()] == ["x.partial"]
        raise error


@pytest.mark.parametrize("error", [RuntimeError("half-way"), FileNotFoundError("somebody else's file")])
def test_an_exception_leaves_nothing_and_is_not_renamed(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        fail_half_way(tmp_path / "x", error)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"x: cannot be written \(No space left on device\); make room"):
        write_arrays(tmp_path / "x", columns(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written \(No such file or directory\)"):
        write_arrays(tmp_path / "no" / "x", columns(), {})
    with pytest.raises(DataError, match="no such file"):
        map_arrays(tmp_path / "x")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        map_arrays(tmp_path)


def reseal(raw: bytes) -> bytes:
    """The same with a checksum that is right: what a broken writer would leave."""
    return raw[:-4] + crc32(raw[:-4]).to_bytes(4, "little")


def refusal(path: Path) -> str:
    try:
        map_arrays(path)
    except DataError as error:
        return str(error)
    return ""


def test_every_one_of_2000_mutations_is_found(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x", columns(), {"seed": 3, "kind": "sidecar"})
    raw = (tmp_path / "x").read_bytes()
    fields = [(0, 8), (len(raw) - 4, 4), *((offset, 8) for offset in range(8, len(raw) - 8, 8))]
    for what, changed in mutations(raw, 2000, seed=1, fields=fields):
        (tmp_path / "x").write_bytes(changed)
        assert refusal(tmp_path / "x").startswith(str(tmp_path / "x")), what


def test_a_wrong_layout_under_a_right_checksum_ends_in_our_error_or_in_columns_inside_the_file(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x", columns(), {"seed": 3, "kind": "sidecar"})
    raw = (tmp_path / "x").read_bytes()
    read, refused = 0, 0
    for _what, changed in mutations(raw, 2000, seed=2, fields=[(0, 8)] * 3):
        (tmp_path / "x").write_bytes(reseal(changed))
        try:
            arrays, _ = map_arrays(tmp_path / "x")
            read += sum(int(column.astype(np.int64).sum()) >= 0 for column in arrays.values()) > 0
        except LongctxError:
            refused += 1
    assert refused > 500  # most of the file is its header


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,  # deeper than Python's stack
        b'{"__metadata__":{"mcore_longctx":"{}"},"checksum":0,"a":{"dtype":"I64","shape":[1.0],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"mcore_longctx":"{}"},"checksum":0,"a":{"dtype":"I64","shape":[-1],"data_offsets":[8,0]}}',
        b'{"__metadata__":{"mcore_longctx":"{}"},"checksum":0,"a":{"dtype":"I64","shape":[1],"data_offsets":[-8,0]}}',
        b'{"__metadata__":{"mcore_longctx":"{}"},"checksum":0,"a":{"dtype":"I64","shape":[1,1],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"mcore_longctx":"{}"},"checksum":0,"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"mcore_longctx":"{}"},"checksum":0,"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}',
        b'{"__metadata__":{"mcore_longctx":"{"},"checksum":0}',
        b'{"__metadata__":3,"checksum":0}',
        b"[]",
        b"\xff\xfe",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    body = bytes(8)
    (tmp_path / "x").write_bytes(reseal(len(header).to_bytes(8, "little") + header + body + bytes(4)))
    with pytest.raises(DataError, match="damaged"):
        map_arrays(tmp_path / "x")


def test_the_checksum_of_a_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcore_longctx.data.files.arrays._BLOCK", 7)
    raw = np.random.default_rng(0).bytes(100)
    (tmp_path / "x").write_bytes(raw)
    assert file_crc32(tmp_path / "x") == crc32(raw)
    with pytest.raises(DataError, match="cannot be read"):
        file_crc32(tmp_path / "y")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_columns_outlive_any_number_of_files_without_a_descriptor(tmp_path: Path) -> None:
    """A few hundred tables are open at once in a plan: each descriptor that one kept would count against the limit of the process."""
    made = {name: column for name, column in columns().items() if name != "empty"} | {"long": np.arange(5000)}
    write_arrays(tmp_path / "a", made, {})
    before = descriptors()
    opened = [map_arrays(tmp_path / "a")[0] for _ in range(300)]
    assert descriptors() == before
    mapped = Path("/proc/self/maps").read_text().count(str(tmp_path / "a"))
    assert mapped == 300  # one map a file, whatever its columns
    kept = opened[7]["long"][10:20]
    del opened
    (tmp_path / "a").unlink()
    assert kept.tolist() == list(range(10, 20))  # a slice of a column keeps its map
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "a")) == 1
    del kept
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "a")) == 0


def test_a_whole_file_is_mapped_read_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert map_file(tmp_path / "a").tobytes() == b"abc"
    assert not map_file(tmp_path / "a").flags.writeable
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        map_file(tmp_path / "a").setflags(write=True)
    (tmp_path / "none").touch()
    assert len(map_file(tmp_path / "none")) == 0
    with Path("/proc/self/stat").open("rb") as file, pytest.raises(OSError, match=r"\[Errno"):  # not address -1
        arrays._map(file.fileno(), 1)
