"""The libraries that define the ids: Hugging Face tokenizers, sentencepiece, tiktoken.

One class for each kind of file, with the same methods. Documents are ordinary text in all of them: `<|end_of_text|>` or `</s>`
inside a document becomes characters. No begin or end token is added.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.tokenizers.pieces import NEVER, Cutter
from mcore_longctx.errors import DataError

__all__ = [
    "HFReference",
    "Reference",
    "SentencePieceReference",
    "TiktokenReference",
    "is_json",
    "read_reference",
    "words_stand_alone",
]

_PIECE = 1 << 19  # characters at once: about 60 MB in tokenizers, where a document of 5M tokens takes 2.3 GB
_EXPECTED = "expected a tokenizer.json of Hugging Face tokenizers, a sentencepiece model or tiktoken ranks"
Tokens = npt.NDArray[np.int32]

# published with Llama 3 (llama3/tokenizer.py); Llama 3.1 gave some of the reserved ones another name, not another id
_LLAMA3_RANKS = 128_000
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{index}|>" for index in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{index}|>" for index in range(5, 251)),
]
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class Reference(Protocol):
    """What a library must tell of a tokenizer.

    Attributes:
        name: library and version.
        cutter: how long texts are cut for it.
    """

    name: str
    cutter: Cutter

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""

    def encode(self, text: str) -> Tokens:
        """Ids of the whole text as ordinary characters, int32 [tokens]."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens written out."""

    def control_id(self, text: str) -> int | None:
        """Id of a whole token, None if there is none of that text."""

    def control_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""


def read_reference(path: Path, raw: bytes) -> Reference:
    """The tokenizer in a file, by its content.

    Raises:
        DataError: it is none, or the library that reads it is missing.
    """
    if _RANK_LINE.match(raw):
        return TiktokenReference(path, raw)
    if is_json(raw):
        return HFReference(path, raw)
    if raw[:1] == b"\n":  # field 1 of a sentencepiece model: its first piece
        return SentencePieceReference(path, raw)
    raise DataError("not a tokenizer", where=path, fix=_EXPECTED)


def is_json(raw: bytes) -> bool:
    """Whether a file begins as a tokenizer.json does."""
    return raw[:64].lstrip()[:1] == b"{"


class HFReference:
    """A tokenizer.json, read by Hugging Face tokenizers."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self._path, self._raw = path, raw
        self._ordinary = self._read()
        self._ordinary.encode_special_tokens = True
        self.name = f"tokenizers {version('tokenizers')}"
        self.cutter = self._cutter()

    def _read(self) -> Any:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(self._raw)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"not a tokenizer ({error})", where=self._path, fix=_EXPECTED) from None
        tokenizer.no_truncation()  # saved limits would cut documents silently
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _control(self) -> Any:
        # a second instance: whether control tokens are recognised is a switch of the whole tokenizer
        return self._read()

    @cached_property
    def vocab_size(self) -> int:
        """See `Reference`."""
        return max(self._ordinary.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> Tokens:
        """See `Reference`."""
        # encode_batch_fast keeps no offsets, half the time of encode; but it starts threads, which a later fork complains about
        if len(text) < 4096:
            return np.array(self._ordinary.encode(text, add_special_tokens=False).ids, np.int32)
        return np.array(self._ordinary.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def encode_chat(self, text: str) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Ids with control tokens recognised, int32 [tokens], and the character at which each ends, int64 [tokens]."""
        encoding = self._control.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array([end for _, end in encoding.offsets], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Reference`."""
        return str(self._ordinary.decode(ids, skip_special_tokens=False))

    def control_id(self, text: str) -> int | None:
        """See `Reference`."""
        found: int | None = self._ordinary.token_to_id(text)
        return found

    def control_ids(self) -> frozenset[int]:
        """See `Reference`."""
        return frozenset(index for index, token in self._ordinary.get_added_tokens_decoder().items() if token.special)

    def _cutter(self) -> Cutter:
        splits = self._ordinary.pre_tokenizer
        if self._same("a b", "a", " b") and splits is not None and len(splits.pre_tokenize_str("a b")) > 1:
            return Cutter(self.encode, _PIECE)
        # no words of its own: tokens may depend on the whole text, unless the vocabulary forbids it
        if self._same("a b", "a", "b") and words_stand_alone(self._ordinary.get_vocab(with_added_tokens=True)):
            return Cutter(self.encode, _PIECE, drops_space=True)
        return Cutter(self.encode, NEVER)

    def _same(self, whole: str, left: str, right: str) -> bool:
        return np.array_equal(self.encode(whole), np.concatenate([self.encode(left), self.encode(right)]))


class SentencePieceReference:
    """A sentencepiece model, read by sentencepiece."""

    def __init__(self, path: Path, raw: bytes) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise _missing(path, "sentencepiece") from None
        try:
            self._model = SentencePieceProcessor(model_proto=raw)
        except Exception as error:  # the library raises RuntimeError and others
            raise DataError(f"not a sentencepiece model ({error})", where=path) from None
        self.name = f"sentencepiece {version('sentencepiece')}"
        self.vocab_size = int(self._model.get_piece_size())
        pieces = [self._model.id_to_piece(index) for index in range(self.vocab_size)]
        self._control = {
            piece: index
            for index, piece in enumerate(pieces)
            if self._model.is_control(index) or self._model.is_unknown(index) or self._model.is_unused(index)
        }
        self._ids = {piece: index for index, piece in enumerate(pieces)}
        joins = np.array_equal(self.encode("a b"), np.concatenate([self.encode("a"), self.encode("b")]))
        piece = _PIECE if joins and words_stand_alone(pieces) else NEVER
        self.cutter = Cutter(self.encode, piece, drops_space=True)

    def encode(self, text: str) -> Tokens:
        """See `Reference`."""
        return np.array(self._model.encode(text, add_bos=False, add_eos=False), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Reference`."""
        names = {index: piece for piece, index in self._control.items()}
        out: list[str] = []
        plain: list[int] = []
        for token in ids:
            if token in names:
                out += [self._model.decode(plain), names[token]]
                plain = []
            else:
                plain.append(int(token))
        return "".join([*out, self._model.decode(plain)])

    def control_id(self, text: str) -> int | None:
        """See `Reference`."""
        return self._ids.get(text)

    def control_ids(self) -> frozenset[int]:
        """See `Reference`."""
        return frozenset(self._control.values())


class TiktokenReference:
    """A file of ranks, read by tiktoken. Such a file does not say how text is split: only Llama 3's is known here.

    Attributes:
        ranks: id of each token, by its bytes.
        special: id of each control token, by its text.
        split: regular expression of the words.
    """

    split = _LLAMA3_SPLIT

    def __init__(self, path: Path, raw: bytes) -> None:
        try:
            from tiktoken import Encoding
        except ImportError:
            raise _missing(path, "tiktoken") from None
        ranks = _read_ranks(path, raw)
        self.vocab_size = _LLAMA3_RANKS + len(_LLAMA3_SPECIAL)
        self.special = {text: _LLAMA3_RANKS + index for index, text in enumerate(_LLAMA3_SPECIAL)}
        self.ranks = ranks
        self._path = path
        self._encoding = Encoding(path.name, pat_str=_LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.special)
        self.name = f"tiktoken {version('tiktoken')}"
        self.cutter = Cutter(self.encode, _PIECE)

    def encode(self, text: str) -> Tokens:
        """See `Reference`."""
        try:
            return np.array(self._encoding.encode_ordinary(text), np.int32)
        except BaseException as error:  # a run of a million spaces overflows its stack: pyo3's PanicException is no Exception
            if type(error).__name__ != "PanicException":
                raise
            what = f"tiktoken fails on this text ({error})"
            raise DataError(what, where=self._path, fix="install gigatoken, or use a tokenizer.json of the same model") from None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Reference`."""
        return str(self._encoding.decode(list(ids)))

    def control_id(self, text: str) -> int | None:
        """See `Reference`."""
        return self.special.get(text, self.ranks.get(text.encode()))

    def control_ids(self) -> frozenset[int]:
        """See `Reference`."""
        return frozenset(self.special.values())


def words_stand_alone(vocabulary: Iterable[str]) -> bool:
    """Whether no token has a space (U+2581) behind another character: then the tokens of a word depend on that word alone."""
    return not any(re.search("[^\u2581 ][\u2581 ]", text) for text in vocabulary)


def _read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    try:
        ranks = {base64.b64decode(text, validate=True): int(rank) for text, rank in map(bytes.split, raw.splitlines())}
    except (ValueError, binascii.Error) as error:
        raise DataError(f"not a file of ranks ({error})", where=path) from None
    if len(ranks) != _LLAMA3_RANKS or set(ranks.values()) != set(range(_LLAMA3_RANKS)):
        raise DataError(
            f"a file of {len(ranks):,} ranks does not say how its model splits text; only Llama 3's ({_LLAMA3_RANKS:,}) is known",
            where=path,
            fix="use the tokenizer.json of the model",
        )
    return ranks


def _missing(path: Path, library: str) -> DataError:
    return DataError(f"{library} is needed to read it", where=path, fix="pip install 'mcore-longctx[data]'")
