"""What `data tokenize` is to do in one folder, and whether it is done: OUT/tokens/settings.json, written first.

Every later start, and every machine that takes part, compares it with what it is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_longctx.data.documents.inputs import InputTask, check_unchanged, plan_inputs
from mcore_longctx.data.files.indexed import token_dtype
from mcore_longctx.data.files.shards import DocumentTable, read_table
from mcore_longctx.data.workspace import remove_leftovers
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import MANIFEST, read_sealed, sha256_file, versions, write_sealed
from mcore_longctx.recipe.data import SentenceSection
from mcore_longctx.recipe.schema import DocumentSource

if TYPE_CHECKING:  # plan and pack need no tokenizer library
    from mcore_longctx.data.tokenizers import Tokenizer

__all__ = ["RANGE_BYTES", "TokenJob", "open_job", "prepare_job", "read_documents_table"]

_SEPARATOR = "<s>"  # UltraLong's
RANGE_BYTES = 64 << 20  # of input a task
_SETTINGS = "settings.json"


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
    template_sha256: str  # of the chat template
    ids: Mapping[str, Sequence[int]]  # of the default separator and of bos, eos and pad: a plan with them needs no tokenizer
    prompt_loss_from: int | None = None  # of chats: tokens of the prompts that are learned too, at least; None: none is
    sentences: SentenceSection | None = None  # of documents: which sentences are tokens of the folder; None: all
    sentences_sha256: str = ""  # of the table of offsets, where there is one
    sentences_seed: int = 0

    def is_done(self, task: int) -> bool:
        """Whether a task's shard is there."""
        stem = self.folder / f"{task:06d}"
        return stem.with_suffix(".docs").is_file() and stem.with_suffix(".tokens").is_file()

    @property
    def size_missing(self) -> int:
        """Bytes of input of the tasks that are not done."""
        return sum(task.size for number, task in enumerate(self.tasks) if not self.is_done(number))

    @property
    def is_whole(self) -> bool:
        """Whether every shard and the manifest over them are there."""
        return (self.folder / MANIFEST).is_file()


def prepare_job(
    out: Path,
    sources: Sequence[DocumentSource],
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    chats: bool = False,
    prompt_loss_from: int | None = None,
    sentences: SentenceSection | None = None,
    seed: int = 0,
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
        prompt_loss_from: of chats: prompts of at least so many tokens are learned too (None: no prompt).
        sentences: of documents: only these are taken (None: all); the table of documents then has the lengths of what is taken.
        seed: of the choice of sentences; without one it decides nothing.
        range_bytes: of input a task (None: 64 MiB). It does not change which tokens come, nor their order.
        write: False leaves the folder as it is (a dry run).

    Raises:
        DataError: an input is missing or has changed since the job was begun, or the vocabulary does not fit, or there is no table of
            offsets.
        ConfigError: the job was begun with other settings, or documents are to have a prompt_loss, or chats chosen sentences.
    """
    if sentences is not None and chats:
        raise ConfigError("sentences has no meaning for chats, which are taken whole", where=out, fix="leave it out")
    if prompt_loss_from is not None and not chats:
        raise ConfigError("prompt_loss has no meaning for documents, which have no prompts", where=out, fix="leave it out")
    from mcore_longctx.data.tokenizers import check_vocabulary

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
        template_sha256=hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
        ids=_known_ids(tokenizer),
        prompt_loss_from=prompt_loss_from,
        sentences=_absolute(sentences),
        sentences_sha256=_offsets_sha256(sentences, tokenizer),
        sentences_seed=seed if sentences is not None else 0,
    )
    path = job.folder / _SETTINGS
    if write:
        remove_leftovers(job.folder)
    if path.is_file():
        _refuse_changes(_read_settings(path), job, path)
    elif write:
        if job.folder.exists() and any(job.folder.iterdir()):
            raise ConfigError(f"the folder is not empty and has no {_SETTINGS}", where=job.folder, fix="choose another output")
        job.folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, _as_settings(job))
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
            template_sha256=str(settings["tokenizer"]["template_sha256"]),
            ids={str(name): [int(token) for token in ids] for name, ids in settings["ids"].items()},
            prompt_loss_from=None if settings.get("prompt_loss_from") is None else int(settings["prompt_loss_from"]),
            **_sentences_of(settings),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError("damaged", where=path, fix="tokenize into another folder") from None


def read_documents_table(job: TokenJob) -> DocumentTable:
    """The documents of a finished job.

    Raises:
        DataError: not every task is done, or a shard is damaged.
    """
    if not job.is_whole:
        done = sum(job.is_done(task) for task in range(len(job.tasks)))
        raise DataError(f"{done:,} of {len(job.tasks):,} tasks are done", where=job.folder, fix="run `data tokenize` again")
    return read_table(job.folder, [source.name for source in job.sources], [task.source for task in job.tasks])


# ------------------------------------------------------------------ settings
def _known_ids(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids that most plans ask for. A role that the tokenizer does not name, or whose text is no token, is left out."""
    ids = {_SEPARATOR: [int(token) for token in tokenizer.encode(_SEPARATOR)]}
    for role in ("bos_token", "eos_token", "pad_token"):
        text = tokenizer.special_tokens.get(role)
        found = tokenizer.control_id(text) if text is not None else None
        if found is not None:
            ids[role] = [found]
    return ids


def _as_settings(job: TokenJob) -> dict[str, Any]:
    sources = [
        {name: getattr(source, name) for name in ("name", "text_field", "id_field", "document")} | {"path": str(source.path)}
        for source in job.sources
    ]
    return {
        "format": 1,
        "chats": job.chats,
        **({} if job.prompt_loss_from is None else {"prompt_loss_from": job.prompt_loss_from}),
        **_sentence_settings(job),
        "dtype": job.dtype.name,
        "vocab_size": job.vocab_size,
        "tokenizer": {"path": str(job.tokenizer), "sha256": job.tokenizer_sha256, "template_sha256": job.template_sha256},
        "ids": job.ids,
        "sources": sources,
        "tasks": [task.as_dict() for task in job.tasks],
        "versions": versions(),
    }


def _absolute(section: SentenceSection | None) -> SentenceSection | None:
    if section is None or section.offsets is None:
        return section
    return replace(section, offsets=section.offsets.absolute())


def _offsets_sha256(section: SentenceSection | None, tokenizer: Tokenizer) -> str:
    """Of the table, which is of this tokenizer. Refused here, before anything is written."""
    if section is None or section.offsets is None:
        return ""
    from mcore_longctx.data.methods.sentences import read_offsets

    if read_offsets(section.offsets)["tokenizer_sha256"] != tokenizer.sha256:
        raise DataError("was made with another tokenizer", where=section.offsets, fix="run `data token-offsets` again")
    return sha256_file(section.offsets)


def _sentence_settings(job: TokenJob) -> dict[str, Any]:
    """Which sentences are taken; where the table of offsets lies is no part of that."""
    section = job.sentences
    if section is None:
        return {}
    words = {"rule": section.rule, "keep": section.keep, "seed": job.sentences_seed, "offsets_sha256": job.sentences_sha256}
    return {"sentences": words, "offsets": None if section.offsets is None else str(section.offsets)}


def _sentences_of(settings: dict[str, Any]) -> dict[str, Any]:
    words = settings.get("sentences")
    if words is None:
        return {}
    offsets = None if settings["offsets"] is None else Path(settings["offsets"])
    return {
        "sentences": SentenceSection(rule=words["rule"], keep=float(words["keep"]), offsets=offsets),
        "sentences_sha256": str(words["offsets_sha256"]),
        "sentences_seed": int(words["seed"]),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_sealed(path)
    except FileNotFoundError:
        raise DataError("nothing was tokenized here", where=path.parent, fix="run `data tokenize` first") from None
    except (ValueError, KeyError, OSError):
        settings = {}
    if settings.get("format") != 1:
        raise DataError("damaged", where=path, fix="tokenize into another folder")
    return settings


def _refuse_changes(old: dict[str, Any], job: TokenJob, path: Path) -> None:
    new = _as_settings(job)
    fix = "set it back, or use another output folder"
    if old.get("tokenizer", {}).get("sha256") != job.tokenizer_sha256:
        raise ConfigError("the tokenizer is another one than when this folder was begun", where=path, fix=fix)
    if old.get("ids") != new["ids"]:
        raise ConfigError("BOS, EOS or pad of the tokenizer are others than when this folder was begun", where=path, fix=fix)
    if job.chats and old["tokenizer"].get("template_sha256") != job.template_sha256:
        raise ConfigError("the chat template is another one than when this folder was begun", where=path, fix=fix)
    for name in ("chats", "dtype", "vocab_size", "prompt_loss_from", "sentences"):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{name} was {old.get(name)!r} when this folder was begun, it is {new.get(name)!r} now", where=path, fix=fix
            )
    if old.get("sources") != new["sources"]:
        names = [row.get("name") for row in old.get("sources", [])]
        raise ConfigError(
            f"the sources were {names} when this folder was begun, or their paths or fields differ", where=path, fix=fix
        )
    tasks = _tasks_of(old, path)
    check_unchanged(tasks, job.tasks, job.sources)
    if [replace(task, ignored=0) for task in tasks] != [replace(task, ignored=0) for task in job.tasks]:
        raise ConfigError("--range was another one when this folder was begun", where=path, fix=fix)


def _tasks_of(settings: dict[str, Any], path: Path) -> tuple[InputTask, ...]:
    try:
        return tuple(InputTask.from_dict(row) for row in settings["tasks"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError("damaged", where=path, fix="tokenize into another folder") from None
