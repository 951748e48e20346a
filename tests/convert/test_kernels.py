"""Numbers of one type as another against torch, every value of the half types; boxes of rows against plain slicing."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.convert.copying import cast
from mcore_longctx.convert.disk import OpenFiles, read_into, write_all
from mcore_longctx.convert.plans.plan import Blend
from mcore_longctx.errors import CheckpointError, ConversionError
from mcore_longctx.formats.dtypes import BY_TORCH, DType
from tests.convert.made_plans import BF16, FP16, FP32, Sources, cut_box

FP64 = BY_TORCH["float64"]
EVERY_HALF = np.arange(1 << 16, dtype=np.uint32).astype("<u2").tobytes()


def through(data: bytes, source: DType, target: DType, tmp_path: Path) -> bytes:
    from mcore_longctx.convert.views import TensorRows

    (tmp_path / "t").write_bytes(data)
    rows = len(data) // source.itemsize
    tensor = TensorRows.stored(source, (rows,), tmp_path / "t", 0)
    numbers = cast.numbers(tensor, (0, rows, 0, 1), OpenFiles(os.O_RDONLY), name="t")
    return bytes(cast.stored(numbers, target, name="t"))


def by_torch(data: bytes, source: DType, target: DType) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, source.name)).to(getattr(torch, target.name))


def same(found: bytes, expected: torch.Tensor, target: DType) -> None:
    """Bit for bit, but for the bits of NaN."""
    got = torch.frombuffer(bytearray(found), dtype=expected.dtype)
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    whole = torch.int16 if target.itemsize == 2 else torch.int32 if target.itemsize == 4 else torch.int64
    assert torch.equal(got[~nan].view(whole), expected[~nan].view(whole))


@pytest.mark.parametrize(("source", "target"), [(BF16, FP32), (FP16, FP32), (FP16, BF16), (BF16, FP64), (FP16, FP64)])
def test_every_half_number_widens_as_in_torch(tmp_path: Path, source: DType, target: DType) -> None:
    same(through(EVERY_HALF, source, target, tmp_path), by_torch(EVERY_HALF, source, target), target)


def test_every_bfloat16_that_fits_float16_rounds_as_in_torch(tmp_path: Path) -> None:
    numbers = torch.frombuffer(bytearray(EVERY_HALF), dtype=torch.bfloat16)
    fits = numbers[~((numbers.float().abs() >= 65520) & numbers.isfinite())]
    data = fits.view(torch.uint8).numpy().tobytes()
    assert len(fits) > 36_000
    same(through(data, BF16, FP16, tmp_path), by_torch(data, BF16, FP16), FP16)


@pytest.mark.parametrize("target", [BF16, FP16])
def test_float32_rounds_to_nearest_even_as_in_torch(tmp_path: Path, target: DType) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 400_000, dtype=np.uint64).astype("<u4")
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000  # half way between two bfloat16
    numbers = np.concatenate([bits, ties, ties + 1, ties - 1]).view("<f4")
    limit = 65520 if target == FP16 else 3.3961e38
    numbers = numbers[~(np.isfinite(numbers) & (np.abs(numbers) >= limit))]
    data = numbers.tobytes()
    same(through(data, FP32, target, tmp_path), by_torch(data, FP32, target), target)


def test_float64_is_rounded_once_where_two_roundings_would_be_wrong(tmp_path: Path) -> None:
    # just above the middle of 1 and the next bfloat16: float32 would round it to the middle, and then down to even
    data = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8, np.nan, np.inf, 0.0, -0.0], "<f8")
    found = torch.frombuffer(bytearray(through(data.tobytes(), FP64, BF16, tmp_path)), dtype=torch.bfloat16).double()
    assert found[:4].tolist() == [1 + 2**-7, 1.0, -1 - 2**-7, 1.0]
    assert found[4].isnan()
    assert found[5:7].tolist() == [float("inf"), 0.0]
    assert torch.signbit(found[7])
    numbers = np.random.default_rng(1).normal(size=100_000) * 10.0 ** np.random.default_rng(2).integers(-40, 30, 100_000)
    found = np.frombuffer(through(numbers.tobytes(), FP64, BF16, tmp_path), "<u2").astype("<u4") << 16
    nearest = found.view("<f4").astype(np.float64)
    for step in (-1, 1):  # no neighbour is nearer, and a tie goes to the even one
        other = (((found >> 16).astype(np.int64) + step).clip(0, 0xFFFF).astype("<u4") << 16).view("<f4").astype(np.float64)
        ours, theirs = np.abs(nearest - numbers), np.abs(other - numbers)
        ok = (
            (ours < theirs)
            | ~np.isfinite(theirs)
            | (np.sign(other) != np.sign(nearest))
            | ((ours == theirs) & ((found >> 16) % 2 == 0))
        )
        assert ok.all()
    small = numbers[np.abs(numbers) < 60_000]
    same(through(small.tobytes(), FP64, FP16, tmp_path), torch.from_numpy(small.astype(np.float16)), FP16)


@pytest.mark.parametrize(
    ("numbers", "target", "count"),
    [([65519.0, 65520.0, -1e9], FP16, 2), ([3.3961775e38, 3.4e38], BF16, 2), ([float("inf"), float("nan"), 1.0], FP16, 0)],
)
def test_only_finite_numbers_that_become_infinite_are_refused(tmp_path: Path, numbers, target: DType, count: int) -> None:
    data = np.array(numbers, "<f4").tobytes()
    if not count:
        same(through(data, FP32, target, tmp_path), by_torch(data, FP32, target), target)
        return
    with pytest.raises(ConversionError, match=f"^t: {count} of {len(numbers)} numbers looked at are too large for {target.name}"):
        through(data, FP32, target, tmp_path)


def test_a_blend_is_a_sum_in_float32_rounded_once(tmp_path: Path) -> None:
    sources = Sources(tmp_path, random.Random(3))
    tensors = [sources.tensor(9, 7, dtype, pieces=3) for dtype in (BF16, FP32, FP16)]
    sources.write()
    weights = (0.3, 0.45, 0.25)
    blend = Blend(tuple((tensor, weight) for (tensor, _), weight in zip(tensors, weights, strict=True)))
    found = cast.numbers(blend, (2, 5, 1, 4), OpenFiles(os.O_RDONLY), name="t")
    parts = [
        torch.frombuffer(
            bytearray(cut_box(data, tensor.dtype.itemsize, 7, (2, 5, 1, 4))), dtype=getattr(torch, tensor.dtype.name)
        )
        for tensor, data in tensors
    ]
    expected = torch.zeros(20)
    for part, weight in zip(parts, weights, strict=True):
        expected += part.float() * torch.tensor(weight, dtype=torch.float32)
    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), expected)


# ------------------------------------------------------------------ boxes
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 30), columns=st.integers(1, 12), data=st.data())
def test_any_box_of_any_pieces_is_what_slicing_says(tmp_path_factory, seed: int, rows: int, columns: int, data) -> None:
    sources = Sources(tmp_path_factory.mktemp("box"), random.Random(seed))
    dtype = data.draw(st.sampled_from([BF16, FP32]))
    tensor, whole = sources.tensor(rows, columns, dtype, pieces=5)
    sources.write()
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    box = (row, data.draw(st.integers(1, rows - row)), column, data.draw(st.integers(1, columns - column)))
    files = OpenFiles(os.O_RDONLY)
    assert bytes(tensor.read_box(*box, files)) == cut_box(whole, dtype.itemsize, columns, box)
    files.close()
    assert b"".join(bytes(band) for _, band in tensor.bands()) == whole
    assert bytes(tensor.read(row, box[1])) == cut_box(whole, dtype.itemsize, columns, (row, box[1], 0, columns))


def test_reads_and_writes_that_stop_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(200)))
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:3], at))
    buffers = [bytearray(4), bytearray(0), bytearray(1), bytearray(7)]
    descriptor = os.open(path, os.O_RDWR)
    read_into(descriptor, [memoryview(buffer) for buffer in buffers], 10, path)
    assert b"".join(buffers) == bytes(range(10, 22))
    write_all(descriptor, b"0123456789", 100, path)
    assert path.read_bytes()[100:110] == b"0123456789"
    with pytest.raises(CheckpointError, match="f: ended while it was read"):
        read_into(descriptor, [memoryview(bytearray(5))], 198, path)
    os.close(descriptor)


def test_more_parts_than_a_call_takes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(random.Random(0).randbytes(10_000))
    buffers = [bytearray(3) for _ in range(3000)]
    files = OpenFiles(os.O_RDONLY)
    read_into(files.descriptor(path), [memoryview(buffer) for buffer in buffers], 5, path)
    assert b"".join(buffers) == path.read_bytes()[5:9005]
    files.close()


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    files = OpenFiles(os.O_RDONLY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(200):
        (tmp_path / str(number)).write_text(str(number))
        assert os.pread(files.descriptor(tmp_path / str(number)), 9, 0).decode() == str(number)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 64
    assert os.pread(files.descriptor(tmp_path / "0"), 9, 0) == b"0"
    files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
