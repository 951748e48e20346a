from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dtypes import BY_TORCH
from mcore_longctx.formats.safetensors_io import header_bytes, plan_shards, read_folder, read_header, read_json
from tests.convert.fuzz import mutations, only_our_errors
from tests.convert.hf_folders import llama_config, write_folder


def a_file(folder: Path) -> Path:
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def with_header(folder: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    data = path.read_bytes()
    tensors = read_header(path)
    assert (tensors["a"].dtype.name, tensors["a"].shape, tensors["b"].shape) == ("float32", (2, 3), (4,))
    for name, tensor in load_file(path).items():
        stored = tensors[name]
        assert data[stored.offset : stored.offset + stored.nbytes] == tensor.view(torch.uint8).numpy().tobytes()


def test_the_header_written_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "y.safetensors"
    sizes = {"one": (BY_TORCH["bfloat16"], (3, 2)), "two": (BY_TORCH["float32"], (5,))}
    path.write_bytes(header_bytes(sizes) + bytes(12 + 20))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(path).items()} == {
        "one": (torch.bfloat16, (3, 2)),
        "two": (torch.float32, (5,)),
    }
    assert len(header_bytes(sizes)) % 8 == 0


def test_shards_hold_at_most_what_is_asked_for() -> None:
    plan = plan_shards({"a": 5, "b": 5, "c": 11, "d": 1, "e": 9}, 10)
    assert plan == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d", "e"],
    }
    assert plan_shards({"a": 5, "b": 5}, 10) == {"model.safetensors": ["a", "b"]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], b"", "not a safetensors file"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": NaN}', b"", "NaN is not JSON"),
        (b'{"\xff": 1}', b"", "not UTF-8"),
        (b'{"a":' + b"[" * 100_000, b"", "nested too deeply"),
        (b'{"a":{},"a":{}}', b"", "key 'a' twice"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"", "not dtype, shape and data_offsets"),
        ({"a": [1]}, b"", "not dtype, shape and data_offsets"),
        ({"a": entry(0, 1, [1], "F4")}, b"x", "dtype 'F4' is not known"),
        ({"a": entry(0, 1, [1], ["U8"])}, b"x", "is not known"),
        ({"a": entry(0, 1, [-1])}, b"x", "not a list of up to 8 sizes"),
        ({"a": entry(0, 1, [True])}, b"x", "not a list of up to 8 sizes"),
        ({"a": entry(0, 1, [1.0])}, b"x", "not a list of up to 8 sizes"),
        ({"a": entry(0, 1, [1] * 9)}, b"x", "not a list of up to 8 sizes"),
        ({"a": entry(0, 1, [2**63])}, b"x", "not a list of up to 8 sizes"),
        ({"a": entry(0, 1, "1")}, b"x", "not a list of up to 8 sizes"),
        ({"a": {**entry(0, 1, [1]), "data_offsets": [0]}}, b"x", "not two offsets"),
        ({"a": entry(0, 2, [1])}, b"xx", r"2 bytes, shape \[1\] needs 1"),
        ({"a": entry(1, 0, [1])}, b"xx", "-1 bytes"),
        ({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"xxx", "hole before tensor 'b'"),
        ({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"xxx", "overlap before tensor 'b'"),
        ({"a": entry(0, 1, [1])}, b"xx", "1 bytes after the last tensor"),
        ({"a": entry(0, 5000, [5000])}, b"xx", "4,998 bytes shorter than its header says; download it again"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(with_header(tmp_path, header, data))
    assert str(caught.value).startswith(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, shorter than its header; download it again"),
        (b"\x10\x00", "2 bytes, shorter than its header"),
        ((100).to_bytes(8, "little") + b"{}", "10 bytes, shorter than its header"),
        ((2**60).to_bytes(8, "little") + b"{}", "header length 1,152,921,504,606,846,976"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a Git LFS pointer, not the weights; run `git lfs pull`",
        ),
    ],
)
def test_a_file_that_is_not_one_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_damaged_headers_give_only_our_errors(tmp_path: Path) -> None:
    data = a_file(tmp_path).read_bytes()
    path = tmp_path / "damaged.safetensors"
    refused = accepted_by_library = 0
    for damaged in mutations(data, 600, seed=1):
        path.write_bytes(damaged)
        ours = only_our_errors(lambda: read_header(path))
        refused += ours
        if not ours:  # what we accept, the reference implementation accepts too
            try:
                load_file(path)
            except (SafetensorError, KeyError):  # KeyError: a type that this torch version has no name for
                pytest.fail(f"accepted what the library refuses: {damaged!r}")
            accepted_by_library += 1
    assert refused > 350
    assert accepted_by_library > 20


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", llama_config(hidden_size=1024, intermediate_size=512), shards=4)
    shard = folder / "model-00002-of-00004.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1_048_576)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert str(caught.value) == f"{shard}: 1,048,576 bytes shorter than its header says; download it again"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", llama_config(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert str(caught.value) == f"{folder}/model-00002-of-00003.safetensors: missing; download it again"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x.safetensors", "shard name '../x.safetensors' leaves the folder"),
        ("/etc/x.safetensors", "leaves the folder"),
        ("a\\b.safetensors", "leaves the folder"),
        ("a\0.safetensors", "leaves the folder"),
        ("x" * 300 + ".safetensors", "leaves the folder"),
        ("pytorch_model.bin", "does not end in .safetensors"),
        (7, "does not end in .safetensors"),
    ],
)
def test_an_index_cannot_leave_the_folder(tmp_path: Path, name: Any, message: str) -> None:
    folder = write_folder(tmp_path / "hf", llama_config(), shards=2)
    index = index_of(folder)
    index["weight_map"]["model.norm.weight"] = name
    write_index(folder, index)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert message in str(caught.value)


def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", llama_config(), shards=2)
    index = index_of(folder)
    write_index(folder, {"weight_map": index["weight_map"] | {"extra": "model-00001-of-00002.safetensors"}})
    with pytest.raises(CheckpointError, match=r"'extra' is not in model-00001-of-00002.safetensors \(1 such in all\)"):
        read_folder(folder)
    write_index(folder, {"weight_map": {k: v for k, v in index["weight_map"].items() if k != "model.norm.weight"}})
    with pytest.raises(
        CheckpointError, match=r"holds 'model.norm.weight', which model.safetensors.index.json does not place here"
    ):
        read_folder(folder)
    write_index(folder, {"weight_map": []})
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_folder(folder)
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_folder(folder)


def test_damaged_indexes_give_only_our_errors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", llama_config(num_hidden_layers=1), shards=2)
    path = folder / "model.safetensors.index.json"
    data = path.read_bytes()
    refused = 0
    for damaged in mutations(data, 300, seed=2):
        path.write_bytes(damaged)
        refused += only_our_errors(lambda: read_folder(folder))
    assert refused > 200


def test_no_weights_or_two_kinds_of_them_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", llama_config())
    write_index(folder, {"weight_map": {"a": "model.safetensors"}})
    with pytest.raises(CheckpointError, match=r"holds both model.safetensors and"):
        read_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no model.safetensors and .*; there is pytorch_model.bin; save the model as safe"):
        read_folder(folder)


def test_json_files_have_a_size_limit(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="200,000,000 bytes, too large for a settings file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "none.json")
