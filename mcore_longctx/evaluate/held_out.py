"""Held-out text as tokens: read by the data room's readers, tokenized once, begun as the model's tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HFTokenizer

from mcore_longctx.data.documents.readers import read_texts
from mcore_longctx.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from mcore_longctx.errors import DataError

__all__ = ["EvaluationTokenizer", "Windows", "cut_windows", "read_documents"]

_ENDS = ("<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>", "</s>")  # Llama 3, Qwen, Mistral


class EvaluationTokenizer:
    """The tokenizer of a model, as the tasks need it: ordinary text to ids and back.

    Attributes:
        prefix: ids that the tokenizer puts before a text (a begin token), often none.
        end_ids: ids that end a text or a turn: what a model writes when it has finished.
        sha256: of tokenizer.json.

    Raises:
        DataError: no tokenizer here, or it has ids that the model has no embedding for.
    """

    def __init__(self, folder: Path, model_vocab_size: int) -> None:
        self._ordinary: Tokenizer = load_tokenizer(folder)
        check_vocabulary(self._ordinary, model_vocab_size)
        self.sha256 = self._ordinary.sha256
        self._whole = HFTokenizer.from_file(str(self._ordinary.path))
        self.prefix = self._begin_ids()
        names = (self._ordinary.special_tokens.get("eos_token"), *_ENDS)
        ids = [self._ordinary.control_id(name) for name in names if name]
        self.end_ids = frozenset(token for token in ids if token is not None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary characters, without begin or end tokens."""
        return self._ordinary.encode(text).tolist()

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        """`encode` for long texts, int64 [tokens]."""
        return self._ordinary.encode(text).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out."""
        return str(self._whole.decode([int(token) for token in ids], skip_special_tokens=False))

    def _begin_ids(self) -> tuple[int, ...]:
        bare = self._whole.encode("a", add_special_tokens=False).ids
        framed = self._whole.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(framed) - len(bare) + 1) if framed[i : i + len(bare)] == bare]
        return tuple(framed[: starts[0]]) if starts else ()


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
