"""Held-out text: read by the data room's readers, cut in windows that begin as the model's tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.documents.readers import read_texts
from mcore_longctx.errors import DataError

__all__ = ["Windows", "cut_windows", "read_documents"]


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens, begin tokens included: int64 [count, length], and where each starts in the text's tokens."""

    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]


def read_documents(path: Path) -> list[str]:
    """Texts of a file or folder (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md), in the order of the sorted names.

    Raises:
        DataError: nothing there, a file that cannot be read, or a bad record.
    """
    return list(read_texts(path))


def cut_windows(tokens: npt.NDArray[np.int64], prefix: Sequence[int], *, count: int, length: int, where: object) -> Windows:
    """`count` windows, equally spaced over the text, none overlapping another.

    Raises:
        DataError: the text is too short for that.
    """
    body = length - len(prefix)
    if len(tokens) < count * body:
        raise DataError(
            f"{len(tokens):,} tokens of held-out text; {count} windows of {length:,} need {count * body:,}",
            where=where,
            fix="give more text, or ask for fewer or shorter windows",
        )
    starts = np.zeros(1, np.int64) if count == 1 else np.arange(count) * (len(tokens) - body) // (count - 1)
    begin = np.array(prefix, dtype=np.int64)
    return Windows(np.stack([np.concatenate([begin, tokens[start : start + body]]) for start in starts]), starts)
