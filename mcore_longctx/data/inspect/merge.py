"""`data merge`: several indexed datasets as one, in constant memory.

Megatron's own merge keeps all lengths in Python lists and does not look at the size of a `.bin`: a cut one shifts every token behind
it. Here each input is checked first, bytes are copied by the kernel, and columns go from map to file in blocks.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import new_arrays
from mcore_longctx.data.files.index_file import Index, write_index
from mcore_longctx.data.files.indexed import IndexedReader
from mcore_longctx.data.files.sidecar import LITERAL, RUN_COLUMNS, SIDECAR_COLUMNS, Runs, check_index, read_runs
from mcore_longctx.data.workspace import remove_leftovers
from mcore_longctx.errors import DataError
from mcore_longctx.manifest import fsync_folder, partial_path, readable_bytes, versions

__all__ = ["merge_in_words", "merge_indexed"]

_COPY = 1 << 26  # bytes copied at once where the kernel does not copy by itself
_ROWS = 1 << 20
_MUST_AGREE = ("tokenizer_sha256", "vocab_size", "pad_token_id", "begin_tokens")  # what a reader takes from a sidecar's facts
_MAX_SOURCES = 2**16
# between these files the kernel does not copy: other file systems, old kernels
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class _Input:
    prefix: Path
    index: Index


def merge_indexed(prefixes: Sequence[Path | str], out: Path | str) -> dict[str, Any]:
    """Write OUT.bin and OUT.idx: the sequences of all inputs, in the order given. Documents stay documents.

    If every input has a sidecar of the same seq_length, OUT.runs is written too: sources by name, documents renumbered, checksums
    kept. The inputs are only read. Nothing appears under a final name before all is written, the index appears last, and what is
    there is never replaced. What a killed merge into OUT left under partial names is removed.

    Args:
        prefixes: paths without suffix, or of one of the files.
        out: path without suffix, or of one of the files.

    Returns:
        facts for `merge_in_words` and JSON: prefix, inputs, sequences, documents, tokens, bytes, dtype, runs, note.

    Raises:
        DataError: OUT is there; an input is missing, cut or damaged; token types, tokenizers or kinds of files do not agree; no
            space is left.
    """
    if not prefixes:
        raise DataError("nothing to merge", where=out, fix="name at least one input")
    out = _without_suffix(Path(out))
    if out.name.startswith(".") or not out.name:
        raise DataError(f"{str(out)!r} names no file", where="merge", fix="name what is to be written: FOLDER/NAME")
    files = {suffix: out.with_name(f"{out.name}.{suffix}") for suffix in ("runs", "bin", "idx")}  # the order in which they appear
    _refuse_existing(files)
    remove_leftovers(out.parent, of=[path.name for path in files.values()])
    # opened and closed one by one: their maps are kept, and no descriptor
    inputs = [_Input(prefix, IndexedReader(prefix).index) for prefix in (_without_suffix(Path(prefix)) for prefix in prefixes)]
    _check_agree(inputs)
    runs, note = _read_all_runs(inputs)
    partial = {suffix: partial_path(path) for suffix, path in files.items()}
    try:
        _copy_tokens(inputs, partial["bin"])
        checksum = write_index(partial["idx"], inputs[0].index.dtype, [given.index.columns for given in inputs])
        if runs:
            _write_runs(partial["runs"], runs, [given.prefix.name for given in inputs], checksum)
        _refuse_existing(files)
        for suffix, path in files.items():
            if suffix != "runs" or runs:
                partial[suffix].rename(path)
        fsync_folder(out.parent)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=out, fix="make room or choose another folder") from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    size = sum(given.index.bytes for given in inputs)
    return {
        "prefix": str(out),
        "inputs": [str(given.prefix) for given in inputs],
        "sequences": sum(len(given.index) for given in inputs),
        "documents": sum(len(given.index.document_indices) - 1 for given in inputs),
        "tokens": size // inputs[0].index.dtype.itemsize,
        "bytes": size,
        "dtype": inputs[0].index.dtype.name,
        "runs": bool(runs),
        "note": note,
    }


def merge_in_words(facts: dict[str, Any]) -> str:
    """What `merge_indexed` did, for the screen."""
    runs = "with a sidecar" if facts["runs"] else f"without a sidecar: {facts['note']}"
    return (
        f"{facts['prefix']}: {len(facts['inputs'])} inputs, {facts['sequences']:,} sequences in {facts['documents']:,} documents, "
        f"{facts['tokens']:,} tokens ({facts['dtype']}, {readable_bytes(facts['bytes'])}), {runs}"
    )


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".runs") else path


def _refuse_existing(files: dict[str, Path]) -> None:
    there = [path for path in files.values() if path.exists()]
    if not there:
        return
    if files["idx"] in there:
        raise DataError("file is already there", where=there[0], fix="choose another name or remove it")
    # the index appears last; but that they were ours is nowhere written
    raise DataError(
        f"file is already there, but no {files['idx'].name}: an earlier merge was killed, if it was one that wrote it",
        where=there[0],
        fix=f"choose another name or remove {' and '.join(path.name for path in there)}",
    )


def _check_agree(inputs: Sequence[_Input]) -> None:
    first = inputs[0]
    for given in inputs[1:]:
        if given.index.dtype != first.index.dtype:
            raise DataError(
                f"holds {given.index.dtype} tokens, {first.prefix} holds {first.index.dtype}",
                where=given.prefix,
                fix="merge what one tokenizer made, or tokenize again",
            )
        if (given.index.sequence_modes is None) != (first.index.sequence_modes is None) and len(given.index) and len(first.index):
            raise DataError(f"one of this and {first.prefix} is multimodal, the other is not", where=given.prefix)


def _copy_tokens(inputs: Sequence[_Input], path: Path) -> None:
    with path.open("wb", buffering=0) as target:
        for given in inputs:
            source = Path(f"{given.prefix}.bin")
            if _copy(source, target.fileno(), given.index.bytes) != given.index.bytes:
                raise DataError("became shorter while it was copied", where=source, fix="merge what nobody writes to")
        os.fsync(target.fileno())


def _copy(source: Path, target: int, size: int) -> int:
    """Append `size` bytes of a file to a descriptor; return how many there were."""
    copied, by_kernel = 0, True
    with source.open("rb", buffering=0) as file:
        while by_kernel and copied < size:
            try:
                count = os.copy_file_range(file.fileno(), target, min(size - copied, 1 << 30))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                count = 0
            copied, by_kernel = copied + count, count > 0
        while copied < size and (block := file.read(min(size - copied, _COPY))):
            view = memoryview(block)
            while view:
                view = view[os.write(target, view) :]
            copied += len(block)
    return copied


# ------------------------------------------------------------------ sidecars
def _read_all_runs(inputs: Sequence[_Input]) -> tuple[list[Runs], str | None]:
    """Sidecars of all inputs, checked; or none, and why."""
    without = [given.prefix for given in inputs if not Path(f"{given.prefix}.runs").is_file()]
    if without:
        return [], f"{len(without)} of {len(inputs)} inputs have none, first {without[0]}"
    runs = [read_runs(given.prefix) for given in inputs]
    for given, part in zip(inputs, runs, strict=True):
        check_index(given.prefix, part)
        if len(part) != len(given.index):
            raise DataError(
                f"{len(given.index):,} sequences, its sidecar says {len(part):,}", where=given.prefix, fix="build it again"
            )
    first = runs[0]
    for given, part in zip(inputs, runs, strict=True):
        if part.seq_length != first.seq_length:
            return [], f"samples of {first.seq_length:,} and of {part.seq_length:,} tokens"
        for name in _MUST_AGREE:
            mine, known = part.facts.get(name), _first_known(runs, name)
            if mine is not None and mine != known:
                raise DataError(
                    f"has {name} {mine!r}, an input before it has {known!r}",
                    where=given.prefix,
                    fix="merge what was made in one way",
                )
        if part.facts.get("augment") != first.facts.get("augment"):
            raise DataError(
                f"was made with another augment, or none, than {inputs[0].prefix}",
                where=given.prefix,
                fix="merge what was made in one way",
            )
        if (_first_known(runs, "begin_tokens") or "augment" in first.facts) and not np.array_equal(part.literals, first.literals):
            raise DataError(
                f"has other separators than {inputs[0].prefix}", where=given.prefix, fix="merge what was made in one way"
            )
    return runs, None


def _write_runs(path: Path, runs: list[Runs], names: list[str], idx_crc32: int) -> None:
    sources = tuple(dict.fromkeys(source for part in runs for source in part.sources))
    if len(sources) > _MAX_SOURCES:
        raise DataError(f"{len(sources):,} sources, a sidecar has at most {_MAX_SOURCES:,}", where=path)
    literals, literal_base = _join_literals(runs)
    counted = {**dict.fromkeys((*RUN_COLUMNS, *SIDECAR_COLUMNS)), "first_run": None}
    columns: dict[str, Any] = {name: (getattr(runs[0], name).dtype, sum(len(getattr(r, name)) for r in runs)) for name in counted}
    columns["first_run"] = (np.int64, 1 + sum(len(part) for part in runs))
    columns["literals"] = (np.int32, len(literals))
    facts = _join_facts(runs, names) | {"sources": sources, "documents": columns["id_stop"][1], "idx_crc32": idx_crc32}
    with new_arrays(path, columns, facts) as file:
        file["literals"][:] = literals
        at = dict.fromkeys(columns, 0)
        at["first_run"] = 1

        def append(name: str, column: npt.NDArray[Any], shift: int = 0) -> None:
            for low in range(0, len(column), _ROWS):
                block = column[low : low + _ROWS]
                file[name][at[name] : at[name] + len(block)] = block + shift if shift else block
                at[name] += len(block)

        for part, base in zip(runs, literal_base, strict=True):
            rows, documents, id_bytes = at["length"], at["id_stop"], at["ids"]
            row_of = np.array([sources.index(source) for source in part.sources], np.uint16)
            for low in range(0, len(part.length), _ROWS):
                block = slice(low, low + _ROWS)
                document = part.document[block]
                append("document", np.where(document >= 0, document + documents, document))
                append("start", np.where(document == LITERAL, part.start[block] + base, part.start[block]))
            for low in range(0, len(part.document_source), _ROWS):
                append("document_source", row_of[part.document_source[low : low + _ROWS]])
            for name in ("length", "loss", "ids", "crc32"):
                append(name, getattr(part, name))
            append("id_stop", part.id_stop, id_bytes)
            append("first_run", part.first_run[1:], rows)


def _join_literals(runs: list[Runs]) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Literals of all parts, each kind once, and where those of each part begin."""
    begins: dict[bytes, int] = {}
    kinds: list[npt.NDArray[np.int32]] = []
    at = 0
    for part in runs:
        if part.literals.tobytes() not in begins:
            begins[part.literals.tobytes()] = at
            kinds.append(part.literals)
            at += len(part.literals)
    return np.concatenate(kinds), [begins[part.literals.tobytes()] for part in runs]


def _join_facts(runs: list[Runs], names: list[str]) -> dict[str, Any]:
    """What all parts say alike; the rest stands in `merged`, one entry an input."""
    first = runs[0].facts
    same = {name: first[name] for name in first if all(part.facts.get(name, ...) == first[name] for part in runs)}
    same |= {name: known for name in _MUST_AGREE if (known := _first_known(runs, name)) is not None}
    left_out = {*same, "sources", "documents", "idx_crc32", "versions"}
    merged = [
        {"name": name} | {key: value for key, value in part.facts.items() if key not in left_out}
        for name, part in zip(names, runs, strict=True)
    ]
    return same | {"merged": merged, "versions": versions()}


def _first_known(runs: list[Runs], name: str) -> Any:
    """The first value of a fact that is not None: data without padding knows no padding token."""
    return next((part.facts[name] for part in runs if part.facts.get(name) is not None), None)
