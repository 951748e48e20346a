"""Tokenizers behind one interface, exact, without transformers: tokenizer.json, sentencepiece models, tiktoken ranks.

Documents are encoded as ordinary text: `<|end_of_text|>` inside a document becomes characters, not a control token, and no BOS
or EOS is added. Chats are encoded with control tokens, because there the template writes them.

The ids are those of the library that defines the file (`data/tokenizers/reference.py`). Where gigatoken is installed and gives the
same ids, it encodes (`data/tokenizers/fast.py`). `Tokenizer.backend` says which library did and why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.tokenizers.fast import FastEncoder, NotExact, fast_from_json, fast_from_ranks, has_new_numbers
from mcore_longctx.data.tokenizers.pieces import Encode
from mcore_longctx.data.tokenizers.reference import HFReference, Reference, TiktokenReference, is_json, read_reference
from mcore_longctx.errors import DataError, DifferenceFound

__all__ = ["Tokenizer", "check_against_reference", "check_vocabulary", "load_tokenizer"]


class Tokenizer:
    """What the data room needs of a tokenizer. Make one with `load_tokenizer`. It may be loaded before a fork.

    Attributes:
        path: the tokenizer's file.
        sha256: of that file.
        backend: the library that encodes, with its version, and why not a faster one.
        chat_template: Jinja source, or None.
        special_tokens: names such as `bos_token`, `eos_token`, `pad_token` with their text, from tokenizer_config.json.
    """

    def __init__(self, path: Path, *, fast: bool = True) -> None:
        self.path = path
        raw = _read(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._fast: FastEncoder | None = None
        reason = ""
        if fast:
            try:
                self._fast = self._find_fast(raw)
            except NotExact as error:
                reason = f" ({error})"
        self.backend = self._reference.name + reason if self._fast is None else self._fast.name
        config = _read_config(path.parent / "tokenizer_config.json")
        self.chat_template = _chat_template(path.parent, config)
        self.special_tokens = _special_tokens(config)

    def _find_fast(self, raw: bytes) -> FastEncoder | None:
        if is_json(raw):
            return fast_from_json(raw)
        if isinstance(self._reference, TiktokenReference):
            return fast_from_ranks(self._reference)
        return None  # sentencepiece is not slow, and gigatoken's own reading of its models is not proven equal

    @cached_property
    def _reference(self) -> Reference:
        # read only when needed: Llama 3's takes 0.5 CPU-s and 80 MB
        raw = _read(self.path)
        if hashlib.sha256(raw).hexdigest() != self.sha256:
            raise DataError("changed while it was in use", where=self.path, fix="start again with one tokenizer")
        return read_reference(self.path, raw)

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return self._reference.vocab_size if self._fast is None else self._fast.vocab_size

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of `text` as ordinary characters, int32 [tokens].

        A long text is encoded in pieces, cut where the tokens around the cut are the same with and without it, so that memory
        does not grow with the text. (A tokenizer for which no such place exists gets the text whole.)

        Raises:
            DataError: the text holds half of a surrogate pair, or the library fails on it.
        """
        if self._fast is None or has_new_numbers(text):
            return self.reference_encode(text)
        return _encode(self._fast.encode_long, text, self.path)

    def reference_encode(self, text: str) -> npt.NDArray[np.int32]:
        """The same by the library that defines the ids, without gigatoken."""
        return _encode(self._reference.cutter.encode_long, text, self.path)

    def encode_chat(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of `text` with control tokens recognised, int32 [tokens], and the character at which each token ends, int64.

        Raises:
            DataError: not a tokenizer.json.
        """
        if not isinstance(self._reference, HFReference):
            fix = "convert it to a tokenizer.json (transformers: AutoTokenizer.from_pretrained(...).save_pretrained)"
            raise DataError("chats need a tokenizer.json: this file gives no offsets of control tokens", where=self.path, fix=fix)
        return self._reference.encode_chat(text)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Text of `ids`, special tokens written out.

        Raises:
            DataError: an id outside the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise DataError(f"id {outside[0]:,} is not in the vocabulary of {self.vocab_size:,}", where=self.path)
        return self._reference.decode(array.tolist())

    def control_id(self, text: str) -> int | None:
        """Id of a special or other whole token, None if there is none of that text."""
        if self._fast is not None and text in self._fast.control:
            return self._fast.control[text][0]
        return self._reference.control_id(text)

    def control_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        if self._fast is not None:
            return frozenset(index for index, special in self._fast.control.values() if special)
        return self._reference.control_ids()


def load_tokenizer(folder_or_file: Path, *, fast: bool = True) -> Tokenizer:
    """Read a tokenizer.json, a sentencepiece model or Llama 3's file of ranks, or the one of these that a model folder holds.

    Args:
        folder_or_file: in a folder, tokenizer.json goes before *.model and *.tiktoken.
        fast: encode with gigatoken where it is exact. Otherwise, for a few texts, only the reference library is loaded.

    Raises:
        DataError: no such file, it is no tokenizer, or the library that reads it is missing.
    """
    if not folder_or_file.is_dir():
        return Tokenizer(folder_or_file, fast=fast)
    whole = folder_or_file / "tokenizer.json"
    others = sorted(path for kind in ("*.model", "*.tiktoken") for path in folder_or_file.glob(kind))
    if whole.is_file() or not others:
        return Tokenizer(whole, fast=fast)
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise DataError(f"no tokenizer.json, but {names}", where=folder_or_file, fix="name the file")
    return Tokenizer(others[0], fast=fast)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"vocabulary of the tokenizer ({tokenizer.vocab_size:,}) is larger than the model's ({model_vocab_size:,})",
            where=tokenizer.path,
            fix="use the model's own tokenizer",
        )


def check_against_reference(tokenizer: Tokenizer, text: str, where: object) -> None:
    """Raise DifferenceFound, with the first token that differs, unless `encode` gives the ids of the defining library."""
    ours, theirs = tokenizer.encode(text), tokenizer.reference_encode(text)
    if np.array_equal(ours, theirs):
        return
    shorter = min(len(ours), len(theirs))
    first = int(np.append(np.flatnonzero(ours[:shorter] != theirs[:shorter]), shorter)[0])

    def words(ids: npt.NDArray[np.int32]) -> str:
        if first == len(ids):
            return "no token"
        known = 0 <= ids[first] < tokenizer.vocab_size
        return f"{ids[first]} ({tokenizer.decode(ids[first : first + 1])!r})" if known else f"{ids[first]}"

    raise DifferenceFound(
        f"token {first:,} of {len(theirs):,}: {tokenizer.backend} gives {words(ours)}, the reference {words(theirs)}",
        where=where,
        fix="uninstall gigatoken, or report the text",
    )


def _encode(encode: Encode, text: str, path: Path) -> npt.NDArray[np.int32]:
    try:
        return encode(text)
    except (UnicodeEncodeError, TypeError) as error:  # tokenizers raises TypeError for it
        half = re.search("[\ud800-\udfff]", text)
        if half is None:
            raise
        what = f"character {half.start():,} of a text is half of a surrogate pair ({type(error).__name__})"
        raise DataError(what, where=path, fix="it is not valid Unicode: leave the document out") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=path, fix="give a folder with tokenizer.json") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None


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
