"""Layouts of safetensors folders, read back by the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mcore_longctx.convert.plans.hf_layout import HfLayout, plan_hf
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.convert.views import TensorRows
from mcore_longctx.formats.dtypes import BY_TORCH
from tests.convert.reference_execute import contents

TORCH_TYPES = ("float64", "float32", "float16", "bfloat16")


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorRows]:
    """The tensors in files of their own, somewhere inside."""
    found = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        path = folder / f"{number}.raw"
        path.write_bytes(b"begin" + tensor.view(torch.uint8).numpy().tobytes() + b"end")
        dtype = BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
        found[name] = TensorRows.stored(dtype, tuple(tensor.shape), path, 5)
    return found


def written(layout: HfLayout, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors, as the library reads them."""
    plan = Plan("export", {}, (), layout.files, layout.fills, layout.small)
    for file, data in zip(plan.files, contents(plan), strict=True):
        (folder / file.name).write_bytes(data)
    layout.describe(folder)
    return {file.name: load_file(folder / file.name) for file in layout.files}


def entries(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    return header


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(TORCH_TYPES), st.lists(st.integers(1, 7), min_size=1, max_size=2)), min_size=1, max_size=8
    ),
    shard_bytes=st.integers(1, 300),
)
def test_tensors_of_any_types_and_sizes_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[str, list[int]]], shard_bytes: int
) -> None:
    """Odd sizes of narrow types beside wide ones: every tensor begins where a reader may map it."""
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.randn(shape).to(getattr(torch, dtype)) for i, (dtype, shape) in enumerate(shapes)}
    files = written(plan_hf(stored(folder, tensors), dtype=None, shard_bytes=shard_bytes), folder)
    assert {name: tensor for part in files.values() for name, tensor in part.items()}.keys() == tensors.keys()
    for file, part in files.items():
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in part.items())
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= shard_bytes
        for name, entry in entries(folder / file).items():
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0
    if len(files) == 1:
        assert set(files) == {"model.safetensors"}
        assert not (folder / "model.safetensors.index.json").exists()
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, part in files.items() for name in part}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert list(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]


def test_the_order_is_kept_and_no_tensor_is_split(tmp_path: Path) -> None:
    tensors = {name: torch.randn(10) for name in ("z", "a", "m", "b")}
    layout = plan_hf(stored(tmp_path, tensors), dtype=None, shard_bytes=80)
    assert [list(shard) for shard in layout.shards] == [["z", "a"], ["m", "b"]]
    assert [fill.name for fill in layout.fills] == ["z", "a", "m", "b"]
    layout = plan_hf(stored(tmp_path, tensors), dtype=None, shard_bytes=1)
    assert [list(shard) for shard in layout.shards] == [["z"], ["a"], ["m"], ["b"]]


def test_files_may_be_given(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 2) for name in "abcd"}
    groups = {"model-00001-of-00002.safetensors": ["d", "a"], "model-00002-of-00002.safetensors": ["c", "b"]}
    files = written(plan_hf(stored(tmp_path, tensors), dtype=None, shard_bytes=groups), tmp_path)
    assert {file: set(part) for file, part in files.items()} == {file: set(names) for file, names in groups.items()}


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_numbers_are_cast_to_the_type_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7).to(torch.bfloat16), "c": torch.randn(2, 2).to(torch.float16)}
    files = written(plan_hf(stored(tmp_path, tensors), dtype=BY_TORCH[dtype], shard_bytes=1000), tmp_path)
    found = files["model.safetensors"]
    assert all(torch.equal(found[name], tensor.to(getattr(torch, dtype))) for name, tensor in tensors.items())


def test_quantised_weights_have_their_scales_beside_them(tmp_path: Path) -> None:
    tensors = {"norm": torch.randn(3).to(torch.bfloat16), "up": torch.randn(5, 3), "down": torch.randn(3, 5)}
    sources = stored(tmp_path, tensors)
    layout = plan_hf(sources, dtype=BY_TORCH["bfloat16"], shard_bytes=36, quantized={"up", "down"})
    files = written(layout, tmp_path)
    # up and its scales: 15 + 20 bytes; norm 6, then down and its scales 15 + 12
    assert [set(part) for part in files.values()] == [{"norm"}, {"up", "up_scale"}, {"down", "down_scale"}]
    found = {name: tensor for part in files.values() for name, tensor in part.items()}
    for name in ("up", "down"):
        scales = tensors[name].abs().amax(1, keepdim=True) / 448
        assert torch.equal(found[f"{name}_scale"], scales)
        assert torch.equal(found[name].float(), (tensors[name] / scales).to(torch.float8_e4m3fn).float())
    assert torch.equal(found["norm"], tensors["norm"])
    one = entries_of(plan_hf(sources, dtype=None, shard_bytes=1000, quantized={"up", "down"}), tmp_path)
    assert [(name, entry["dtype"]) for name, entry in one.items()] == [
        ("up_scale", "F32"),
        ("down_scale", "F32"),
        ("norm", "BF16"),
        ("up", "F8_E4M3"),
        ("down", "F8_E4M3"),
    ]


def entries_of(layout: HfLayout, folder: Path) -> dict[str, Any]:
    written(layout, folder)
    return entries(folder / "model.safetensors")
