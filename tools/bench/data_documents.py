"""What came out of a tokenizing run, whoever ran it: so that contenders that did different work are not compared."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Fingerprint", "fingerprint", "of_indexed", "of_shards"]


class Fingerprint(NamedTuple):
    """Of a set of documents in any order. Equal exactly if the token ids of every document are equal."""

    documents: int  # with at least one token
    tokens: int
    digest: str  # SHA-256 over the sorted hashes of the documents


def fingerprint(documents: Iterable[npt.ArrayLike]) -> Fingerprint:
    """Of documents as arrays of ids, [tokens] each, of any integer type."""
    hashes, tokens = [], 0
    for document in documents:
        ids = np.ascontiguousarray(document, np.dtype("<i8"))
        if len(ids):
            hashes.append(hashlib.blake2b(ids.data, digest_size=16).digest())
            tokens += len(ids)
    return Fingerprint(len(hashes), tokens, hashlib.sha256(b"".join(sorted(hashes))).hexdigest())


def of_indexed(prefix: Path) -> Fingerprint:
    """Of PREFIX.bin and PREFIX.idx, where a document may be several sequences."""
    return fingerprint(_indexed_documents(prefix))


def _indexed_documents(prefix: Path) -> Iterator[npt.NDArray[Any]]:
    from mcore_longctx.data.files.indexed import IndexedReader

    reader = IndexedReader(prefix)
    borders = reader.document_indices.tolist()
    for start, stop in itertools.pairwise(borders):
        sequences = [reader[row] for row in range(start, stop)]
        yield sequences[0] if len(sequences) == 1 else np.concatenate([np.zeros(0, reader.dtype), *sequences])


def of_shards(folder: Path) -> Fingerprint:
    """Of the shards that `mcore-longctx data tokenize` left in `folder`."""
    return fingerprint(_shard_documents(folder))


def _shard_documents(folder: Path) -> Iterator[npt.NDArray[Any]]:
    from mcore_longctx.data.files.shards import read_shard

    for number in range(len(list(folder.glob("*.docs")))):
        shard = read_shard(folder, number)
        tokens, start = shard.tokens(), 0
        for length in shard.length.tolist():
            yield tokens[start : start + length]
            start += length
