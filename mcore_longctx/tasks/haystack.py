"""Held-out text as a ring of tokens with the places where something can be put in: starts of lines and of sentences.

A text is tokenized once. `cached_haystack` keeps the tokens in a file of the run folder, which every process maps and none loads:

    64 bytes    "mcorehay", format, CRC-32 of the body, CRC-32 of the header's rest, counts (tokens, lines, sentences), name (16 bytes)
    int32       tokens, filled up with zeros to 8 bytes
    int64       starts of lines, starts of sentences

The name is a hash of text and tokenizer. The file is written aside and renamed, so two processes that make it at once make the same
file twice. A file whose checksum or size is wrong is made again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import DataError, StorageError
from mcore_longctx.manifest import fsync_folder, partial_path, refusals_as
from mcore_longctx.tasks.tokens import TextTokenizer, Tokens, line_ends, spell_tokens

__all__ = ["STEMS", "Haystack", "HaystackCut", "cached_haystack", "open_haystack"]

# beginnings of the sentences that tasks hide: a text that holds one has answers of its own
STEMS = ("The pass key for", "The secret number of", "The secret code of")

_MAGIC, _FORMAT = b"mcorehay", 1
_HEADER = struct.Struct("<8sIIIQQQ16s4x")
_BLOCK = 1 << 20  # bytes read at once for the checksum


@dataclass(frozen=True)
class HaystackCut:
    """A stretch of a haystack that ends where a line ends.

    Attributes:
        tokens: int64 [count].
        line_starts: where in them lines start, ascending int64 (0 and `count` included).
        sentence_starts: where a sentence starts behind a full stop of its own, with a token that begins with a space.
    """

    tokens: Tokens
    line_starts: Tokens
    sentence_starts: Tokens


@dataclass(frozen=True)
class Haystack:
    """Held-out text as a ring of tokens.

    Attributes:
        tokens: int [n], in memory or mapped from a file.
        line_starts: ascending int64, 1 to n: a line starts behind the token before. n stands for 0, as in any ring.
        sentence_starts: ascending int64, 1 to n - 1: the token before is a full stop alone, the token here begins with a space.
    """

    tokens: npt.NDArray[np.integer]
    line_starts: Tokens
    sentence_starts: Tokens

    @classmethod
    def from_documents(cls, documents: Sequence[str], tokenizer: TextTokenizer, *, where: object = None) -> Haystack:
        """Tokenize documents once and find the borders. A document that does not end its last line gets a newline.

        Raises:
            DataError: no text, or the text holds sentences of a task already.
        """
        parts: list[Tokens] = []
        for text in documents:
            stem = next((stem for stem in STEMS if stem in text), None)
            if stem is not None:
                raise DataError(f"the haystack holds the words {stem!r}: its answers would not be unique", where=where)
            whole = text if text.endswith("\n") else text + "\n"
            parts.append(np.array(tokenizer.encode(whole), dtype=np.int64))
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
        if not any(text.strip() for text in documents) or not len(tokens):
            raise DataError("the haystack holds no text", where=where)
        line_starts = line_ends(tokenizer, tokens)
        if not len(line_starts):
            raise DataError("no token of this tokenizer ends in a newline: needles need line starts", where=where)
        return cls(tokens, line_starts, _sentence_starts(tokenizer, tokens))

    def cut(self, start: int, count: int) -> HaystackCut:
        """`count` tokens that end where a line ends, from the ring at `start` or as little after it as that needs."""
        n = len(self.tokens)
        last = (start + count - 1) % n
        at = int(np.searchsorted(self.line_starts, last + 1))
        end = int(self.line_starts[at]) if at < len(self.line_starts) else int(self.line_starts[0]) + n
        begin = (start + end - last - 1) % n
        tokens = np.empty(count, np.int64)
        filled, source = 0, begin
        while filled < count:
            piece = self.tokens[source : source + count - filled]
            tokens[filled : filled + len(piece)] = piece
            filled, source = filled + len(piece), 0
        lines = _in_cut(self.line_starts, begin, count, n)
        return HaystackCut(tokens, np.union1d([0], lines), _in_cut(self.sentence_starts, begin, count, n))

    def unique_share(self, count: int) -> float:
        """Share of `count` tokens of the ring that is not a repetition, 0 to 1."""
        return min(1.0, len(self.tokens) / count)


def _in_cut(places: Tokens, begin: int, count: int, n: int) -> Tokens:
    """Those of the ring's places that lie in (0, count] from `begin`, turn by turn."""
    turns = np.arange((begin + count) // n + 1) * n - begin
    lows = np.searchsorted(places, -turns, side="right")
    highs = np.searchsorted(places, count - turns, side="right")
    return np.concatenate([places[low:high] + turn for low, high, turn in zip(lows, highs, turns, strict=True)])


def _sentence_starts(tokenizer: TextTokenizer, tokens: Tokens) -> Tokens:
    ids = np.unique(tokens)
    texts = spell_tokens(tokenizer, ids)
    stop = np.array([text == "." for text in texts], dtype=np.bool_)
    space = np.array([text.startswith(" ") for text in texts], dtype=np.bool_)
    at = np.searchsorted(ids, tokens)
    return np.flatnonzero(stop[at[:-1]] & space[at[1:]]) + 1


# ------------------------------------------------------------------------------------------------------------------ the cache


def cached_haystack(
    documents: Sequence[str],
    tokenizer: TextTokenizer,
    *,
    tokenizer_sha256: str,
    folder: Path,
    where: object = None,
    say: Callable[[str], None] = lambda line: None,
) -> Haystack:
    """The haystack of `documents`, mapped from a file in `folder`, which is made where it is missing or damaged.

    Args:
        documents: texts; their bytes are part of the file's name.
        tokenizer: encodes them, once.
        tokenizer_sha256: says which tokenizer it is; part of the name.
        folder: the cache; made if it is missing.
        where: named in errors about the text.
        say: takes a line when a damaged file is made again.

    Raises:
        DataError: as `Haystack.from_documents`.
        StorageError: the file cannot be read or written.
    """
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer_sha256} {len(documents)}".encode())
    for text in documents:
        raw = text.encode(errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    name = digest.digest()[:16]
    path = folder / _file_name(name)
    try:
        return open_haystack(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except DataError as error:
        say(f"{error}; it is made again")
    except OSError as error:
        raise StorageError(f"cannot be read ({error.strerror})", where=path) from None
    with refusals_as(StorageError, folder):  # before the long work
        folder.mkdir(parents=True, exist_ok=True)
    _write(Haystack.from_documents(documents, tokenizer, where=where), path, name)
    return open_haystack(path)


def open_haystack(path: Path) -> Haystack:
    """Map a file of `cached_haystack`. Every byte is checked (a gigabyte takes about a second), none stays in memory.

    Raises:
        DataError: damaged.
        FileNotFoundError: not there.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        counts = _read_header(header, path)
        at_lines = _HEADER.size + -(-4 * counts[0] // 8) * 8
        size = at_lines + 8 * (counts[1] + counts[2])
        if os.fstat(file.fileno()).st_size != size:
            raise DataError(f"damaged: {os.fstat(file.fileno()).st_size:,} bytes instead of {size:,}", where=path)
        checksum = 0
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
        if checksum != _HEADER.unpack(header)[2]:
            raise DataError("damaged: its checksum is wrong", where=path)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Haystack(
        np.frombuffer(data, "<i4", counts[0], _HEADER.size),
        np.frombuffer(data, "<i8", counts[1], at_lines),
        np.frombuffer(data, "<i8", counts[2], at_lines + 8 * counts[1]),
    )


def _read_header(header: bytes, path: Path) -> tuple[int, int, int]:
    """Counts of tokens, lines and sentences."""
    if len(header) < _HEADER.size:
        raise DataError("damaged: it ends in its header", where=path)
    magic, format_, body, own, tokens, lines, sentences, name = _HEADER.unpack(header)
    if magic != _MAGIC or format_ != _FORMAT or own != _header_crc(body, tokens, lines, sentences, name):
        raise DataError("damaged: its header is wrong", where=path)
    if path.name != _file_name(name):
        raise DataError(f"damaged: it is a copy of {_file_name(name)}", where=path)
    return tokens, lines, sentences


def _file_name(name: bytes) -> str:
    return f"haystack-{name.hex()}.tokens"


def _header_crc(body: int, tokens: int, lines: int, sentences: int, name: bytes) -> int:
    return zlib.crc32(struct.pack("<IQQQ16s", body, tokens, lines, sentences, name))


def _write(haystack: Haystack, path: Path, name: bytes) -> None:
    tokens = haystack.tokens.astype("<i4").tobytes()
    parts = [tokens + bytes(-len(tokens) % 8), haystack.line_starts.astype("<i8").tobytes()]
    parts.append(haystack.sentence_starts.astype("<i8").tobytes())
    body = 0
    for part in parts:
        body = zlib.crc32(part, body)
    counts = (len(haystack.tokens), len(haystack.line_starts), len(haystack.sentence_starts))
    header = _HEADER.pack(_MAGIC, _FORMAT, body, _header_crc(body, *counts, name), *counts, name)
    aside = partial_path(path)
    with refusals_as(StorageError, path):
        try:
            with aside.open("wb") as file:
                file.writelines([header, *parts])
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            fsync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)
