"""`.bin` shards: what torch.save wrote, read as byte ranges; everything else refused in one line."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.convert.views import open_checkpoint
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.torch_bin import read_bin, read_bin_folder
from tests.convert.fuzz import mutations, only_our_errors
from tests.convert.hf_folders import llama_config, random_weights, write_folder

CONFIG = llama_config()


def stored_bytes(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    data = path.read_bytes()
    found = read_bin(path)
    return {name: (t.shape, t.dtype.name, data[t.offset : t.offset + t.nbytes]) for name, t in found.items()}


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    return {
        name: (tuple(t.shape), str(t.dtype)[6:], t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_torch_saves_is_read(tmp_path: Path, dtype: str) -> None:
    weights = random_weights(CONFIG, dtype)
    torch.save(weights, tmp_path / "a.bin")
    assert stored_bytes(tmp_path / "a.bin") == as_bytes(weights)


def test_state_dicts_parameters_and_shared_storages_are_read(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 6)
    state = layer.state_dict()  # an OrderedDict with an attribute
    state["parameter"] = layer.weight
    whole = torch.arange(24.0).view(6, 4)
    state |= {"upper": whole[:2], "lower": whole[2:], "all": whole}
    torch.save(state, tmp_path / "a.bin")
    assert stored_bytes(tmp_path / "a.bin") == as_bytes(state)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"w": torch.arange(24.0).view(6, 4).t()}, r"tensor 'w' has strides \(1, 4\), expected row-major \(6, 1\)"),
        ({"w": torch.arange(24.0).view(6, 4)[:, :2]}, r"tensor 'w' has strides \(4, 1\), expected row-major \(2, 1\)"),
        ({"model": {"w": torch.zeros(2)}}, "tensor 'model' is not a plain tensor"),
        ({"w": 3}, "tensor 'w' is not a plain tensor"),
        ([torch.zeros(2)], "is not a dict of tensors"),
        ({3: torch.zeros(2)}, "names a tensor by something that is not text"),
        ({"w": OrderedDict}, "tensor 'w' is not a plain tensor"),
        ({"w": Path("x")}, r"names pathlib\S*\.PosixPath, which is not allowed in a checkpoint"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "which is not allowed in a checkpoint"),
    ],
)
def test_what_is_no_dict_of_row_major_tensors_is_refused_by_name(tmp_path: Path, value: Any, said: str) -> None:
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=said):
        read_bin(tmp_path / "a.bin")


def test_files_before_torch_1_6_and_pointers_of_git_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a.bin: not a zip archive: torch before 1.6 .*save the model as safetensors"):
        read_bin(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_bin(tmp_path / "a.bin")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(200)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as source, zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed or encrypted record"):
        read_bin(tmp_path / "b.bin")


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        import os

        return os.mkdir, (str(self.path),)


def test_nothing_that_is_read_runs(tmp_path: Path) -> None:
    torch.save({"w": RunsCode(tmp_path / "ran")}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"names posix.mkdir, which is not allowed"):
        read_bin(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()


def bin_folder(folder: Path, shards: int) -> dict[str, torch.Tensor]:
    """A Hugging Face folder whose weights are `.bin` files. Returns the weights."""
    weights = random_weights(CONFIG, "bfloat16", seed=5)
    write_folder(folder, CONFIG, weights)
    (folder / "model.safetensors").unlink()
    names = list(weights)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return weights
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: weights[name] for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_bin_files_is_a_model(tmp_path: Path, shards: int) -> None:
    weights = bin_folder(tmp_path, shards)
    view = open_checkpoint(tmp_path)
    found = {name: (rows.shape, rows.dtype.name, bytes(rows.read(0, rows.rows))) for name, rows in view.tensors.items()}
    assert found == as_bytes(weights)
    assert view.format == "hf"


def test_shard_names_stay_in_the_folder(tmp_path: Path) -> None:
    bin_folder(tmp_path, 3)
    path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    for bad, said in (("../x.bin", "leaves the folder"), ("/x.bin", "leaves the folder"), ("x.py", "does not end in .bin")):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: bad}}))
        with pytest.raises(CheckpointError, match=said):
            read_bin_folder(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"new": index["weight_map"][name]}}))
    with pytest.raises(CheckpointError, match=r"'new' is not in pytorch_model-00001-of-00003\.bin"):
        read_bin_folder(tmp_path)


def test_damaged_bin_files_give_only_our_errors(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    refused = 0
    for damaged in mutations(data, 1000, seed=6):
        (tmp_path / "a.bin").write_bytes(damaged)
        refused += only_our_errors(lambda: read_bin(tmp_path / "a.bin"))
    assert refused > 400  # much of the file is padding and records that nobody needs


def test_a_damaged_pickle_inside_a_bin_file_gives_only_our_errors(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as source:
        records = {name: source.read(name) for name in source.namelist()}
    (pickled,) = (name for name in records if name.endswith("data.pkl"))
    refused = 0
    for damaged in mutations(records[pickled], 1000, seed=7):
        with zipfile.ZipFile(tmp_path / "b.bin", "w") as target:
            for name, data in (records | {pickled: damaged}).items():
                target.writestr(name, data)
        refused += only_our_errors(lambda: read_bin(tmp_path / "b.bin"))
    assert refused > 600


def test_a_damaged_index_gives_only_our_errors(tmp_path: Path) -> None:
    bin_folder(tmp_path, 3)
    path = tmp_path / "pytorch_model.bin.index.json"
    data = path.read_bytes()
    refused = 0
    for damaged in mutations(data, 1000, seed=8):
        path.write_bytes(damaged)
        refused += only_our_errors(lambda: read_bin_folder(tmp_path))
    assert refused > 800
