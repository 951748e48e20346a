"""JSON lines that appear whole or not at all, in the order of their numbers, by any number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.data.synthesis.sized import TokenCounter
from mcore_longctx.data.workspace import remove_leftovers, run_tasks
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import fsync_folder, partial_path

__all__ = ["SynthesisReport", "Wanted", "in_order", "output_paths", "prepare_folder", "sibling", "write_lines", "write_made"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """So many chats of at most so many tokens."""

    length: int
    chats: int
    text: str  # the length as it was asked for, for file names


@dataclass(frozen=True, kw_only=True)
class SynthesisReport:
    """What was written. `str(report)` is the text for the screen."""

    files: tuple[tuple[str, int, int, int], ...]  # path, length, chats, tokens
    questions: int

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        names = ("path", "length", "chats", "tokens")
        return {"files": [dict(zip(names, row, strict=True)) for row in self.files], "questions": self.questions}

    def __str__(self) -> str:
        rows = []
        for path, length, chats, tokens in self.files:
            full = tokens / max(1, chats * length)
            rows.append(f"{path}: {chats:,} chats of at most {length:,} tokens, {tokens:,} tokens, {full:.1%} full")
        return "\n".join([*rows, f"{self.questions:,} questions"])


def sibling(out: Path, word: str) -> Path:
    """OUT.WORD.jsonl beside OUT.jsonl."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{word}.jsonl")


def output_paths(out: Path, wanted: Sequence[Wanted], *, besides: Sequence[Path] = (), ours: bool = False) -> list[Path]:
    """OUT for one length; for several OUT-LENGTH.jsonl each: stages train on one length each.

    besides: other files that must not be there either. ours: what is there is ours and is written again.

    Raises:
        ConfigError: one of them is there, two lengths are the same, or OUT cannot be the name of the chats.
    """
    if out.suffix != ".jsonl":
        raise ConfigError("the chats are JSON lines", where=out, fix="let the name end in .jsonl")
    if len({one.length for one in wanted}) < len(wanted):
        raise ConfigError("--length gives the same length twice", where=out, fix="add their chats together")
    paths = [out] if len(wanted) == 1 else [out.with_name(f"{out.stem}-{one.text}.jsonl") for one in wanted]
    for path in (*besides, *paths):
        if path.exists() and not ours:
            raise ConfigError("is already there", where=path, fix="choose another name or remove it")
    return paths


def prepare_folder(out: Path, paths: Sequence[Path] = ()) -> None:
    """The folder of OUT, made if it is not there, without what a killed run left of these files (none: it is not looked at).

    Raises:
        DataError: it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot be made ({error.strerror})", where=out.parent, fix="choose another output") from None
    if paths:
        remove_leftovers(out.parent, of=[path.name for path in paths])


def write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """Records to a file, a line each, which has its name when it is whole."""
    aside = partial_path(path)
    try:
        with aside.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def in_order(make: Callable[[int], dict[str, Any]], numbers: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """make(number) of each number in order, made by `workers` processes in any order."""
    waiting: dict[int, dict[str, Any]] = {}
    following = iter(numbers)
    expected = next(following, None)
    for number, record in run_tasks(lambda number: (number, make(number)), numbers, workers):
        waiting[number] = record
        while expected is not None and expected in waiting:
            yield waiting.pop(expected)
            expected = next(following, None)


def write_made(
    out: Path,
    wanted: Sequence[Wanted],
    tokenizer: Path,
    make: Callable[[TokenCounter, int, int], dict[str, Any]],
    *,
    workers: int = 1,
    on_chat: Callable[[int], None] = lambda tokens: None,
) -> SynthesisReport:
    """Chats that need nobody's answer: make(count, index, length) for every index of every length, into OUT.

    The indices go on from length to length, so that no two chats are drawn alike.

    Args:
        out: file; for several lengths see `output_paths`.
        wanted: lengths and how many chats of each.
        tokenizer: model folder or tokenizer.json, whose tokens are counted.
        make: a pure function.
        workers: processes; the result is the same for any number.
        on_chat: called with the tokens of every chat.

    Raises:
        ConfigError: a file is already there.
        DataError: a tokenizer without chat template, or a length that is too small.
    """
    paths = output_paths(out, wanted)
    count = TokenCounter(tokenizer)
    rows, questions, first = [], 0, 0
    prepare_folder(out, paths)
    for path, one in zip(paths, wanted, strict=True):
        tokens = 0

        def records(one: Wanted = one, first: int = first) -> Iterator[dict[str, Any]]:
            nonlocal tokens, questions
            chats = in_order(lambda index: make(count, index, one.length), range(first, first + one.chats), workers)
            for record in chats:
                tokens += record["tokens"]
                questions += len(record["questions"])
                on_chat(record["tokens"])
                yield record

        write_lines(path, records())
        rows.append((str(path), one.length, one.chats, tokens))
        first += one.chats
    return SynthesisReport(files=tuple(rows), questions=questions)
