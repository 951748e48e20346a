"""Megatron-core of the running version as the judge: it loads our imports at any layout, and we export its saves.

The models are built the plain way (GPTModel, stock local layer spec and rotary), not by this package.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.convert import compare, export_hf, import_hf, inspect_folder
from mcore_longctx.families import read_shape
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import write_manifest
from mcore_longctx.rope import read_hf_rope
from tests.convert.hf_folders import LLAMA3_ROPE, read_weights
from tests.multiproc import run_processes

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))  # tensor x pipeline parallel, in four processes
LENGTH = 64
# largest difference as a share of the largest logit, float32: order of sums in the projections
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    config: dict[str, Any]
    dtype: str = "float32"
    shards: str = "10GB"
    padding: int = 128  # rows that Megatron's model has
    imported: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings of the import

    @property
    def per_layer(self) -> bool:
        return not self.imported.get("stacked", True)


CASES = (
    Case("untied", {}),
    Case("tied", {"tie_word_embeddings": True}),
    Case("llama3 rope in shards", {"rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 65536}, shards="60KB"),
    Case("more padding", {}, padding=256),
    Case("bf16", {}, dtype="bfloat16"),
    Case("chunks for two", {}, imported={"chunks_for_tp": 2, "vocab_multiple": 16}),
    Case("layer by layer", {}, padding=256, imported={"chunks_for_tp": 2, "stacked": False}),
)
# what Megatron saves again; each save starts processes of its own and costs seconds
SAVES = [(CASES[0], 1, 1), (CASES[0], 2, 1), (CASES[1], 1, 2), *((case, 2, 2) for case in CASES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases at all layouts in one launch: logits by layout, and the folders that Megatron saved again."""
    folder = tmp_path_factory.mktemp("megatron")
    reference = {}
    for case in CASES:
        reference[case.name] = transformers_model(folder / case.name / "hf", case)
        import_hf(folder / case.name / "hf", folder / case.name / "megatron", **case.imported)
    try:
        ranks = run_processes(load_and_save_again, 4, str(folder), timeout=280)
    finally:
        end_children(folder)
    for case, tp, pp in SAVES:
        as_our_trainer_would(folder / case.name / "megatron", saved_folder(folder, case, tp, pp))
    return {"folder": folder, "reference": reference, "logits": next(rank for rank in ranks if rank)}


def end_children(folder: Path) -> None:
    """End the manager processes that megatron-core's saver keeps beside each rank: they outlive a rank that is killed."""
    for note in folder.glob("child-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(note.name.removeprefix("child-")), signal.SIGKILL)


def transformers_model(folder: Path, case: Case) -> torch.Tensor:
    """Make a Llama with transformers, save it, and return its logits [LENGTH, vocabulary]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 126, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "rms_norm_eps": 1e-5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 500000.0}
    config = LlamaConfig(
        **{**sizes, **heads, "max_position_embeddings": 512, "initializer_range": 0.2, **copy.deepcopy(case.config)}
    )  # changed by transformers 5
    model = LlamaForCausalLM(config).to(getattr(torch, case.dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # transformers starts them at one, where a mix-up would not show
    model.save_pretrained(folder, max_shard_size=case.shards)
    # read again, since .to(bfloat16) has rounded the rotary frequencies as well
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids()).logits[0]


def token_ids() -> torch.Tensor:
    return torch.randint(126, (1, LENGTH), generator=torch.Generator().manual_seed(7))


def saved_folder(folder: Path, case: Case, tp: int, pp: int) -> Path:
    return folder / case.name / f"tp{tp}-pp{pp}"


def as_our_trainer_would(source: Path, saved: Path) -> None:
    """Put beside Megatron's files what our trainer puts there."""
    shutil.copytree(source / "hf", saved / "hf")
    shutil.copyfile(source / "mcore_longctx.json", saved / "mcore_longctx.json")
    write_manifest(saved, "checkpoint")


# ------------------------------------------------------------------------------------------------ in the ranks
def load_and_save_again(folder: str) -> dict[str, Any] | None:
    """Runs in each of four ranks. The last pipeline stage of the first tensor-parallel rank returns the logits."""
    from megatron.core import parallel_state

    from mcore_longctx.megatron_compat import device_context
    from mcore_longctx.model import init_process_groups
    from mcore_longctx.recipe import Parallel

    # megatron-core's saver starts processes of its own, which the test's daemon processes may not
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    logits = {}
    with device_context():
        for tp, pp in LAYOUTS:
            init_process_groups(
                Parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=4 // tp // pp), seed=1
            )
            for case in CASES:
                model = plain_gpt_model(Path(folder) / case.name / "hf", case, tp, pp)
                load(model, Path(folder) / case.name / "megatron", per_layer=case.per_layer)
                found = forward(model)
                if found is not None:
                    logits[case.name, tp, pp] = found[0, :, :126].numpy()
                if (case, tp, pp) in SAVES:
                    save(model, saved_folder(Path(folder), case, tp, pp), per_layer=(case.name, tp) == ("untied", 2))
            last = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    return logits if len(logits) == len(LAYOUTS) * len(CASES) and last else None


def plain_gpt_model(hf: Path, case: Case, tp: int, pp: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = json.loads((hf / "config.json").read_text())
    shape, rope = read_shape(config), read_hf_rope(config)
    megatron = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.layernorm_epsilon,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        megatron,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=case.padding,
        max_sequence_length=512,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.rope_theta,
        rope_scaling=rope.type == "llama3",
        rope_scaling_factor=rope.factor,
    )
    return model.to(getattr(torch, case.dtype)).eval()


def load(model: Any, folder: Path, *, per_layer: bool) -> None:
    from megatron.core import dist_checkpointing

    weights = model.sharded_state_dict(metadata=metadata_of(per_layer=per_layer))
    loaded = dist_checkpointing.load({"model": weights}, str(folder))["model"]
    result = model.load_state_dict(loaded, strict=False)
    lost = [key for key in (*result.missing_keys, *result.unexpected_keys) if not key.endswith("_extra_state")]
    assert not lost, lost


def metadata_of(*, per_layer: bool) -> dict[str, bool]:
    """What Megatron names one key a layer by."""
    return {"non_homogeneous_layers": per_layer, "singleton_local_shards": False}


def forward(model: Any) -> torch.Tensor | None:
    """Logits in float32 [1, LENGTH, vocabulary] on the last stage."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dtype = next(model.parameters()).dtype
    with widened(model), torch.no_grad():
        if not model.pre_process:
            hidden = torch.empty(LENGTH, 1, model.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
        out = model(token_ids(), torch.arange(LENGTH)[None], mask)
        if not model.post_process:
            dist.send(out, parallel_state.get_pipeline_model_parallel_next_rank())
            return None
    assert next(model.parameters()).dtype == dtype
    return out


@contextlib.contextmanager
def widened(model: Any) -> Iterator[None]:
    dtype = next(model.parameters()).dtype
    model.float()
    yield
    model.to(dtype)


def save(model: Any, folder: Path, *, per_layer: bool) -> None:
    """Save with Megatron's own code, weights and what an optimizer would store beside them."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    weights = model.sharded_state_dict(metadata=metadata_of(per_layer=per_layer))
    moments = {
        number: dataclasses.replace(tensor, key=f"optimizer.state.exp_avg.{tensor.key}")
        for number, tensor in enumerate(nested_values(weights))
        if isinstance(tensor, ShardedTensor)
    }
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": weights, "optimizer": moments, "iteration": 3}, str(folder))
    for child in multiprocessing.active_children():
        (folder.parent.parent / f"child-{child.pid}").touch()
    dist.barrier()


# ------------------------------------------------------------------------------------------------------- the tests
@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}".format(*layout))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_megatron_loads_the_import_and_its_logits_are_those_of_transformers(
    results: dict[str, Any], case: Case, layout: tuple[int, int]
) -> None:
    ours, theirs = torch.from_numpy(results["logits"][case.name, *layout]), results["reference"][case.name]
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.multiproc
@pytest.mark.parametrize(("case", "tp", "pp"), SAVES, ids=[f"{case.name}-tp{tp}-pp{pp}" for case, tp, pp in SAVES])
def test_what_megatron_saved_is_exported_bit_for_bit(results: dict[str, Any], case: Case, tp: int, pp: int) -> None:
    saved = saved_folder(results["folder"], case, tp, pp)
    out = saved.with_name(saved.name + "-exported")
    export_hf(saved, out)
    assert read_weights(out) == read_weights(results["folder"] / case.name / "hf")
    report = compare(results["folder"] / case.name / "hf", saved)
    assert report.equal
    assert any("beside the weights are not compared (first: optimizer." in note for note in report.notes)


@pytest.mark.multiproc
def test_the_saves_are_as_various_as_they_should_be(results: dict[str, Any]) -> None:
    """The tests above would prove little if Megatron had written what we write."""
    case = CASES[0]
    key = "decoder.layers.mlp.linear_fc2.weight"
    one = read_torch_dist(saved_folder(results["folder"], case, 1, 1)).tensors[key]
    assert {chunk.sizes for chunk in one.chunks} == {(1, 64, 96)}
    per_layer = read_torch_dist(saved_folder(results["folder"], case, 2, 1)).tensors
    assert {chunk.sizes for chunk in per_layer["decoder.layers.3.mlp.linear_fc2.weight"].chunks} == {(64, 48)}
    stacked = read_torch_dist(saved_folder(results["folder"], CASES[1], 2, 2)).tensors[key]
    assert {chunk.sizes for chunk in stacked.chunks} == {(1, 64, 48)}
    padded = read_torch_dist(saved_folder(results["folder"], CASES[3], 2, 2)).tensors["output_layer.weight"]
    assert padded.shape == (256, 64)
    imported = read_torch_dist(results["folder"] / CASES[5].name / "megatron").tensors
    assert {chunk.sizes for chunk in imported[key].chunks} == {(1, 64, 48)}
    assert imported["output_layer.weight"].shape == (128, 64)
    imported = read_torch_dist(results["folder"] / CASES[6].name / "megatron").tensors
    assert {chunk.sizes for chunk in imported["decoder.layers.3.mlp.linear_fc2.weight"].chunks} == {(64, 48)}
    facts = inspect_folder(saved_folder(results["folder"], case, 2, 2))
    assert facts["optimizer_bytes"] > 0
    assert facts["files"] > 1


@pytest.mark.multiproc
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_loads_the_export_with_the_same_frequencies_and_logits(results: dict[str, Any], case: Case) -> None:
    from transformers import AutoModelForCausalLM

    hf, out = results["folder"] / case.name / "hf", results["folder"] / case.name / "out"
    if not out.exists():
        export_hf(results["folder"] / case.name / "megatron", out)
    models = [
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval() for path in (hf, out)
    ]
    before, after = (model.model.rotary_emb for model in models)
    assert torch.equal(before.inv_freq, after.inv_freq)
    assert before.attention_scaling == after.attention_scaling
    with torch.no_grad():
        first, second = (model(token_ids()).logits[0] for model in models)
    assert torch.equal(first, second)
    assert (second - results["reference"][case.name]).abs().max() <= TOLERANCE * second.abs().max()
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == getattr(torch, case.dtype)
