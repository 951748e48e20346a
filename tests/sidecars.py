"""Sidecars of made-up samples, column by column."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.data import IndexedReader
from mcore_longctx.data.files.arrays import write_arrays
from mcore_longctx.data.files.sidecar import RUN_COLUMNS


def write_runs(
    prefix: Path, *, seq_length: int, documents: list[tuple[str, str]], literals: Any = (), facts: Any = None, **runs: Any
) -> None:
    """PREFIX.runs beside a .bin/.idx that is there. documents: (source, id); runs: first_run, document, start, length, loss."""
    reader = IndexedReader(prefix)
    sources = list(dict.fromkeys(source for source, _ in documents))
    ids = [name.encode() for _, name in documents]
    columns = {name: np.asarray(runs[name], dtype) for name, dtype in RUN_COLUMNS.items()} | {
        "first_run": np.asarray(runs["first_run"], np.int64),
        "literals": np.asarray(literals, np.int32),
        "crc32": np.array([zlib.crc32(np.ascontiguousarray(reader[i]).data) for i in range(len(reader))], np.uint32),
        "document_source": np.array([sources.index(source) for source, _ in documents], np.uint16),
        "id_stop": np.cumsum([len(name) for name in ids], dtype=np.int64),
        "ids": np.frombuffer(b"".join(ids), np.uint8),
    }
    idx_crc32 = zlib.crc32(Path(f"{prefix}.idx").read_bytes())
    head = {"format": 1, "kind": "sidecar", "seq_length": seq_length, "sources": sources, "documents": len(ids)}
    write_arrays(Path(f"{prefix}.runs"), columns, head | {"idx_crc32": idx_crc32, "dtype": reader.dtype.name} | (facts or {}))
