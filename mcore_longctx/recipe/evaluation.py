"""The `evaluate` section of a recipe: what is measured before and after each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcore_longctx.recipe.parallel import Parallel
from mcore_longctx.recipe.values import TokenCount

__all__ = ["EvaluateSection", "Level", "LossByPositionSection", "NeedleSection", "RulerSection", "ShortSuiteSection"]

Level = Literal["quick", "standard", "publish"]


@dataclass(frozen=True, kw_only=True)
class NeedleSection:
    """Needle (passkey) grid: a key hidden at each depth of each length, asked for at the end."""

    haystack: Path  # text that was not trained on: a file or a folder
    lengths: tuple[TokenCount, ...]
    depths: int = 6  # equally spaced from 0 (start) to 1 (just before the question)
    samples: int = 10  # per cell
    digits: int = 7
    kind: Literal["passkey", "sentence"] = "passkey"  # a number, or a fact about an invented person
    shared: bool = False  # one haystack holds the needles of all depths, read once and asked once for each (`needles_shared`)


@dataclass(frozen=True, kw_only=True)
class RulerSection:
    """The 13 RULER-like tasks, in our own words: results are shown as `ruler-like`, and are not RULER's."""

    haystack: Path  # text that was not trained on: a file or a folder
    lengths: tuple[TokenCount, ...]
    tasks: tuple[str, ...] = ()  # none named: all of `mcore_longctx.tasks.RULER_TASKS`
    samples: int = 25  # of each task and length
    code: Path | None = None  # source code as haystack of the tasks whose haystack is text: odd samples take it
    scoring: Literal["teacher_forced", "greedy"] = "teacher_forced"  # greedy: decoded with a key/value cache over all ranks

    def __post_init__(self) -> None:
        if not self.lengths or self.samples < 1:
            raise ValueError("give at least one length and one sample")


@dataclass(frozen=True, kw_only=True)
class ShortSuiteSection:
    """Short-context skills before and after: multiple choice (a file, or made offline) and perplexity on short texts."""

    choices: Path | None = (
        None  # JSONL: {"question", "choices": [...], "answer": index}; None: made from a seed (arithmetic, copying, ...)
    )
    questions: int = 100


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
    ruler: RulerSection | None = None
    loss_by_position: LossByPositionSection | None = None
    short_suite: ShortSuiteSection | None = None
    level: Level = "standard"  # quick: a look at the longest length; publish: at least 100 samples a cell, decoded
    max_budget_share: float | None = None  # refuse to start when measuring costs more than this share of the training
    parallel: Parallel = field(default_factory=Parallel)
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.parallel.pipeline_model_parallel_size != 1 or self.parallel.data_parallel_size != 1:
            raise ValueError("evaluation runs with pipeline_model_parallel_size 1 and data_parallel_size 1")
