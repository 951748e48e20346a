"""Hashes that say whether two plans are the same, in whatever order their documents were read."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import Runs
from mcore_longctx.data.planning.draw import hash_order
from mcore_longctx.data.planning.layout import run_blocks

__all__ = ["lengths_sha256", "plan_sha256"]

_ROWS = 1 << 18  # documents at once


def plan_sha256(table: DocumentTable, runs: Runs) -> str:
    """Hash of all runs with keys of documents in place of rows: the same for any order in which documents were read."""
    columns = [hashlib.sha256() for _ in range(5)]
    for block in run_blocks(runs):
        document = runs.document[block]
        known = document >= 0
        key = document.astype(np.uint64)  # -1 and -2 become the largest numbers
        key[known] = table.key[document[known]]
        rows: list[npt.NDArray[Any]] = [key, known, runs.start[block], runs.length[block], runs.loss[block]]
        for digest, column in zip(columns, rows, strict=True):
            digest.update(column.tobytes())
    head = np.array([runs.seq_length, len(runs), *runs.literals.tolist()], "<i8").tobytes()
    return hashlib.sha256(head + b"".join(digest.digest() for digest in columns)).hexdigest()


def lengths_sha256(table: DocumentTable) -> str:
    """Hash of keys, lengths and loss flags in the order of the keys: the same for any order in which documents were read."""
    columns, order = [hashlib.sha256() for _ in range(2)], hash_order(len(table), lambda rows: table.key[rows])
    for low in range(0, len(order), _ROWS):
        rows = order[low : low + _ROWS]
        for digest, column in zip(columns, (table.key, table.length), strict=True):
            digest.update(column[rows].tobytes())
    key = table.key[table.loss_document] if len(table.loss_document) else np.zeros(0, np.uint64)
    rows = np.lexsort((table.loss_stop, key))
    flags = key[rows].tobytes() + table.loss_stop[rows].tobytes() + table.loss_flag[rows].tobytes()
    return hashlib.sha256(b"".join(digest.digest() for digest in columns) + flags).hexdigest()
