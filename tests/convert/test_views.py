"""Which folder a path stands for, and checkpoints that are refused by name before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from mcore_longctx.convert import import_hf
from mcore_longctx.convert.views import locate_checkpoint, nonzero_padding, open_checkpoint
from mcore_longctx.errors import CheckpointError, ConfigError, ConversionError, LongctxError
from tests.convert.fuzz import mutations, only_our_errors
from tests.convert.hf_folders import llama_config, random_weights, write_folder

CONFIG = llama_config()
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    import_hf(write_folder(folder / "hf", CONFIG), folder / "ck")
    return folder


def megatron_tensors() -> dict[str, torch.Tensor]:
    """A model of CONFIG under Megatron's stacked keys, as any program could have saved it."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "embedding.word_embeddings.weight": (128, 32),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 128, 32),
        "decoder.layers.self_attention.linear_proj.weight": (2, 32, 64),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 32),
        "decoder.layers.mlp.linear_fc1.weight": (2, 48, 32),
        "decoder.layers.mlp.linear_fc2.weight": (2, 32, 24),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (128, 32),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def saved(folder: Path, tensors: dict[str, Any], backend: str | None = "torch_dist") -> Path:
    """What torch's own writer makes of these tensors, with Megatron's metadata.json."""
    torch_checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    if backend is not None:
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------- where it lies


@pytest.mark.parametrize(("name", "tracker"), [("iter_0000100", "100"), ("iter_0000100", "100\n"), ("release", "release")])
def test_the_outer_folder_stands_for_what_its_tracker_names(imported: Path, tmp_path: Path, name: str, tracker: str) -> None:
    shutil.copytree(imported / "ck", tmp_path / name)
    shutil.copytree(imported / "ck", tmp_path / "iter_0000200")
    (tmp_path / TRACKER).write_text(tracker)
    for path in (tmp_path, tmp_path / name):
        assert open_checkpoint(path).folder == tmp_path / name
        assert locate_checkpoint(path) == tmp_path / name


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("300", f"{TRACKER}: names iter_0000300, which is not there; give one of the folders beside it"),
        ("../../etc", f"{TRACKER}: holds '../../etc', expected a number or release"),
        ("", f"{TRACKER}: holds '', expected a number or release"),
        ("-1", f"{TRACKER}: holds '-1', expected a number or release"),
        ("9" * 60, f"{TRACKER}: holds '{'9' * 40}', expected a number or release"),
        ("\x00" * 100_000, "expected a number or release"),
    ],
)
def test_a_tracker_that_names_no_folder_is_refused(imported: Path, tmp_path: Path, tracker: str, said: str) -> None:
    shutil.copytree(imported / "ck", tmp_path / "iter_0000100")
    (tmp_path / TRACKER).write_text(tracker)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert said in str(caught.value)


def test_without_a_tracker_nothing_is_guessed(imported: Path, tmp_path: Path) -> None:
    shutil.copytree(imported / "ck", tmp_path / "iter_0000100")
    with pytest.raises(CheckpointError, match=rf"holds iter_0000100 but no {TRACKER}; give {tmp_path}/iter_0000100"):
        open_checkpoint(tmp_path)


def test_arguments_that_have_no_use_are_refused(imported: Path, config: Path) -> None:
    with pytest.raises(ConfigError, match=r"carries its own hf/config.json; leave out --config"):
        open_checkpoint(imported / "ck", config=config)
    with pytest.raises(ConfigError, match=r"a Hugging Face folder has its own config.json; leave out --config"):
        open_checkpoint(imported / "hf", config=config)
    with pytest.raises(ConfigError, match=r"has no optimizer state; leave out --from-master"):
        open_checkpoint(imported / "hf", from_master=True)
    with pytest.raises(CheckpointError, match=r"holds no optimizer state; leave out --from-master"):
        open_checkpoint(imported / "ck", from_master=True)


# ------------------------------------------------------------------------------------------------- what it is


def test_a_checkpoint_of_any_program_is_read_with_a_config(tmp_path: Path, config: Path) -> None:
    tensors = megatron_tensors()
    view = open_checkpoint(saved(tmp_path / "ck", tensors), config=config / "config.json")
    rows = view.tensors["model.layers.1.mlp.up_proj.weight"]
    assert bytes(rows.read(0, 24)) == tensors["decoder.layers.mlp.linear_fc1.weight"][1, 24:].numpy().tobytes()
    assert view.notes == (
        "the checkpoint does not say which model and rope it was trained with; both were taken from the config",
    )
    assert nonzero_padding(view) == ["embedding.word_embeddings.weight", "output_layer.weight"]
    tensors["embedding.word_embeddings.weight"][126:] = 0
    zeroed = open_checkpoint(saved(tmp_path / "zeroed", tensors), config=config)
    assert nonzero_padding(zeroed) == ["output_layer.weight"]


def with_tensor(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {key: torch.zeros(shape)}


def with_dtype(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    key = "decoder.layers.mlp.linear_fc2.weight"
    return lambda tensors: tensors | {key: tensors[key].to(dtype)}


LAYERS = "decoder.layers."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_tensor(f"{LAYERS}mlp.experts.linear_fc1.weight", 2, 4, 48, 32), "mixture of experts is not supported"),
        (with_tensor(f"{LAYERS}mlp.router.weight", 2, 4, 32), "mixture of experts is not supported"),
        (with_tensor(f"{LAYERS}mlp.linear_fc1.weight_quantizer._amax", 2), "quantised weights are not supported"),
        (with_tensor("vision_model.conv1.weight", 3, 3), "multimodal models are not supported"),
        (with_tensor(f"{LAYERS}mixer.in_proj.weight", 2, 3, 3), "state-space layers are not supported"),
        (with_tensor(f"{LAYERS}self_attention.linear_q_down_proj.weight", 2, 3, 3), "multi-latent attention"),
        (with_tensor(f"{LAYERS}self_attention.linear_qkv.bias", 2, 128), "the model's config has no such bias"),
        (with_tensor(f"{LAYERS}self_attention.q_layernorm.weight", 2, 16), "the model's config has no such norm"),
        (with_tensor("something.else", 2), "use the config.json of this model"),
        (with_dtype(torch.float8_e4m3fn), "quantised or integer weights cannot be converted"),
        (with_dtype(torch.int8), "quantised or integer weights cannot be converted"),
        (with_tensor("output_layer.weight", 64, 32), "has shape [64, 32], "),
        (
            with_tensor("output_layer.weight", 99_968, 32),
            "99,968 rows of vocabulary, the config's vocab_size 126 is not padded to that",
        ),
        (with_tensor("embedding.word_embeddings.weight", 127, 32), "127 rows of vocabulary, the config's vocab_size 126"),
        (with_tensor(f"{LAYERS}self_attention.linear_qkv.weight", 2, 4, 32, 32), "has shape [2, 4, 32, 32], "),
        (with_tensor(f"{LAYERS}self_attention.linear_qkv.weight", 3, 128, 32), "implies [2, 128, 32]"),
        (lambda t: {k: v for k, v in t.items() if "fc2" not in k}, "tensor decoder.layers.0.mlp.linear_fc2.weight is missing"),
        (lambda t: {f"optimizer.state.exp_avg.{k}": v for k, v in t.items()}, "holds optimizer state and no weights"),
    ],
)
def test_another_model_is_refused_by_name(
    tmp_path: Path, config: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str
) -> None:
    folder = saved(tmp_path / "ck", change(megatron_tensors()))
    with pytest.raises(LongctxError) as caught:
        open_checkpoint(folder, config=config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_surplus_tensors_are_counted(tmp_path: Path, config: Path) -> None:
    tensors = megatron_tensors() | {f"mtp.layers.{i}.weight": torch.zeros(2) for i in range(12)}
    with pytest.raises(ConversionError, match=r"12 tensors without a place in the model of .*config.json \(first: mtp.layers.0"):
        open_checkpoint(saved(tmp_path / "ck", tensors), config=config)


def test_other_formats_are_refused_by_name(tmp_path: Path, config: Path) -> None:
    tensors = megatron_tensors()
    fsdp = saved(tmp_path / "fsdp", {f"model.module.{key}": value for key, value in tensors.items()}, backend=None)
    with pytest.raises(CheckpointError, match=r"an fsdp_dtensor checkpoint of Megatron-FSDP; save it once with"):
        open_checkpoint(fsdp, config=config)
    zarr = saved(tmp_path / "zarr", tensors, backend="zarr")
    with pytest.raises(CheckpointError, match=r"sharded_backend is 'zarr', only torch_dist is supported; load it with"):
        open_checkpoint(zarr, config=config)
    for rank in ("mp_rank_00", "mp_rank_00_000"):
        legacy = tmp_path / rank / "iter_0000100"
        (legacy / rank).mkdir(parents=True)
        (legacy / rank / "model_optim_rng.pt").write_bytes(b"")
        (tmp_path / rank / TRACKER).write_text("100")
        for path in (legacy, tmp_path / rank):
            with pytest.raises(CheckpointError, match=r"a legacy checkpoint, one file a rank \(mp_rank_00\); load it with"):
                open_checkpoint(path, config=config)
    unfinished = saved(tmp_path / "unfinished", tensors, backend=None)
    with pytest.raises(CheckpointError, match=r"no metadata.json: the save was not finished"):
        open_checkpoint(unfinished, config=config)


def test_chunks_that_overlap_or_leave_a_hole_are_refused(tmp_path: Path, config: Path) -> None:
    import pickle

    folder = saved(tmp_path / "ck", megatron_tensors())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.size = torch.Size([64])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(LongctxError, match=r"decoder.final_layernorm.weight do not cover its shape \[64\] exactly once"):
        open_checkpoint(folder, config=config)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damaged_checkpoints_give_only_our_errors(tmp_path: Path, config: Path, file: str) -> None:
    folder = saved(tmp_path / "ck", megatron_tensors())
    path = folder / file
    data = path.read_bytes()
    refused = 0
    for damaged in mutations(data, 1000, seed=11):
        path.write_bytes(damaged)
        refused += only_our_errors(lambda: open_checkpoint(folder, config=config))
    assert refused > (600 if file == ".metadata" else 150)


def test_bin_weights_import_to_the_bytes_of_safetensors(tmp_path: Path, imported: Path) -> None:
    weights = random_weights(CONFIG)
    folder = write_folder(tmp_path / "hf", CONFIG, weights)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    import_hf(folder, tmp_path / "ck")
    for path in sorted((imported / "ck").glob("*.distcp")):
        assert (tmp_path / "ck" / path.name).read_bytes() == path.read_bytes()
