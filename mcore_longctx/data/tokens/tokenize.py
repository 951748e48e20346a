"""`data tokenize`: documents or chats to token shards, in tasks that any number of workers, starts and machines may share.

OUT/tokens/settings.json            what was asked, and the tasks: written first, compared by every later start
OUT/tokens/000012.tokens .docs      one pair a task (`data/files/shards.py`)
OUT/tokens/manifest.json            what came of it: written when every task is done
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mcore_longctx.data.documents.readers import BadRecord, Chat, Document, read_task
from mcore_longctx.data.files.shards import ShardWriter, read_shard
from mcore_longctx.data.methods.sentences import make_choice
from mcore_longctx.data.tokenizers import Tokenizer, check_against_reference
from mcore_longctx.data.tokens.job import TokenJob
from mcore_longctx.data.tokens.sft import ChatEncoder
from mcore_longctx.data.workspace import remove_leftovers, run_tasks
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import sha256_file, write_manifest

__all__ = ["SourceCounts", "TokenReport", "run_job"]

_SHOWN = 100  # bad records that the manifest lists

Encode = Callable[[Document | Chat], Iterable[tuple[npt.NDArray[Any], bool]]]


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


# ------------------------------------------------------------------ one task
@dataclass(frozen=True)
class _Result:
    task: int
    tokens: int
    bad: list[str]  # `where: what`


def _encoder(job: TokenJob, tokenizer: Tokenizer) -> Encode:
    chats = ChatEncoder(tokenizer, prompt_loss_from=job.prompt_loss_from) if job.chats else None
    choice = None
    if job.sentences is not None:
        if job.sentences.offsets is not None and sha256_file(job.sentences.offsets) != job.sentences_sha256:
            raise ConfigError("has changed since this folder was begun", where=job.sentences.offsets, fix="use another output")
        choice = make_choice(job.sentences, tokenizer, seed=job.sentences_seed)

    def encode(record: Document | Chat) -> list[tuple[npt.NDArray[Any], bool]]:
        if isinstance(record, Document):
            # each part alone, so that its loss flag covers exactly its own characters
            segments = [(tokenizer.encode(part.text), part.loss) for part in record.parts]
            return segments if choice is None else choice.choose(record.id, segments)
        assert chats is not None
        return [*chats.encode(record)]

    return encode


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
            try:
                segments = encode(record)
            except DataError as error:  # a chat without an answer, or one that its template refuses
                if not job.chats:
                    raise
                bad.append(str(error))
                if len(bad) > max_bad:
                    return _Result(number, 0, bad)
                continue
            empty += not shard.add(record.id, segments)
            if verify_fraction and isinstance(record, Document) and zlib.crc32(record.id.encode()) < verify_fraction * 2**32:
                for part in record.parts:
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
