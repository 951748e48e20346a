"""A model's tokenizer as evaluation needs it: ordinary text to ids and back, and how it begins and ends a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.tokenizers.reference import is_json
from mcore_longctx.data.tokenizers.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from mcore_longctx.errors import DataError

__all__ = ["EvaluationTokenizer"]

_ENDS = ("<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>", "</s>")  # Llama 3, Qwen, Mistral


class EvaluationTokenizer:
    """The tokenizer of a model, as the tasks need it: ordinary text to ids and back.

    Attributes:
        prefix: ids that the tokenizer puts before a text (a begin token), often none.
        end_ids: ids that end a text or a turn: what a model writes when it has finished.
        sha256: of tokenizer.json.

    Raises:
        DataError: no tokenizer.json here, or it has ids that the model has no embedding for.
    """

    def __init__(self, folder: Path, model_vocab_size: int) -> None:
        self._ordinary: Tokenizer = load_tokenizer(folder)
        if not is_json(self._ordinary.path.read_bytes()):
            raise DataError(
                "evaluation needs a tokenizer.json: this file does not say how a text begins",
                where=self._ordinary.path,
                fix="convert it (transformers: AutoTokenizer.from_pretrained(...).save_pretrained)",
            )
        check_vocabulary(self._ordinary, model_vocab_size)
        self.sha256 = self._ordinary.sha256
        from tokenizers import Tokenizer as HFTokenizer

        self._whole = HFTokenizer.from_file(str(self._ordinary.path))
        self.prefix = self._begin_ids()
        names = (self._ordinary.special_tokens.get("eos_token"), *_ENDS)
        ids = [self._ordinary.control_id(name) for name in names if name]
        self.end_ids = frozenset(token for token in ids if token is not None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary characters, without begin or end tokens."""
        ids: list[int] = self._ordinary.encode(text).tolist()
        return ids

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
