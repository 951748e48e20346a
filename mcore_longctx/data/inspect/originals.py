"""Where the tokens of packed samples came from: the shards beside them. A checksum tells that a sample is damaged, this where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.sidecar import Runs
from mcore_longctx.data.planning.plan import read_plan
from mcore_longctx.data.tokens.job import open_job, read_documents_table
from mcore_longctx.errors import DataError

__all__ = ["Originals"]


class Originals:
    """Plan and token shards of a run folder, from which its samples were copied.

    Args:
        out: run folder.
        runs: sidecar of its samples.

    Raises:
        DataError: no shards or no plan there, damaged, or of other samples.
    """

    def __init__(self, out: Path, runs: Runs) -> None:
        self._plan, facts = read_plan(out / "plan")
        if facts.get("plan_sha256") != runs.facts.get("plan_sha256") or len(self._plan) != len(runs):
            raise DataError("is the plan of other samples", where=out / "plan")
        self._table = read_documents_table(open_job(out))

    def first_difference(self, sample: int, tokens: npt.NDArray[Any]) -> int | None:
        """Position of the first token that is not the one that the document holds; None if all are. tokens: the whole sample."""
        rows = self._plan.rows(sample)
        at = 0
        for document, start, length in zip(
            self._plan.document[rows].tolist(), self._plan.start[rows].tolist(), self._plan.length[rows].tolist(), strict=True
        ):
            if document >= 0:
                shard = int(np.searchsorted(self._table.shard_first, document, side="right")) - 1
                begin = int(self._table.token_offset[document]) + start
                expected = self._table.shards[shard].tokens()[begin : begin + length]
                wrong = tokens[at : at + length] != expected
                if wrong.any():
                    return at + int(np.argmax(wrong))
            at += length
        return None
