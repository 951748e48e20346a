"""Every family, made by transformers, imported, run by Megatron's own model and by ours at several layouts, and exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_longctx.convert import compare, export_hf, import_hf
from mcore_longctx.evaluate import compare_logits
from mcore_longctx.families import read_shape
from mcore_longctx.recipe import read_card
from mcore_longctx.rope import read_hf_rope
from tests.convert.family_models import FAMILIES, LENGTH, VOCABULARY, make, token_ids
from tests.convert.hf_folders import read_weights
from tests.convert.test_megatron import load
from tests.multiproc import run_processes

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))  # tensor x pipeline parallel, in four processes
# rope_scaling and max_position_embeddings as a config.json has them
ROPES: dict[str, tuple[dict[str, Any] | None, int]] = {
    "plain": (None, 512),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 512),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        4096,
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
}
TOLERANCE = 1e-5  # of the largest logit, float32: order of sums


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """FOLDER/name/hf and FOLDER/name/megatron of every family, and transformers' logits."""
    folder = tmp_path_factory.mktemp("families")
    logits = {name: make(folder / name / "hf", name) for name in FAMILIES}
    for name in FAMILIES:
        import_hf(folder / name / "hf", folder / name / "megatron")
    return folder, logits


@pytest.fixture(scope="module")
def by_megatron(imported: tuple[Path, dict[str, torch.Tensor]]) -> dict[tuple[str, str, int, int], torch.Tensor]:
    """Logits by family, whose model, and layout: one launch."""
    ranks = run_processes(logits_of_all, 4, str(imported[0]), timeout=280)
    return {key: torch.from_numpy(found) for rank in ranks for key, found in rank.items()}


# ------------------------------------------------------------------------------------------------ in the ranks
def logits_of_all(folder: str) -> dict[tuple[str, str, int, int], Any]:
    """Runs in each of four ranks; those of the last pipeline stage return logits."""
    from mcore_longctx.megatron_compat import device_context
    from mcore_longctx.model import build_gpt_model, init_process_groups
    from mcore_longctx.model.weights import load_model_weights
    from mcore_longctx.recipe import Parallel

    found = {}
    with device_context():
        for tp, pp in LAYOUTS:
            parallel = Parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=4 // tp // pp)
            init_process_groups(parallel, seed=1)
            for name in FAMILIES:
                checkpoint = Path(folder) / name / "megatron"
                config = json.loads((Path(folder) / name / "hf" / "config.json").read_text())
                stock = stock_model(config, tp, pp)
                load(stock, checkpoint, per_layer=False)
                found["stock", name, tp, pp] = forward(stock, causal_mask())
                card = read_card(checkpoint)
                ours = build_gpt_model(card.shape, card.rope, parallel, precision="fp32", seq_length=LENGTH, seed=None)
                load_model_weights(ours, checkpoint)
                found["ours", name, tp, pp] = forward(ours.eval(), None)
                save(ours, Path(folder) / name / f"saved-tp{tp}-pp{pp}")
    return {key: logits.numpy() for key, logits in found.items() if logits is not None}


def save(model: Any, folder: Path) -> None:
    """Megatron's own save, written in the rank's process."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from mcore_longctx.train.writing import SaveStrategy

    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": False}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder), SaveStrategy("torch_dist", 1))


def stock_model(config: dict[str, Any], tp: int, pp: int) -> Any:
    """Megatron's GPTModel of its own local layers, with the flags that a user of Megatron-LM would give."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = read_shape(config)
    kind, biases = config["model_type"], bool(config.get("mlp_bias"))
    fusions = ("bias_activation", "masked_softmax", "bias_dropout", "gradient_accumulation")
    off = {**{f"{name}_fusion": False for name in fusions}, "apply_rope_fusion": False, "persist_layer_norm": False}
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
        add_bias_linear=biases,
        add_qkv_bias=kind == "qwen2",
        qk_layernorm=kind == "qwen3",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        **off,
    )
    return GPTModel(
        megatron,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=kind == "qwen3"),
        vocab_size=128 * tp,
        max_sequence_length=512,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=bool(config["tie_word_embeddings"]),
        position_embedding_type="rope",
        rotary_base=read_hf_rope(config).rope_theta,
    ).eval()


def causal_mask() -> torch.Tensor:
    return torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)


def forward(model: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Logits [LENGTH, VOCABULARY] on the last pipeline stage."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    with torch.no_grad():
        if not model.pre_process:
            hidden = torch.empty(LENGTH, 1, model.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        out = model(token_ids(), torch.arange(LENGTH)[None], mask)
        if not model.post_process:
            dist.send(out, parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        parts = [torch.empty_like(out) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        dist.all_gather(parts, out.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)[0, :, :VOCABULARY]


# ------------------------------------------------------------------------------------------------------- the tests
@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}".format(*layout))
@pytest.mark.parametrize("model", ["stock", "ours"])
@pytest.mark.parametrize("name", FAMILIES)
def test_megatron_gives_the_logits_of_transformers(
    imported: Any, by_megatron: Any, name: str, model: str, layout: tuple[int, int]
) -> None:
    theirs, found = imported[1][name], by_megatron[model, name, *layout]
    assert (found - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_side_from_its_own_files_gives_the_same_logits(imported: Any, name: str) -> None:
    folder = imported[0] / name
    report = compare_logits(folder / "megatron", folder / "hf")
    assert report.equal, report.text()
    assert [reader.split()[0] for reader in report.readers] == ["megatron-core", "transformers"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_round_trip_gives_the_same_bytes_and_a_folder_that_transformers_reads(imported: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = imported[0] / name
    export_hf(folder / "megatron", folder / "out")
    assert read_weights(folder / "out") == read_weights(folder / "hf")
    for first, second in (("hf", "megatron"), ("megatron", "out"), ("hf", "out")):
        report = compare(folder / first, folder / second)
        assert report.equal, report.text()
    model = AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits[0], imported[1][name])


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}".format(*layout))
@pytest.mark.parametrize("name", FAMILIES)
def test_what_megatron_saved_at_any_layout_leaves_with_the_same_bytes(
    imported: Any, by_megatron: Any, tmp_path: Path, name: str, layout: tuple[int, int]
) -> None:
    folder = imported[0] / name
    export_hf(folder / "saved-tp{}-pp{}".format(*layout), tmp_path / "out", config=folder / "hf")
    assert read_weights(tmp_path / "out") == read_weights(folder / "hf")


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_every_rope_in_shards_leaves_with_the_same_bytes_and_frequencies(
    imported: Any, tmp_path: Path, name: str, rope: str
) -> None:
    source = imported[0] / name / "hf"
    config = json.loads((source / "config.json").read_text())
    for spelling in ("rope_scaling", "rope_parameters", "rope_theta"):
        config.pop(spelling, None)
    config |= {"rope_theta": 500000.0, "rope_scaling": ROPES[rope][0], "max_position_embeddings": ROPES[rope][1]}
    hf = in_shards(source, tmp_path / "hf", config)
    import_hf(hf, tmp_path / "megatron", chunks_for_tp=2)
    export_hf(tmp_path / "megatron", tmp_path / "out", shard_bytes=100_000)
    assert read_weights(tmp_path / "out") == read_weights(source)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(frequencies(exported), frequencies(config))
    assert compare(hf, tmp_path / "out").equal


def in_shards(source: Path, folder: Path, config: dict[str, Any]) -> Path:
    """The model of `source` in three files, with another config."""
    folder.mkdir()
    names = sorted(weights := load_file(source / "model.safetensors"))
    places = {name: f"model-{number % 3 + 1:05d}-of-00003.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def frequencies(config: dict[str, Any]) -> torch.Tensor:
    """Inverse frequencies as transformers makes them of a config, whatever it thinks of the family's name."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = ("hidden_size", "num_attention_heads", "head_dim", "rope_theta", "rope_scaling", "max_position_embeddings")
    frequencies: torch.Tensor = LlamaRotaryEmbedding(LlamaConfig(**{key: config[key] for key in sizes if key in config})).inv_freq
    return frequencies


def test_skywork_leaves_as_the_llama_that_it_is(imported: Any) -> None:
    folder = imported[0] / "skywork"
    export_hf(folder / "megatron", folder / "as llama")
    config = json.loads((folder / "as llama" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    assert not list((folder / "as llama").glob("*.py"))
    assert json.loads((folder / "megatron" / "hf" / "config.json").read_text())["model_type"] == "skywork"
    assert read_card(folder / "megatron").shape.family == "llama"
