"""torch_dist metadata, both ways: ours read by torch, torch's and megatron's read by us, and everything that is refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mcore_longctx.convert import import_hf
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import boxes_are_disjoint, read_torch_dist
from mcore_longctx.formats.dcp_write import StoredItem, write_description
from mcore_longctx.formats.dtypes import BY_TORCH
from mcore_longctx.formats.torch_archive import object_item, tensor_frame
from tests.convert.fuzz import mutations, only_our_errors
from tests.convert.hf_folders import llama_config, write_folder


def written(folder: Path) -> Path:
    """A folder with a stacked tensor in four chunks and an object, by our writer."""
    folder.mkdir()
    dtype, items, data = BY_TORCH["float32"], [], bytearray()
    for layer in range(2):
        for first in (0, 2):
            head, tail = tensor_frame(dtype, (1, 2, 3))
            item = head + torch.full((1, 2, 3), 10.0 * layer + first).numpy().tobytes() + tail
            items.append(StoredItem("w", ((layer, first, 0), (1, 2, 3)), "__0_0.distcp", len(data), len(item)))
            data += item
    item = object_item([None])
    items.append(StoredItem("w._extra_state/shard_0_1", None, "__0_0.distcp", len(data), len(item)))
    (folder / "__0_0.distcp").write_bytes(data + item)
    write_description(folder, {"w": (dtype, (2, 4, 3))}, items, {"checkpoint_version": 3.0, "iteration": 0})
    return folder


def test_torch_reads_the_metadata_that_we_write(tmp_path: Path) -> None:
    folder = written(tmp_path / "ck")
    read = torch_checkpoint.FileSystemReader(folder).read_metadata()
    tensor = read.state_dict_metadata["w"]
    assert isinstance(tensor, torch_metadata.TensorStorageMetadata)
    assert (tensor.size, tensor.properties.dtype, tensor.properties.layout) == (
        torch.Size([2, 4, 3]),
        torch.float32,
        torch.strided,
    )
    assert [tuple(chunk.offsets) for chunk in tensor.chunks] == [(0, 0, 0), (0, 2, 0), (1, 0, 0), (1, 2, 0)]
    assert isinstance(read.state_dict_metadata["w._extra_state/shard_0_1"], torch_metadata.BytesStorageMetadata)


def test_torch_loads_the_tensors_that_we_write(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2, 4, 3)}
    torch_checkpoint.load(state, checkpoint_id=written(tmp_path / "ck"), no_dist=True)
    assert state["w"][:, ::2, 0].tolist() == [[0.0, 2.0], [10.0, 12.0]]
    assert torch.load(tmp_path / "ck" / "common.pt", weights_only=True) == {"checkpoint_version": 3.0, "iteration": 0}


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.ones(4, dtype=torch.bfloat16)}, "step": 3}
    torch_checkpoint.save(state, checkpoint_id=tmp_path / "ck", no_dist=True)
    (tmp_path / "ck" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    read = read_torch_dist(tmp_path / "ck")
    assert {key: (tensor.dtype.name, tensor.shape) for key, tensor in read.tensors.items()} == {
        "a": ("float32", (2, 3)),
        "b.c": ("bfloat16", (4,)),
    }
    assert list(read.objects) == ["step"]
    assert all(tensor.is_covered_once() for tensor in read.tensors.values())


def changed(folder: Path, change: Any) -> Path:
    """The folder with its metadata unpickled by torch, changed, and pickled again as torch does."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=4))
    return folder


def info_of(metadata: Any) -> tuple[Any, Any]:
    return next((index, info) for index, info in metadata.storage_data.items() if index.fqn == "w")


def replace_info(**values: Any) -> Any:
    def change(metadata: Any) -> None:
        index, info = info_of(metadata)
        metadata.storage_data[index] = _StorageInfo(**{**vars(info), **values})

    return change


def replace_chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    def change(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["w"].chunks
        _, info = info_of(metadata)
        metadata.storage_data[torch_metadata.MetadataIndex("w", offsets)] = info
        chunks[0] = torch_metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_info(relative_path="../x"), "file name '../x' of w leaves the folder"),
        (replace_info(relative_path="/etc/passwd"), "leaves the folder"),
        (replace_info(relative_path=".."), "leaves the folder"),
        (replace_info(relative_path=7), "leaves the folder"),
        (replace_info(relative_path="none.distcp"), "none.distcp: missing"),
        (replace_info(offset=-1), "offset or length of w is not a size"),
        (replace_info(length=True), "offset or length of w is not a size"),
        (replace_info(length=2**63), "offset or length of w is not a size"),
        (replace_info(length=10**6), "but w ends at byte 1,000,000"),
        (replace_info(transform_descriptors=["zstd"]), "w is stored compressed or encrypted"),
        (replace_chunk((0, 0, 3), (1, 2, 3)), r"chunk of w at \[0, 0, 3\] leaves the tensor \[2, 4, 3\]"),
        (replace_chunk((0, 0), (1, 2)), "chunk of w has other dimensions than the tensor"),
        (
            lambda m: m.state_dict_metadata["w"].chunks.append(m.state_dict_metadata["w"].chunks[0]),
            r"two chunks of w at \[0, 0, 0\]",
        ),
        (lambda m: m.storage_data.pop(info_of(m)[0]), r"chunk of w at \[0, 0, 0\] has no stored item"),
        (lambda m: setattr(m, "state_dict_metadata", []), "has no state_dict_metadata"),
        (lambda m: m.state_dict_metadata.update({7: 7}), "names a tensor by something that is not text"),
        (lambda m: m.state_dict_metadata.update({"x": 7}), "something else where a TensorStorageMetadata belongs"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1] * 9)), "is not a list of sizes"),
        (lambda m: m.state_dict_metadata.update({"o": torch_metadata.BytesStorageMetadata()}), "object o has no stored item"),
    ],
)
def test_metadata_that_does_not_hold_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = changed(written(tmp_path / "ck"), change)
    with pytest.raises(CheckpointError, match=message):
        read_torch_dist(folder)


@pytest.mark.parametrize(
    ("offsets", "sizes", "covered"),
    [((0, 0, 0), (1, 2, 3), True), ((0, 1, 0), (1, 2, 3), False), ((0, 0, 1), (1, 2, 2), False), ((0, 0, 0), (1, 2, 2), False)],
)
def test_chunks_must_cover_their_tensor_exactly_once(
    tmp_path: Path, offsets: tuple[int, ...], sizes: tuple[int, ...], covered: bool
) -> None:
    folder = changed(written(tmp_path / "ck"), replace_chunk(offsets, sizes))
    assert read_torch_dist(folder).tensors["w"].is_covered_once() == covered


def grid(rows: list[int], columns: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((sum(rows[:i]), sum(columns[:j])), (rows[i], columns[j])) for i in range(len(rows)) for j in range(len(columns))]


def test_boxes_of_any_grid_are_disjoint_and_a_grown_one_is_not() -> None:
    boxes = grid([3, 1, 2], [2, 5])
    assert boxes_are_disjoint(boxes)
    assert boxes_are_disjoint(boxes[::-1])
    for index, (offsets, sizes) in enumerate(boxes):
        if offsets[0] + sizes[0] < 6:
            grown = (offsets, (sizes[0] + 1, sizes[1]))
            assert not boxes_are_disjoint([*boxes[:index], grown, *boxes[index + 1 :]])


def test_many_chunks_are_checked_quickly() -> None:
    assert boxes_are_disjoint(grid([1] * 100, [1] * 300))


class Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))


def test_metadata_that_names_a_function_is_refused_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = changed(written(tmp_path / "ck"), lambda metadata: setattr(metadata, "planner_data", Hostile()))
    with pytest.raises(CheckpointError, match=r"metadata: names \w+.system, which is not allowed in a checkpoint; refused"):
        read_torch_dist(folder)
    assert not (tmp_path / "ran").exists()


def test_an_unfinished_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "ck")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="sharded_backend is 'zarr', only torch_dist is supported"):
        read_torch_dist(folder)
    for text in ("", "[]", "{}", "7", "[" * 100_000):
        (folder / "metadata.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"metadata.json: (not valid JSON|not a JSON object|names no sharded_backend)"):
            read_torch_dist(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no metadata.json: the save was not finished"):
        read_torch_dist(folder)


def test_a_huge_metadata_file_is_not_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "ck")
    with (folder / ".metadata").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"1,099,511,627,776 bytes, too large for a .metadata"):
        read_torch_dist(folder)


@pytest.mark.parametrize("written_by", ["us", "torch"])
def test_damaged_metadata_gives_only_our_errors(tmp_path: Path, written_by: str) -> None:
    folder = written(tmp_path / "ck")
    if written_by == "torch":
        changed(folder, lambda metadata: None)
    path = folder / ".metadata"
    data = path.read_bytes()
    refused = 0
    for damaged in mutations(data, 500, seed=4):
        path.write_bytes(damaged)
        refused += only_our_errors(lambda: [tensor.is_covered_once() for tensor in read_torch_dist(folder).tensors.values()])
    assert refused > 350


def test_the_metadata_of_a_large_import_is_read_in_time(tmp_path: Path) -> None:
    """80 layers: as many entries as a 70B."""
    config = llama_config(num_hidden_layers=80, hidden_size=8, intermediate_size=4, vocab_size=8)
    import_hf(write_folder(tmp_path / "hf", config), tmp_path / "ck")
    read = read_torch_dist(tmp_path / "ck")
    assert sum(len(tensor.chunks) for tensor in read.tensors.values()) == 80 * 7 + 3
    shutil.rmtree(tmp_path / "hf")
