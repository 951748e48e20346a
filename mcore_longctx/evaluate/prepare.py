"""What a column measures, made ready and checked before a model is built: texts, samples, questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx import __version__
from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.errors import DataError
from mcore_longctx.evaluate.held_out import Windows, cut_windows, read_documents
from mcore_longctx.evaluate.prompts import PromptCache
from mcore_longctx.evaluate.rows import on_first_rank
from mcore_longctx.evaluate.ruler import RulerPrompts, ruler_tasks
from mcore_longctx.manifest import sha256_file
from mcore_longctx.recipe.schema import EvaluateSection, LossByPositionSection, NeedleSection, RulerSection
from mcore_longctx.tasks import (
    Haystack,
    RulerTexts,
    cached_haystack,
    check_ruler_lengths,
    make_needle_sample,
    make_ruler_sample,
    make_shared_needles,
    needle_depths,
)
from mcore_longctx.tasks.choices import CHOICE_KINDS, ChoiceQuestion, choice_questions, encode_choices, make_choice_question

__all__ = ["ColumnTasks", "prepare_tasks"]


@dataclass(frozen=True)
class ColumnTasks:
    """Everything that is measured.

    Attributes:
        section: at its level.
        needle: text of the needle grid; None on ranks other than 0.
        ruler: samples of the RULER-like tasks; their texts are on rank 0 alone.
        long: windows of the loss by position.
        short: windows of the short-context loss.
        questions: of the short suite.
        texts: what each file of rows is measured on: 16 hexadecimal digits over its text as tokens, or over its questions.
        longest: tokens of the longest sequence that the model sees, padded for the layout.
    """

    section: EvaluateSection
    tokenizer: EvaluationTokenizer
    needle: Haystack | None
    ruler: RulerPrompts | None
    long: Windows | None
    short: Windows | None
    questions: tuple[ChoiceQuestion, ...]
    texts: Mapping[str, str]
    longest: int

    @property
    def samples(self) -> int:
        """All rows of the column."""
        needle, ruler = self.section.needle, self.ruler
        count = len(self.questions)
        if needle is not None:
            count += len(needle.lengths) * needle.depths * needle.samples
        if ruler is not None:
            count += len(ruler.section.lengths) * len(ruler_tasks(ruler.section)) * ruler.section.samples
        return count + sum(len(windows.starts) for windows in (self.long, self.short) if windows is not None)


def prepare_tasks(section: EvaluateSection, tokenizer: EvaluationTokenizer, *, seed: int, cache: Path) -> ColumnTasks:
    """Read the texts, and make a first sample of everything. All ranks call it; rank 0 reads and makes.

    Args:
        section: at its level, seen by `check_section`.
        tokenizer: the model's.
        seed: of the samples.
        cache: folder for texts as tokens and for prompts that are dear to make.

    Raises:
        ConfigError: a length below the least of a task.
        DataError: a text that is too small, holds answers of its own or cannot be read; a tokenizer whose answers drift with the prompt.
        StorageError: the cache cannot be written.
    """
    texts: dict[Path, Haystack] = {}  # on rank 0 alone
    read = on_first_rank(lambda: _read(section, tokenizer, seed, cache, texts))
    unit = 2 * section.parallel.context_parallel_size * section.parallel.tensor_model_parallel_size
    longest = max(read.longest_question, *(int(length) for _, length in section.lengths), 1)
    return ColumnTasks(
        section=section,
        tokenizer=tokenizer,
        needle=texts.get(section.needle.haystack) if section.needle is not None else None,
        ruler=_ruler(section, tokenizer, seed, cache, texts, read.texts_sha256),
        long=read.long,
        short=read.short,
        questions=read.questions,
        texts=read.texts,
        longest=-(-longest // unit) * unit,
    )


@dataclass(frozen=True)
class _Read:
    """What rank 0 tells the others."""

    long: Windows | None
    short: Windows | None
    questions: tuple[ChoiceQuestion, ...]
    longest_question: int  # tokens
    texts_sha256: str  # of the texts of the RULER-like tasks, as tokens
    texts: dict[str, str]  # of every file of rows


def _read(section: EvaluateSection, tokenizer: EvaluationTokenizer, seed: int, cache: Path, texts: dict[Path, Haystack]) -> _Read:
    """Fill `texts`; find what cannot be measured."""
    for path in dict.fromkeys(
        path for key, path in section.texts.items() if key in ("needle.haystack", "ruler.haystack", "ruler.code")
    ):
        documents = read_documents(path)
        texts[path] = cached_haystack(documents, tokenizer, tokenizer_sha256=tokenizer.sha256, folder=cache, where=path)
    found: dict[str, str] = {}
    if section.needle is not None:
        _try_needles(section.needle, texts[section.needle.haystack], tokenizer, seed)
        found["needle"] = _sha256([texts[section.needle.haystack].tokens])
    ruler = ""
    if section.ruler is not None:
        _try_ruler(section.ruler, texts, tokenizer, seed)
        ruler = _sha256(None if text is None else texts[text].tokens for text in (section.ruler.haystack, section.ruler.code))
        found["ruler"] = ruler
    long = short = None
    if section.loss_by_position is not None:
        tokens = _text(section.loss_by_position, tokenizer)
        long, short = _windows(section.loss_by_position, tokens, tokenizer)
        found["loss_by_position"] = found["short_context"] = _sha256([tokens])
    questions: tuple[ChoiceQuestion, ...] = ()
    if section.short_suite is not None:
        suite = section.short_suite
        questions = tuple(choice_questions(suite.choices, count=suite.questions, seed=seed))
        found["short_suite"] = _questions_sha256(suite.choices, seed)
    encoded = [encode_choices(question, tokenizer, tokenizer.prefix) for question in questions]
    longest = max((len(prompt) + max(map(len, options)) for prompt, options in encoded), default=0)
    return _Read(long, short, questions, longest, ruler, {task: sha256[:16] for task, sha256 in found.items()})


def _sha256(texts: Iterable[npt.NDArray[np.integer] | None]) -> str:
    """Of texts as tokens."""
    digest = hashlib.sha256()
    for tokens in texts:
        digest.update(b"-" if tokens is None else tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def _questions_sha256(choices: Path | None, seed: int) -> str:
    """Of the file of questions, or of the first that is made of each kind: a maker that was changed makes others.

    How many are asked is no part of it, so that more can be asked later.
    """
    if choices is not None:
        return sha256_file(choices)
    first = [asdict(make_choice_question(seed=seed, index=index)) for index in range(len(CHOICE_KINDS))]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()


def _ruler(
    section: EvaluateSection, tokenizer: EvaluationTokenizer, seed: int, cache: Path, texts: dict[Path, Haystack], sha256: str
) -> RulerPrompts | None:
    ruler = section.ruler
    if ruler is None:
        return None
    identity = {"version": __version__, "seed": seed, "texts": sha256, "tokenizer": tokenizer.sha256}
    code = texts.get(ruler.code) if ruler.code is not None else None
    made_from = RulerTexts(texts[ruler.haystack], code) if texts else None
    return RulerPrompts(ruler, made_from, tokenizer, seed, PromptCache(cache, identity))


def _try_needles(section: NeedleSection, haystack: Haystack, tokenizer: EvaluationTokenizer, seed: int) -> None:
    """One sample of the shortest length: its size, and whether question and answer can be taken apart."""
    _check_unique(haystack, max(section.lengths), "needle.haystack", section.haystack)
    settings: dict[str, Any] = {"seed": seed, "length": min(section.lengths), "index": 0, "digits": section.key_digits}
    settings |= {"kind": section.kind, "prefix": tokenizer.prefix}
    if section.shared:
        make_shared_needles(haystack, tokenizer, depths=needle_depths(section.depths), **settings)
    else:
        make_needle_sample(haystack, tokenizer, depth=0.5, **settings)


@dataclass(frozen=True)
class _Watched(RulerTexts):
    """Texts that note which of them a task reads."""

    read: list[Haystack] = field(default_factory=list)

    def of(self, index: int) -> Haystack:
        self.read.append(super().of(index))
        return self.read[-1]


def _try_ruler(section: RulerSection, texts: dict[Path, Haystack], tokenizer: EvaluationTokenizer, seed: int) -> None:
    """Samples of each task at twice its least length: cheap, whatever the lengths of the section."""
    least = check_ruler_lengths(ruler_tasks(section), min(section.lengths), tokenizer, tokenizer.prefix)
    code = texts[section.code] if section.code is not None else None
    watched = _Watched(texts[section.haystack], code)
    for task, tokens in least.items():
        for index in range(1 if code is None else 2):
            make_ruler_sample(task, watched, tokenizer, seed=seed, length=2 * tokens, index=index, prefix=tokenizer.prefix)
    for key, path in (("ruler.haystack", section.haystack), ("ruler.code", section.code)):
        if path is not None and any(haystack is texts[path] for haystack in watched.read):
            _check_unique(texts[path], max(section.lengths), key, path)


def _check_unique(haystack: Haystack, length: int, key: str, path: Path) -> None:
    """Raise DataError when a text would be repeated in a sample: a model ignores what it has seen before, and finds the rest."""
    there = len(haystack.tokens)
    if there < length:
        raise DataError(
            f"{there:,} tokens of text: a sample of {length:,} would hold them {length / there:.1f} times, {1 - there / length:.0%} of it repeated",
            where=f"evaluate.{key}: {path}",
            fix="give more text, or measure shorter lengths",
        )


def _text(section: LossByPositionSection, tokenizer: EvaluationTokenizer) -> npt.NDArray[np.int64]:
    text = "".join(document if document.endswith("\n") else document + "\n" for document in read_documents(section.path))
    return tokenizer.encode_array(text)


def _windows(
    section: LossByPositionSection, tokens: npt.NDArray[np.int64], tokenizer: EvaluationTokenizer
) -> tuple[Windows, Windows]:
    return (
        cut_windows(tokens, tokenizer.prefix, count=section.windows, length=section.seq_length, where=section.path),
        cut_windows(tokens, tokenizer.prefix, count=section.short_windows, length=section.short_length, where=section.path),
    )
