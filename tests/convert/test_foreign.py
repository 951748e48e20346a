"""Checkpoints that megatron-core itself, our trainer and Megatron-LM's program saved, read at any layout and in every way of keying.

The oracle is the model in memory, or the optimizer's parameters in memory: what the view reads must be their bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_longctx import checkpoint_folder as store
from mcore_longctx.convert.views import open_checkpoint, open_torch_dist
from mcore_longctx.errors import CheckpointError, ConfigError, ConversionError
from mcore_longctx.formats.common_state import read_common_state
from mcore_longctx.recipe import Parallel
from tests.convert.hf_folders import llama_config
from tests.megatron_lm.program import MODEL, PLAIN_ROPE, TINY, TRAINING, needs_program
from tests.megatron_lm.program import run as run_program
from tests.model.llama import SHAPE
from tests.multiproc import run_processes
from tests.train.jobs import CONFIG, make_job, make_world, train

pytestmark = pytest.mark.multiproc

SMALL = replace(SHAPE, num_layers=2)
HF = llama_config(
    vocab_size=264, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=8, rope_theta=1e4
)
STYLES = {
    "stacked": {"singleton_local_shards": False},
    "per-layer": {"singleton_local_shards": False, "non_homogeneous_layers": True},
    "halves": {"singleton_local_shards": True},
}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def read(path: Path, **options: Any) -> dict[str, bytes]:
    return {name: bytes(rows.read(0, rows.rows)) for name, rows in open_checkpoint(path, **options).tensors.items()}


def hf_names(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The small model's whole tensors under Hugging Face's names, split with torch alone."""
    named = {"model.norm.weight": whole["decoder.final_layernorm.weight"]}
    for name, key in (("model.embed_tokens", "embedding.word_embeddings"), ("lm_head", "output_layer")):
        named[f"{name}.weight"] = whole[f"{key}.weight"][:264]
    for i in range(2):
        ours, hf = f"decoder.layers.{i}.", f"model.layers.{i}."
        q, k, v = whole[f"{ours}self_attention.linear_qkv.weight"].unflatten(0, (4, 4, 8)).split((2, 1, 1), dim=1)
        named |= {f"{hf}self_attn.{n}_proj.weight": part.flatten(0, 2) for n, part in zip("qkv", (q, k, v), strict=True)}
        gate, up = whole[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        named |= {f"{hf}mlp.gate_proj.weight": gate, f"{hf}mlp.up_proj.weight": up}
        named[f"{hf}self_attn.o_proj.weight"] = whole[f"{ours}self_attention.linear_proj.weight"]
        named[f"{hf}mlp.down_proj.weight"] = whole[f"{ours}mlp.linear_fc2.weight"]
        named[f"{hf}input_layernorm.weight"] = whole[f"{ours}input_layernorm.weight"]
        named[f"{hf}post_attention_layernorm.weight"] = whole[f"{ours}pre_mlp_layernorm.weight"]
    return named


def save_with_optimizer(base: Path, distributed: bool, kinds: list[str], styles: list[str]) -> list[dict[str, bytes]] | None:
    """BASE/<kind>-<style>: a bf16 model after a step of Adam. Returns weights and masters in memory (one rank only)."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from mcore_longctx.megatron_compat import device_context
    from mcore_longctx.train.optimizer import prepare_optimizer_state
    from mcore_longctx.train.writing import SaveStrategy
    from tests.model.llama import build

    size = torch.distributed.get_world_size()
    with device_context():
        model = build(Parallel(tensor_model_parallel_size=size), shape=SMALL, precision="bf16", seed=3)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        wrapped = DistributedDataParallel(model.config, settings, model)
        config = OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=distributed
        )
        optimizer = get_megatron_optimizer(config, [wrapped])
        torch.manual_seed(4)
        for parameter in model.parameters():
            parameter.main_grad.normal_()
        if distributed:
            prepare_optimizer_state(optimizer)
        optimizer.step()
        for kind in kinds:
            for style in styles:
                folder = base / f"{kind}-{style}"
                if torch.distributed.get_rank() == 0:
                    folder.mkdir(parents=True)
                torch.distributed.barrier()
                metadata = STYLES[style] | {
                    "distrib_optim_sharding_type": kind,
                    "distrib_optim_fully_reshardable_mem_efficient": False,
                    "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
                }
                state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": 7, "checkpoint_version": 3.0}
                state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=False, metadata=metadata)
                dist_checkpointing.save(state, str(folder), SaveStrategy("torch_dist", 1))
        if size > 1:
            return None
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        masters = {name: parameter.main_param.detach().view_as(parameter) for name, parameter in model.named_parameters()}
        return [bits(hf_names(weights)), bits(hf_names(masters))]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(HF))
    return path


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, bytes]]]:
    folder = tmp_path_factory.mktemp("saves")
    kinds = ["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"]
    (found,) = run_processes(save_with_optimizer, 1, folder, True, kinds, list(STYLES))
    return folder, found


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize("kind", ["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"])
def test_weights_beside_any_optimizer_state_are_read(saves: Any, config: Path, kind: str, style: str) -> None:
    folder, (weights, _) = saves
    assert read(folder / f"{kind}-{style}", config=config) == weights


@pytest.mark.parametrize("style", list(STYLES))
def test_masters_are_the_optimizers_float32_weights(saves: Any, config: Path, style: str) -> None:
    folder, (weights, masters) = saves
    found = read(folder / f"fully_reshardable-{style}", config=config, from_master=True)
    assert found == masters
    assert sum(map(len, found.values())) == 2 * sum(map(len, weights.values()))
    rounded = {name: torch.frombuffer(bytearray(data), dtype=torch.float32).bfloat16() for name, data in found.items()}
    assert bits(rounded) == weights


def test_masters_of_an_optimizer_that_is_not_distributed_are_read(tmp_path: Path, config: Path) -> None:
    ((weights, masters),) = run_processes(save_with_optimizer, 1, tmp_path, False, ["plain"], list(STYLES))
    for style in STYLES:
        assert read(tmp_path / f"plain-{style}", config=config) == weights
        assert read(tmp_path / f"plain-{style}", config=config, from_master=True) == masters


@pytest.mark.parametrize(
    ("kind", "said"), [("dp_reshardable", "lie in flat buckets"), ("dp_zero_gather_scatter", "lie in a pickle")]
)
def test_masters_without_names_are_refused_with_what_to_do(saves: Any, config: Path, kind: str, said: str) -> None:
    folder, _ = saves
    with pytest.raises(
        CheckpointError, match=rf"{said} \(sharding type {kind}\); .*fully-reshardable, or leave out --from-master"
    ):
        open_checkpoint(folder / f"{kind}-stacked", config=config, from_master=True)


def test_tensor_parallel_masters_and_weights_fit_together(tmp_path: Path, config: Path) -> None:
    run_processes(save_with_optimizer, 2, tmp_path, True, ["fully_reshardable"], list(STYLES))
    stacked = read(tmp_path / "fully_reshardable-stacked", config=config)
    masters = read(tmp_path / "fully_reshardable-stacked", config=config, from_master=True)
    rounded = {name: torch.frombuffer(bytearray(data), dtype=torch.float32).bfloat16() for name, data in masters.items()}
    assert bits(rounded) == stacked
    for style in ("per-layer", "halves"):
        assert read(tmp_path / f"fully_reshardable-{style}", config=config) == stacked


def test_a_foreign_checkpoint_without_config_is_refused_and_a_config_too_many_as_well(saves: Any, config: Path) -> None:
    folder, _ = saves
    with pytest.raises(ConfigError, match=r"its model and rope are not known; give the model's config.json with --config"):
        open_checkpoint(folder / "dp_reshardable-stacked")


# ------------------------------------------------------------------------------------------------- our trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORLD/one and WORLD/four: steps that change no weight, saved at TP 1 and at TP 2 x PP 2."""
    world = make_world(tmp_path_factory.mktemp("trained"))
    frozen = {"lr": 1e-30, "min_lr": 0.0, "train_iters": 2, "lr_warmup_iters": 1}  # too small to change a float32
    train(make_job(world, "one", **frozen))
    train(make_job(world, "four", tensor_model_parallel_size=2, pipeline_model_parallel_size=2, **frozen))
    return world


def test_a_checkpoint_of_four_ranks_exports_to_the_files_of_one(trained: Path, tmp_path: Path) -> None:
    from mcore_longctx.convert import export_hf

    outer = {run: trained / run / "checkpoints" / "extend" for run in ("one", "four")}
    for run, folder in outer.items():
        export_hf(store.iteration_folder(folder, 2), tmp_path / run)
    one, four = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "four"))
    assert one == four
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "four" / "config.json").read_bytes()
    original = load_file(trained / "hf" / "model.safetensors")
    assert bits(load_file(tmp_path / "four" / "model.safetensors")) == bits(original)
    assert len(list(store.iteration_folder(outer["four"], 2).glob("*.distcp"))) == 4


def test_the_folder_around_the_trainers_checkpoints_stands_for_the_newest(trained: Path) -> None:
    outer = trained / "four" / "checkpoints" / "extend"
    view = open_checkpoint(outer)
    assert view.folder == outer / "iter_0000002"
    assert view.shape.vocab_size == CONFIG["vocab_size"]
    assert open_torch_dist(outer).folder == view.folder
    with pytest.raises(ConfigError, match=r"carries its own hf/config.json; leave out --config"):
        open_checkpoint(outer, config=trained / "hf")


def test_the_trainers_masters_are_read(trained: Path) -> None:
    outer = trained / "four" / "checkpoints" / "extend"
    assert read(outer, from_master=True) == read(outer)  # trained in float32


# ------------------------------------------------------------------------------------------------- Megatron-LM's program


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """FOLDER/run, what Megatron-LM's program saves at TP 2 after a step that changes no weight; FOLDER/start, where it began."""
    from mcore_longctx.convert import import_hf

    folder = tmp_path_factory.mktemp("hosted")
    import_hf(TINY, folder / "start" / "release")
    (folder / "start" / "latest_checkpointed_iteration.txt").write_text("release")
    flags = [flag if flag != "1e-3" else "1e-30" for flag in TRAINING]
    start = ["--mock-data", "--load", str(folder / "start"), "--finetune", "--train-iters", "1", "--save-interval", "1"]
    layout = ["--tensor-model-parallel-size", "2", "--save", str(folder / "run")]
    run_program([*MODEL, *flags, *PLAIN_ROPE, *start, *layout], 2)
    yield folder
    shutil.rmtree(folder)


@needs_program
def test_what_megatron_lm_saved_is_the_model_that_it_was_given(hosted: Path) -> None:
    view = open_checkpoint(hosted / "run", config=TINY)
    assert view.folder == hosted / "run" / "iter_0000001"
    assert view.notes == ()
    found = {name: bytes(rows.read(0, rows.rows)) for name, rows in view.tensors.items()}
    assert found == bits(load_file(TINY / "model.safetensors"))
    assert open_checkpoint(hosted / "start").folder == hosted / "start" / "release"


@needs_program
def test_megatron_lms_flags_are_shown_as_plain_values(hosted: Path) -> None:
    common = read_common_state(hosted / "run" / "iter_0000001")
    assert common is not None
    args = common["args"]
    assert (args["num_layers"], args["params_dtype"], args["rotary_base"]) == (4, "float32", 10000)
    assert args["attention_backend"] == "not shown (megatron.core.transformer.enums.AttnBackend)"
    json.dumps(common)


@needs_program
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 500000.0}, "rotary_base 10,000, this config says rope_theta 500,000"),
        ({"rms_norm_eps": 1e-6}, "norm_epsilon 1e-05, this config says 1e-06"),
        ({"tie_word_embeddings": True}, "tied embeddings False, this config says tie_word_embeddings True"),
        ({"num_hidden_layers": 3}, "num_layers 4, this config says 3"),
        ({"num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 1}, "num_attention_heads 4, this config says 2"),
        ({"intermediate_size": 350}, "ffn_hidden_size 352, this config says 350"),
        ({"vocab_size": 256}, "512 rows of vocabulary, the config's vocab_size 256 is not padded to that"),
        ({"vocab_size": 513}, "embedding.word_embeddings.weight has shape [512, 128]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "with the rope none"),
    ],
)
def test_a_config_that_differs_from_megatron_lms_flags_is_refused(
    hosted: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | change))
    with pytest.raises(ConversionError) as caught:
        open_checkpoint(hosted / "run", config=tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "rows of vocabulary" in said or "has shape" in said
