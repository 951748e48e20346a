"""What `args` prints, through the parser and the checks of Megatron-LM, by value: args, TransformerConfig, optimizer, rope."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.launch.args import StageRun, as_line
from tests.launch.args_recipes import BANDS, LONGROPE, MAKERS, PLAIN, YARN, command, line, run_of
from tests.megatron_lm.program import needs_program

PRESETS = ["tiny-cpu", "ultralong-8b-1m", "ultralong-8b-2m", "ultralong-8b-4m"]
BRIDGE_FIELDS = Path(__file__).parent / "bridge_fields.json"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A world of any size, of Hoppers: what validate_args asks the machine for."""

    def pretend(ranks: int) -> None:
        for name, value in {"WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0, "CUDA_DEVICE_MAX_CONNECTIONS": 1}.items():
            monkeypatch.setenv(name, str(value))

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: types.SimpleNamespace(major=9, minor=0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    return pretend


def words_of(printed: str, program: list[str]) -> list[str]:
    """The words behind the program of a printed line."""
    words = shlex.split(printed)
    at = next(number for number in range(len(words)) if words[number : number + len(program)] == program)
    return words[at + len(program) :]


def accepted(maker: str, run: StageRun, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Namespace, Any]:
    """Args and GPTModelConfig of Megatron-LM for the printed line, as the program itself would have them."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from mcore_longctx.megatron_lm import launcher
    from mcore_longctx.megatron_lm.flags import extra_args_provider
    from mcore_longctx.megatron_lm.model import model_config
    from mcore_longctx.megatron_lm.programs import OWN_PROGRAM
    from mcore_longctx.megatron_lm.refusals import check_arguments
    from mcore_longctx.megatron_lm.rope import rope_of

    cluster(run.stage.parallel.world_size)
    made = MAKERS[maker](run)
    printed = as_line(made)
    extra = None
    if maker == "ours":
        parsed = launcher.read_arguments(words_of(printed, ["-m", "mcore_longctx.megatron_lm"]))
        words, extra = list(parsed.line), extra_args_provider(OWN_PROGRAM)
    else:
        words = words_of(printed, ["pretrain_gpt.py"])
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
    args = validate_args(parse_args(extra), {"tokenizer_type": "GPT2BPETokenizer"})
    if maker == "stock":
        args.apply_rope_fusion = False  # asks for TransformerEngine, which is not here
        return args, gpt_config_from_args(args)
    check_arguments(args, parsed.given, OWN_PROGRAM)
    rope = rope_of(args, parsed.given)
    assert rope.fingerprint() == run.rope.fingerprint()
    return args, model_config(args, rope)


def check_by_value(run: StageRun, args: Namespace, config: Any) -> None:
    """Everything that decides what is trained, from the recipe, as Megatron holds it after its own checks."""
    from megatron.training.training import get_megatron_optimizer_config

    stage, shape, parallel, adam = run.stage, run.shape, run.stage.parallel, run.stage.optimizer
    cp_comm = parallel.cp_comm_type if isinstance(parallel.cp_comm_type, str) else list(parallel.cp_comm_type)
    sizes = parallel.hierarchical_context_parallel_sizes
    transformer = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "layernorm_epsilon": shape.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": stage.precision == "bf16",
        "params_dtype": {"bf16": torch.bfloat16, "fp32": torch.float32}[stage.precision],
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "calculate_per_token_loss": True,
    }
    if parallel.context_parallel_size > 1:
        transformer["cp_comm_type"] = cp_comm
        transformer["hierarchical_context_parallel_sizes"] = None if sizes is None else list(sizes)
    assert {name: getattr(config.transformer, name) for name in transformer} == transformer
    model = {
        "vocab_size": -(-shape.vocab_size // parallel.tensor_model_parallel_size) * parallel.tensor_model_parallel_size,
        "should_pad_vocab": False,
        "share_embeddings_and_output_weights": shape.tie_word_embeddings,
        "seq_length": run.rope.resolved_max_position_embeddings,  # its name for --max-position-embeddings
        "rotary_percent": 1.0,
    }
    assert {name: getattr(config, name) for name in model} == model
    given = {
        "seq_length": stage.seq_length,
        "data_parallel_size": parallel.data_parallel_size,
        "micro_batch_size": stage.micro_batch_size,
        "global_batch_size": stage.global_batch_size,
        "train_iters": stage.iterations,
        "lr_decay_style": adam.lr_decay_style,
        "lr_decay_iters": stage.iterations,
        "lr_warmup_iters": adam.lr_warmup_iters,
        "lr_warmup_init": 0.0,
        "seed": run.seed,
        "save_interval": stage.save_interval,
        "eval_iters": 0,
        "log_interval": 1,
        "ckpt_format": "torch_dist",
        "dist_ckpt_optim_fully_reshardable": True,
        "async_save": stage.async_save,
        "exit_signal_handler": True,
        "distributed_timeout_minutes": 60,
        "use_distributed_optimizer": True,
        "create_attention_mask_in_dataloader": False,
        "finetune": False,
    }
    assert {name: getattr(args, name) for name in given} == given
    optimizer, _ = get_megatron_optimizer_config(args)
    wanted = {
        name: getattr(adam, name)
        for name in ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    }
    assert {name: getattr(optimizer, name) for name in wanted} == wanted
    assert optimizer.optimizer == "adam"


@needs_program
@pytest.mark.parametrize("stage", ["extend", "instruct"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_parser_and_the_checks_take_every_preset_and_stage(
    preset: str, stage: str, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(preset, stage)
    args, config = accepted("ours", run, cluster, monkeypatch)
    check_by_value(run, args, config)
    ours = run.stage.activations
    assert (args.longctx_recompute, args.longctx_mlp_tile, args.longctx_loss_chunk) == (
        ours.recompute,
        ours.mlp_tile,
        ours.loss_chunk,
    )
    assert args.longctx_phase_dtype == run.section.phase_dtype
    assert args.max_position_embeddings == run.rope.resolved_max_position_embeddings


PARALLEL = "stages.extend.parallel={tensor_model_parallel_size: 2, sequence_parallel: true, %s}"
VARIANTS = {
    "a2a+p2p": [PARALLEL % "context_parallel_size: 8, cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 4]"],
    "per layer": [PARALLEL % ("context_parallel_size: 4, cp_comm_type: [" + "p2p, " * 31 + "a2a]")],
    "pipeline": [PARALLEL % "pipeline_model_parallel_size: 2, context_parallel_size: 4, data_parallel_size: 2"],
    "yarn": [YARN % ", beta_fast: 4.5, truncate: false"],
    "yarn, temperature": [YARN % ", attention_factor: 1.0"],
    "yarn, pair": [YARN % ", mscale: 0.8, mscale_all_dim: 0.5"],
    "linear": ["rope={type: linear, factor: 32, original_max_position_embeddings: 128k, rope_theta: 500000}"],
    "abf": ["rope={type: abf, rope_theta: 500000000, max_position_embeddings: 4M}"],
    "full": ["stages.extend.activations={recompute: full}"],
    "none": ["stages.extend.activations={recompute: none}"],
    "selective": ["stages.extend.seq_length=128k"],
    "selective and offload": ["stages.extend.seq_length=128k", "stages.extend.activations.offload_fraction=0.5"],
    "async": ["stages.extend.async_save=true"],
    "fp32": ["stages.extend.precision=fp32", "stages.extend.parallel={tensor_model_parallel_size: 8, data_parallel_size: 2}"],
    "schedule": [
        "stages.extend.optimizer={lr: 1.1e-5, min_lr: 3.7e-7, lr_decay_style: cosine, lr_warmup_iters: 9, adam_eps: 1e-9}"
    ],
    "tokens": ["stages.extend.train_iters=null", "stages.extend.train_tokens=1.26B"],
}
ONLY_OURS = {
    "llama3 with other settings": ["rope.low_freq_factor=2"],
    "llama3 512": ["rope.factor=512"],
    "base with a fraction": ["rope.rope_theta=500000.25"],
    "rotations": [YARN % ", ramp: rotations, attention_factor: 1.0"],
    "ntk": ["rope={type: ntk, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000}"],
    "bands": [BANDS],
    "longrope": [LONGROPE],
    "float64": ["rope.phase_dtype=float64"],
}


@needs_program
@pytest.mark.parametrize("name", [*VARIANTS, *ONLY_OURS])
def test_the_parser_takes_every_kind_of_layout_rope_and_policy(name: str, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("ultralong-8b-4m", "extend", *({**VARIANTS, **ONLY_OURS}[name]))
    check_by_value(run, *accepted("ours", run, cluster, monkeypatch))


@needs_program
@pytest.mark.parametrize("name", VARIANTS)
def test_the_parser_takes_the_stock_flags_and_the_rope_reaches_the_config(
    name: str, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("ultralong-8b-4m", "extend", *PLAIN, *VARIANTS[name])
    args, config = accepted("stock", run, cluster, monkeypatch)
    check_by_value(run, args, config)
    assert config.transformer_layer_spec is None  # no --spec: nothing of ours, and nothing that could fail to be imported
    assert args.spec is None
    rope, transformer = run.rope, config.transformer
    assert config.rotary_base == rope.rope_theta
    assert config.position_embedding_type == ("yarn" if rope.type == "yarn" else "rope")
    assert (config.rope_scaling, config.rope_scaling_factor) == (rope.type == "llama3", 8.0)
    assert config.seq_len_interpolation_factor == (rope.factor if rope.type == "linear" else None)
    if rope.type == "yarn":
        assert transformer.yarn_rotary_scaling_factor == rope.factor
        assert transformer.yarn_original_max_position_embeddings == rope.original_max_position_embeddings
        assert (transformer.yarn_beta_fast, transformer.yarn_beta_slow) == (rope.beta_fast, rope.beta_slow)
        assert transformer.yarn_correction_range_round_to_int == rope.truncate
    activations = run.stage.activations
    if "selective" in name:
        assert (transformer.recompute_granularity, transformer.recompute_modules) == ("selective", ["layernorm", "mlp"])
    elif activations.recompute != "none":
        assert (transformer.recompute_granularity, transformer.recompute_method) == ("full", "uniform")
        assert transformer.recompute_num_layers == 1
    else:
        assert transformer.recompute_granularity is None
    if activations.offload_fraction:
        assert transformer.fine_grained_activation_offloading
        assert transformer.activation_offload_fraction == activations.offload_fraction
    assert (args.data_path, args.split) == ([str(run.data_prefix)], "100,0,0")


@needs_program
@pytest.mark.parametrize("name", ["yarn", "yarn, temperature", "yarn, pair", "linear", "abf", "schedule"])
def test_megatrons_own_rotary_embedding_of_the_stock_flags_is_the_recipes_rope(
    name: str, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle are the modules that GPTModel builds for these settings."""
    import numpy as np

    from mcore_longctx.megatron_compat import training_program_context

    run = run_of("ultralong-8b-4m", "extend", *PLAIN, *VARIANTS[name])
    _, config = accepted("stock", run, cluster, monkeypatch)
    with training_program_context():
        found, factor = megatrons_own_rope(config, yarn=run.rope.type == "yarn")
    wanted, attention_factor = run.rope.frequencies()
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert factor == pytest.approx(attention_factor, rel=1e-6)


def megatrons_own_rope(config: Any, *, yarn: bool) -> tuple[Any, float]:
    """Inverse frequencies [d/2] and the factor of cos and sin, from the modules that GPTModel builds."""
    import numpy as np
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        YarnRotaryEmbedding,
        _yarn_find_correction_range,
        _yarn_get_concentration_factor_from_config,
    )

    transformer, factor = config.transformer, 1.0
    rotary: Any
    if yarn:
        rotary = YarnRotaryEmbedding(
            kv_channels=transformer.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            scaling_factor=transformer.yarn_rotary_scaling_factor,
            original_max_position_embeddings=transformer.yarn_original_max_position_embeddings,
            beta_fast=transformer.yarn_beta_fast,
            beta_slow=transformer.yarn_beta_slow,
            mscale=transformer.yarn_mscale,
            mscale_all_dim=transformer.yarn_mscale_all_dim,
            correction_range_round_to_int=transformer.yarn_correction_range_round_to_int,
            use_cpu_initialization=True,
        )
        transformer.position_embedding_type = "yarn"
        factor = float(_yarn_get_concentration_factor_from_config(transformer))
        low, high = (
            float(bound)
            for bound in _yarn_find_correction_range(
                rotary.beta_fast,
                rotary.beta_slow,
                rotary.dim,
                rotary.rotary_base,
                rotary.original_max_position_embeddings,
                transformer.yarn_correction_range_round_to_int,
            )
        )
        mask = 1 - np.clip((np.arange(64) - low) / max(high - low, 0.001), 0, 1)
        found = rotary.inv_freq_inter.numpy() * (1 - mask) + rotary.inv_freq_extra.numpy() * mask
    else:
        rotary = RotaryEmbedding(
            kv_channels=transformer.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            use_cpu_initialization=True,
        )
        found = rotary.inv_freq.numpy() / (config.seq_len_interpolation_factor or 1)
    return found, factor


# --------------------------------------------------------------------------------------------------------------------------- bridge


@needs_program
@pytest.mark.parametrize("name", ["yarn", *(name for name in VARIANTS if "yarn" not in name and name != "fp32")])
def test_every_override_for_bridge_is_a_field_of_its_configuration(name: str) -> None:
    """Its own fields by name from the commit, those of its base classes from megatron-core 0.19.2."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.training.config import common_config, training_config
    from megatron.training.models.gpt import GPTModelConfig

    overrides = (
        [*PLAIN, *VARIANTS[name]] if name != "yarn" else ["rope.factor=512"]
    )  # no YaRN there: the factor that pretrain_gpt.py drops
    classes: dict[str, type] = {
        "model": GPTModelConfig,
        "model.transformer": TransformerConfig,
        "train": training_config.TrainingConfig,
        "validation": training_config.ValidationConfig,
        "scheduler": training_config.SchedulerConfig,
        "logger": training_config.LoggerConfig,
        "checkpoint": training_config.CheckpointConfig,
        "tokenizer": training_config.TokenizerConfig,
        "rng": common_config.RNGConfig,
        "dist": common_config.DistributedInitConfig,
        "dataset": GPTDatasetConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
    }
    own = json.loads(BRIDGE_FIELDS.read_text())["fields"]
    known = {f"{group}.{field.name}" for group, one in classes.items() for field in dataclasses.fields(one)}
    known |= {f"{group}.{field}" if group else field for group, fields in own.items() for field in fields}
    printed = words_of(line("bridge", *overrides), ["--mode", "pretrain"])
    assert len(printed) > 50
    names = [word.partition("=")[0] for word in printed]
    assert len(set(names)) == len(names)
    assert not set(names) - known
    assert "model.rope_scaling_factor=512" in printed or "rope.factor=512" not in overrides


@needs_program
def test_overrides_for_bridge_carry_the_recipes_values() -> None:
    made = command("bridge", "rope.factor=512", *VARIANTS["schedule"])
    values = {one.name.removesuffix("="): one.values[0] for one in made.flags}
    run = run_of("ultralong-8b-4m", "extend", *VARIANTS["schedule"])
    for key, value in {
        "optimizer.lr": run.stage.optimizer.lr,
        "optimizer.min_lr": run.stage.optimizer.min_lr,
        "optimizer.adam_eps": run.stage.optimizer.adam_eps,
        "model.seq_length": run.stage.seq_length,
        "dataset.seq_length": run.stage.seq_length,
        "model.rotary_base": run.rope.rope_theta,
        "model.rope_scaling_factor": run.rope.factor,
        "scheduler.lr_warmup_iters": run.stage.optimizer.lr_warmup_iters,
        "model.transformer.context_parallel_size": run.stage.parallel.context_parallel_size,
        "checkpoint.most_recent_k": run.stage.keep_checkpoints,
    }.items():
        assert float(values[key]) == value
