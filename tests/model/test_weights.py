"""Weights from torch_dist folders: whole, cast, and refused when anything is wrong with the folder."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.model.weights import load_model_weights, read_metadata
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import SHAPE, build, save_torch_dist

SMALL = replace(SHAPE, num_layers=2)


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    init_process_groups(Parallel(), seed=0)
    yield
    destroy_process_groups()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "torch_dist"
    save_torch_dist(build(Parallel(), shape=SMALL, seed=11), folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_weights_are_cast_to_the_models_dtype(stored: str, wanted: str, tmp_path: Path) -> None:
    source = build(Parallel(), shape=SMALL, seed=12, precision=stored)
    save_torch_dist(source, tmp_path / "ck")
    model = build(Parallel(), shape=SMALL, seed=None, precision=wanted)
    load_model_weights(model, tmp_path / "ck")
    for name, tensor in weights_of(source).items():
        assert torch.equal(weights_of(model)[name], tensor.to(weights_of(model)[name].dtype))


def test_only_tensors_of_the_model_are_read(copied: Path) -> None:
    """Neither common.pt nor the extra-state objects, both pickles that could run code; no optimizer either."""
    (copied / "common.pt").write_bytes(b"not a pickle")
    model = build(Parallel(), shape=SMALL, seed=None)
    load_model_weights(model, copied)
    assert torch.equal(weights_of(model)["decoder.final_layernorm.weight"], torch.ones(64))
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_layers_under_keys_of_their_own_are_read_too(tmp_path: Path) -> None:
    source = build(Parallel(), shape=SMALL, seed=13)
    (tmp_path / "ck").mkdir()
    with device_context():
        state = {"model": source.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
        dist_checkpointing.save(state, str(tmp_path / "ck"))
    assert "decoder.layers.1.mlp.linear_fc2.weight" in read_metadata(tmp_path / "ck")
    model = build(Parallel(), shape=SMALL, seed=None)
    load_model_weights(model, tmp_path / "ck")
    assert all(torch.equal(tensor, weights_of(source)[name]) for name, tensor in weights_of(model).items())


def test_the_vocabularys_padding_may_differ_but_not_its_real_rows(saved: Path) -> None:
    # 264 of 384 stored rows are real
    model = build(Parallel(), shape=replace(SMALL, vocab_size=200), seed=None)
    load_model_weights(model, saved)  # other real size, enough rows: that is for the card to refuse
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with pytest.raises(CheckpointError, match=r"embedding.word_embeddings.weight is \[384, 64\], the model has \[512, 64\]"):
        load_model_weights(build(Parallel(), shape=replace(SMALL, vocab_size=400), seed=None), saved)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(SMALL, num_layers=4), "[2, "),
        (replace(SMALL, ffn_hidden_size=48), "linear_fc1.weight is [2, 192, 64], the model has [2, 96, 64]"),
        (replace(SMALL, num_query_groups=2), "linear_qkv.weight is [2, 128, 64], the model has [2, 96, 64]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_tensor_and_shape(shape, message: str, saved: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model_weights(build(Parallel(), shape=shape, seed=None), saved)
    assert message in str(caught.value)


def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    tied = replace(SMALL, tie_word_embeddings=True)
    save_torch_dist(build(Parallel(), shape=tied), tmp_path / "ck")
    with pytest.raises(CheckpointError, match=r"holds no tensor output_layer.weight; use a checkpoint of this model"):
        load_model_weights(build(Parallel(), shape=SMALL, seed=None), tmp_path / "ck")


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_tensor_that_the_model_has_no_place_for_is_named(per_layer: bool, tmp_path: Path) -> None:
    """Megatron ignores it, and the model would be another."""
    (tmp_path / "ck").mkdir()
    with device_context():
        source = build(Parallel(), shape=replace(SMALL, add_qkv_bias=True))
        metadata = {"non_homogeneous_layers": per_layer, "singleton_local_shards": False}
        dist_checkpointing.save({"model": source.sharded_state_dict(metadata=metadata)}, str(tmp_path / "ck"))
    layer = "0." if per_layer else ""
    with pytest.raises(
        CheckpointError, match=rf"holds decoder.layers.{layer}self_attention.linear_qkv.bias, which the model does not have"
    ):
        load_model_weights(build(Parallel(), shape=SMALL, seed=None), tmp_path / "ck")
    load_model_weights(build(Parallel(), shape=replace(SMALL, add_qkv_bias=True), seed=None), tmp_path / "ck")


def test_a_folder_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    model = build(Parallel(), shape=SMALL, seed=None)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no checkpoint here; check the path"):
            load_model_weights(model, folder)
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_a_folder_that_was_not_finished_is_refused(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name}: not a torch_dist checkpoint, or one that was not finished"):
        load_model_weights(build(Parallel(), shape=SMALL, seed=None), copied)


def test_damaged_metadata_is_refused(copied: Path) -> None:
    content = (copied / ".metadata").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\x80\x04garbage"):
        (copied / ".metadata").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"/\.metadata: (is cut off|has a frame beyond its end|has opcode)"):
            read_metadata(copied)


def test_a_data_file_that_is_cut_or_missing_is_refused(copied: Path) -> None:
    model = build(Parallel(), shape=SMALL, seed=None)
    files = sorted(copied.glob("*.distcp"))
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3])
    with pytest.raises(CheckpointError, match=r"distcp: [\d,]+ bytes, but .* ends at byte"):
        load_model_weights(model, copied)
    for path in files:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"distcp: missing"):
        load_model_weights(model, copied)


class RunsCode:
    """A pickle that calls a function as soon as it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        import os

        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_code_is_refused_before_it_does(copied: Path, tmp_path: Path) -> None:
    (copied / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "pwned")))
    with pytest.raises(CheckpointError, match=r"names posix.mkdir, which is not allowed in a checkpoint; refused"):
        load_model_weights(build(Parallel(), shape=SMALL, seed=None), copied)
    assert not (tmp_path / "pwned").exists()


def test_metadata_that_is_swapped_after_it_was_checked_is_not_unpickled(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcore_longctx.model import weights

    def read_then_swap(folder: Path) -> object:
        saved = read_torch_dist(folder)
        (folder / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "pwned")))
        return saved

    monkeypatch.setattr(weights, "read_torch_dist", read_then_swap)
    model = build(Parallel(), shape=SMALL, seed=None)
    load_model_weights(model, copied)
    assert not (tmp_path / "pwned").exists()
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_common_state_and_extra_state_that_would_run_code_are_not_opened(tmp_path: Path) -> None:
    source = build(Parallel(), shape=SMALL, seed=14)
    original = type(source.decoder).__module__
    assert original.startswith("megatron")
    save_torch_dist(source, tmp_path / "ck")
    torch.save(RunsCode(tmp_path / "pwned"), tmp_path / "ck" / "common.pt")
    load_model_weights(build(Parallel(), shape=SMALL, seed=None), tmp_path / "ck")
    assert not (tmp_path / "pwned").exists()


def test_metadata_lists_tensors_with_shapes_and_objects_without(saved: Path) -> None:
    listed = read_metadata(saved)
    assert listed["decoder.layers.mlp.linear_fc1.weight"] == (2, 192, 64)
    assert listed["embedding.word_embeddings.weight"] == (384, 64)
    assert [shape for key, shape in listed.items() if "_extra_state" in key] == [None] * 8
    assert json.loads((saved / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
