"""What would stop an evaluation hours after a run was started: found in the recipe, and in files of it that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mcore_longctx.data.documents.readers import read_texts
from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.layout import check_seq_length
from mcore_longctx.recipe.schema import EvaluateSection, LossByPositionSection, Recipe, ShortSuiteSection
from mcore_longctx.tasks import RULER_TASKS, check_needle_grid, check_ruler_lengths, check_ruler_tasks, needle_depths
from mcore_longctx.tasks.choices import ChoiceQuestion, choice_questions, encode_choices

__all__ = ["check_files", "check_section"]

_CHARACTERS = 64 << 20  # of each text that are read ahead of time
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken")


def check_section(section: EvaluateSection, *, backend: Literal["local", "te"]) -> None:
    """What can be wrong without looking into a file: lengths that do not divide, unknown tasks, a backend that keeps no cache.

    Args:
        section: at its level.
        backend: whose layers compute the model.

    Raises:
        ConfigError, LayoutError: with the key of the recipe.
    """
    if section.ruler is not None:
        check_ruler_tasks(section.ruler.tasks)
    for key, length in section.lengths:
        if not key.startswith("ruler"):  # prompts of those tasks have any length and are padded
            check_seq_length(length, section.parallel.context_parallel_size, where=f"evaluate.{key}")
    if section.loss_by_position is not None:
        _check_windows(section.loss_by_position, 2)
    needs = {
        "evaluate.needle.shared": section.needle is not None and section.needle.shared,
        "evaluate.ruler.scoring": section.ruler is not None and section.ruler.scoring == "greedy",
        "evaluate.short_suite": section.short_suite is not None,
    }
    other_level = "" if section.level == "standard" else f" (level {section.level} may ask for it, level standard does not)"
    for where, needed in needs.items():
        if needed and backend == "te":
            raise ConfigError(
                "keeps keys and values of a prompt, which layers of TransformerEngine do not do for us",
                where=where,
                fix=f"measure with model.backend=local, which reads the same checkpoint, or leave it out{other_level}",
            )


def check_files(recipe: Recipe, vocab_size: int) -> None:
    """What the files of an evaluation say: texts and questions that cannot be read, lengths too short for this tokenizer.

    Files that are not there are left alone: a recipe may be looked at before its data, and `run` asks for them itself.

    Args:
        recipe: seen by `check_section`.
        vocab_size: ids that the model has embeddings for.

    Raises:
        ConfigError: a length below the least of a task.
        DataError: a text, a file of questions or a tokenizer that cannot be used.
    """
    section = recipe.evaluate.at_level()
    texts = {path: f"evaluate.{key}" for key, path in section.texts.items() if key != "short_suite.choices"}
    for path, where in texts.items():
        if path.exists():
            _check_text(path, where)
    questions = _questions(section.short_suite, recipe.evaluation_seed)
    folder = recipe.tokenizer_folder
    if folder.is_file() or any(path for name in _TOKENIZERS for path in folder.glob(name)):
        _check_tokens(section, questions, EvaluationTokenizer(folder, vocab_size), recipe.evaluation_seed)


def _questions(section: ShortSuiteSection | None, seed: int) -> list[ChoiceQuestion]:
    if section is None or (section.choices is not None and not section.choices.exists()):
        return []
    try:
        return choice_questions(section.choices, count=section.questions, seed=seed)
    except DataError as error:
        raise DataError(f"{error.where}: {error.what}", where="evaluate.short_suite.choices", fix=error.fix) from None


def _check_tokens(section: EvaluateSection, questions: list[ChoiceQuestion], tokenizer: EvaluationTokenizer, seed: int) -> None:
    """Lengths that are too short with this tokenizer, and answers that it joins with the prompt."""
    prefix = tokenizer.prefix
    if (needle := section.needle) is not None:
        check_needle_grid(
            tokenizer,
            seed=seed,
            length=min(needle.lengths),
            depths=needle_depths(needle.depths),
            samples=needle.samples,
            shared=needle.shared,
            digits=needle.key_digits,
            kind=needle.kind,
            prefix=prefix,
        )
    if (ruler := section.ruler) is not None:
        check_ruler_lengths(ruler.tasks or RULER_TASKS, min(ruler.lengths), tokenizer, prefix)
    if section.loss_by_position is not None:
        _check_windows(section.loss_by_position, max(2, len(prefix) + 1))
    for question in questions:
        encode_choices(question, tokenizer, prefix)


def _check_windows(section: LossByPositionSection, least: int) -> None:
    for key, length in (("seq_length", section.seq_length), ("short_length", section.short_length)):
        if length < least:
            raise ConfigError(
                f"a window of {length:,} tokens predicts none",
                where=f"evaluate.loss_by_position.{key}",
                fix=f"give at least {least:,}",
            )


def _check_text(path: Path, where: str) -> None:
    """Read the beginning of a text."""
    characters = 0
    try:
        for text in read_texts(path):
            characters += len(text)
            if characters > _CHARACTERS:
                return
    except DataError as error:
        raise DataError(f"{error.where}: {error.what}", where=where, fix=error.fix) from None
