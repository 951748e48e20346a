from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import BY_TORCH
from mcore_longctx.formats.torch_archive import locate_payload, object_item, tensor_frame
from tests.convert.fuzz import mutations, only_our_errors


def our_item(tensor: torch.Tensor) -> bytes:
    dtype = BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
    head, tail = tensor_frame(dtype, tuple(tensor.shape))
    return head + tensor.contiguous().view(torch.uint8).numpy().tobytes() + tail


def torch_item(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def located(folder: Path, item: bytes, tensor: torch.Tensor, *, before: bytes = b"some other item") -> bytes:
    """The payload that `locate_payload` finds, with the item somewhere inside a file."""
    path = folder / "__0_0.distcp"
    path.write_bytes(before + item + b"the next item")
    dtype = BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
    at = locate_payload(path, len(before), len(item), dtype, tuple(tensor.shape), tensor="decoder.weight")
    return path.read_bytes()[at : at + tensor.nbytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6, 4)])
def test_torch_loads_what_we_write_and_we_find_what_torch_saves(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)
    item = our_item(tensor)
    loaded = torch.load(io.BytesIO(item), weights_only=True)
    assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))
    with zipfile.ZipFile(io.BytesIO(item)) as archive:  # another reader of the structure; the payload's checksum is left out
        assert [info.filename for info in archive.infolist() if info.CRC] == [
            "archive/data.pkl",
            "archive/byteorder",
            "archive/version",
        ]
        assert all(archive.read(name) for name in archive.namelist() if name != "archive/data/0")
        assert archive.getinfo("archive/data/0").file_size == tensor.nbytes
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert located(tmp_path, item, tensor) == raw
    assert located(tmp_path, torch_item(tensor), tensor) == raw


@pytest.mark.parametrize("shape", [(5,), (1, 2), (126, 1000, 1_000_000), (1 << 40,)])
def test_payloads_begin_at_a_multiple_of_64(shape: tuple[int, ...]) -> None:
    head, _ = tensor_frame(BY_TORCH["bfloat16"], shape)
    assert len(head) % 64 == 0


def test_frames_are_a_function_of_type_and_shape() -> None:
    assert tensor_frame(BY_TORCH["float16"], (3, 4)) == tensor_frame(BY_TORCH["float16"], (3, 4))
    assert tensor_frame(BY_TORCH["float16"], (3, 4)) != tensor_frame(BY_TORCH["bfloat16"], (3, 4))


def test_an_element_type_without_a_storage_in_torch_is_refused() -> None:
    with pytest.raises(ValueError, match="torch has no storage of float8_e4m3fn"):
        tensor_frame(BY_TORCH["float8_e4m3fn"], (2,))


def test_a_view_into_a_larger_storage_is_found(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)[1:3]
    assert located(tmp_path, torch_item(tensor), tensor) == tensor.numpy().tobytes()


@pytest.mark.parametrize("value", [[None], {"iteration": 7, "checkpoint_version": 3.0}])
def test_objects_are_loaded_by_torch(value: Any) -> None:
    item = object_item(value)
    assert torch.load(io.BytesIO(item), weights_only=True) == value
    assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None


@pytest.mark.parametrize("size", [(1 << 32) - 4096, (1 << 32) - 1, 1 << 32, 5 << 30])
def test_items_around_and_beyond_4_gib_are_read(tmp_path: Path, size: int) -> None:
    """Sparse files: the payload is a hole but for its last bytes. From 4 GiB on the frame is zip64."""
    path = tmp_path / "large.distcp"
    head, tail = tensor_frame(BY_TORCH["uint8"], (size,))
    with path.open("wb") as file:
        file.write(head)
        file.seek(size - 3, io.SEEK_CUR)
        file.write(b"end" + tail)
    assert path.stat().st_blocks * 512 < 1 << 20
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == size
        assert archive.read("archive/version") == b"3\n"
    at = locate_payload(path, 0, path.stat().st_size, BY_TORCH["uint8"], (size,), tensor="large")
    assert at == len(head)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == (size,)
    assert bytes(loaded[-3:].tolist()) == b"end"


class Hostile:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit",))


def unchecked(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record, whatever its checksum: ours leave out that of the payload."""
    with archive.open(name) as record:
        record._expected_crc = None
        return record.read()


def repacked(item: bytes, **changes: bytes | None) -> bytes:
    """The archive with some records replaced or left out; `data_pkl` stands for data.pkl."""
    source, out = zipfile.ZipFile(io.BytesIO(item)), io.BytesIO()
    with zipfile.ZipFile(out, "w", changes.pop("method", zipfile.ZIP_STORED)) as target:
        for name in source.namelist():
            data = changes.get(name.split("/", 1)[1].replace(".", "_").replace("/", "_"), unchecked(source, name))
            if data is not None:
                target.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda item: b"", "has no zip directory"),
        (lambda item: item[:-30], "has no zip directory"),
        (lambda item: bytes(1000), "has no zip directory"),
        (lambda item: repacked(item, data_pkl=None), "has no record 'data.pkl'"),
        (lambda item: repacked(item, data_0=None), "has no record 'data/0'"),
        (lambda item: repacked(item, data_0=b"short"), "holds 5 bytes, the tensor needs 24"),
        (lambda item: repacked(item, byteorder=b"big"), "is not little-endian"),
        (lambda item: repacked(item, method=zipfile.ZIP_DEFLATED), "has a compressed or encrypted record 'archive/data.pkl'"),
        (lambda item: repacked(item, data_pkl=pickle.dumps(Hostile())), "names builtins.exec, which is not allowed"),
        (lambda item: repacked(item, data_pkl=pickle.dumps([1])), "is not a plain tensor"),
        (lambda item: repacked(item, data_pkl=b"\x80\x02]" + b"]" * 70000), "has a record of 70,003 bytes beside the tensor"),
        (lambda item: torch_item(torch.ones(2, 3).double()), r"holds float64 \[2, 3\], .metadata says float32 \[2, 3\]"),
        (lambda item: torch_item(torch.ones(3, 2)), r"holds float32 \[3, 2\], .metadata says float32 \[2, 3\]"),
        (lambda item: torch_item(torch.ones(3, 2).t()), r"has strides \(1, 2\), expected row-major \(3, 1\)"),
        (lambda item: torch_item([torch.ones(2, 3)]), "is not a plain tensor"),
        (lambda item: torch_item({"a": 1}), "is not a plain tensor"),
    ],
)
def test_a_bad_item_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        located(tmp_path, damage(our_item(torch.ones(2, 3))), torch.ones(2, 3))
    assert "decoder.weight" in str(caught.value)


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data/0", bytes(24))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(CheckpointError, match="two records 'data/0'"):
        located(tmp_path, out.getvalue(), torch.ones(2, 3))


def test_a_record_that_points_outside_its_item_is_refused(tmp_path: Path) -> None:
    item = bytearray(our_item(torch.ones(2, 3)))
    at = item.rindex(b"PK\1\2")
    item[at + 42 : at + 46] = struct.pack("<I", 10_000)
    with pytest.raises(CheckpointError, match="has a record outside itself"):
        located(tmp_path, bytes(item), torch.ones(2, 3))


@pytest.mark.parametrize("write", [our_item, torch_item])
def test_damaged_items_give_only_our_errors(tmp_path: Path, write: Any) -> None:
    tensor = torch.ones(2, 3)
    refused = sum(
        only_our_errors(lambda damaged=damaged: located(tmp_path, damaged, tensor))
        for damaged in mutations(write(tensor), 400, seed=3)
    )
    assert refused > 100
