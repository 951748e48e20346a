"""`data verify`: any indexed dataset, and what stands beside it, compared byte for byte in one pass.

Damage is looked for everywhere, not only up to the first place, and is named by sequence and, where a sidecar knows them, by source,
document and token of the document. Memory is one block; the cost is little more than that of hashing the bytes once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.index_file import Index, read_index
from mcore_longctx.data.files.indexed import find_prefix
from mcore_longctx.data.files.shards import Shard, read_shard
from mcore_longctx.data.files.sidecar import Runs, check_index, read_runs
from mcore_longctx.data.inspect.scan import DatasetScan, Faults, Locate, highest_id, token_blocks
from mcore_longctx.errors import DataError, DifferenceFound, LongctxError
from mcore_longctx.manifest import MANIFEST, read_manifest, sha256_file

__all__ = ["check_data", "check_tokens", "find_prefix", "raise_for_faults", "verify_data", "verify_tokens"]


def verify_data(
    path: Path | str, *, vocab_size: int | None = None, separator: Sequence[int] | None = None, max_faults: int = 10
) -> dict[str, Any]:
    """`check_data`, with an error if anything is wrong.

    Raises:
        DifferenceFound: the data is damaged; names the first `max_faults` places.
        CheckpointError, DataError: there is nothing to check, as in `check_data`.
    """
    facts = check_data(path, vocab_size=vocab_size, separator=separator, max_faults=max_faults)
    raise_for_faults(facts)
    return facts


def check_data(
    path: Path | str, *, vocab_size: int | None = None, separator: Sequence[int] | None = None, max_faults: int = 10
) -> dict[str, Any]:
    """Compare packed data, or any indexed dataset, with all that is known of it.

    Always: sizes, pointers, lengths, documents. With a sidecar: checksum of every sample, runs that add up, separators and padding
    that are the tokens they should be; pieces of documents that `augment` spread over a sample are there once and in order. With a manifest: sha256 of every file. With a vocabulary: every id.

    Args:
        path: a folder with a manifest, a folder with one .idx, or a prefix.
        vocab_size: of the tokenizer. None: the one that manifest or sidecar names, if they do.
        separator: ids. With a sidecar: what its literals must be. Without: what every document must end with.
        max_faults: how many places are named.

    Returns:
        facts for JSON: prefix, sequences, documents, tokens, dtype, samples and seq_length (with a sidecar), vocab_size, checked
        (what was compared), faults (in words), fault_count.

    Raises:
        CheckpointError: the manifest is damaged, or of a folder of another kind.
        DataError: a file is missing, or there is more than one dataset.
    """
    path, faults = Path(path), Faults(max_faults)
    manifest: Mapping[str, Any] = {}
    if path.is_dir() and (path / MANIFEST).is_file():
        manifest = read_manifest(path, "data")
        prefix = path / str(manifest.get("name", ""))
    else:
        prefix = find_prefix(path)
    for suffix in (".idx", ".bin"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise DataError(
                "no such file", where=f"{prefix}{suffix}", fix="give a folder or the path of .bin and .idx without suffix"
            )
    runs = _read_runs(prefix, faults)
    vocab_size = next((size for size in (vocab_size, *_known_vocabularies(manifest, runs)) if size is not None), None)
    facts: dict[str, Any] = {"prefix": str(prefix), "vocab_size": vocab_size, "checked": ["sizes", "pointers", "documents"]}
    digest = _check_files(path, prefix, manifest, faults)
    try:
        index = read_index(Path(f"{prefix}.idx"))
    except DataError as error:
        faults.add(error.where, error.what)
    else:
        facts |= {"sequences": len(index), "documents": len(index.document_indices) - 1, "dtype": index.dtype.name}
        facts["tokens"] = index.bytes // index.dtype.itemsize
        if runs is not None:
            facts |= {"samples": len(runs), "seq_length": runs.seq_length}
            runs = _agreeing(prefix, index, runs, faults)
        checked = DatasetScan(prefix, index, runs, faults, _locator(prefix.parent, runs)).check(vocab_size, separator, digest)
        facts["checked"] += checked
        if runs is not None and "augment" in runs.facts:
            _check_pieces(prefix, runs, faults)
            facts["checked"].append("pieces")
    if manifest:
        facts["checked"].append("manifest")
        _check_counts(path, manifest, facts, faults)
    return facts | {"faults": faults.words, "fault_count": faults.count}


def raise_for_faults(facts: Mapping[str, Any]) -> None:
    """Raise DifferenceFound if `check_data` or `check_tokens` found anything."""
    if not facts["fault_count"]:
        return
    more = facts["fault_count"] - len(facts["faults"])
    text = "; ".join(facts["faults"]) + (f"; and {more:,} more" if more else "")
    raise DifferenceFound(text, fix="make the damaged files again, or take them from a copy")


def _known_vocabularies(manifest: Mapping[str, Any], runs: Runs | None) -> Iterator[int]:
    tokenizer = manifest.get("tokenizer")
    for place in (tokenizer, runs.facts if runs is not None else None):
        if isinstance(place, dict) and isinstance(place.get("vocab_size"), int):
            yield place["vocab_size"]


def _read_runs(prefix: Path, faults: Faults) -> Runs | None:
    if not Path(f"{prefix}.runs").is_file():
        return None
    try:
        return read_runs(prefix)
    except DataError as error:
        faults.add(error.where, error.what)
        return None


def _agreeing(prefix: Path, index: Index, runs: Runs, faults: Faults) -> Runs | None:
    """The sidecar, if it can be the one of this index."""
    try:
        check_index(prefix, runs)
    except DataError as error:
        faults.add(error.where, error.what)
    if len(index) != len(runs):
        faults.add(f"{prefix}.runs", f"{len(runs):,} samples, the index has {len(index):,} sequences")
        return None
    wrong = index.sequence_lengths != runs.seq_length
    if wrong.any():
        at = int(np.argmax(wrong))
        faults.add(
            index.path,
            f"sequence {at:,} has {index.sequence_lengths[at]:,} tokens, the sidecar says {runs.seq_length:,}",
            int(wrong.sum()),
        )
        return None
    return runs


def _check_pieces(prefix: Path, runs: Runs, faults: Faults) -> None:
    """Whether every sample that `augment` rearranged can be untied."""
    from mcore_longctx.data.inspect.untie import untie

    try:
        for sample in range(len(runs)):
            for fault in untie(runs, sample):
                faults.add(f"{prefix}.runs", f"sample {sample:,}: {fault}")
    except (KeyError, TypeError, ValueError, AttributeError):
        faults.add(f"{prefix}.runs", "what it says about augment is damaged")


def _locator(folder: Path, runs: Runs | None) -> Locate:
    """Finds the damaged token of a sample in the shards that it was copied from, if they are there. Opened at the first damage."""
    originals: list[Any] = []

    def locate(sample: int, tokens: npt.NDArray[Any]) -> int | None:
        if not originals:
            from mcore_longctx.data.inspect.originals import Originals

            try:
                originals.append(Originals(folder, runs) if runs is not None else None)
            except LongctxError:  # they are not needed to verify the samples, only to say more
                originals.append(None)
        position: int | None = originals[0].first_difference(sample, tokens) if originals[0] is not None else None
        return position

    return locate


def _check_files(folder: Path, prefix: Path, manifest: Mapping[str, Any], faults: Faults) -> str | None:
    """Files of the manifest. The tokens, which are read anyway, are left to the caller: their sha256 is returned."""
    digest = None
    for name, row in manifest.get("files", {}).items():
        file = folder / name
        if not file.is_file():
            faults.add(file, "listed in the manifest but missing")
        elif file == Path(f"{prefix}.bin"):
            digest = row["sha256"]
        elif file.stat().st_size != row["bytes"]:
            faults.add(file, f"{file.stat().st_size:,} bytes, the manifest says {row['bytes']:,}")
        elif sha256_file(file) != row["sha256"]:
            faults.add(file, "contents differ from the manifest's sha256")
    return digest


def _check_counts(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any], faults: Faults) -> None:
    for name in ("samples", "seq_length", "tokens"):
        if name in manifest and name in facts and manifest[name] != facts[name]:
            faults.add(folder / MANIFEST, f"says {manifest[name]:,} {name}, there are {facts[name]:,}")


# ------------------------------------------------------------------ shards and plan
def verify_tokens(folder: Path | str, *, vocab_size: int | None = None, max_faults: int = 10) -> dict[str, Any]:
    """`check_tokens`, with an error if anything is wrong.

    Raises:
        DifferenceFound: something is damaged.
        CheckpointError, DataError: there is nothing to check, as in `check_tokens`.
    """
    facts = check_tokens(folder, vocab_size=vocab_size, max_faults=max_faults)
    raise_for_faults(facts)
    return facts


def check_tokens(folder: Path | str, *, vocab_size: int | None = None, max_faults: int = 10) -> dict[str, Any]:
    """Compare the token shards of OUT/tokens with their tables, and settings and plan with their checksums.

    Args:
        folder: OUT.
        vocab_size: None: the one that OUT/tokens/manifest.json names, if it is there.
        max_faults: how many places are named.

    Returns:
        facts for JSON: shards, documents, tokens, is_whole (whether every shard is there), plan (whether there is one),
        faults (in words), fault_count.

    Raises:
        CheckpointError: the manifest of the shards is damaged.
        DataError: there are no shards.
    """
    from mcore_longctx.data.planning.plan import read_plan
    from mcore_longctx.data.tokens.job import open_job

    folder, faults = Path(folder), Faults(max_faults)
    tokens, settings, plan = folder / "tokens", folder / "tokens" / "settings.json", folder / "plan" / "plan.json"
    manifest = read_manifest(tokens, "tokens") if (tokens / MANIFEST).is_file() else {}
    vocab_size = next((size for size in (vocab_size, *_known_vocabularies(manifest, None)) if size is not None), None)
    expected = manifest.get("shards")
    numbers = sorted(int(path.stem) for path in tokens.glob("*.docs") if path.stem.isdigit())
    if not numbers and expected is None:
        raise DataError("no shards here", where=tokens, fix="run `data tokenize`")
    if expected is not None:
        numbers = list(range(len(expected)))
    counts = {"shards": 0, "documents": 0, "tokens": 0}
    for number in numbers:
        try:
            shard = read_shard(tokens, number)
            found = _check_shard(shard, vocab_size, faults)
        except DataError as error:
            faults.add(error.where, error.what)
            continue
        if expected is not None and (expected[number]["tokens"], expected[number]["tokens_crc32"]) != found:
            faults.add(shard.path, "is not the shard that the manifest lists (tokens or checksum differ)")
        for name, count in (("shards", 1), ("documents", len(shard.length)), ("tokens", found[0])):
            counts[name] += count
    steps: list[tuple[Path, Callable[[], object]]] = [
        (settings, lambda: open_job(folder)),
        (plan, lambda: read_plan(plan.parent)),
    ]
    for file, read in steps:
        if file.is_file():
            try:
                read()
            except DataError as error:
                faults.add(error.where, error.what)
    facts = {**counts, "is_whole": expected is not None, "plan": plan.is_file(), "vocab_size": vocab_size}
    return facts | {"faults": faults.words, "fault_count": faults.count}


def _check_shard(shard: Shard, vocab_size: int | None, faults: Faults) -> tuple[int, int]:
    """Tokens and checksum of a shard's file. Raises DataError if it is missing or has another size."""
    tokens, checksum = len(shard.tokens()), 0
    highest = highest_id(shard.dtype, vocab_size)
    for first, block in token_blocks(shard.path, tokens * shard.dtype.itemsize, shard.dtype):
        checksum = zlib.crc32(block.data, checksum)
        unsigned = block.view(f"u{block.itemsize}")
        if highest is not None and int(unsigned.max()) > highest:
            at = first + int(np.argmax(unsigned > highest))
            row = int(np.searchsorted(np.cumsum(shard.length), at, side="right"))
            text = f"document {shard.document_id(row)!r} holds id {int(block[at - first]):,}, outside of the vocabulary"
            faults.add(shard.path, text, int((unsigned > highest).sum()))
    if checksum != shard.facts["tokens_crc32"]:
        faults.add(shard.path, "its checksum differs from the one in its table")
    return tokens, checksum
