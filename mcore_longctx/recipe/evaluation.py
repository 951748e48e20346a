"""The `evaluate` section of a recipe: what is measured before and after each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcore_longctx.recipe.parallel import Parallel
from mcore_longctx.recipe.values import TokenCount

__all__ = ["EvaluateSection", "LossByPositionSection", "NeedleSection"]


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
