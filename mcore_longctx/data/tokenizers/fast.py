"""gigatoken, tens of times faster than the libraries that define the ids, where it gives the same ids.

Version 0.10 has no mode in which `<|end_of_text|>` inside a document is ordinary text, so it is built from a tokenizer.json
without the special tokens. It ignores what it does not know of a file. Therefore a file is used only if every field is one
that both libraries read alike (`_check_structure`), and if the ids of a set of nasty texts are those of the library that defines
them (`_checked`).

Its table of words seen grows without bound (marcelroed/gigatoken#36). It is built anew when this process has grown.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from mcore_longctx.data.tokenizers.check import check_texts, small_reference
from mcore_longctx.data.tokenizers.pieces import NEVER, Cutter
from mcore_longctx.data.tokenizers.reference import TiktokenReference

__all__ = ["FastEncoder", "NotExact", "fast_from_json", "fast_from_ranks", "has_new_numbers"]

Tokens = npt.NDArray[np.int32]

# Bytes that this process may grow before the table is built anew, 0.6 CPU-s for Llama 3. The table doubles, and needs both
# while it does: 64 to 128 MiB must be the last time.
_GROWTH = 108 << 20
_LOOK_EVERY = 1 << 20  # characters between two looks at memory
_OF_A_DOCUMENT = 4  # bytes for a character of it: its line, its text, its tokens in pieces and joined
_WORST = 40  # bytes that the table takes for a character at worst (random CJK), assumed where the system does not tell
_PIECE = 1 << 20

# Numbers of Unicode 17, which gigatoken knows and the regular expressions of tokenizers 0.22 do not: found by comparing every
# code point with Llama 3's tokenizer.
_NEW_NUMBERS = re.compile("[\U00011de0-\U00011de9\U00016ff4-\U00016ff6]")


class NotExact(Exception):
    """Gigatoken is not used for this tokenizer. `str(error)` is the reason."""


class FastEncoder:
    """Gigatoken with bounded memory.

    Attributes:
        name: library and version.
        cutter: how long texts are cut for it.
        vocab_size: largest id + 1.
        control: id and whether it is special, for each added token.
    """

    def __init__(self, build: Callable[[], Any], *, vocab_size: int, control: dict[str, tuple[int, bool]]) -> None:
        self._build_backend = build
        self.name = f"gigatoken {version('gigatoken')}"
        self.vocab_size, self.control = vocab_size, control
        self.rebuilds = -1  # the first build is none
        self._backend: Any = None
        self._characters = self._next_look = self._base = self._in_hand = 0
        self._rebuild()
        self.cutter = Cutter(self.encode, _PIECE)

    def encode_long(self, text: str) -> Tokens:
        """Ids of a text of any length as ordinary characters, int32 [tokens]."""
        self._in_hand = _OF_A_DOCUMENT * len(text)
        ids = self.cutter.encode_long(text)
        self._in_hand = 0
        return ids

    def encode(self, text: str) -> Tokens:
        """Ids of the whole text, encoded at once."""
        ids: npt.NDArray[np.uint32] = self._backend.encode(text)
        self._characters += len(text)
        if self._characters >= self._next_look:
            self._bound_memory()
        return ids.view(np.int32)

    def _bound_memory(self) -> None:
        self._next_look = self._characters + _LOOK_EVERY
        if self._growth() <= _GROWTH:
            return
        _give_back_memory()  # what a big document left behind is no growth of the table
        if self._growth() > _GROWTH:
            self._rebuild()

    def _growth(self) -> int:
        """Bytes that this process has grown by since the last build."""
        used = _own_memory()
        if used is None:
            return self._characters * _WORST
        self._base = min(self._base, used)  # others may have shrunk meanwhile
        return used - self._base - self._in_hand

    def _rebuild(self) -> None:
        self._backend = None
        self._backend = self._build_backend()
        _give_back_memory()
        self._base = max(0, (_own_memory() or 0) - self._in_hand)
        self._characters, self._next_look = 0, _LOOK_EVERY
        self.rebuilds += 1


def fast_from_json(raw: bytes) -> FastEncoder:
    """Encoder for a tokenizer.json.

    Raises:
        NotExact: it is not installed, or its ids may differ from those of Hugging Face tokenizers.
    """
    gigatoken = _gigatoken()
    try:
        spec = msgspec.json.decode(raw, type=dict[str, Any])
        control = _check_structure(spec)
        kept = [row for row in spec["added_tokens"] if not row["special"]]
        text = msgspec.json.encode(spec | {"added_tokens": kept, "post_processor": None})
        texts = check_texts(control)
        reference = small_reference(spec, texts)
        vocab_size = 1 + max([*spec["model"]["vocab"].values(), *(index for index, _ in control.values())])
        byte_fallback = bool(spec["model"].get("byte_fallback"))
    except NotExact:
        raise
    except Exception as error:  # also what tokenizers finds wrong, which is a plain Exception
        raise NotExact(f"the file is unusual ({type(error).__name__}: {error})") from None
    del spec

    def build() -> Any:
        return gigatoken.Tokenizer.from_json(text).backend

    encoder = _checked(build, texts, lambda text: reference.encode(text, add_special_tokens=False).ids, vocab_size, control)
    if byte_fallback:
        encoder.cutter = Cutter(encoder.encode, NEVER)  # sentencepiece's kind puts a space before every piece
    return encoder


def fast_from_ranks(reference: TiktokenReference) -> FastEncoder:
    """Encoder for Llama 3's file of ranks.

    Raises:
        NotExact: it is not installed, or its ids differ from those of tiktoken.
    """
    gigatoken = _gigatoken()
    # gigatoken's own reader of ranks panics on Llama 3's: some of its tokens are the merge of no two others
    text = msgspec.json.encode(_spec_of_ranks(reference.ranks, reference.split))

    def build() -> Any:
        return gigatoken.Tokenizer.from_json(text).backend

    control = {name: (index, True) for name, index in reference.special.items()}
    return _checked(build, check_texts(control), reference.encode, reference.vocab_size, control)


def _spec_of_ranks(ranks: dict[bytes, int], split: str) -> dict[str, Any]:
    """The tokenizer.json of tiktoken ranks: it merges any two tokens that make a third, the lowest of these first."""
    names = dict(zip(_BYTES, _byte_characters(), strict=True))
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:size], token[size:]) for size in range(1, len(token))]
        merges += [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]

    def text(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    return {
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {text(token): rank for token, rank in ranks.items()},
            "merges": [[text(left), text(right)] for left, right in merges],
            "ignore_merges": True,  # a word that is a token is not looked at further
            "byte_fallback": False,
        },
    }


def has_new_numbers(text: str) -> bool:
    """Whether the text has characters that gigatoken splits otherwise than the reference."""
    # a text without characters past U+FFFF takes less than four bytes for each: nothing to search
    return not text.isascii() and sys.getsizeof(text) >= 4 * len(text) and _NEW_NUMBERS.search(text) is not None


def _gigatoken() -> Any:
    try:
        import gigatoken
    except ImportError:
        raise NotExact("gigatoken is not installed") from None
    return gigatoken


def _checked(
    build: Callable[[], Any],
    texts: Sequence[str],
    expected: Callable[[str], Any],
    vocab_size: int,
    control: dict[str, tuple[int, bool]],
) -> FastEncoder:
    """The encoder, if its ids for `texts` are the expected ones."""
    try:
        encoder = FastEncoder(build, vocab_size=vocab_size, control=control)
        other = [text for text in texts if not np.array_equal(encoder.encode(text), np.asarray(expected(text), np.int32))]
    except BaseException as error:  # plain Exception for a tokenizer that it does not know; pyo3's panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NotExact(f"gigatoken: {error}".splitlines()[0]) from None
    if other:
        raise NotExact(f"gigatoken gives other ids for {other[0][:40]!r}")
    return encoder


def _check_structure(spec: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Added tokens (id, special) of a tokenizer.json that gigatoken and Hugging Face tokenizers read alike."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise NotExact(f"gigatoken knows BPE only, this is {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise NotExact(f"gigatoken ignores {name}")
    vocabulary = model["vocab"]
    if model.get("byte_fallback"):
        bare = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
        if any(byte > 127 or chr(byte) not in vocabulary for byte in bare):
            raise NotExact("not every byte has a token")
    else:
        _check_byte_level(spec)
        if not all(character in vocabulary for character in _byte_characters()):
            raise NotExact("not every byte has a token")
    return _check_added(spec["added_tokens"], vocabulary, has_normalizer=spec.get("normalizer") is not None)


def _check_byte_level(spec: dict[str, Any]) -> None:
    splits = spec.get("pre_tokenizer") or {}
    if splits.get("type") == "ByteLevel":
        if not splits.get("use_regex", True):
            raise NotExact("gigatoken needs a split rule")
        return
    rows = splits.get("pretokenizers", [])
    *patterns, last = rows or [{}]
    known = [("Isolated", False), ("Removed", True)]
    if (
        splits.get("type") != "Sequence"
        or any(row["type"] != "Split" or (row["behavior"], row["invert"]) not in known for row in patterns)
        or last.get("type") != "ByteLevel"
        or last.get("use_regex", True)
        or last.get("add_prefix_space")
    ):
        raise NotExact("gigatoken ignores a part of the pre_tokenizer")


def _check_added(rows: list[dict[str, Any]], vocabulary: dict[str, int], *, has_normalizer: bool) -> dict[str, tuple[int, bool]]:
    outside = len(vocabulary)
    added: dict[str, tuple[int, bool]] = {}
    for row in rows:
        text, index = row["content"], row["id"]
        if not text or text in added:
            raise NotExact("an added token is empty or given twice")
        if text not in vocabulary:
            # Hugging Face counts on from the vocabulary, whatever the file says
            if index != outside:
                raise NotExact(f"id of the added token {text!r}")
            outside += 1
        elif vocabulary[text] != index:
            raise NotExact(f"id of the added token {text!r}")
        added[text] = (index, bool(row["special"]))
        # those that are not special are found in documents too
        if not row["special"] and (row["single_word"] or (row["normalized"] and has_normalizer)):
            raise NotExact(f"gigatoken ignores how the added token {text!r} is to be found")
    if outside > len(vocabulary) and max(vocabulary.values(), default=-1) >= len(vocabulary):
        raise NotExact("ids of the vocabulary have gaps")
    special = [text for text, (_, flag) in added.items() if flag]
    for text in (text for text, (_, flag) in added.items() if not flag):
        if any(_overlap(text, other) for other in special):
            raise NotExact(f"the added token {text!r} overlaps a special token")
    return added


def _overlap(one: str, two: str) -> bool:
    """Whether the two may share characters of a text."""
    shorter = min(len(one), len(two))
    ends = any(one[-size:] == two[:size] or two[-size:] == one[:size] for size in range(1, shorter))
    return ends or one in two or two in one


# the order in which a byte-level vocabulary (GPT-2) gives characters to the 256 bytes: visible ones stand for themselves
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [*_VISIBLE, *sorted(set(range(256)) - set(_VISIBLE))]


def _byte_characters() -> list[str]:
    """The characters of `_BYTES`."""
    return [*map(chr, _VISIBLE), *(chr(256 + index) for index in range(256 - len(_VISIBLE)))]


def _own_memory() -> int | None:
    """Bytes of this process that no file backs, None where the system does not tell."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_bytes().split())
    except OSError:
        return None
    return (resident - shared) * mmap.PAGESIZE


def _give_back_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; without it freed memory is used again, not given back
    if trim is not None:
        trim(0)
