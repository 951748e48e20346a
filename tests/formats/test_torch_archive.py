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
from mcore_longctx.formats.torch_archive import locate_payload, write_object_item, write_tensor_item
from tests.convert.fuzz import mutations, only_our_errors


def our_item(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    dtype = BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
    length = write_tensor_item(file, dtype, tuple(tensor.shape), [data[:10], data[10:]])
    assert length == len(file.getvalue())
    return file.getvalue()


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
    assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert located(tmp_path, item, tensor) == raw
    assert located(tmp_path, torch_item(tensor), tensor) == raw


def test_payloads_are_aligned_for_memory_maps() -> None:
    item = our_item(torch.ones(5))
    assert item.index(torch.ones(5).numpy().tobytes()) % 64 == 0


def test_a_view_into_a_larger_storage_is_found(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)[1:3]
    assert located(tmp_path, torch_item(tensor), tensor) == tensor.numpy().tobytes()


def test_objects_are_loaded_by_torch() -> None:
    file = io.BytesIO()
    write_object_item(file, [None])
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True) == [None]


def test_items_beyond_4_gib_use_zip64(tmp_path: Path) -> None:
    """A sparse file: the payload is a hole, only the frame is written."""

    size = 5 << 30
    path = tmp_path / "large.distcp"
    with path.open("wb") as file:
        write_sparse(file, size)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == size
        assert archive.read("archive/version") == b"3\n"
    item = path.stat().st_size
    at = locate_payload(path, 0, item, BY_TORCH["uint8"], (size,), tensor="large")
    assert at % 64 == 0
    assert torch.load(path, weights_only=True, mmap=True).shape == (size,)


def write_sparse(file: Any, size: int) -> None:
    class Sparse:
        """A file whose writes of zeros become holes, so that five gigabytes cost nothing."""

        def write(self, data: bytes) -> int:
            if isinstance(data, Zeros):
                file.seek(data.size, io.SEEK_CUR)
                return data.size
            return int(file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    class Zeros(bytes):
        size = 0

    zeros = Zeros()
    zeros.size = size
    write_tensor_item(Sparse(), BY_TORCH["uint8"], (size,), [zeros])  # type: ignore[arg-type]


def test_a_payload_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="payload has 4 bytes, the tensor 8"):
        write_tensor_item(io.BytesIO(), BY_TORCH["float32"], (2,), [b"four"])


class Hostile:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit",))


def repacked(item: bytes, **changes: bytes | None) -> bytes:
    """The archive with some records replaced or left out; `data_pkl` stands for data.pkl."""
    source, out = zipfile.ZipFile(io.BytesIO(item)), io.BytesIO()
    with zipfile.ZipFile(out, "w", changes.pop("method", zipfile.ZIP_STORED)) as target:  # type: ignore[arg-type]
        for name in source.namelist():
            data = changes.get(name.split("/", 1)[1].replace(".", "_").replace("/", "_"), source.read(name))
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
        only_our_errors(lambda damaged=damaged: located(tmp_path, damaged, tensor))  # type: ignore[misc]
        for damaged in mutations(write(tensor), 400, seed=3)
    )
    assert refused > 100
