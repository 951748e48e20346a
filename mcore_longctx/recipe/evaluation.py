"""The `evaluate` section of a recipe: what is measured before and after each stage, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mcore_longctx.recipe.parallel import Parallel
from mcore_longctx.recipe.values import TokenCount

__all__ = ["EvaluateSection", "Level", "LossByPositionSection", "NeedleSection", "RulerSection", "ShortSuiteSection"]

Level = Literal["quick", "standard", "publish"]

QUICK_QUESTIONS = 20  # asked of the one haystack of a quick look, and in its short suite
QUICK_TOKENS_A_NEEDLE = 128  # a short haystack holds fewer needles than that
QUICK_WINDOWS, QUICK_SHORT_WINDOWS = 2, 16
DIGITS = 7
PUBLISH_SAMPLES = 100  # of each cell: 100 of 100 right says at least 96 % (Wilson, 95 %)


@dataclass(frozen=True, kw_only=True)
class NeedleSection:
    """Needle grid: a fact hidden at each depth of each length, asked for at the end."""

    haystack: Path  # text that was not trained on: a file or a folder
    lengths: tuple[TokenCount, ...]
    depths: int = 6  # equally spaced from 0 (start) to 1 (just before the question)
    samples: int = 10  # per cell
    digits: int | None = None  # of a pass key; None: 7
    kind: Literal["passkey", "sentence"] = "passkey"  # a number, or a fact about an invented person
    shared: bool = False  # one haystack holds the needles of all depths, read once and asked once for each (`needles_shared`)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.depths, self.samples, self.key_digits) < 1:
            raise ValueError("give at least one length, depth, sample and digit")
        if self.kind == "sentence" and self.digits is not None:
            raise ValueError(f"digits {self.digits} are those of a pass key, kind is sentence; leave digits out (digits: null)")

    @property
    def key_digits(self) -> int:
        """Digits of a pass key."""
        return DIGITS if self.digits is None else self.digits

    def at_level(self, level: Level) -> NeedleSection:
        """See `EvaluateSection.at_level`."""
        if level == "quick":
            longest = max(self.lengths)
            depths = max(1, min(QUICK_QUESTIONS, longest // QUICK_TOKENS_A_NEEDLE))
            return replace(self, lengths=(longest,), depths=depths, samples=1, shared=True)
        if level == "publish":
            return replace(self, samples=max(self.samples, PUBLISH_SAMPLES))
        return self


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
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task is named twice")

    def at_level(self, level: Level) -> RulerSection:
        """See `EvaluateSection.at_level`."""
        if level == "quick":
            return replace(self, lengths=(max(self.lengths),), samples=1)
        if level == "publish":
            return replace(self, samples=max(self.samples, PUBLISH_SAMPLES), scoring="greedy")
        return self


@dataclass(frozen=True, kw_only=True)
class ShortSuiteSection:
    """Short-context skills before and after: multiple choice, scored by the likelihood of the options."""

    choices: Path | None = None  # JSONL: {"question", "choices": [...], "answer": index}; None: made from the seed
    questions: int = 100  # at most: a file may hold fewer

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ValueError("give at least one question")

    def at_level(self, level: Level) -> ShortSuiteSection:
        """See `EvaluateSection.at_level`."""
        return replace(self, questions=min(self.questions, QUICK_QUESTIONS)) if level == "quick" else self


@dataclass(frozen=True, kw_only=True)
class LossByPositionSection:
    """Next-token loss on held-out text, by position, and at the base model's own length."""

    path: Path
    seq_length: TokenCount
    short_length: TokenCount
    windows: int = 12  # windows of seq_length tokens
    short_windows: int = 96  # windows of short_length tokens

    def __post_init__(self) -> None:
        if min(self.windows, self.short_windows) < 1:
            raise ValueError("give at least one window")

    def at_level(self, level: Level) -> LossByPositionSection:
        """See `EvaluateSection.at_level`."""
        if level == "quick":
            return replace(
                self, windows=min(self.windows, QUICK_WINDOWS), short_windows=min(self.short_windows, QUICK_SHORT_WINDOWS)
            )
        return self


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """What is measured before and after each stage."""

    needle: NeedleSection | None = None
    ruler: RulerSection | None = None
    loss_by_position: LossByPositionSection | None = None
    short_suite: ShortSuiteSection | None = None
    level: Level = "standard"  # quick: a look at the longest length; publish: at least 100 samples a cell, decoded
    seed: int | None = None  # of the samples; None: the recipe's. One for all runs of a comparison
    max_budget_share: float | None = None  # refuse to start when measuring costs more than this share of the training
    parallel: Parallel = field(default_factory=Parallel)
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.parallel.pipeline_model_parallel_size != 1 or self.parallel.data_parallel_size != 1:
            raise ValueError("evaluation runs with pipeline_model_parallel_size 1 and data_parallel_size 1")
        if self.max_budget_share is not None and not self.max_budget_share > 0:
            raise ValueError("max_budget_share is a share of the training's hours, for example 0.1")
        if self.max_budget_share is not None and not self.measures:
            raise ValueError("max_budget_share has no effect where nothing is measured")

    @property
    def measures(self) -> bool:
        """Whether anything is measured at all."""
        return any(part is not None for part in (self.needle, self.ruler, self.loss_by_position, self.short_suite))

    @property
    def lengths(self) -> tuple[tuple[str, TokenCount], ...]:
        """Every length that is measured, with the key that asks for it."""
        needle, ruler, loss = self.needle, self.ruler, self.loss_by_position
        found = [("needle.lengths", n) for n in (needle.lengths if needle is not None else ())]
        found += [("ruler.lengths", n) for n in (ruler.lengths if ruler is not None else ())]
        if loss is not None:
            found += [("loss_by_position.seq_length", loss.seq_length), ("loss_by_position.short_length", loss.short_length)]
        return tuple(found)

    @property
    def texts(self) -> dict[str, Path]:
        """Every file or folder that is read, by the key that names it."""
        found: dict[str, Path | None] = {}
        if self.needle is not None:
            found["needle.haystack"] = self.needle.haystack
        if self.ruler is not None:
            found |= {"ruler.haystack": self.ruler.haystack, "ruler.code": self.ruler.code}
        if self.loss_by_position is not None:
            found["loss_by_position.path"] = self.loss_by_position.path
        if self.short_suite is not None:
            found["short_suite.choices"] = self.short_suite.choices
        return {key: path for key, path in found.items() if path is not None}

    def at_level(self) -> EvaluateSection:
        """What is really measured: the section as its `level` changes it. At its own level again it stays as it is.

        quick       one haystack of the longest length, read once and asked up to 20 questions (one for each 128 tokens); 2 long windows
                    and 16 short ones; 20 questions of the short suite. No RULER-like tasks, unless they are all that is asked for: then
                    one sample of each at the longest length.
        standard    what the section says.
        publish     at least 100 samples of each needle cell and of each RULER-like task and length, these decoded greedily. (A needle
                    needs no decoding: teacher forcing finds it exactly when greedy decoding does.)
        """
        ruler = self.ruler
        if self.level == "quick" and (self.needle, self.loss_by_position, self.short_suite) != (None, None, None):
            ruler = None
        return replace(
            self,
            needle=self.needle and self.needle.at_level(self.level),
            ruler=ruler and ruler.at_level(self.level),
            loss_by_position=self.loss_by_position and self.loss_by_position.at_level(self.level),
            short_suite=self.short_suite and self.short_suite.at_level(self.level),
        )
