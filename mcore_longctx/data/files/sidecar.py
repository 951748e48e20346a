"""`NAME.runs`: which document every token of every sample came from, and whether it carries loss.

A sample is a list of runs. A run is a stretch of one document, a stretch of literal tokens (a separator, a label), or padding; each
has one loss flag. The index of Megatron cannot say this (one sample is one sequence there), and a separator made of text cannot be
found again in the tokens, so it is written beside them. A plan is the same list before any token is copied: every way of sampling
and packing is a function from a table of documents to runs.

The file is in safetensors layout (`data/files/arrays.py`), memory-mapped: opening it costs no memory however many runs there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import file_crc32, map_arrays
from mcore_longctx.errors import DataError

__all__ = ["LITERAL", "PADDING", "RUN_COLUMNS", "SIDECAR_COLUMNS", "Run", "Runs", "check_index", "open_runs", "read_runs"]

LITERAL = -1  # `document` of a run that is taken from `literals`
PADDING = -2  # `document` of a run that repeats the padding token

RUN_COLUMNS: dict[str, Any] = {"document": np.int64, "start": np.int64, "length": np.int32, "loss": np.bool_}
SIDECAR_COLUMNS: dict[str, Any] = {"document_source": np.uint16, "id_stop": np.int64, "ids": np.uint8, "crc32": np.uint32}
_TYPES = {**RUN_COLUMNS, **SIDECAR_COLUMNS, "first_run": np.int64, "literals": np.int32}
_BLOCK = 1 << 20  # rows that are checked at once
_MAX_SEQ_LENGTH = 2**31 - 1  # as in the index


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stretch of a sample, in words: `source` and `document` are None for literal tokens and for padding."""

    source: str | None
    document: str | None
    start: int  # tokens from the start of the document, or of the literals
    length: int  # tokens
    loss: bool
    is_padding: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """All runs of a plan or of a packed data set, as columns.

    The runs of sample i are rows first_run[i] to first_run[i + 1]; their lengths add up to `seq_length`.
    """

    seq_length: int
    sources: tuple[str, ...]
    first_run: npt.NDArray[np.int64]  # [samples + 1]
    document: npt.NDArray[np.int64]  # [runs] LITERAL, PADDING, or a document: in a plan a row of the table, in a sidecar of `ids`
    start: npt.NDArray[np.int64]  # [runs] tokens from the start of the document or of `literals`
    length: npt.NDArray[np.int32]  # [runs] tokens, at least 1
    loss: npt.NDArray[np.bool_]  # [runs] whether these tokens are learned
    literals: npt.NDArray[np.int32]
    # only in a sidecar:
    document_source: npt.NDArray[np.uint16] = field(
        default_factory=lambda: np.zeros(0, np.uint16)
    )  # [documents] row of `sources`
    id_stop: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [documents] bytes in `ids`
    ids: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))  # UTF-8
    crc32: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))  # [samples] of the bytes in .bin
    facts: dict[str, Any] = field(default_factory=dict)  # what else the file says: hashes, seed, versions

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.first_run) - 1

    def document_id(self, document: int) -> str:
        """Id of one document of a sidecar."""
        start = int(self.id_stop[document - 1]) if document else 0
        return bytes(self.ids[start : int(self.id_stop[document])]).decode(errors="replace")

    def rows(self, sample: int) -> slice:
        """Rows of the runs of one sample.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return slice(int(self.first_run[sample]), int(self.first_run[sample + 1]))

    def sample(self, index: int) -> list[Run]:
        """The runs of one sample of a sidecar, in order."""
        rows = self.rows(index)
        columns = (getattr(self, name)[rows].tolist() for name in RUN_COLUMNS)
        return [self._in_words(*row) for row in zip(*columns, strict=True)]

    def _in_words(self, document: int, start: int, length: int, loss: bool) -> Run:
        known = document >= 0
        return Run(
            source=self.sources[int(self.document_source[document])] if known else None,
            document=self.document_id(document) if known else None,
            start=start,
            length=length,
            loss=loss,
            is_padding=document == PADDING,
        )

    def loss_flags(self, sample: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Loss flag of the tokens `start` to `stop` of a sample, bool [stop - start]."""
        if start >= stop:
            return np.zeros(0, dtype=np.bool_)
        rows = self.rows(sample)
        ends = np.cumsum(self.length[rows], dtype=np.int64)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        ends = np.minimum(ends[first : last + 1], stop)
        return np.repeat(self.loss[rows][first : last + 1], np.diff(ends, prepend=start))


def read_runs(prefix: Path | str) -> Runs:
    """Map `PREFIX.runs`, the sidecar of packed samples.

    Raises:
        DataError: the file is missing or damaged, or its runs do not add up to whole samples.
    """
    path = Path(f"{prefix}.runs")
    if not path.is_file():
        raise DataError("no such file", where=path, fix="the sidecar belongs beside .bin and .idx: build the data again")
    return open_runs(path, kind="sidecar")


def open_runs(path: Path, *, kind: str) -> Runs:
    """Map a file of runs. kind: `plan` or `sidecar`.

    Raises:
        DataError: missing, damaged, of another kind, or its runs do not add up to whole samples.
    """
    arrays, facts = map_arrays(path)
    try:
        fault = None if facts["kind"] == kind else f"a {facts['kind']}, expected a {kind}"
        runs = Runs(seq_length=facts["seq_length"], sources=tuple(facts["sources"]), facts=facts, **arrays)
        documents = facts["documents"]
    except (KeyError, TypeError, ValueError):
        raise DataError("not a file of runs", where=path, fix="build the data again") from None
    for found in [fault] if fault else _faults(runs, documents, is_sidecar=kind == "sidecar"):
        raise DataError(found, where=path, fix="the file is damaged: build the data again")
    return runs


def check_index(prefix: Path | str, runs: Runs) -> None:
    """Compare `PREFIX.idx` with the checksum in its sidecar.

    An index has no checksum of its own: another border of documents, or uint16 read as int16, agrees with all the rest of it.

    Raises:
        DataError: it is not the index that was written with this sidecar.
    """
    path = Path(f"{prefix}.idx")
    if file_crc32(path) != runs.facts.get("idx_crc32"):
        raise DataError(
            "is not the index that the sidecar was written with (checksum differs)",
            where=path,
            fix="a file was damaged or replaced: build the data again",
        )


def _faults(runs: Runs, documents: Any, *, is_sidecar: bool) -> Iterator[str]:
    """What is wrong, the first fault first: later checks rely on earlier ones. documents: how many `document` may point to."""
    yield from _faults_of_form(runs, documents)
    first, rows = runs.first_run, len(runs.length)
    if any(len(getattr(runs, name)) != rows for name in RUN_COLUMNS):
        yield "columns of different lengths"
    if len(first) < 1 or first[0] != 0 or first[-1] != rows or _least_step(first) < 1:
        yield "first_run does not go over all runs"
    if is_sidecar:
        stops = runs.id_stop
        if len(runs.crc32) != len(runs) or not len(runs.document_source) == len(stops) == documents:
            yield "columns of different lengths"
        if (documents and (stops[0] < 0 or _least_step(stops) < 0)) or (int(stops[-1]) if documents else 0) != len(runs.ids):
            yield "ids of documents that do not add up"
        if documents and int(runs.document_source.max()) >= len(runs.sources):
            yield "a document of an unknown source"
    filled = 0  # tokens before this block
    for low in range(0, rows, _BLOCK):
        block = slice(low, min(low + _BLOCK, rows))
        document, start, length = runs.document[block], runs.start[block], runs.length[block]
        if (length < 1).any() or (start < 0).any():
            yield "a run without tokens"
        if (document < PADDING).any() or (document >= documents).any():
            yield "a run of an unknown document"
        if (start > len(runs.literals) - length.astype(np.int64))[document == LITERAL].any():
            yield "a run of more literal tokens than there are"
        begins = filled + np.cumsum(length, dtype=np.int64) - length
        inside = slice(*np.searchsorted(first, [block.start, block.stop]).tolist())
        at = begins[first[inside] - low]
        if (at != np.arange(inside.start, inside.start + len(at)) * runs.seq_length).any():
            yield "runs do not add up to whole samples"
        filled = int(begins[-1]) + int(length[-1])
    if filled != len(runs) * runs.seq_length:
        yield "runs do not add up to whole samples"


def _faults_of_form(runs: Runs, documents: Any) -> Iterator[str]:
    """Types and numbers that cannot be: what everything else relies on."""
    if any(getattr(runs, name).dtype != dtype for name, dtype in _TYPES.items()):
        yield "a column has another type"
    if len(runs.loss) and int(runs.loss.view(np.uint8).max()) > 1:
        yield "a loss flag that is neither true nor false"
    if type(runs.seq_length) is not int or not 1 <= runs.seq_length <= _MAX_SEQ_LENGTH:
        yield f"a seq_length of {runs.seq_length!r}"
    if type(documents) is not int or not 0 <= documents < 2**63:
        yield f"a number of documents of {documents!r}"
    if not all(isinstance(source, str) for source in runs.sources):
        yield "a source whose name is no text"
    begin_tokens = runs.facts.get("begin_tokens", 0)
    if type(begin_tokens) is not int or not 0 <= begin_tokens <= len(runs.literals):
        yield f"{begin_tokens!r} tokens that begin a document"


def _least_step(column: npt.NDArray[np.int64]) -> int:
    """Smallest difference of neighbours, 1 if there are none. In blocks: the column may be mapped and long."""
    steps = (np.diff(column[low : low + _BLOCK + 1]) for low in range(0, len(column) - 1, _BLOCK))
    return min((int(step.min()) for step in steps), default=1)
