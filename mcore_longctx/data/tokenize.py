"""`data tokenize`: documents or chats to token shards, in tasks that any number of workers, starts and machines may share.

OUT/tokens/settings.json            what was asked, and the tasks: written first, compared by every later start
OUT/tokens/000012.tokens .docs      one pair a task (`data/shards.py`)
OUT/tokens/manifest.json            what came of it: written when every task is done
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.indexed import token_dtype
from mcore_longctx.data.inputs import InputTask, check_unchanged, plan_inputs
from mcore_longctx.data.readers import BadRecord, Chat, Document, read_task
from mcore_longctx.data.sft import ChatEncoder
from mcore_longctx.data.shards import DocumentTable, ShardWriter, read_shard, read_table
from mcore_longctx.data.tokenizers import Tokenizer, check_against_reference, check_vocabulary
from mcore_longctx.data.workspace import remove_leftovers, run_tasks
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import MANIFEST, versions, write_atomic, write_manifest
from mcore_longctx.recipe.schema import DocumentSource

__all__ = ["SourceCounts", "TokenJob", "TokenReport", "open_job", "prepare_job", "read_documents_table", "run_job"]

RANGE_BYTES = 64 << 20  # of input a task
_SETTINGS = "settings.json"
_SHOWN = 100  # bad records that the manifest lists

Encode = Callable[[Document | Chat], Iterable[tuple[npt.NDArray[Any], bool]]]


@dataclass(frozen=True, kw_only=True)
class TokenJob:
    """What `data tokenize` is to do in one folder."""

    folder: Path  # OUT/tokens
    sources: tuple[DocumentSource, ...]
    tasks: tuple[InputTask, ...]
    chats: bool
    dtype: np.dtype[Any]
    vocab_size: int  # of the model that the tokens are for
    tokenizer: Path
    tokenizer_sha256: str

    def is_done(self, task: int) -> bool:
        """Whether a task's shard is there."""
        return (self.folder / f"{task:06d}.docs").is_file()

    @property
    def is_whole(self) -> bool:
        """Whether every shard and the manifest over them are there."""
        return (self.folder / MANIFEST).is_file()


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What came of one source."""

    name: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # of input
    empty: int = 0  # records without text, left out
    bad: int = 0  # records that cannot be read, left out
    binary: int = 0  # files of repositories that are no text, left out
    ignored: int = 0  # files that are not read: hidden, or of another suffix


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """What `data tokenize` did. `str(report)` is the text for the screen."""

    folder: Path
    sources: tuple[SourceCounts, ...]
    bad: tuple[str, ...]
    tasks: int
    tasks_done_before: int
    backend: str

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.tokens for source in self.sources)

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    def __str__(self) -> str:
        lines = [
            f"{sum(s.documents for s in self.sources):,} documents, {self.tokens:,} tokens in {self.folder} ({self.backend})"
        ]
        for source in self.sources:
            counts = {"empty": source.empty, "bad": source.bad, "binary files": source.binary, "other files": source.ignored}
            left_out = [f"{count:,} {what}" for what, count in counts.items() if count]
            note = f"; left out: {', '.join(left_out)}" if left_out else ""
            lines.append(f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens{note}")
        if self.tasks_done_before:
            lines.append(f"  {self.tasks_done_before:,} of {self.tasks:,} tasks were done before")
        return "\n".join(lines)


def prepare_job(
    out: Path,
    sources: Sequence[DocumentSource],
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    chats: bool = False,
    range_bytes: int | None = None,
    write: bool = True,
) -> TokenJob:
    """The job of tokenizing `sources` into OUT/tokens: a new one, or the one that was begun there.

    Args:
        out: the run folder.
        sources: of documents, or of chats.
        tokenizer: read with `load_tokenizer`.
        vocab_size: entries of the model's embedding; None: of the tokenizer.
        chats: the sources hold chats.
        range_bytes: of input a task (None: 64 MiB). It does not change which tokens come, nor their order.
        write: False leaves the folder as it is (a dry run).

    Raises:
        DataError: an input is missing or has changed since the job was begun, or the vocabulary does not fit.
        ConfigError: the job was begun with other settings.
    """
    vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    check_vocabulary(tokenizer, vocab_size)
    tasks = plan_inputs(sources, range_bytes=RANGE_BYTES if range_bytes is None else range_bytes, chats=chats)
    job = TokenJob(
        folder=out / "tokens",
        sources=tuple(sources),
        tasks=tuple(tasks),
        chats=chats,
        dtype=token_dtype(vocab_size),
        vocab_size=vocab_size,
        tokenizer=tokenizer.path.absolute(),
        tokenizer_sha256=tokenizer.sha256,
    )
    path = job.folder / _SETTINGS
    if path.is_file():
        _refuse_changes(_read_settings(path), job, path)
    elif write:
        if job.folder.exists() and any(job.folder.iterdir()):
            raise ConfigError(f"the folder is not empty and has no {_SETTINGS}", where=job.folder, fix="choose another output")
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(_as_settings(job), indent=1) + "\n")
    return job


def open_job(out: Path) -> TokenJob:
    """The job that was begun in a run folder.

    Raises:
        DataError: there is none, or its settings are damaged.
    """
    path = out / "tokens" / _SETTINGS
    settings = _read_settings(path)
    try:
        return TokenJob(
            folder=path.parent,
            sources=tuple(DocumentSource(**row | {"path": Path(row["path"])}) for row in settings["sources"]),
            tasks=_tasks_of(settings, path),
            chats=bool(settings["chats"]),
            dtype=np.dtype(settings["dtype"]),
            vocab_size=int(settings["vocab_size"]),
            tokenizer=Path(settings["tokenizer"]["path"]),
            tokenizer_sha256=str(settings["tokenizer"]["sha256"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError("damaged", where=path, fix="tokenize into another folder") from None


def run_job(
    job: TokenJob,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    max_bad: int = 0,
    verify_fraction: float = 0.0,
    tasks: Sequence[int] | None = None,
    on_task: Callable[[int, int], None] = lambda input_bytes, tokens: None,
) -> TokenReport | None:
    """Do the tasks that are not done yet, and write the manifest when all are.

    The caller holds the lock of the run folder, or hands every task to one process only.

    Args:
        job: from `prepare_job`.
        tokenizer: the job's.
        workers: processes.
        max_bad: records that cannot be read and are left out; one more is an error.
        verify_fraction: share of the documents, chosen by their ids, that are encoded again with the reference.
        tasks: only these (None: all).
        on_task: called with the bytes of input and the tokens of every task that is done.

    Returns:
        The report, or None as long as other tasks are missing.

    Raises:
        DataError: more bad records than allowed; the first of them is named.
        DifferenceFound: the reference encodes a document otherwise.
    """
    if job.tokenizer_sha256 != tokenizer.sha256:
        raise ConfigError("is not the tokenizer that this folder was begun with", where=tokenizer.path, fix="use another output")
    remove_leftovers(job.folder)
    wanted = range(len(job.tasks)) if tasks is None else tasks
    missing = [task for task in wanted if not job.is_done(task)]
    encode = _encoder(job, tokenizer)

    def do(task: int) -> _Result:
        return _run_task(job, task, tokenizer, encode, max_bad, verify_fraction)

    bad: list[str] = []
    for result in run_tasks(do, missing, workers):
        bad += result.bad
        if len(bad) > max_bad:
            more = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
            where, _, what = bad[0].partition(": ")
            raise DataError(what + more, where=where, fix="repair the record, or allow bad records with --max-bad N")
        on_task(job.tasks[result.task].size, result.tokens)
    if not all(job.is_done(task) for task in range(len(job.tasks))):
        return None
    return _finish(job, tokenizer, max_bad, len(wanted) - len(missing))


def read_documents_table(job: TokenJob) -> DocumentTable:
    """The documents of a finished job.

    Raises:
        DataError: not every task is done, or a shard is damaged.
    """
    if not job.is_whole:
        done = sum(job.is_done(task) for task in range(len(job.tasks)))
        raise DataError(f"{done:,} of {len(job.tasks):,} tasks are done", where=job.folder, fix="run `data tokenize` again")
    return read_table(job.folder, [source.name for source in job.sources], [task.source for task in job.tasks])


# ------------------------------------------------------------------ one task
@dataclass(frozen=True)
class _Result:
    task: int
    tokens: int
    bad: list[str]  # `where: what`


def _encoder(job: TokenJob, tokenizer: Tokenizer) -> Encode:
    if job.chats:
        chats = ChatEncoder(tokenizer)
        return chats.encode  # type: ignore[return-value]
    # each part alone, so that its loss flag covers exactly its own characters
    return lambda record: [(tokenizer.encode(part.text), part.loss) for part in record.parts]  # type: ignore[union-attr]


def _run_task(job: TokenJob, number: int, tokenizer: Tokenizer, encode: Encode, max_bad: int, verify_fraction: float) -> _Result:
    task = job.tasks[number]
    source = job.sources[task.source]
    bad: list[str] = []
    with ShardWriter(job.folder, number, job.dtype, source.name) as shard:
        records = read_task(task, source, chats=job.chats)
        empty = 0
        for record in records:
            if isinstance(record, BadRecord):
                bad.append(f"{record.place}: {record.what}")
                if len(bad) > max_bad:  # nothing is published
                    return _Result(number, 0, bad)
                continue
            empty += not shard.add(record.id, encode(record))
            if verify_fraction and not job.chats and zlib.crc32(record.id.encode()) < verify_fraction * 2**32:
                for part in record.parts:  # type: ignore[union-attr]
                    check_against_reference(tokenizer, part.text, record.place)
        facts = {name: getattr(records, name) for name in ("bytes_read", "crc32", "binary", "ignored")}
        shard.publish({"source": source.name, "backend": tokenizer.backend, "empty": empty + records.empty, "bad": bad, **facts})
        return _Result(number, shard.tokens, bad)


def _finish(job: TokenJob, tokenizer: Tokenizer, max_bad: int, done_before: int) -> TokenReport:
    counts = {index: SourceCounts(name=source.name) for index, source in enumerate(job.sources)}
    bad: list[str] = []
    shards = []
    for number, task in enumerate(job.tasks):
        shard = read_shard(job.folder, number)
        facts, old = shard.facts, counts[task.source]
        counts[task.source] = dataclasses.replace(
            old,
            documents=old.documents + len(shard.length),
            tokens=old.tokens + int(facts["tokens"]),
            bytes=old.bytes + int(facts["bytes_read"]),
            empty=old.empty + int(facts["empty"]),
            bad=old.bad + len(facts["bad"]),
            binary=old.binary + int(facts["binary"]),
            ignored=old.ignored + int(facts["ignored"]),
        )
        bad += facts["bad"]
        shards.append({name: facts[name] for name in ("tokens", "tokens_crc32", "bytes_read", "crc32", "backend")})
    if len(bad) > max_bad:  # from earlier starts that allowed more
        where, _, what = bad[0].partition(": ")
        raise DataError(f"{what} (and {len(bad) - 1:,} more)", where=where, fix=f"allow them with --max-bad {len(bad)}")
    for source in counts.values():
        if not source.documents:
            raise DataError("no document with text", where=f"source {source.name}", fix="check its path and fields")
    write_manifest(
        job.folder,
        "tokens",
        files=(),
        tokenizer={"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        dtype=job.dtype.name,
        sources={source.name: dataclasses.asdict(source) for source in counts.values()},
        bad=bad[:_SHOWN],
        shards=shards,
    )
    backends = dict.fromkeys(str(shard["backend"]) for shard in shards)
    return TokenReport(
        folder=job.folder,
        sources=tuple(counts.values()),
        bad=tuple(bad),
        tasks=len(job.tasks),
        tasks_done_before=done_before,
        backend=", ".join(backends),
    )


# ------------------------------------------------------------------ settings
def _as_settings(job: TokenJob) -> dict[str, Any]:
    sources = [
        {name: getattr(source, name) for name in ("name", "text_field", "id_field", "document")} | {"path": str(source.path)}
        for source in job.sources
    ]
    return {
        "format": 1,
        "chats": job.chats,
        "dtype": job.dtype.name,
        "vocab_size": job.vocab_size,
        "tokenizer": {"path": str(job.tokenizer), "sha256": job.tokenizer_sha256},
        "sources": sources,
        "tasks": [task.as_dict() for task in job.tasks],
        "versions": versions(),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("nothing was tokenized here", where=path.parent, fix="run `data tokenize` first") from None
    except (ValueError, OSError):
        settings = None
    if not isinstance(settings, dict) or settings.get("format") != 1:
        raise DataError("damaged", where=path, fix="tokenize into another folder")
    return settings


def _refuse_changes(old: dict[str, Any], job: TokenJob, path: Path) -> None:
    new = _as_settings(job)
    fix = "set it back, or use another output folder"
    if old.get("tokenizer", {}).get("sha256") != job.tokenizer_sha256:
        raise ConfigError("the tokenizer is another one than when this folder was begun", where=path, fix=fix)
    for name in ("chats", "dtype", "vocab_size"):
        if old.get(name) != new[name]:
            raise ConfigError(
                f"{name} was {old.get(name)!r} when this folder was begun, it is {new[name]!r} now", where=path, fix=fix
            )
    if old.get("sources") != new["sources"]:
        names = [row.get("name") for row in old.get("sources", [])]
        raise ConfigError(
            f"the sources were {names} when this folder was begun, or their paths or fields differ", where=path, fix=fix
        )
    tasks = _tasks_of(old, path)
    check_unchanged(tasks, job.tasks, job.sources)
    if tasks != job.tasks:
        raise ConfigError("--range was another one when this folder was begun", where=path, fix=fix)


def _tasks_of(settings: dict[str, Any], path: Path) -> tuple[InputTask, ...]:
    try:
        return tuple(InputTask.from_dict(row) for row in settings["tasks"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError("damaged", where=path, fix="tokenize into another folder") from None
