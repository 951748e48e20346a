"""The model that a recipe extends, and the rope that it is trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mcore_longctx.recipe.values import TokenCount
from mcore_longctx.rope import RopeBand, RopeScaling, RopeType

__all__ = ["ModelSection", "RopeSection"]


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
    bands: tuple[RopeBand, ...] | None = None
    long_factor: tuple[float, ...] | None = None
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
            bands=self.bands,
            long_factor=self.long_factor,
        )
