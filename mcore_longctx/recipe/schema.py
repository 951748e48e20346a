"""The recipe: one YAML file that describes a whole run, as frozen dataclasses.

Every field here is a key of the file. `load.py` reads it, `docs/recipe.md` explains it. Lower rooms are handed the section that
they need, never the whole recipe.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mcore_longctx.errors import LayoutError
from mcore_longctx.layout import check_seq_length
from mcore_longctx.layout.heads import key_head_replicas
from mcore_longctx.recipe.cluster import ClusterSection
from mcore_longctx.rope import RopeScaling, RopeType

__all__ = [
    "Activations",
    "ClusterSection",
    "DataSection",
    "DocumentSource",
    "EvaluateSection",
    "LengthSampling",
    "LossByPositionSection",
    "ModelSection",
    "NeedleSection",
    "OptimizerSection",
    "Parallel",
    "Recipe",
    "RopeSection",
    "Stage",
    "TokenCount",
]


_MOST_COPIES = 1_000_000  # of a document: each is drawn by itself, in memory
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} names a folder; use letters, digits, '.', '_' and '-'")


class TokenCount(int):
    """A number of tokens: `4096`, `1_048_576`, `128k` (131,072), `4M` (4,194,304), `1.26B` (a plain 1,260,000,000)."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model that is extended: a Hugging Face folder of the Llama family."""

    path: Path
    backend: Literal["local", "te"] = "local"  # layers: ours on Megatron's local ones, or Megatron's TransformerEngine layers
    num_layers: int | None = None  # where given, the sizes must agree with the folder's config.json;
    hidden_size: int | None = None  # they let a plan or a dry run work before the model is at hand
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class RopeSection:
    """The rope that the model is trained with. Fields as in `mcore_longctx.rope.RopeScaling`."""

    type: RopeType
    factor: float = 1.0
    rope_theta: float | None = None  # None: the model's own base
    original_max_position_embeddings: TokenCount | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    ramp: Literal["index", "rotations"] = "index"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    alpha: float = 1.0
    beta: float = 32.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    max_position_embeddings: TokenCount | None = None  # None: follows from factor and the original length
    phase_dtype: Literal["float32", "float64"] = "float32"

    def scaling(self, model_rope: RopeScaling) -> RopeScaling:
        """This rope for a model whose own rope is `model_rope` (it gives head_dim and, if not set here, the base)."""
        return RopeScaling(
            type=self.type,
            head_dim=model_rope.head_dim,
            rope_theta=self.rope_theta if self.rope_theta is not None else model_rope.rope_theta,
            max_position_embeddings=self.max_position_embeddings,
            factor=self.factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            ramp=self.ramp,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            alpha=self.alpha,
            beta=self.beta,
            truncate=self.truncate,
            attention_factor=self.attention_factor,
            mscale=self.mscale,
            mscale_all_dim=self.mscale_all_dim,
        )


@dataclass(frozen=True, kw_only=True)
class ChunkSet:
    """Pieces of exactly `length` tokens, each from one document (mode `prolong`)."""

    length: TokenCount
    share: float | None = None  # share of the token budget


@dataclass(frozen=True, kw_only=True)
class DocumentSource:
    """One source of documents: a file (JSONL plain or packed, Parquet, text), or a folder of them."""

    name: str
    path: Path
    share: float | None = None  # share of the token budget; None: see DataSection.mode
    text_field: str = "text"
    id_field: str = "id"
    document: Literal["record", "folder"] = "record"  # folder: each folder directly below `path` is one document (a repository)
    chunks: tuple[ChunkSet, ...] = ()  # mode prolong: its documents in chunks; a document goes to the longest that it fills

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():  # bytes that are no UTF-8 are not printable either
            raise ValueError(f"{self.name!r} cannot be the name of a source; use letters, digits and the like")
        lengths = [chunk.length for chunk in self.chunks]
        if len(set(lengths)) < len(lengths):
            raise ValueError("two chunks have the same length")
        if self.chunks and self.share is not None:
            raise ValueError("share stands in the chunks of a source that has chunks")


@dataclass(frozen=True, kw_only=True)
class LengthSampling:
    """Length sampling inside each source: short documents are kept with a probability, long ones repeated, others dropped."""

    short_below: TokenCount = TokenCount(4096)
    keep_probability: float = 1.0
    long_above: TokenCount = TokenCount(8192)
    repetition: float = 1.0
    min_length: TokenCount = TokenCount(1)  # shorter documents are dropped
    max_length: TokenCount | None = None  # longer ones are dropped

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep_probability <= 1.0:
            raise ValueError(f"keep_probability is {self.keep_probability}, expected 0 to 1")
        if not 1.0 <= self.repetition <= _MOST_COPIES:  # not for nan either
            raise ValueError(f"repetition is {self.repetition}, expected 1 to {_MOST_COPIES:,}")
        for name in ("short_below", "long_above", "min_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):,}, expected 0 or more")
        if self.short_below > self.long_above:
            raise ValueError(f"short_below {self.short_below:,} is larger than long_above {self.long_above:,}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length:,} is below min_length {self.min_length:,}")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """A data set: documents for `pretrain` stages, chats for `sft` stages.

    mode `ultralong`: a source without a share keeps the part of the tokens that it holds after length sampling; `fu`: the part that
    it holds before (Fu et al., arXiv 2402.10171: lengths shift inside a source, the mixture stays); `prolong` (arXiv 2410.02660):
    as `ultralong`, and sources may have chunks.
    """

    sources: tuple[DocumentSource, ...]
    mode: Literal["ultralong", "fu", "prolong"] = "ultralong"
    length_sampling: LengthSampling = field(default_factory=LengthSampling)
    separator: str = "<s>"  # between documents; with separator_kind bos_eos and none it has no meaning
    separator_kind: Literal["text", "token", "bos_eos", "none"] = "text"  # text: ordinary characters; token: a control token
    separator_loss: bool = True  # whether separators are learned
    packing: Literal["concatenate", "single", "best_fit", "intact"] = "concatenate"
    repeat_to_fill: bool = False  # take documents again where a source is too small for its share; else that is an error
    max_bad: int = 0  # records that cannot be read and are left out

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty")
        if len(set(names)) < len(names):
            raise ValueError(f"two sources share the name {next(n for n in names if names.count(n) > 1)!r}")
        shares = [chunk.share for source in self.sources for chunk in source.chunks or (source,)]
        if shares.count(None) not in (0, len(shares)) or not all(share is None or 0 < share < math.inf for share in shares):
            raise ValueError("give every source a positive share, or none")
        if self.mode != "prolong" and any(source.chunks for source in self.sources):
            raise ValueError("chunks belong to mode prolong")
        if self.separator_kind in ("text", "token") and not self.separator:
            raise ValueError("separator is empty; for nothing between documents use separator_kind none")
        if self.max_bad < 0:
            raise ValueError(f"max_bad is {self.max_bad}, expected 0 or more")

    @property
    def separator_text(self) -> str:
        """What stands between documents, in words."""
        if self.separator_kind in ("bos_eos", "none"):
            return {"bos_eos": "BOS and EOS", "none": "nothing"}[self.separator_kind]
        return f"the {self.separator_kind} {self.separator!r}"


CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Layout of one job. `data_parallel_size` is what is left of the ranks: world = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    cp_comm_type: CpCommType | tuple[CpCommType, ...] = "p2p"  # one for all layers, or a list with one for each
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = None  # a2a+p2p: [ranks of the a2a, ranks of the ring]

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size above 1")
        if not self.cp_comm_types or not set(self.cp_comm_types) <= set(get_args(CpCommType)):
            raise ValueError(
                f"cp_comm_type is {self.cp_comm_type!r}, expected {', '.join(get_args(CpCommType))}, or one for each layer"
            )
        sizes, is_hierarchical = self.hierarchical_context_parallel_sizes, "a2a+p2p" in self.cp_comm_types
        if is_hierarchical and sizes is None and self.context_parallel_size > 1:
            raise ValueError(
                "cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes: [ranks of the a2a, ranks of the ring]"
            )
        if sizes is not None and not is_hierarchical:
            raise ValueError("hierarchical_context_parallel_sizes are given, but cp_comm_type is not a2a+p2p")
        if sizes is not None and (len(sizes) != 2 or min(sizes) < 1 or math.prod(sizes) != self.context_parallel_size):
            raise ValueError(
                f"hierarchical_context_parallel_sizes are {list(sizes)}, expected two sizes whose product is "
                f"context_parallel_size {self.context_parallel_size}"
            )

    @property
    def cp_comm_types(self) -> tuple[CpCommType, ...]:
        """The exchanges that are used: one for all layers, or one for each."""
        return (self.cp_comm_type,) if isinstance(self.cp_comm_type, str) else tuple(self.cp_comm_type)

    @property
    def attention_neighbours(self) -> int:
        """Context-parallel ranks that share the heads of their rows in every layer: `inner` of `layout.pack_layout`."""
        sizes = self.hierarchical_context_parallel_sizes
        of_kind = {"p2p": 1, "all_gather": 1, "a2a": self.context_parallel_size, "a2a+p2p": sizes[0] if sizes is not None else 1}
        return min(of_kind[kind] for kind in self.cp_comm_types)

    def check_attention(
        self,
        num_layers: int,
        num_attention_heads: int,
        num_query_groups: int,
        *,
        backend: Literal["local", "te"] = "local",
        where: object = None,
    ) -> None:
        """Raise LayoutError unless the exchanges fit the model: one for each layer, heads that divide over the ranks of an a2a.

        Our exchange repeats key heads where there are fewer of them than ranks. TransformerEngine's (`backend: te`) repeats none: it
        asserts that query and key heads both divide.
        """
        tp, sizes = self.tensor_model_parallel_size, self.hierarchical_context_parallel_sizes
        if not isinstance(self.cp_comm_type, str) and len(self.cp_comm_type) != num_layers:
            raise LayoutError(
                f"cp_comm_type lists {len(self.cp_comm_type)} exchanges, the model has {num_layers} layers", where=where
            )
        of_kind = {"a2a": self.context_parallel_size, "a2a+p2p": sizes[0] if sizes is not None else 1}
        for kind in sorted({kind for kind in self.cp_comm_types if kind in of_kind}):
            query_heads, key_heads, ranks = num_attention_heads // tp, num_query_groups // tp, of_kind[kind]
            if key_head_replicas(query_heads, key_heads, ranks, where=where) > 1 and backend == "te":
                works = ", ".join(str(size) for size in range(1, key_heads + 1) if key_heads % size == 0)
                raise LayoutError(
                    f"TransformerEngine's a2a over {ranks} ranks cannot divide {key_heads} key heads (of one tensor-parallel rank)",
                    where=where,
                    fix=f"use a2a over {works} ranks, and p2p for the rest (a2a+p2p), or model.backend=local, which repeats key heads",
                )

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    def describe(self) -> str:
        """For example `TP 8 (SP) x PP 1 x CP 16 p2p x DP 2 = 256 ranks`."""
        sp = " (SP)" if self.sequence_parallel else ""
        sizes = self.hierarchical_context_parallel_sizes
        hierarchy = f" ({sizes[0]} x {sizes[1]})" if sizes is not None else ""
        kinds = "/".join(sorted(set(self.cp_comm_types)))
        comm = f" {kinds}{hierarchy}" if self.context_parallel_size > 1 else ""
        return (
            f"TP {self.tensor_model_parallel_size}{sp} x PP {self.pipeline_model_parallel_size} x CP {self.context_parallel_size}{comm}"
            f" x DP {self.data_parallel_size} = {self.world_size:,} ranks"
        )


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
    parallel: Parallel = field(default_factory=Parallel)
    activations: Activations = field(default_factory=Activations)
    precision: Literal["fp32", "bf16"] = "bf16"
    save_interval: int = 50
    keep_checkpoints: int = 2
    async_save: bool = False  # checkpoints are written beside the training, by megatron-core's own strategy
    distributed_timeout_minutes: float | None = None  # of NCCL and gloo; None: derived from the planned step time

    def __post_init__(self) -> None:
        _check_name(self.name)
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


@dataclass(frozen=True, kw_only=True)
class NeedleSection:
    """Needle (passkey) grid: a key hidden at each depth of each length, asked for at the end."""

    haystack: Path  # text that was not trained on: a file or a folder
    lengths: tuple[TokenCount, ...]
    depths: int = 6  # equally spaced from 0 (start) to 1 (just before the question)
    samples: int = 10  # per cell
    digits: int = 7


@dataclass(frozen=True, kw_only=True)
class LossByPositionSection:
    """Next-token loss on held-out text, by position, and at the base model's own length."""

    path: Path
    seq_length: TokenCount
    short_length: TokenCount
    windows: int = 12  # windows of seq_length tokens
    short_windows: int = 96  # windows of short_length tokens


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """What is measured before and after each stage."""

    needle: NeedleSection | None = None
    loss_by_position: LossByPositionSection | None = None
    parallel: Parallel = field(default_factory=Parallel)
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.parallel.pipeline_model_parallel_size != 1 or self.parallel.data_parallel_size != 1:
            raise ValueError("evaluation runs with pipeline_model_parallel_size 1 and data_parallel_size 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: which model, which rope, which data, which stages, what is measured, where it goes."""

    name: str
    model: ModelSection
    rope: RopeSection
    data: dict[str, DataSection]
    stages: tuple[Stage, ...]
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    tokenizer: Path | None = None  # None: the model's folder
    output: Path | None = None  # None: runs/<name>
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in (self.name, *self.data):
            _check_name(name)
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages is empty")
        if len(set(names)) < len(names):
            raise ValueError("two stages share a name")
        masked = [stage.name for stage in self.stages if stage.cross_document_mask]
        if masked and self.model.backend == "te":
            raise ValueError(f"stage {masked[0]}: cross_document_mask is computed by backend local only, model.backend is te")
        reserved = {"base", "before", "scaled"} & set(names)
        if reserved:
            raise ValueError(f"no stage may be called {reserved.pop()!r}: the run folder uses this name")

    @property
    def run_folder(self) -> Path:
        """Where everything that comes of this recipe goes."""
        return self.output if self.output is not None else Path("runs") / self.name

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that holds tokenizer.json."""
        return self.tokenizer if self.tokenizer is not None else self.model.path
