"""The recipe: one YAML file that describes a whole run, as frozen dataclasses.

Every field here is a key of the file. `load.py` reads it, `docs/recipe.md` explains it. Lower rooms are handed the section that
they need, never the whole recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcore_longctx.recipe.cluster import ClusterSection
from mcore_longctx.recipe.data import ChunkSet, DataSection, DocumentSource, LengthSampling
from mcore_longctx.recipe.evaluation import EvaluateSection, LossByPositionSection, NeedleSection
from mcore_longctx.recipe.parallel import CpCommType, Parallel
from mcore_longctx.recipe.stage import Activations, OptimizerSection, Stage
from mcore_longctx.recipe.values import TokenCount, check_name
from mcore_longctx.rope import RopeScaling, RopeType

__all__ = [
    "Activations",
    "ChunkSet",
    "ClusterSection",
    "CpCommType",
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
            check_name(name)
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
