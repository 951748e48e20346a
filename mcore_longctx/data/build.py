"""Documents or chats to packed samples, all steps in one: tokenize, plan, pack. What is done is skipped.

OUT/tokens/     token shards and tables of documents
OUT/plan/       which stretch of which document goes where, and the lengths before and after
OUT/NAME.bin NAME.idx NAME.runs manifest.json     the samples (`data/pack.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.data.documents.inputs import InputTask, input_path, plan_inputs
from mcore_longctx.data.documents.parquet import row_count
from mcore_longctx.data.documents.readers import BadRecord, Chat, Document, read_task
from mcore_longctx.data.files.indexed import token_dtype
from mcore_longctx.data.pack import PackReport, check_name, pack
from mcore_longctx.data.planning.plan import make_chat_plan, make_plan, plan_text
from mcore_longctx.data.planning.separator import job_tokenizer, make_separator
from mcore_longctx.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from mcore_longctx.data.tokens.job import RANGE_BYTES, prepare_job, read_documents_table
from mcore_longctx.data.tokens.sft import ChatEncoder
from mcore_longctx.data.tokens.tokenize import TokenReport, run_job
from mcore_longctx.data.workspace import lock_folder
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import readable_bytes
from mcore_longctx.recipe.data import SentenceSection
from mcore_longctx.recipe.schema import DataSection, DocumentSource

__all__ = ["BuildReport", "Expected", "Progress", "build", "check_output", "expect"]

_PROBE = 1 << 20  # characters of each kind of file of a source that a dry run encodes,
_PACKED = 1 << 24  # and how many bytes of a compressed file it unpacks to see how much they hold
_WHOLE = 1 << 62  # a range that no file exceeds

# called with what is done (`tokenize`, `pack`), bytes of input, tokens; before all with `to tokenize` and the bytes that are left to read
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What was built. `str(report)` is the text for the screen."""

    tokens: TokenReport
    plan: Mapping[str, Any]  # contents of plan.json
    pack: PackReport
    samples_needed: int | None

    @property
    def prefix(self) -> Path:
        """Path of .bin, .idx and .runs without suffix."""
        return self.pack.folder / self.pack.name

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {"tokens": self.tokens.as_dict(), "plan": dict(self.plan), "pack": self.pack.as_dict()}

    def __str__(self) -> str:
        return "\n".join([str(self.tokens), plan_text(dict(self.plan), self.samples_needed), str(self.pack)])


def build(
    section: DataSection,
    name: str,
    *,
    chats: bool,
    tokenizer: Path,
    model_vocab_size: int,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    out: Path,
    workers: int = 1,
    verify_fraction: float = 0.0,
    progress: Progress = lambda step, input_bytes, tokens: None,
) -> BuildReport:
    """Tokenize, plan and pack one data set into the folder `out`. The same call goes on where a killed one was.

    Args:
        section: sources, sampling, separator and packing.
        name: of the data set; the files are called after it.
        chats: the sources hold chats (stage kind `sft`); then only the sources of `section` have a meaning.
        tokenizer: file or folder.
        model_vocab_size: entries of the model's embedding.
        seq_length: tokens of a sample.
        num_samples: samples that the training stage needs, None for all that the documents give. One more is written, because
            Megatron's GPTDataset, which reads seq_length + 1 tokens a sample, loses the last one.
        seed: of every decision.
        out: folder; made if it is not there.
        workers: processes.
        verify_fraction: share of the documents that are encoded again with the reference tokenizer.
        progress: called as the work goes on.

    Raises:
        DataError: an input that cannot be read, a vocabulary that does not fit, too few documents.
        ConfigError: `out` holds something else, or was begun with other settings.
        InUseError: another process works on `out`.
    """
    check_name(name)
    if chats:
        _refuse_unused(section, name)
    check_output(out)
    tools = load_tokenizer(tokenizer)
    with lock_folder(out):
        job = prepare_job(
            out,
            section.sources,
            tools,
            vocab_size=model_vocab_size,
            chats=chats,
            prompt_loss_from=section.prompt_loss_tokens,
            sentences=section.sentences,
            seed=seed,
        )
        progress("to tokenize", job.size_missing, 0)
        tokens = run_job(
            job,
            tools,
            workers=workers,
            max_bad=section.max_bad,
            verify_fraction=verify_fraction,
            on_task=lambda input_bytes, count: progress("tokenize", input_bytes, count),
        )
        assert tokens is not None  # every task was asked for
        table = read_documents_table(job)
        if chats:
            plan = make_chat_plan(out / "plan", table, name=name, seed=seed, seq_length=seq_length)
        else:
            max_samples = None if num_samples is None else num_samples + 1
            plan = make_plan(
                out / "plan",
                table,
                section,
                name=name,
                seed=seed,
                seq_length=seq_length,
                separator=make_separator(section, job),
                token_budget=None if max_samples is None else max_samples * seq_length,
                max_samples=max_samples,
                tokenizer=lambda: job_tokenizer(job),
            )
        facts = {"method": "sft" if chats else "pretrain", "samples_needed": num_samples}
        packed = pack(out, name, workers=workers, facts=facts, on_block=lambda count: progress("pack", 0, count))
    return BuildReport(tokens=tokens, plan=plan, pack=packed, samples_needed=num_samples)


def check_output(out: Path) -> None:
    """Raise ConfigError if `out` is there and is not a run folder of this room."""
    if out.is_file():
        raise ConfigError("is a file", where=out, fix="give a folder")
    ours = (out / "tokens" / "settings.json").is_file()
    if out.is_dir() and not ours and any(entry.name not in (".lock", "tokens") for entry in out.iterdir()):
        raise ConfigError(
            "the folder is not empty, and nothing was tokenized here", where=out, fix="choose another output folder"
        )


def _refuse_unused(section: DataSection, name: str) -> None:
    plain = DataSection(sources=section.sources)
    fields = ("mode", "length_sampling", "separator", "separator_kind", "separator_loss", "packing", "repeat_to_fill")
    for field in (*fields, "augment", "sentences"):
        if getattr(section, field) != getattr(plain, field):
            raise ConfigError("has no meaning for chats, which are taken whole", where=f"data.{name}.{field}", fix="remove it")
    if any(source.share is not None for source in section.sources):
        raise ConfigError("share has no meaning for chats, every one is taken", where=f"data.{name}.sources", fix="remove it")


# ------------------------------------------------------------------ a dry run
@dataclass(frozen=True, kw_only=True)
class Expected:
    """What tokenizing would give, from the beginning of every source."""

    sources: tuple[tuple[str, int, int], ...]  # name, bytes of input, tokens expected
    dtype: str
    files: int
    tasks: int

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        rows = [{"name": name, "input_bytes": size, "tokens_expected": tokens} for name, size, tokens in self.sources]
        return {"sources": rows, "dtype": self.dtype, "files": self.files, "tasks": self.tasks}

    def __str__(self) -> str:
        total = sum(tokens for _, _, tokens in self.sources)
        width = np.dtype(self.dtype).itemsize
        lines = [
            f"{self.files:,} files in {self.tasks:,} tasks, about {total:,} tokens, {readable_bytes(total * width)} of {self.dtype}"
        ]
        lines += [f"  {name}: {readable_bytes(size)} of input, about {tokens:,} tokens" for name, size, tokens in self.sources]
        return "\n".join(lines)


def expect(
    sources: Sequence[DocumentSource],
    tokenizer: Path,
    *,
    chats: bool,
    vocab_size: int | None,
    range_bytes: int | None = None,
    sentences: SentenceSection | None = None,
) -> Expected:
    """What tokenizing would give, estimated from the beginning of every source. Writes nothing.

    Raises:
        DataError: an input is missing, the first records of a source are bad, or the vocabulary does not fit.
    """
    tools = load_tokenizer(tokenizer)
    if vocab_size is not None:
        check_vocabulary(tools, vocab_size)
    tasks = plan_inputs(sources, range_bytes=RANGE_BYTES if range_bytes is None else range_bytes, chats=chats)
    whole_files = plan_inputs(sources, range_bytes=_WHOLE, chats=chats)
    rows = []
    for index, source in enumerate(sources):
        mine = [task for task in whole_files if task.source == index]
        tokens = 0.0
        for kind in dict.fromkeys(task.kind for task in mine):  # a compressed byte holds more than a plain one
            alike = [task for task in mine if task.kind == kind]
            tokens += sum(task.size for task in alike) * _tokens_per_byte(alike, source, tools, chats)
        tokens *= 1.0 if sentences is None else sentences.keep  # at least: the sentence that fills the share is taken whole
        rows.append((source.name, sum(task.size for task in mine), round(tokens)))
    files = {(task.source, file.name) for task in whole_files for file in task.files}
    dtype = token_dtype(tools.vocab_size if vocab_size is None else vocab_size)
    return Expected(sources=tuple(rows), dtype=dtype.name, files=len(files), tasks=len(tasks))


def _tokens_per_byte(tasks: Sequence[InputTask], source: DocumentSource, tokenizer: Tokenizer, chats: bool) -> float:
    """Tokens in a byte of the input as it lies on the disk, from the beginning of the first files of one kind."""
    encoder, probe = ChatEncoder(tokenizer) if chats else None, _Probe()
    for task in tasks:
        if probe.encoded >= _PROBE:
            break
        probe.begin(task, source)
        records = read_task(task, source, chats=chats)
        for record in records:
            if isinstance(record, BadRecord):
                raise DataError(record.what, where=record.place)
            text = "".join(map(str, record.messages) if isinstance(record, Chat) else (part.text for part in record.parts))
            probe.reach(record, len(text), records.bytes_read)
            if probe.is_enough:
                break
            if probe.encoded >= _PROBE:
                pass  # only to see how much a compressed file holds
            elif isinstance(record, Chat):
                assert encoder is not None
                probe.take(len(text), sum(len(part) for part, _ in encoder.encode(record)))
            else:
                probe.take(len(text[:_PROBE]), len(tokenizer.encode(text[:_PROBE])))
            probe.size += len(text)
        else:
            probe.end()
    return probe.tokens_per_byte


class _Probe:
    """How much of the input some records are: the bytes between their places, and not what was read ahead to find them."""

    def __init__(self) -> None:
        self.encoded = self.tokens = 0  # characters that were encoded, and the tokens in them
        self.size = 0  # characters of all records of this file so far
        self.is_enough = False
        self._sizes, self._bytes = 0.0, 0.0  # characters of the files, in how many bytes

    def begin(self, task: InputTask, source: DocumentSource) -> None:
        """A task of whole files comes next."""
        self._task, self.size, self._read, self._known = task, 0, 0, (0.0, 0.0)
        self._rows = row_count(input_path(source, task.files[0].name)) if task.kind == "parquet" else 0
        self._stops = dict(zip((file.name for file in task.files), accumulate(file.size for file in task.files), strict=True))
        self._stop = 0  # of the files before this record, where a file is a record

    def reach(self, record: Document | Chat, size: int, bytes_read: int) -> None:
        """The records so far lie before this one of `size` characters: note how many bytes they are, and whether that is enough."""
        place, kind = record.place, self._task.kind
        if kind in ("gzip", "zstd"):
            # a block is read when those before it are unpacked: they ended somewhere in this record
            if bytes_read != self._read:
                self._known, self._read = (self.size + size / 2, self._read), bytes_read
            self.is_enough = self.encoded >= _PROBE and self._known[1] >= _PACKED
        else:
            if kind == "parquet":
                assert place.row is not None
                begin = self._task.size * (place.row - 1) / self._rows
            elif kind == "jsonl":
                assert place.offset is not None
                begin = place.offset
            else:
                begin, self._stop = self._stop, self._stops[record.id]
            self._known = (self.size, begin)
            self.is_enough = self.encoded >= _PROBE
        if self.is_enough:
            self._add(*self._known)

    def take(self, size: int, tokens: int) -> None:
        """So many characters have so many tokens."""
        self.encoded, self.tokens = self.encoded + size, self.tokens + tokens

    def end(self) -> None:
        """The task has no more records."""
        self._add(self.size, self._task.size)

    def _add(self, size: float, count: float) -> None:
        self._sizes, self._bytes = self._sizes + size, self._bytes + count

    @property
    def tokens_per_byte(self) -> float:
        """Over all that was looked at."""
        return self.tokens / max(1, self.encoded) * self._sizes / max(1.0, self._bytes)
