"""One training stage of a recipe: what it trains on, how long, on which layout, with which optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mcore_longctx.layout import check_seq_length
from mcore_longctx.recipe.model import RopeSection
from mcore_longctx.recipe.parallel import Parallel
from mcore_longctx.recipe.values import TokenCount, check_name

__all__ = ["Activations", "MergeSection", "OptimizerSection", "PositionsSection", "SparsitySection", "Stage"]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a stage keeps for the backward pass, and how much of a layer or of the loss it computes at once.

    These decide memory and speed. Losses change by rounding only.
    """

    recompute: Literal["none", "full", "attention_kept"] = "attention_kept"
    offload_fraction: float = 0.0  # share of the layers whose kept activations wait in host memory
    mlp_tile: TokenCount | None = TokenCount(8192)  # tokens of the MLP at once; None: all
    loss_chunk: TokenCount | None = None  # tokens of logits at once; None: as many as 256 MiB of float32 hold

    def __post_init__(self) -> None:
        if not 0.0 <= self.offload_fraction <= 1.0:
            raise ValueError(f"offload_fraction is {self.offload_fraction}, expected 0 to 1")
        if self.offload_fraction and self.recompute == "none":
            raise ValueError(
                "offload_fraction needs recompute attention_kept or full: with none there is nothing that is kept by us"
            )
        for name in ("mlp_tile", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more tokens")

    def describe(self) -> str:
        """For example `recompute attention_kept, MLP 8,192 tokens at a time, loss as many as 256 MiB of logits hold`."""
        tile = "whole" if self.mlp_tile is None else f"{self.mlp_tile:,} tokens at a time"
        chunk = "as many tokens at a time as 256 MiB of logits hold" if self.loss_chunk is None else f"{self.loss_chunk:,}"
        kept = f", {self.offload_fraction:.0%} of the layers' kept activations on the host" if self.offload_fraction else ""
        return f"recompute {self.recompute}{kept}, MLP {tile}, loss {chunk}"


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    lr: float
    min_lr: float = 0.0
    lr_decay_style: Literal["cosine", "constant"] = "cosine"
    lr_warmup_iters: int = 0
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}, expected more than 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, expected 0 to lr ({self.lr})")


@dataclass(frozen=True, kw_only=True)
class PositionsSection:
    """Positions with jumps: a sample trains positions up to `target` with fewer tokens (PoSE, RPES, LongRecipe).

    pose: two stretches with one jump between them; rpes: increasing positions drawn at random; segments: a jump before every sentence.
    """

    type: Literal["pose", "rpes", "segments"]
    target: TokenCount  # positions are below it

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"target is {self.target}, expected 1 or more tokens")


@dataclass(frozen=True, kw_only=True)
class MergeSection:
    """After training, weights = (1 - other_weight) x this stage + other_weight x another checkpoint, tensor by tensor."""

    other: str  # `base`, or the name of an earlier stage
    other_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.other_weight < 1.0:
            raise ValueError(f"other_weight is {self.other_weight}, expected more than 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class SparsitySection:
    """Sparse to dense: the smallest weights of every linear layer are held at 0 for the first steps. A study, it saves no time."""

    sparsity: float  # share of the weights that are held at 0 in the beginning
    dense_from: int  # first iteration, counted from 1, in which all weights train

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity is {self.sparsity}, expected more than 0 and less than 1")
        if self.dense_from < 2:
            raise ValueError(f"dense_from is {self.dense_from}, expected 2 or more: before that iteration weights are held at 0")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: continued pretraining on long documents, or instruction tuning on chats."""

    name: str
    kind: Literal["pretrain", "sft"]
    data: str
    seq_length: TokenCount
    global_batch_size: int
    optimizer: OptimizerSection
    train_iters: int | None = None
    train_tokens: TokenCount | None = None
    micro_batch_size: int = 1
    cross_document_mask: bool = False  # documents of one sample do not see each other (UltraLong: they do)
    rope: RopeSection | None = None  # None: the recipe's; ProLong raises the base from stage to stage
    optimizer_from: Literal["none", "previous"] = (
        "none"  # previous: the moments of the stage before, with this stage's own schedule
    )
    loss_reduction: Literal["token_mean", "sequence_mean"] = "token_mean"  # sequence_mean: every conversation weighs the same
    balance: Literal["none", "sum_sq"] = "none"  # sum_sq: steps of samples whose documents cost attention alike
    positions: PositionsSection | None = None  # None: 0, 1, 2, ...
    merge: MergeSection | None = None
    sparsity: SparsitySection | None = None
    parallel: Parallel = field(default_factory=Parallel)
    activations: Activations = field(default_factory=Activations)
    precision: Literal["fp32", "bf16"] = "bf16"
    save_interval: int = 50
    keep_checkpoints: int = 2
    async_save: bool = False  # checkpoints are written beside the training, by megatron-core's own strategy
    distributed_timeout_minutes: float | None = None  # of NCCL and gloo; None: derived from the planned step time

    def __post_init__(self) -> None:
        check_name(self.name)
        if (self.train_iters is None) == (self.train_tokens is None):
            raise ValueError("give either train_iters or train_tokens")
        if self.iterations < 1:
            raise ValueError("train_iters or train_tokens gives no step at all")
        replicas = self.micro_batch_size * self.parallel.data_parallel_size
        if self.global_batch_size < 1 or self.global_batch_size % replicas:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size x data_parallel_size ({replicas})"
            )
        if self.cross_document_mask and self.micro_batch_size != 1:
            raise ValueError(
                f"cross_document_mask needs micro_batch_size 1, it is {self.micro_batch_size}: a sample is a batch itself"
            )
        _check_methods(self)
        if not 0 <= self.optimizer.lr_warmup_iters < self.iterations:
            raise ValueError(
                f"optimizer.lr_warmup_iters is {self.optimizer.lr_warmup_iters}, expected less than the {self.iterations} iterations"
            )
        if self.save_interval < 1 or self.keep_checkpoints < 1:
            raise ValueError("save_interval and keep_checkpoints must be 1 or more")
        if self.distributed_timeout_minutes is not None and not 0 < self.distributed_timeout_minutes < math.inf:
            raise ValueError(f"distributed_timeout_minutes is {self.distributed_timeout_minutes}, expected more than 0")
        check_seq_length(self.seq_length, self.parallel.context_parallel_size)
        cp, tp = self.parallel.context_parallel_size, self.parallel.tensor_model_parallel_size
        if self.parallel.sequence_parallel and self.seq_length // cp % tp:
            raise ValueError(
                f"seq_length / context_parallel_size ({self.seq_length // cp:,}) is not a multiple of TP {tp} (sequence parallel)"
            )

    def methods(self) -> list[str]:
        """What a stage does that a plain one does not, beside its rope and its merge: a line each."""
        lines = []
        if self.optimizer_from == "previous":
            lines.append("main weights, moments and step count of AdamW from the stage before")
        if self.loss_reduction == "sequence_mean":
            lines.append("every conversation weighs the same in the loss")
        if self.balance == "sum_sq":
            lines.append("steps of samples whose documents cost attention alike")
        if self.positions is not None:
            lines.append(f"positions with jumps ({self.positions.type}) below {self.positions.target:,}")
        if self.sparsity is not None:
            how = self.sparsity
            lines.append(
                f"the smallest {how.sparsity:.0%} of the weights of linear layers are 0 until iteration {how.dense_from:,}"
            )
        return lines

    @property
    def iterations(self) -> int:
        """Optimizer steps: `train_iters`, or as many as reach `train_tokens`."""
        if self.train_iters is not None:
            return self.train_iters
        assert self.train_tokens is not None
        return -(-self.train_tokens // (self.global_batch_size * self.seq_length))

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.parallel.data_parallel_size)


def _check_methods(stage: Stage) -> None:
    """What the published methods need of a stage, and what they exclude."""
    if stage.positions is not None and stage.positions.target < stage.seq_length:
        raise ValueError(f"positions.target {stage.positions.target:,} is below seq_length {stage.seq_length:,}")
    if stage.positions is not None and stage.cross_document_mask:
        raise ValueError(
            "positions jump over a whole sample, and with cross_document_mask each document begins at position 0; use one of them"
        )
    if stage.balance == "sum_sq" and not stage.cross_document_mask:
        raise ValueError("balance sum_sq needs cross_document_mask: without it every sample costs attention the same")
    if stage.loss_reduction == "sequence_mean" and (stage.kind != "sft" or stage.positions is not None):
        what = "positions" if stage.kind == "sft" else f"kind {stage.kind}"
        raise ValueError(f"loss_reduction sequence_mean weighs the conversations of sft stages; it does not go with {what}")
    if stage.sparsity is not None and stage.sparsity.dense_from > stage.iterations:
        raise ValueError(f"sparsity.dense_from is {stage.sparsity.dense_from}, the stage has {stage.iterations} iterations")
    if stage.sparsity is not None and stage.optimizer_from == "previous":
        raise ValueError("sparsity holds weights at 0 whose moments begin at 0: optimizer_from must be none")
