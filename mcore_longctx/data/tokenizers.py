"""A tokenizer read from `tokenizer.json`, without transformers.

Documents are encoded as ordinary text: `<|end_of_text|>` inside a document becomes characters, not a control token, and no BOS
or EOS is added. Chats are encoded with control tokens, because there the template writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HFTokenizer

from mcore_longctx.errors import DataError

__all__ = ["Tokenizer", "check_vocabulary", "load_tokenizer"]

_PIECE = 1 << 19  # characters encoded at once: about 60 MB, where a whole document of 5M tokens takes 2.3 GB
_MARGIN = 512  # characters on each side of a cut that are compared
_TRIES = 16
# a space between two words, or a line end between two lines
_CUT = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\S)")


class Tokenizer:
    """What the data room needs of a tokenizer. Make one with `load_tokenizer`.

    Attributes:
        path: the tokenizer.json.
        sha256: of that file.
        vocab_size: largest id + 1, added tokens included.
        chat_template: Jinja source, or None.
        special_tokens: names such as `bos_token`, `eos_token`, `pad_token` with their text, from tokenizer_config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = path.read_bytes()
            self._ordinary = HFTokenizer.from_buffer(raw)
        except FileNotFoundError:
            raise DataError("no such file", where=path, fix="give a folder with tokenizer.json") from None
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"not a tokenizer ({error})", where=path, fix="expected a tokenizer.json of Hugging Face tokenizers"
            ) from None
        _without_limits(self._ordinary)
        self._ordinary.encode_special_tokens = True
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.vocab_size = max(self._ordinary.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        config = _read_config(path.parent / "tokenizer_config.json")
        self.chat_template = _chat_template(path.parent, config)
        self.special_tokens = _special_tokens(config)

    @cached_property
    def _control(self) -> HFTokenizer:
        # a second instance: whether control tokens are recognised is a switch of the whole tokenizer
        tokenizer = HFTokenizer.from_file(str(self.path))
        _without_limits(tokenizer)
        return tokenizer

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of `text` as ordinary characters, int32 [tokens].

        A long text is encoded in pieces, cut where the tokens around the cut are the same with and without it, so that memory
        does not grow with the text. (A tokenizer for which no such place exists gets the text whole.)
        """
        pieces = [self._encode(piece) for piece in self._pieces(text)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)

    def encode_chat(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of `text` with control tokens recognised, int32 [tokens], and the character at which each token ends, int64."""
        encoding = self._control.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array([end for _, end in encoding.offsets], np.int64)

    def control_id(self, text: str) -> int | None:
        """Id of a special or other whole token, None if there is none of that text."""
        found: int | None = self._control.token_to_id(text)
        return found

    def control_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(index for index, token in self._control.get_added_tokens_decoder().items() if token.special)

    def _encode(self, text: str) -> npt.NDArray[np.int32]:
        # encode_batch_fast keeps no offsets: half the time of encode
        return np.array(self._ordinary.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > _PIECE:
            cut = self._cut(text, start + _PIECE // 2, start + _PIECE)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]

    def _cut(self, text: str, low: int, high: int) -> int | None:
        """Last place in [low, high) at which cutting changes no token."""
        places = [match.start() for match in _CUT.finditer(text, low, high)]
        for cut in reversed(places[-_TRIES:]):
            left, right = text[max(0, cut - _MARGIN) : cut], text[cut : cut + _MARGIN]
            if np.array_equal(self._encode(left + right), np.concatenate([self._encode(left), self._encode(right)])):
                return cut
        return None


def load_tokenizer(folder_or_file: Path) -> Tokenizer:
    """Read a tokenizer.json, or the one of a model folder.

    Raises:
        DataError: no such file, or it is no tokenizer.
    """
    return Tokenizer(folder_or_file / "tokenizer.json" if folder_or_file.is_dir() else folder_or_file)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"vocabulary of the tokenizer ({tokenizer.vocab_size:,}) is larger than the model's ({model_vocab_size:,})",
            where=tokenizer.path,
            fix="use the model's own tokenizer",
        )


def _without_limits(tokenizer: HFTokenizer) -> None:
    """Saved truncation would cut documents silently."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise DataError(f"cannot be read ({error})", where=path) from None
    if not isinstance(config, dict):
        raise DataError("expected a JSON object", where=path)
    return config


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja` goes before the one in tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {row.get("name"): row.get("template") for row in template}.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens
