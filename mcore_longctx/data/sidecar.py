"""`NAME.runs.npz`: which document every token of every sample came from, and whether it carries loss.

A sample is a list of runs. A run is a stretch of one document, a stretch of literal tokens (the separator), or padding; each has
one loss flag. The index of Megatron cannot say this (one sample is one sequence there), and a separator made of text cannot be
found again in the tokens, so it is written beside them. A numpy archive without pickled objects: reading it runs no code.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import DataError

__all__ = ["LITERAL", "PADDING", "Run", "Runs", "read_runs", "write_runs"]

LITERAL = -1  # `source` of a run that is taken from `literals`
PADDING = -2  # `source` of a run that repeats the padding token
_ARRAYS: dict[str, Any] = {
    "first_run": np.int64,
    "source": np.int32,
    "document": np.int64,
    "start": np.int64,
    "length": np.int64,
    "loss": np.bool_,
    "literals": np.int32,
    "crc32": np.uint32,
}


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
    """All runs of a packed data set, as arrays.

    The runs of sample i are rows first_run[i] to first_run[i + 1]; their lengths add up to `seq_length`.
    """

    seq_length: int
    sources: tuple[str, ...]
    document_ids: tuple[str, ...]  # rows that `document` points to
    first_run: npt.NDArray[np.int64]  # [samples + 1]
    source: npt.NDArray[np.int32]  # [runs] row of `sources`, LITERAL or PADDING
    document: npt.NDArray[np.int64]  # [runs] row of `document_ids`, -1 for literals and padding
    start: npt.NDArray[np.int64]  # [runs] tokens from the start of the document or of `literals`
    length: npt.NDArray[np.int64]  # [runs] tokens
    loss: npt.NDArray[np.bool_]  # [runs] whether these tokens are learned
    literals: npt.NDArray[np.int32]
    crc32: npt.NDArray[np.uint32]  # [samples] of the sample's bytes in .bin

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.first_run) - 1

    def sample(self, index: int) -> list[Run]:
        """The runs of one sample, in order."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        runs = []
        for row in range(int(self.first_run[index]), int(self.first_run[index + 1])):
            source, document = int(self.source[row]), int(self.document[row])
            runs.append(
                Run(
                    source=self.sources[source] if source >= 0 else None,
                    document=self.document_ids[document] if source >= 0 else None,
                    start=int(self.start[row]),
                    length=int(self.length[row]),
                    loss=bool(self.loss[row]),
                    is_padding=source == PADDING,
                )
            )
        return runs

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Position after each run in the stream of all samples, [runs]."""
        return np.cumsum(self.length, dtype=np.int64)

    def loss_flags(self, sample: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Loss flag of the tokens `start` to `stop` of a sample, bool [stop - start]."""
        if start >= stop:
            return np.zeros(0, dtype=np.bool_)
        low, high = sample * self.seq_length + start, sample * self.seq_length + stop
        first, last = np.searchsorted(self.ends, [low, high - 1], side="right")
        ends = np.minimum(self.ends[first : last + 1], high)
        return np.repeat(self.loss[first : last + 1], np.diff(ends, prepend=low))


def write_runs(prefix: Path | str, runs: Runs) -> Path:
    """Write `PREFIX.runs.npz` and return its path. Equal runs give equal bytes."""
    path = Path(f"{prefix}.runs.npz")
    words = json.dumps({"format": 1, "seq_length": runs.seq_length, "sources": runs.sources, "document_ids": runs.document_ids})
    arrays = {name: np.asarray(getattr(runs, name), dtype=dtype) for name, dtype in _ARRAYS.items()}
    np.savez_compressed(path, allow_pickle=False, words=np.frombuffer(words.encode(), np.uint8), **arrays)
    return path


def read_runs(prefix: Path | str) -> Runs:
    """Read `PREFIX.runs.npz`.

    Raises:
        DataError: the file is missing or damaged, or its runs do not add up to whole samples.
    """
    path = Path(f"{prefix}.runs.npz")
    try:
        # opened here: numpy leaves the file open when it is no archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            words = json.loads(archive["words"].tobytes())
            arrays = {name: archive[name] for name in _ARRAYS}
        runs = Runs(
            seq_length=int(words["seq_length"]),
            sources=tuple(words["sources"]),
            document_ids=tuple(words["document_ids"]),
            **arrays,
        )
    except FileNotFoundError:
        raise DataError(
            "no such file", where=path, fix="the sidecar belongs beside .bin and .idx: build the data again"
        ) from None
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"not a runs file, or damaged ({error})", where=path, fix="build the data again") from None
    for fault in _faults(runs):
        raise DataError(fault, where=path, fix="the file is damaged: build the data again")
    return runs


def _faults(runs: Runs) -> Iterator[str]:
    """What is wrong, the first fault first: later checks rely on earlier ones."""
    first, rows = runs.first_run, len(runs.length)
    if any(getattr(runs, name).dtype != dtype or getattr(runs, name).ndim != 1 for name, dtype in _ARRAYS.items()):
        yield "an array has another type"
    if any(len(getattr(runs, name)) != rows for name in ("source", "document", "start", "loss")):
        yield "arrays of different lengths"
    if len(first) < 1 or first[0] != 0 or first[-1] != rows or (np.diff(first) < 1).any() or len(runs.crc32) != len(runs):
        yield "first_run does not go over all runs"
    if (runs.length < 1).any() or (runs.start < 0).any():
        yield "a run without tokens"
    if (runs.source < PADDING).any() or (runs.source >= len(runs.sources)).any():
        yield "a run of an unknown source"
    documents, literal = runs.document[runs.source >= 0], runs.source == LITERAL
    if (documents < 0).any() or (documents >= len(runs.document_ids)).any():
        yield "a run of an unknown document"
    if ((runs.start + runs.length)[literal] > len(runs.literals)).any():
        yield "a run of more literal tokens than there are"
    borders = np.concatenate(([0], runs.ends))[first]
    if (borders != np.arange(len(first)) * runs.seq_length).any():
        yield "runs do not add up to whole samples"
