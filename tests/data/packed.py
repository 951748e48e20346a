"""A packed dataset made by hand, run by run: what `data pack` leaves, without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from mcore_longctx.data.files.arrays import write_arrays
from mcore_longctx.data.files.indexed import IndexedWriter
from mcore_longctx.data.files.sidecar import LITERAL, PADDING

SEPARATOR = (7, 8)
PAD = 3
VOCABULARY = 1000


@dataclass
class Packed:
    """What was written, in plain Python: one list of ids a sample, and (what, document, start, length) for each of its runs."""

    prefix: Path
    samples: list[list[int]]
    runs: list[list[tuple[str, int, int, int]]]
    names: list[tuple[str, str]]  # source and id of each document


def make_packed(
    prefix: Path,
    samples: int = 4,
    *,
    seq_length: int = 64,
    seed: int = 0,
    dtype: str = "<i4",
    sources: tuple[str, ...] = ("books", "wiki"),
    separator: tuple[int, ...] = SEPARATOR,
    **facts: Any,
) -> Packed:
    """Documents of 1 to 60 tokens behind each other with separators; each sample ends in some padding; every third run has no loss."""
    rng = np.random.default_rng(seed)
    packed = Packed(prefix, [], [], [])
    columns: dict[str, list[int]] = {name: [] for name in ("document", "start", "length", "loss")}
    first = [0]
    for _ in range(samples):
        ids: list[int] = []
        runs: list[tuple[str, int, int, int]] = []
        while len(ids) < seq_length - 4:
            if runs:
                count = min(len(separator), seq_length - len(ids))
                runs.append(("separator", LITERAL, 0, count))
                ids += separator[:count]
            length = min(int(rng.integers(1, 61)), seq_length - len(ids) - int(rng.integers(0, 4)))
            if length > 0:
                runs.append(("document", len(packed.names), int(rng.integers(0, 5)), length))
                ids += rng.integers(10, VOCABULARY, length).tolist()
                packed.names.append((sources[int(rng.integers(len(sources)))], f"dök-{len(packed.names)}"))
        if len(ids) < seq_length:
            runs.append(("padding", PADDING, 0, seq_length - len(ids)))
            ids += [PAD] * (seq_length - len(ids))
        for _, document, start, length in runs:
            for name, value in zip(columns, (document, start, length, len(columns["loss"]) % 3 != 0), strict=True):
                columns[name].append(value)
        first.append(len(columns["length"]))
        packed.samples.append(ids)
        packed.runs.append(runs)
    raw_ids = [name.encode() for _, name in packed.names]
    with IndexedWriter(prefix, dtype) as writer:
        for ids in packed.samples:
            writer.add(np.array(ids, dtype))
        checksum = writer.finish()
    arrays = {
        "first_run": np.array(first, np.int64),
        "document": np.array(columns["document"], np.int64),
        "start": np.array(columns["start"], np.int64),
        "length": np.array(columns["length"], np.int32),
        "loss": np.array(columns["loss"], np.bool_),
        "literals": np.array(separator, np.int32),
        "document_source": np.array([sources.index(source) for source, _ in packed.names], np.uint16),
        "id_stop": np.cumsum([len(raw) for raw in raw_ids]).astype(np.int64),
        "ids": np.frombuffer(b"".join(raw_ids), np.uint8),
        "crc32": np.array([crc32(np.array(ids, dtype).tobytes()) for ids in packed.samples], np.uint32),
    }
    head = {"format": 1, "kind": "sidecar", "seq_length": seq_length, "sources": sources, "documents": len(packed.names)}
    known = {"idx_crc32": checksum, "tokenizer_sha256": "ab" * 32, "vocab_size": VOCABULARY, "pad_token_id": PAD, "seed": seed}
    write_arrays(Path(f"{prefix}.runs"), arrays, head | known | facts)
    return packed
