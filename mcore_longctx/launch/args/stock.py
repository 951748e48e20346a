"""A stage as flags of pretrain_gpt.py without anything of ours: refused where that would train another model without a word.

Where it can be said, the differences are listed. Read in megatron-core 0.19.2 and in Megatron-LM core_v0.16.1 to core_v0.19.0.
"""

from __future__ import annotations

from dataclasses import replace

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.launch.args.flags import Command, Difference, Flag, flag
from mcore_longctx.launch.args.megatron_lm import (
    checkpoint_differences,
    ddp_flags,
    distributed_flags,
    environment,
    logging_flags,
    model_flags,
    parallel_flags,
    preparation,
    schedule_flags,
    title,
    tokenizer_flags,
)
from mcore_longctx.launch.args.refusals import refuse_methods
from mcore_longctx.launch.args.rope import ROPE_KEYS, rope_flags, why_no_rope_flags
from mcore_longctx.launch.args.source import StageRun
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.setup import stage_setup

__all__ = ["refuse_what_is_lost", "stock_command", "stock_recompute"]

_WAY_ROUND = "use --program ours"
_STOCK_FACTOR = 8.0  # of Llama 3's scaling in every model that pretrain_gpt.py builds
# what a layer keeps around its attention, in Megatron's words (model/te.py has the same)
_OFFLOADED = ("attn_norm", "core_attn", "attn_proj", "mlp_norm")


def stock_command(run: StageRun) -> Command:
    """The flags for pretrain_gpt.py of Megatron-LM.

    Raises:
        ConfigError: the program would drop or change something that decides what is trained.
    """
    refuse_methods(run)
    refuse_what_is_lost(run, "pretrain_gpt.py")
    _refuse_dropped_rope(run)
    recompute, why = stock_recompute(run)
    data = [
        flag("--data-path", str(run.data_prefix), keys="stage.data stage.kind stage.name"),
        flag("--split", "100,0,0"),
        flag("--data-cache-path", str(run.work / "cache"), keys="stage.name output"),
        flag("--no-mmap-bin-files"),
        flag("--no-create-attention-mask-in-dataloader", why="a mask of seq_length x seq_length cannot exist"),
        *tokenizer_flags(run),
    ]
    model = [*model_flags(run), *_rope_flags(run), flag("--transformer-impl", "transformer_engine", keys="model.backend")]
    fusion = [flag("--cross-entropy-loss-fusion"), flag("--cross-entropy-fusion-impl", "native")]
    yarn = run.rope.type == "yarn"
    versions = "core_v0.19; before there was no YaRN for models without MLA" if yarn else "core_v0.19"
    return Command(
        title=title(run, "pretrain_gpt.py, Megatron-LM's own layers"),
        accepted_by=f"Megatron-LM {versions} (parser and checks tested: megatron-core 0.19.2), with TransformerEngine and apex",
        environment=environment(run),
        before=preparation(run),
        launcher=("torchrun",),
        program=("pretrain_gpt.py",),
        arrays=(
            ("DISTRIBUTED_ARGS", tuple(distributed_flags(run))),
            ("MODEL_ARGS", tuple(model)),
            ("TRAINING_ARGS", (*schedule_flags(run), *fusion, *recompute, *_offload_flags(run))),
            ("MODEL_PARALLEL_ARGS", (*parallel_flags(run), *ddp_flags(run))),
            ("DATA_ARGS", tuple(data)),
            ("EVAL_AND_LOGGING_ARGS", tuple(logging_flags(run))),
        ),
        differences=(*_data_differences(run), *_memory_differences(run, why), *checkpoint_differences(run)),
    )


# ------------------------------------------------------------------------------------------------------------------------- refusals


def refuse_what_is_lost(run: StageRun, program: str) -> None:
    """Raise ConfigError for what Megatron's own layers and data set do not do, in Megatron-LM and in Megatron-Bridge."""
    stage = run.stage
    if run.cluster.gpu == "none":
        _refuse(run, "cluster.gpu", f"{program} needs CUDA")
    if stage.kind == "sft":
        what = f"{program} would learn questions as well as answers: which tokens carry loss stands in the sidecar, which it does not read"
        _refuse(run, "stage.kind", what)
    if not run.separator_loss:
        what = f"{program} would learn the separators too: which tokens carry loss stands in the sidecar, which it does not read"
        _refuse(run, f"data.{stage.data}.separator_loss", what)
    if run.section.phase_dtype == "float64":
        what = f"{program} computes angles in float32 (wrong by up to 0.2 rad at 4M tokens)"
        _refuse(run, "rope.phase_dtype", what, "rope.phase_dtype=float32")
    if stage.activations.offload_fraction and stage.activations.recompute == "full":
        what = f"{program} has nothing to offload when everything is recomputed"
        _refuse(run, "stage.activations.offload_fraction", what, f"stages.{stage.name}.activations.offload_fraction=0")
    if stage.precision == "fp32" and run.stage.parallel.context_parallel_size > 1:
        what = f"{program} has context parallelism in TransformerEngine only, whose fused attention computes no fp32"
        _refuse(run, "stage.precision", what, f"stages.{stage.name}.precision=bf16")
    _refuse_repeated_key_heads(run, program)


def _refuse_repeated_key_heads(run: StageRun, program: str) -> None:
    """Attention is TransformerEngine's there, whatever the recipe's backend."""
    shape, parallel = run.shape, run.stage.parallel
    try:
        parallel.check_attention(shape.num_layers, shape.num_attention_heads, shape.num_query_groups, backend="te")
    except LayoutError as error:
        ranks = "a2a over fewer ranks, and p2p for the rest (a2a+p2p)"
        _refuse(run, "stage.parallel.cp_comm_type", f"{program} would stop at its first step: {error.what}", ranks)


def _refuse_dropped_rope(run: StageRun) -> None:
    rope = run.rope
    why = why_no_rope_flags(rope)
    if not why and rope.type == "llama3" and rope.factor != _STOCK_FACTOR:
        why = (
            f"--rope-scaling-factor {rope.factor:g} is accepted and dropped: pretrain_gpt.py builds every model with factor"
            f" {_STOCK_FACTOR:g}, in all versions from 0.16 to 0.19"
        )
    if why:
        _refuse(run, "rope", why)


def _refuse(run: StageRun, key: str, what: str, other: str = "") -> None:
    raise ConfigError(what, where=run.where(key), fix=f"{_WAY_ROUND}, or {other}" if other else _WAY_ROUND)


# ---------------------------------------------------------------------------------------------------------------------------- flags


def _rope_flags(run: StageRun) -> list[Flag]:
    """Without the factor of Llama 3's scaling: the flag would say something and do nothing."""
    flags = [one for one in rope_flags(run.rope) if one.name != "--rope-scaling-factor"]
    return [replace(one, keys=(*ROPE_KEYS, "rope.phase_dtype")) for one in flags]  # angles are float32 whatever is said


def stock_recompute(run: StageRun) -> tuple[list[Flag], str]:
    """Megatron's recompute flags nearest to the recipe's policy, and why these.

    `attention_kept` has none. `selective` over norms and MLP does not compute attention twice, but keeps queries, keys and values as
    well; where the plan says that they do not fit, `full` it is.
    """
    policy = run.stage.activations.recompute
    keys = "stage.activations.recompute"
    selective = [
        flag("--recompute-granularity", "selective", keys=keys),
        flag("--recompute-modules", "layernorm", "mlp", keys=keys),
    ]
    full = [
        flag("--recompute-granularity", "full", keys=keys),
        flag("--recompute-method", "uniform", keys=keys),
        flag("--recompute-num-layers", 1, keys=keys),
    ]
    if policy == "none":
        return [], "nothing is recomputed, as in the recipe"
    if policy == "full":
        return full, "every layer is recomputed, as in the recipe"
    gpu = find_gpu(run.cluster.gpu, run.cluster.hardware)
    kept = replace(
        stage_setup(run.stage, run.shape, gpu, backend="te"),
        recompute="selective",
        loss="native",
        loss_chunk=None,
        offload_fraction=0.0,
    )
    total = memory(kept).total
    sizes = f"{total / 1e9:,.0f} GB of the {gpu.memory_bytes / 1e9:,.0f} GB of a {gpu.name} by the plan"
    if total <= gpu.memory_bytes or run.stage.activations.offload_fraction:
        return selective, f"attention_kept becomes selective recompute of norms and MLP: {sizes}."
    return full, f"attention_kept becomes full recompute, attention is computed twice: selective would take {sizes}."


def _offload_flags(run: StageRun) -> list[Flag]:
    fraction, key = run.stage.activations.offload_fraction, "stage.activations.offload_fraction"
    if not fraction:
        return []
    return [
        flag("--fine-grained-activation-offloading", keys=key),
        flag("--offload-modules", *_OFFLOADED, keys=key),
        flag("--activation-offload-fraction", fraction, keys=key),
    ]


# ---------------------------------------------------------------------------------------------------------------------- differences


def _data_differences(run: StageRun) -> list[Difference]:
    return [
        Difference(
            ("seed",),
            "GPTDataset reads our samples in an order of its own (other steps see other samples), and the last label of each is the"
            " first token of another; one sample of the file is never read.",
        ),
        Difference(
            ("stage.data",),
            "tokens without loss in a document (a field of its record) are learned: GPTDataset does not read the sidecar. Separators"
            " are in the file.",
        ),
    ]


def _memory_differences(run: StageRun, recompute: str) -> list[Difference]:
    tile = run.stage.activations.mlp_tile
    found = [Difference(("stage.activations.recompute",), recompute)]
    if tile is not None:
        found.append(
            Difference(
                ("stage.activations.mlp_tile",), "the MLP is computed over all tokens of a rank at once: there are no tiles."
            )
        )
    found.append(
        Difference(
            ("stage.activations.loss_chunk",),
            "the logits of all tokens of a rank are held at once: the loss is not computed in chunks.",
        )
    )
    if run.backend == "local":
        what = "layers and attention are TransformerEngine's: losses differ from ours by rounding."
        found.append(Difference(("model.backend",), what))
    return found
