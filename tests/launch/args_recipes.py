"""Recipes for the tests of `args`: a preset with overrides, and for every key a change that a command line must show."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.launch.args import StageRun, as_line, bridge_command, our_command, stage_run, stock_command
from mcore_longctx.launch.args.flags import Command
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve

MAKERS = {"ours": our_command, "stock": stock_command, "bridge": bridge_command}
TIMEOUT = "stages.{stage}.distributed_timeout_minutes=60"  # the planned one has a test of its own
# what the stock program can say: Megatron's own factor, and a length that does not follow from it
PLAIN = ("rope.factor=8", "rope.max_position_embeddings=8M")


def run_of(preset: str, stage: str, *overrides: str) -> StageRun:
    file = open_recipe(preset, [TIMEOUT.format(stage=stage), *overrides])
    names = [one.name for one in file.recipe.stages]
    return stage_run(file, resolve(file, need_model=False), stage if stage in names else names[0])


def command(maker: str, *overrides: str, preset: str = "ultralong-8b-4m", stage: str = "extend") -> Command:
    base = PLAIN if maker == "stock" else ()
    return MAKERS[maker](run_of(preset, stage, *base, *overrides))


def line(maker: str, *overrides: str, preset: str = "ultralong-8b-4m", stage: str = "extend") -> str:
    return as_line(command(maker, *overrides, preset=preset, stage=stage))


@dataclass(frozen=True)
class Change:
    """One value of a recipe set otherwise. `given` holds for both sides: a key may need others beside it."""

    override: str
    given: tuple[str, ...] = ()


def _extend(key: str, value: str, *given: str) -> Change:
    return Change(f"stages.extend.{key}={value}", tuple(f"stages.extend.{one}" for one in given))


YARN = "rope={type: yarn, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000%s}"
_INDEX = YARN % ""
BANDS = "rope={type: bands, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000, bands: [{pairs: 64, rule: ntk}]}"
LONGROPE = f"rope={{type: longrope, long_factor: {[1.5] * 64}, rope_theta: 500000, max_position_embeddings: 4M}}"
_ROTATIONS = YARN % ", ramp: rotations, alpha: 2, beta: 8, attention_factor: 1.0"

CHANGES: dict[str, Change] = {
    "stage.name": _extend("name", "other"),
    "stage.kind": _extend("kind", "sft"),
    "stage.data": _extend("data", "instructions"),
    "stage.seq_length": _extend("seq_length", "2M"),
    "stage.global_batch_size": _extend("global_batch_size", "4"),
    "stage.train_iters": _extend("train_iters", "77"),
    "stage.train_tokens": _extend("train_tokens", "500M", "train_iters=null", "train_tokens=1B"),
    "stage.micro_batch_size": _extend("micro_batch_size", "2", "global_batch_size=4"),
    "stage.cross_document_mask": _extend("cross_document_mask", "true"),
    "stage.rope": _extend("rope", "{type: abf, rope_theta: 60000000, max_position_embeddings: 4M}"),
    "stage.optimizer_from": _extend("optimizer_from", "previous"),
    "stage.loss_reduction": _extend("loss_reduction", "sequence_mean"),
    "stage.balance": _extend("balance", "sum_sq"),
    "stage.positions": _extend("positions", "{type: rpes, target: 4M}", "seq_length=2M"),
    "stage.merge": _extend("merge", "{other: base}"),
    "stage.sparsity": _extend("sparsity", "{sparsity: 0.5, dense_from: 10}"),
    "stage.precision": _extend("precision", "fp32"),
    "stage.save_interval": _extend("save_interval", "7"),
    "stage.keep_checkpoints": _extend("keep_checkpoints", "3"),
    "stage.async_save": _extend("async_save", "true"),
    "stage.distributed_timeout_minutes": _extend("distributed_timeout_minutes", "77"),
    "stage.parallel.tensor_model_parallel_size": _extend("parallel.tensor_model_parallel_size", "4"),
    "stage.parallel.pipeline_model_parallel_size": _extend("parallel.pipeline_model_parallel_size", "2"),
    "stage.parallel.context_parallel_size": _extend("parallel.context_parallel_size", "8"),
    "stage.parallel.data_parallel_size": _extend("parallel.data_parallel_size", "1"),
    "stage.parallel.sequence_parallel": _extend("parallel.sequence_parallel", "false"),
    "stage.parallel.cp_comm_type": _extend("parallel.cp_comm_type", "all_gather"),
    "stage.parallel.hierarchical_context_parallel_sizes": _extend(
        "parallel.hierarchical_context_parallel_sizes",
        "[4, 4]",
        "parallel.cp_comm_type=a2a+p2p",
        "parallel.hierarchical_context_parallel_sizes=[2, 8]",
        "parallel.tensor_model_parallel_size=2",  # 4 key heads a rank: TransformerEngine's a2a repeats none
    ),
    "stage.activations.recompute": _extend("activations.recompute", "none"),
    "stage.activations.offload_fraction": _extend("activations.offload_fraction", "0.5"),
    "stage.activations.mlp_tile": _extend("activations.mlp_tile", "null"),
    "stage.activations.loss_chunk": _extend("activations.loss_chunk", "1024"),
    "stage.optimizer.lr": _extend("optimizer.lr", "1e-5"),
    "stage.optimizer.min_lr": _extend("optimizer.min_lr", "1e-6"),
    "stage.optimizer.lr_decay_style": _extend("optimizer.lr_decay_style", "cosine"),
    "stage.optimizer.lr_warmup_iters": _extend("optimizer.lr_warmup_iters", "5"),
    "stage.optimizer.weight_decay": _extend("optimizer.weight_decay", "0.3"),
    "stage.optimizer.adam_beta1": _extend("optimizer.adam_beta1", "0.8"),
    "stage.optimizer.adam_beta2": _extend("optimizer.adam_beta2", "0.97"),
    "stage.optimizer.adam_eps": _extend("optimizer.adam_eps", "1e-7"),
    "stage.optimizer.clip_grad": _extend("optimizer.clip_grad", "0.5"),
    "rope.type": Change(_INDEX),
    "rope.factor": Change("rope.factor=700"),
    "rope.rope_theta": Change("rope.rope_theta=600000"),
    "rope.original_max_position_embeddings": Change("rope.original_max_position_embeddings=16384"),
    "rope.low_freq_factor": Change("rope.low_freq_factor=2"),
    "rope.high_freq_factor": Change("rope.high_freq_factor=8"),
    "rope.ramp": Change("rope.ramp=rotations", (_INDEX,)),
    "rope.beta_fast": Change("rope.beta_fast=16", (_INDEX,)),
    "rope.beta_slow": Change("rope.beta_slow=2", (_INDEX,)),
    "rope.alpha": Change("rope.alpha=4", (_ROTATIONS,)),
    "rope.beta": Change("rope.beta=16", (_ROTATIONS,)),
    "rope.truncate": Change("rope.truncate=false", (_INDEX,)),
    "rope.attention_factor": Change("rope.attention_factor=1.25", (_INDEX,)),
    "rope.bands": Change("rope.bands=[{pairs: 32, rule: none}, {pairs: 32, rule: ntk}]", (BANDS,)),
    "rope.long_factor": Change(f"rope.long_factor={[2.0] * 64}", (LONGROPE,)),
    "rope.mscale": Change("rope.mscale=0.5", (YARN % ", mscale: 1.0, mscale_all_dim: 1.0",)),
    "rope.mscale_all_dim": Change("rope.mscale_all_dim=0.5", (YARN % ", mscale: 1.0, mscale_all_dim: 1.0",)),
    "rope.max_position_embeddings": Change("rope.max_position_embeddings=5M"),
    "rope.phase_dtype": Change("rope.phase_dtype=float64"),
    "model.backend": Change("model.backend=te"),
    "seed": Change("seed=7"),
    "tokenizer": Change("tokenizer=somewhere"),
    "output": Change("output=elsewhere"),
}
