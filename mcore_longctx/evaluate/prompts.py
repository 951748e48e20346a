"""Prompts of RULER-like tasks: made on one rank, sent to all, and kept on disk where making them took long.

Why rank 0 alone: a prompt of 4M tokens costs seconds and hundreds of megabytes to make and 16 MB to send, and the ranks of a node share
its memory and its cores. Why not on disk at once: a prompt is a pure function of its settings, and most take less time to make than to
read. What took longer than `DEAR_SECONDS` is read by the next column, and by a column that was stopped and goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.errors import StorageError
from mcore_longctx.evaluate.rows import on_first_rank
from mcore_longctx.manifest import partial_path
from mcore_longctx.tasks import RulerSample

__all__ = ["DEAR_SECONDS", "PROMPT_TAIL", "PromptCache", "prompt_tail"]

DEAR_SECONDS = 0.5
PROMPT_TAIL = 200  # characters of a prompt's end that a row shows
_ARRAYS = ("tokens", "answer")


def prompt_tail(tokenizer: EvaluationTokenizer, *parts: npt.NDArray[np.int64]) -> str:
    """The last characters of a prompt. A character that its first token cuts in two is shown as such."""
    ids: list[int] = []
    for part in reversed(parts):
        ids = [*part[max(0, len(part) - PROMPT_TAIL) :].tolist(), *ids]
    return tokenizer.decode(ids[-PROMPT_TAIL:])[-PROMPT_TAIL:]


class PromptCache:
    """Samples by the hash of what they are made from.

    Args:
        folder: of the files; made when the first is written.
        identity: what all samples of this cache depend on beside their own settings (tokenizer, texts, seed).
        dear_seconds: what takes longer is written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, dear_seconds: float = DEAR_SECONDS) -> None:
        self.folder, self.identity, self.dear_seconds = folder, dict(identity), dear_seconds

    def get(self, settings: Mapping[str, Any], make: Callable[[], RulerSample]) -> RulerSample:
        """The sample of some settings, on every rank. All ranks call it; `make` runs on rank 0, if at all.

        Raises:
            LongctxError: what `make` raised, on every rank.
            StorageError: the file cannot be written.
        """
        return on_first_rank(lambda: self._get(settings, make))

    def path(self, settings: Mapping[str, Any]) -> Path:
        """Where a sample lies, if it is there."""
        text = json.dumps([self.identity, dict(settings)], sort_keys=True)
        return self.folder / f"prompt-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def _get(self, settings: Mapping[str, Any], make: Callable[[], RulerSample]) -> RulerSample:
        path = self.path(settings)
        found = _read(path)
        if found is None:
            started = time.monotonic()
            found = make()
            if time.monotonic() - started > self.dear_seconds:
                _write(path, found)
        return found


def _write(path: Path, sample: RulerSample) -> None:
    plain = {field.name: getattr(sample, field.name) for field in fields(sample) if field.name not in _ARRAYS}
    buffer = io.BytesIO()
    facts = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
    np.savez(buffer, facts=facts, **{name: getattr(sample, name).astype(np.int32) for name in _ARRAYS})
    aside = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(buffer.getbuffer())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", where=path) from None


def _read(path: Path) -> RulerSample | None:
    """None where there is no such file, or a damaged one: zip files carry checksums, and numpy is not allowed to unpickle."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name].astype(np.int64) for name in _ARRAYS}
            facts = json.loads(file["facts"].tobytes())
        lists = {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
        return RulerSample(**(facts | lists), **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
