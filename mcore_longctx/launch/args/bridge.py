"""A stage as `key=value` of NVIDIA Megatron-Bridge, on top of one of its Llama 3 recipes.

Names read in NVIDIA-NeMo/Megatron-Bridge at 067f987 (2026-08-22): training/config.py, models/gpt/model_config.py, and those of the base
classes in megatron-core 0.19.2. The model of its recipes is a GPTModelConfig with a TransformerConfig inside, and its override code
(training/utils/omegaconf_utils.py, which was run on these classes) refuses `model.num_layers`: it is `model.transformer.num_layers`.
Training with it has not been run.
"""

from __future__ import annotations

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.args.flags import Command, Difference, Expansion, Flag, flag
from mcore_longctx.launch.args.megatron_lm import (
    checkpoint_differences,
    distributed_flags,
    environment,
    title,
    vocabulary_rows,
)
from mcore_longctx.launch.args.refusals import refuse_methods
from mcore_longctx.launch.args.rope import ROPE_KEYS, why_no_rope_flags
from mcore_longctx.launch.args.source import StageRun
from mcore_longctx.launch.args.stock import refuse_what_is_lost, stock_recompute

__all__ = ["BASE_RECIPE", "bridge_command"]

BASE_RECIPE = "llama3_8b_pretrain_64gpu_h100_bf16_128k_config"
"""The nearest that it ships; every size and setting that a recipe of ours has is overridden."""


def bridge_command(run: StageRun) -> Command:
    """The overrides for Megatron-Bridge's scripts/training/run_recipe.py.

    Raises:
        ConfigError: it would train something else, or cannot be told.
    """
    refuse_methods(run)
    refuse_what_is_lost(run, "Megatron-Bridge")
    if run.stage.precision != "bf16":
        raise ConfigError(
            f"the recipe that the overrides are laid over ({BASE_RECIPE}) trains in bf16",
            where=run.where("stage.precision"),
            fix="use bf16",
        )
    recompute, why = stock_recompute(run)
    return Command(
        title=title(run, "Megatron-Bridge"),
        accepted_by="Megatron-Bridge at 067f987 by its configuration classes; read, not run",
        environment=environment(run),
        before=_preparation(run),
        launcher=("torchrun",),
        program=("scripts/training/run_recipe.py", "--recipe", BASE_RECIPE, "--mode", "pretrain"),
        arrays=(
            ("DISTRIBUTED_ARGS", tuple(distributed_flags(run))),
            ("MODEL", (*_model(run), *_rope(run))),
            (
                "TRAINING",
                (
                    *_training(run),
                    *(_said(f"model.transformer.{_name(one)}", _value(one), one.keys) for one in recompute),
                    *_offload(run),
                ),
            ),
            ("PARALLEL", tuple(_parallel(run))),
            ("DATA", tuple(_data(run))),
            ("CHECKPOINTS_AND_LOGS", tuple(_checkpoints(run))),
        ),
        differences=_differences(run, why),
    )


def _said(name: str, value: object, keys: str | tuple[str, ...] = (), why: str = "") -> Flag:
    text = str(value).lower() if isinstance(value, bool) else value
    return flag(f"{name}=", text, keys=keys, why=why)


def _name(one: Flag) -> str:
    return one.name.removeprefix("--").replace("-", "_")


def _value(one: Flag) -> str:
    return f"[{','.join(one.values)}]" if one.name == "--recompute-modules" else one.values[0]


def _preparation(run: StageRun) -> tuple[str, ...]:
    data = f"mcore-longctx run RECIPE --steps data-{run.stage.name}"
    if run.previous is not None:
        return (data,)
    return (data, f"convert the weights: scripts/conversion/convert.sh import, into {run.folder / 'megatron-bridge' / 'base'}")


def _model(run: StageRun) -> list[Flag]:
    shape = run.shape
    return [
        _said("model.transformer.num_layers", shape.num_layers, "model.num_layers"),
        _said("model.transformer.hidden_size", shape.hidden_size, "model.hidden_size"),
        _said("model.transformer.ffn_hidden_size", shape.ffn_hidden_size, "model.ffn_hidden_size"),
        _said("model.transformer.num_attention_heads", shape.num_attention_heads, "model.num_attention_heads"),
        _said("model.transformer.num_query_groups", shape.num_query_groups, "model.num_query_groups"),
        _said("model.transformer.kv_channels", shape.kv_channels, "model.kv_channels"),
        _said("model.vocab_size", vocabulary_rows(run), "model.vocab_size"),
        _said("model.should_pad_vocab", False, "model.vocab_size", why="padding would take part in the softmax"),
        _said("model.seq_length", run.stage.seq_length, "stage.seq_length"),
        _said("model.transformer.layernorm_epsilon", shape.layernorm_epsilon, "model.path"),
        _said("model.transformer.add_bias_linear", shape.add_bias_linear, "model.path"),
        _said("model.transformer.add_qkv_bias", shape.add_qkv_bias, "model.path"),
        _said("model.transformer.qk_layernorm", shape.qk_layernorm, "model.path"),
        _said("model.share_embeddings_and_output_weights", shape.tie_word_embeddings, "model.path"),
        _said("model.transformer.transformer_impl", "transformer_engine", "model.backend"),
    ]


def _rope(run: StageRun) -> list[Flag]:
    """Unlike Megatron-LM's command line, its configuration hands the factor of Llama 3's scaling on."""
    rope = run.rope
    why = why_no_rope_flags(rope)
    if rope.type == "yarn" and not why:
        why = "the settings of YaRN are no fields of its configuration: an override of them is refused, or with + skipped with a warning"
    if why:
        raise ConfigError(why, where=run.where("rope"), fix="use mcore-longctx train, or --for megatron-lm --program ours")
    keys = (*ROPE_KEYS, "rope.phase_dtype")
    pairs: list[tuple[str, object]] = [
        ("position_embedding_type", "rope"),
        ("rotary_base", rope.rope_theta),
        ("rope_scaling", rope.type == "llama3"),
        ("rope_scaling_factor", rope.factor if rope.type == "llama3" else 1.0),
    ]
    if rope.type == "linear":
        pairs.append(("seq_len_interpolation_factor", rope.factor))
    return [_said(f"model.{name}", value, keys) for name, value in pairs]


def _training(run: StageRun) -> list[Flag]:
    stage, adam = run.stage, run.stage.optimizer
    return [
        _said("train.micro_batch_size", stage.micro_batch_size, "stage.micro_batch_size"),
        _said("train.global_batch_size", stage.global_batch_size, "stage.global_batch_size"),
        _said("train.train_iters", stage.iterations, "stage.train_iters stage.train_tokens"),
        _said("optimizer.lr", adam.lr, "stage.optimizer.lr"),
        _said("optimizer.min_lr", adam.min_lr, "stage.optimizer.min_lr"),
        _said("scheduler.lr_decay_style", adam.lr_decay_style, "stage.optimizer.lr_decay_style"),
        _said("scheduler.lr_decay_iters", stage.iterations, "stage.train_iters stage.train_tokens"),
        _said("scheduler.lr_warmup_iters", adam.lr_warmup_iters, "stage.optimizer.lr_warmup_iters"),
        _said("optimizer.weight_decay", adam.weight_decay, "stage.optimizer.weight_decay"),
        # what is trained with: the scheduler sets it at every step, and the recipe below has 0.033 there
        _said("scheduler.start_weight_decay", adam.weight_decay, "stage.optimizer.weight_decay"),
        _said("scheduler.end_weight_decay", adam.weight_decay, "stage.optimizer.weight_decay"),
        _said("optimizer.adam_beta1", adam.adam_beta1, "stage.optimizer.adam_beta1"),
        _said("optimizer.adam_beta2", adam.adam_beta2, "stage.optimizer.adam_beta2"),
        _said("optimizer.adam_eps", adam.adam_eps, "stage.optimizer.adam_eps"),
        _said("optimizer.clip_grad", adam.clip_grad, "stage.optimizer.clip_grad"),
        _said("rng.seed", run.seed, "seed"),
        _said("mixed_precision", "bf16_mixed", "stage.precision"),
        _said("model.transformer.calculate_per_token_loss", True, why="one division by the number of tokens, over all ranks"),
        _said("ddp.average_in_collective", False, why="follows from it: sums must not be divided twice"),
        _said("model.transformer.cross_entropy_fusion_impl", "native"),
    ]


def _offload(run: StageRun) -> list[Flag]:
    fraction, key = run.stage.activations.offload_fraction, "stage.activations.offload_fraction"
    if not fraction:
        return []
    return [
        _said("model.transformer.fine_grained_activation_offloading", True, key),
        _said("model.transformer.offload_modules", "[attn_norm,core_attn,attn_proj,mlp_norm]", key),
        _said("model.transformer.activation_offload_fraction", fraction, key),
    ]


def _parallel(run: StageRun) -> list[Flag]:
    parallel = run.stage.parallel
    sizes, types = parallel.hierarchical_context_parallel_sizes, parallel.cp_comm_types
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "sequence_parallel")
    flags = [_said(f"model.transformer.{name}", getattr(parallel, name), f"stage.parallel.{name}") for name in names]
    if parallel.context_parallel_size > 1:
        value = types[0] if len(types) == 1 else f"[{','.join(types)}]"
        flags.append(_said("model.transformer.cp_comm_type", value, "stage.parallel.cp_comm_type"))
    if sizes is not None:
        key = "hierarchical_context_parallel_sizes"
        flags.append(_said(f"model.transformer.{key}", f"[{','.join(map(str, sizes))}]", f"stage.parallel.{key}"))
    return [
        *flags,
        _said("ddp.use_distributed_optimizer", True),
        _said("dist.distributed_timeout_minutes", run.timeout_minutes, "stage.distributed_timeout_minutes"),
    ]


def _data(run: StageRun) -> list[Flag]:
    return [
        _said("dataset.data_path", str(run.data_prefix), "stage.data stage.kind stage.name"),
        _said("dataset.split", Expansion("'100,0,0'")),  # Hydra reads a bare comma as a list of choices
        _said("dataset.seq_length", run.stage.seq_length, "stage.seq_length"),
        _said("tokenizer.tokenizer_type", "HuggingFaceTokenizer", "tokenizer"),
        _said("tokenizer.tokenizer_model", str(run.tokenizer), "tokenizer"),
    ]


def _checkpoints(run: StageRun) -> list[Flag]:
    stage, folder = run.stage, run.folder / "megatron-bridge"
    start = folder / "base" if run.previous is None else folder / run.previous / "checkpoints"
    checkpoints = folder / stage.name / "checkpoints"
    flags = [
        _said("checkpoint.save", str(checkpoints), "stage.name output"),
        _said("checkpoint.load", str(checkpoints), "stage.name output"),
        _said("checkpoint.pretrained_checkpoint", str(start), "model.path"),
        _said("checkpoint.save_interval", stage.save_interval, "stage.save_interval"),
        _said("checkpoint.most_recent_k", stage.keep_checkpoints, "stage.keep_checkpoints"),
        _said("checkpoint.ckpt_format", "torch_dist"),
        _said("checkpoint.dist_ckpt_optim_fully_reshardable", True),
        _said("checkpoint.async_save", stage.async_save, "stage.async_save"),
    ]
    if stage.async_save:
        flags.append(_said("checkpoint.async_strategy", "mcore", "stage.async_save"))
    return [
        *flags,
        _said("logger.log_interval", 1),
        _said("validation.eval_iters", 0),
        _said("train.exit_signal_handler", True),
    ]


def _differences(run: StageRun, recompute: str) -> tuple[Difference, ...]:
    found = [
        Difference(("stage.activations.recompute",), recompute),
        Difference(("stage.activations.mlp_tile",), "the MLP is computed over all tokens of a rank at once: there are no tiles."),
        Difference(("stage.activations.loss_chunk",), "the logits of all tokens of a rank are held at once."),
        Difference(
            ("rope.max_position_embeddings",), "the length that the model is made for is not a setting of its own: seq_length is."
        ),
        Difference(
            ("seed", "stage.data"),
            "samples come in GPTDataset's order, the last label of each is foreign, and tokens without loss in a document are learned.",
        ),
        Difference(
            ("model.backend",),
            "layers and attention are TransformerEngine's. Our layer spec is set in Python: cfg.model."
            "transformer_layer_spec = mcore_longctx.model.spec.llama.",
        ),
    ]
    own = [
        one
        for one in checkpoint_differences(run)
        if "stage.keep_checkpoints" not in one.keys and "model.vocab_size" not in one.keys
    ]
    return (*found, *own)
