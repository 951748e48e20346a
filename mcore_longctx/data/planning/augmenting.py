"""`augment` over a whole plan: the runs of one file rearranged sample by sample into another, in blocks.

Each block is made twice, once to count its runs and once to write them, as in `data/planning/layout.py`: no memory grows with the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import new_arrays
from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import RUN_COLUMNS, Runs, open_runs
from mcore_longctx.data.methods.augment import Augmenter
from mcore_longctx.data.methods.labels import TextEncoder, make_labels
from mcore_longctx.data.methods.pieces import Columns, units_of
from mcore_longctx.data.planning.layout import release
from mcore_longctx.recipe.data import AugmentSection

__all__ = ["Augmented", "augment_runs"]

IntArray = npt.NDArray[np.int64]

_ROWS = 1 << 16  # runs at once, whole samples
_FEWEST_LABELS = 1024
_LABELS = 4  # for each piece of the sample that has the most


@dataclass(frozen=True)
class Augmented:
    """What was done to a plan."""

    facts: dict[str, Any]  # for plan.json and the sidecar: settings, and for utk the markers and labels
    cut_tokens: list[int]  # of each source: tokens of documents that labels pushed out of their samples


def augment_runs(
    source: Path,
    path: Path,
    how: AugmentSection,
    *,
    seed: int,
    table: DocumentTable,
    tokenizer: Callable[[], TextEncoder] | None,
    where: object,
) -> Augmented:
    """Write the runs of `source`, rearranged, to `path`, whole or not at all.

    Args:
        source: a plan's file of runs.
        path: of the file of runs to write.
        how: the section of the recipe.
        seed: of every decision.
        table: of the documents.
        tokenizer: of the data; asked for with type utk only.
        where: the tokenizer, for errors.

    Raises:
        DataError: the tokenizer has no tokens for markers and labels, or no space is left.
    """
    runs = open_runs(source, kind="plan")
    literals = runs.literals.astype(np.int64)
    facts: dict[str, Any] = {
        "type": how.type,
        "chunks": list(how.chunks),
        "probability": how.probability,
        "documents_per_group": how.documents_per_group,
        "keep_order": how.keep_order,
        "backtrace": how.backtrace,
        "separator_tokens": len(literals),
        "documents_learned_whole": not len(table.loss_document),
    }
    labels = None
    if how.type == "utk":
        assert tokenizer is not None
        most = max(how.chunks) * _most_units(runs)
        count = max(_FEWEST_LABELS, 1 << math.ceil(math.log2(_LABELS * most)))
        labels, added = make_labels(tokenizer(), cuts=max(how.chunks) - 1, count=count, base=len(literals), where=where)
        literals = np.concatenate([literals, added])
        facts["labels"] = labels.as_dict()
    augmenter = Augmenter(
        how=how, seed=seed, seq_length=runs.seq_length, begin_tokens=int(runs.facts["begin_tokens"]), labels=labels
    )
    counts = [np.zeros(1, np.int64)]
    lost = np.zeros(len(table.sources), np.int64)
    for first_sample, columns, first_run in _blocks(runs):
        changed, first = augmenter(columns, first_run, first_sample)
        counts.append(np.diff(first))
        lost += _tokens(table, columns) - _tokens(table, changed)
    first_run = np.cumsum(np.concatenate(counts))
    sizes: dict[str, Any] = {name: (dtype, int(first_run[-1])) for name, dtype in RUN_COLUMNS.items()}
    sizes |= {"first_run": (np.int64, len(first_run)), "literals": (np.int32, len(literals))}
    with new_arrays(path, sizes, runs.facts) as file:
        file["first_run"][:], file["literals"][:] = first_run, literals
        out, at = [file[name] for name in RUN_COLUMNS], 0
        for first_sample, columns, first in _blocks(runs):
            changed, _ = augmenter(columns, first, first_sample)
            rows = slice(at, at + len(changed[0]))
            for column, values in zip(out, changed, strict=True):
                column[rows] = values
            at = rows.stop
            release(out)
    return Augmented(facts=facts, cut_tokens=lost.tolist())


def _blocks(runs: Runs) -> Iterator[tuple[int, Columns, IntArray]]:
    """Whole samples: number of the first, their runs, and the rows of the block at which they begin."""
    sample = 0
    while sample < len(runs):
        low = int(runs.first_run[sample])
        stop = max(sample + 1, int(np.searchsorted(runs.first_run, low + _ROWS, side="right")) - 1)
        rows = slice(low, int(runs.first_run[stop]))
        yield sample, tuple(getattr(runs, name)[rows] for name in RUN_COLUMNS), runs.first_run[sample : stop + 1] - low
        sample = stop


def _most_units(runs: Runs) -> int:
    """Stretches of documents in the sample that has most, at least 1."""
    begin = int(runs.facts["begin_tokens"])
    most = 1
    for _, columns, first_run in _blocks(runs):
        most = max(most, int(np.bincount(units_of(columns, first_run, begin).sample, minlength=1).max()))
    return most


def _tokens(table: DocumentTable, columns: Columns) -> IntArray:
    """Tokens of documents of each source."""
    known = columns[0] >= 0
    return np.bincount(table.source[columns[0][known]], columns[2][known], len(table.sources)).astype(np.int64)
