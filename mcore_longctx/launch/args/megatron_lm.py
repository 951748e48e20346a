"""A stage as flags of Megatron-LM: what both programs take, and the whole command for ours (`python -m mcore_longctx.megatron_lm`).

Names and order of the arrays are those of Megatron-LM's example scripts (examples/llama/train_llama3_8b_h100_fp8.sh).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.args.flags import Command, Difference, Expansion, Flag, flag
from mcore_longctx.launch.args.refusals import refuse_methods
from mcore_longctx.launch.args.rope import ROPE_KEYS, rope_as_json, rope_flags, why_no_rope_flags
from mcore_longctx.launch.args.source import StageRun

__all__ = [
    "checkpoint_differences",
    "ddp_flags",
    "distributed_flags",
    "environment",
    "logging_flags",
    "model_flags",
    "our_command",
    "parallel_flags",
    "preparation",
    "schedule_flags",
    "title",
    "tokenizer_flags",
    "vocabulary_rows",
]

ACCEPTED_BY_OURS = "megatron-core 0.19, with or without a checkout of Megatron-LM (tested: 0.19.2); before 0.19 there was no training program in the wheel"


def our_command(run: StageRun) -> Command:
    """The flags for `python -m mcore_longctx.megatron_lm`: everything that decides the losses is said.

    Raises:
        ConfigError: the stage cannot be trained by this program.
    """
    refuse_methods(run)
    activations = run.stage.activations
    if run.stage.async_save and run.cluster.gpu == "none":
        raise ConfigError(
            "megatron-core 0.19 writes in a process of its own that needs CUDA, and without it the ranks wait for ever",
            where=run.where("stage.async_save"),
            fix=f"use mcore-longctx train, or stages.{run.stage.name}.async_save=false",
        )
    model = [*model_flags(run), *_our_rope(run)]
    training = [*schedule_flags(run), flag("--longctx-recompute", activations.recompute, keys="stage.activations.recompute")]
    if activations.mlp_tile is not None:
        training.append(flag("--longctx-mlp-tile", activations.mlp_tile, keys="stage.activations.mlp_tile"))
    if activations.loss_chunk is not None:
        training.append(flag("--longctx-loss-chunk", activations.loss_chunk, keys="stage.activations.loss_chunk"))
    data = [
        flag(
            "--longctx-data",
            str(run.data_prefix),
            keys="stage.data stage.kind stage.name",
            why="samples, their order and their loss masks are those of mcore-longctx train",
        ),
        *tokenizer_flags(run),
    ]
    return Command(
        title=title(run, "python -m mcore_longctx.megatron_lm (docs/megatron_lm.md)"),
        accepted_by=ACCEPTED_BY_OURS,
        environment=environment(run),
        before=preparation(run),
        launcher=("torchrun",),
        program=("-m", "mcore_longctx.megatron_lm"),
        arrays=(
            ("DISTRIBUTED_ARGS", tuple(distributed_flags(run))),
            ("MODEL_ARGS", tuple(model)),
            ("TRAINING_ARGS", tuple(training)),
            ("MODEL_PARALLEL_ARGS", (*parallel_flags(run), *ddp_flags(run))),
            ("DATA_ARGS", tuple(data)),
            ("EVAL_AND_LOGGING_ARGS", tuple(logging_flags(run))),
        ),
        differences=tuple(_our_differences(run)),
    )


def title(run: StageRun, program: str) -> str:
    """What this is, in words."""
    stage = run.stage
    return (
        f"Stage {stage.name} of {run.name} for {program}: {stage.iterations:,} steps x {stage.global_batch_size:,} sequences x"
        f" {stage.seq_length:,} tokens, {stage.parallel.describe()}."
    )


def environment(run: StageRun) -> tuple[tuple[str, str, str], ...]:
    """Variables that Megatron-LM itself asks for."""
    parallel = run.stage.parallel
    if run.cluster.gpu == "none" or parallel.tensor_model_parallel_size * parallel.context_parallel_size == 1:
        return ()
    why = "Megatron-LM stops without it on Hopper and before: communication is queued ahead of the product that it overlaps with"
    return (("CUDA_DEVICE_MAX_CONNECTIONS", "1", why),)


def preparation(run: StageRun) -> tuple[str, ...]:
    """Shell lines that make what the first start of this stage reads."""
    data = f"mcore-longctx run RECIPE --steps import,data-{run.stage.name}"
    if run.previous is not None:
        return (f"mcore-longctx run RECIPE --steps data-{run.stage.name}",)
    start = shlex.quote(str(run.work / "start"))
    up = "../" * 3  # from RUN/megatron-lm/STAGE/start to RUN
    return (
        data,
        f"mkdir -p {start} && ln -sfn {up}checkpoints/base {start}/release",
        f"echo release > {start}/latest_checkpointed_iteration.txt",
    )


# ----------------------------------------------------------------------------------------------------------------- arrays, in order


def distributed_flags(run: StageRun) -> list[Flag]:
    """What torchrun takes."""
    nodes_keys = tuple(f"stage.parallel.{name}_parallel_size" for name in ("data", "tensor_model", "pipeline_model", "context"))
    flags = [flag("--nnodes", run.nodes, keys=nodes_keys), flag("--nproc-per-node", run.ranks_per_node, keys=nodes_keys)]
    if run.nodes == 1:
        return [*flags, flag("--standalone")]
    endpoint = Expansion("${MASTER_ADDR:?}:${MASTER_PORT:-29500}")
    return [
        *flags,
        flag("--rdzv-backend", "c10d"),
        flag("--rdzv-endpoint", endpoint, why="MASTER_ADDR: the first node, the same on all of them"),
        flag("--rdzv-id", Expansion("${SLURM_JOB_ID:-mcore-longctx}")),
    ]


def model_flags(run: StageRun) -> list[Flag]:
    """Sizes of a dense decoder of the Llama family, without its rope."""
    shape, length = run.shape, run.stage.seq_length
    reach = run.rope.resolved_max_position_embeddings or length
    flags = [
        flag("--num-layers", shape.num_layers, keys="model.num_layers"),
        flag("--hidden-size", shape.hidden_size, keys="model.hidden_size"),
        flag("--ffn-hidden-size", shape.ffn_hidden_size, keys="model.ffn_hidden_size"),
        flag("--num-attention-heads", shape.num_attention_heads, keys="model.num_attention_heads"),
        flag("--group-query-attention", keys="model.num_query_groups"),
        flag("--num-query-groups", shape.num_query_groups, keys="model.num_query_groups"),
        flag("--kv-channels", shape.kv_channels, keys="model.kv_channels"),
        flag("--seq-length", length, keys="stage.seq_length"),
        flag("--max-position-embeddings", reach, keys="rope.max_position_embeddings"),
        flag("--normalization", "RMSNorm"),
        flag("--norm-epsilon", shape.layernorm_epsilon, keys="model.path"),
        flag("--swiglu"),
        flag("--attention-dropout", 0),
        flag("--hidden-dropout", 0),
    ]
    optional = {
        "--disable-bias-linear": not shape.add_bias_linear,
        "--add-qkv-bias": shape.add_qkv_bias,
        "--qk-layernorm": shape.qk_layernorm,
        "--untie-embeddings-and-output-weights": not shape.tie_word_embeddings,
    }
    return flags + [flag(name, keys="model.path") for name, given in optional.items() if given]


def _our_rope(run: StageRun) -> list[Flag]:
    how = flag("--longctx-phase-dtype", run.section.phase_dtype, keys="rope.phase_dtype")
    exactly = run.rope.type != "yarn" or run.rope.attention_factor is None  # else mscale would have to be solved for
    if exactly and not why_no_rope_flags(run.rope):
        return [*rope_flags(run.rope), how]
    why = why_no_rope_flags(run.rope) or "an attention factor that is a number is not one of Megatron's flags"
    text = rope_as_json(run.rope, where=run.where("rope"))
    return [flag("--longctx-rope", text, keys=ROPE_KEYS, why=f"as in a config.json: {why}"), how]


def schedule_flags(run: StageRun) -> list[Flag]:
    """Batches, steps, AdamW, learning rate, precision, seed."""
    stage, adam = run.stage, run.stage.optimizer
    flags = [
        flag("--micro-batch-size", stage.micro_batch_size, keys="stage.micro_batch_size"),
        flag("--global-batch-size", stage.global_batch_size, keys="stage.global_batch_size"),
        flag("--train-iters", stage.iterations, keys="stage.train_iters stage.train_tokens"),
        flag("--optimizer", "adam"),
        flag("--lr", adam.lr, keys="stage.optimizer.lr"),
        flag("--min-lr", adam.min_lr, keys="stage.optimizer.min_lr"),
        flag("--lr-decay-style", adam.lr_decay_style, keys="stage.optimizer.lr_decay_style"),
        flag("--lr-decay-iters", stage.iterations, keys="stage.train_iters stage.train_tokens"),
        flag("--lr-warmup-iters", adam.lr_warmup_iters, keys="stage.optimizer.lr_warmup_iters"),
        flag("--weight-decay", adam.weight_decay, keys="stage.optimizer.weight_decay"),
        flag("--adam-beta1", adam.adam_beta1, keys="stage.optimizer.adam_beta1"),
        flag("--adam-beta2", adam.adam_beta2, keys="stage.optimizer.adam_beta2"),
        flag("--adam-eps", adam.adam_eps, keys="stage.optimizer.adam_eps"),
        flag("--clip-grad", adam.clip_grad, keys="stage.optimizer.clip_grad"),
        flag("--seed", run.seed, keys="seed"),
    ]
    if stage.precision == "bf16":
        flags.append(flag("--bf16", keys="stage.precision"))
    why = "one division by the number of tokens that carry loss, over all ranks"
    return [*flags, flag("--calculate-per-token-loss", why=why)]


def parallel_flags(run: StageRun) -> list[Flag]:
    """Tensor, pipeline and context parallelism."""
    parallel = run.stage.parallel
    flags = [
        flag(
            "--tensor-model-parallel-size", parallel.tensor_model_parallel_size, keys="stage.parallel.tensor_model_parallel_size"
        ),
        flag(
            "--pipeline-model-parallel-size",
            parallel.pipeline_model_parallel_size,
            keys="stage.parallel.pipeline_model_parallel_size",
        ),
        flag("--context-parallel-size", parallel.context_parallel_size, keys="stage.parallel.context_parallel_size"),
    ]
    if parallel.sequence_parallel:
        flags.insert(1, flag("--sequence-parallel", keys="stage.parallel.sequence_parallel"))
    if parallel.context_parallel_size > 1:
        flags.append(flag("--cp-comm-type", *parallel.cp_comm_types, keys="stage.parallel.cp_comm_type"))
        sizes = parallel.hierarchical_context_parallel_sizes
        if sizes is not None:
            key = "stage.parallel.hierarchical_context_parallel_sizes"
            flags.append(flag("--hierarchical-context-parallel-sizes", *sizes, keys=key))
    return flags


def ddp_flags(run: StageRun) -> list[Flag]:
    """Gradients and optimizer state over the data- and context-parallel ranks."""
    flags = [flag("--use-distributed-optimizer")]
    if run.cluster.gpu != "none":
        flags += [flag("--overlap-grad-reduce", why="speed only: sums are the same"), flag("--overlap-param-gather")]
    why = "time that a rank waits for the others, several steps' worth; Megatron's default is 10 minutes"
    return [
        *flags,
        flag("--distributed-timeout-minutes", run.timeout_minutes, keys="stage.distributed_timeout_minutes", why=why),
    ]


def tokenizer_flags(run: StageRun) -> list[Flag]:
    """The tokenizer, and the rows of the vocabulary that the softmax is over."""
    why = "not a multiple of 128: padding would take part in the softmax"
    return [
        flag("--tokenizer-type", "HuggingFaceTokenizer", keys="tokenizer"),
        flag("--tokenizer-model", str(run.tokenizer), keys="tokenizer"),
        flag("--padded-vocab-size", vocabulary_rows(run), keys="model.vocab_size", why=why),
    ]


def vocabulary_rows(run: StageRun) -> int:
    """The smallest number of rows that the tensor-parallel ranks can share. All of them take part in Megatron's softmax."""
    tp = run.stage.parallel.tensor_model_parallel_size
    return -(-run.shape.vocab_size // tp) * tp


def logging_flags(run: StageRun) -> list[Flag]:
    """What is logged, saved and loaded, and the signal that ends a run."""
    stage, checkpoints = run.stage, run.work / "checkpoints"
    start = run.work / "start" if run.previous is None else run.work_of(run.previous) / "checkpoints"
    flags = [
        flag("--log-interval", 1),
        flag("--log-throughput"),
        flag("--eval-iters", 0, why="mcore-longctx evaluate measures, before and after"),
        flag("--eval-interval", stage.iterations),
        flag("--tensorboard-dir", str(run.work / "tensorboard"), keys="stage.name output"),
        flag("--save", str(checkpoints), keys="stage.name output"),
        flag("--load", str(checkpoints), keys="stage.name output"),
        flag(
            "--pretrained-checkpoint",
            str(start),
            keys="model.path",
            why="read as long as --load has nothing: never random weights",
        ),
        flag("--save-interval", stage.save_interval, keys="stage.save_interval"),
        flag("--ckpt-format", "torch_dist"),
        flag("--dist-ckpt-optim-fully-reshardable", why="so that a run can go on with another layout"),
    ]
    if stage.async_save:
        key = "stage.async_save"
        flags += [
            flag("--async-save", keys=key),
            flag(
                "--async-strategy", "mcore", keys=key, why="megatron-core's own; the default, nvrx, wants nvidia-resiliency-ext"
            ),
            flag("--use-persistent-ckpt-worker", keys=key, why="without it 0.19 goes back to saves that stop the training"),
        ]
    return [*flags, flag("--exit-signal-handler"), flag("--exit-signal", "SIGUSR1", why="saves and ends at the end of a step")]


# ---------------------------------------------------------------------------------------------------------------------- differences


def checkpoint_differences(run: StageRun) -> list[Difference]:
    """What Megatron-LM's loop does otherwise, whichever program it runs in."""
    stage = run.stage
    found = [
        Difference(
            ("stage.keep_checkpoints",),
            f"every checkpoint is kept ({-(-stage.iterations // stage.save_interval):,} of them, keep_checkpoints"
            f" {stage.keep_checkpoints} has no flag): delete old ones yourself.",
        ),
        Difference(
            (),
            "SIGUSR1 is answered at the end of a step, not of a micro-batch, and the exit code is 0; SIGTERM ends the run without saving.",
        ),
        Difference(
            (), "checkpoints are Megatron-LM's, under megatron-lm/: they carry no card and no manifest of sizes and hashes."
        ),
    ]
    minutes = stage.distributed_timeout_minutes
    if minutes is not None and minutes != run.timeout_minutes:
        what = f"--distributed-timeout-minutes takes whole minutes: {run.timeout_minutes} for {minutes:g}."
        found.append(Difference(("stage.distributed_timeout_minutes",), what))
    rows = vocabulary_rows(run) - run.shape.vocab_size
    if rows:
        what = f"{rows} rows of zeros fill the vocabulary up to a multiple of the tensor-parallel ranks and take part in the softmax."
        found.append(Difference(("model.vocab_size",), what))
    return found


def _our_differences(run: StageRun) -> Sequence[Difference]:
    found = []
    offload = run.stage.activations.offload_fraction
    if offload:
        what = (
            f"offload_fraction {offload:g} has no flag: what the layers keep stays on the GPU, and mcore-longctx plan shows with"
            f" stages.{run.stage.name}.activations.offload_fraction=0 whether it fits."
        )
        found.append(Difference(("stage.activations.offload_fraction",), what))
    if run.backend == "te":
        what = "backend te has no flag: the layers are ours, whose results differ from TransformerEngine's by rounding."
        found.append(Difference(("model.backend",), what))
    return [*found, *checkpoint_differences(run)]
