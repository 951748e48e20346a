"""Packed data held against its manifest, its sidecar and the vocabulary; and any indexed dataset in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.data.indexed import IndexedReader
from mcore_longctx.data.samples import PackedSamples
from mcore_longctx.errors import DataError
from mcore_longctx.manifest import MANIFEST, verify_manifest

__all__ = ["describe_indexed", "find_prefix", "verify_data"]


def verify_data(folder: Path) -> Mapping[str, Any]:
    """Compare a folder of packed data with its manifest and with itself; return the manifest.

    Every file's sha256, every sample's checksum, and that every id is one of the tokenizer's.

    Raises:
        CheckpointError: a file is missing or differs from the manifest, or there is no manifest.
        DataError: the files do not belong together, or an id is outside the vocabulary.
    """
    manifest = verify_manifest(folder, "data")
    samples = PackedSamples(folder / str(manifest["name"]))
    if (len(samples), samples.seq_length) != (manifest["samples"], manifest["seq_length"]):
        raise DataError(
            f"{len(samples):,} samples of {samples.seq_length:,} tokens, the manifest says {manifest['samples']:,} of "
            f"{manifest['seq_length']:,}",
            where=folder,
            fix="build it again",
        )
    vocab_size = int(manifest["tokenizer"]["vocab_size"])
    for index in range(len(samples)):
        samples.check_sample(index)
        tokens = samples.tokens(index)
        highest = int(tokens.max())
        if highest >= vocab_size or int(tokens.min()) < 0:
            raise DataError(f"sample {index} holds id {highest:,}, the vocabulary ends at {vocab_size:,}", where=folder)
    return manifest


def find_prefix(path: Path) -> Path:
    """Prefix of the indexed dataset that `path` means: a prefix, a .bin or .idx file, or a folder that holds one pair.

    Raises:
        DataError: there is none, or more than one.
    """
    if path.is_dir():
        found = sorted(path.glob("*.idx"))
        if len(found) != 1:
            raise DataError(f"{len(found)} .idx files in this folder, expected one", where=path, fix="give a prefix")
        return found[0].with_suffix("")
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def describe_indexed(prefix: Path) -> dict[str, Any]:
    """Sizes of any indexed dataset, for people and JSON: sequences, documents, tokens, type, shortest and longest sequence."""
    reader = IndexedReader(prefix)
    lengths = reader.sequence_lengths
    return {
        "prefix": str(prefix),
        "sequences": len(reader),
        "documents": len(reader.document_indices) - 1,
        "tokens": int(lengths.sum(dtype="int64")),
        "dtype": reader.dtype.name,
        "shortest_sequence": int(lengths.min()) if len(reader) else 0,
        "longest_sequence": int(lengths.max()) if len(reader) else 0,
        "has_runs": Path(f"{prefix}.runs.npz").is_file(),
        "has_manifest": (prefix.parent / MANIFEST).is_file(),
    }
