"""Document lengths of each source before and after: counts by power of two, their table and their picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import Runs
from mcore_longctx.data.planning.layout import run_blocks

__all__ = ["SourceLengths", "length_name", "measure_lengths", "plot_lengths", "source_borders", "tokens_used"]

IntArray = npt.NDArray[np.int64]

# Okabe-Ito: told apart by readers with any colour blindness, and in grey
_BEFORE, _AFTER = "#999999", "#0072B2"

_COUNTS = ("documents_before", "tokens_before", "documents_after", "tokens_after")
_BLOCK = 1 << 18  # rows at once


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceLengths:
    """Documents of one source by length, and how many of their tokens are in the samples.

    Row i counts documents of edge[i] to edge[i + 1] - 1 tokens. Edges are all powers of two up to the longest document, and the
    borders of length sampling.
    """

    name: str
    edges: IntArray  # [rows + 1] tokens
    counts: IntArray  # [rows, 4] documents and tokens as read, documents and tokens in the samples (repetitions counted)
    median: int  # tokens
    longest: int  # tokens

    def between(self, low: int, high: int | None) -> tuple[int, int, int, int]:
        """Documents of `low` to `high` - 1 tokens: documents and tokens before, documents and tokens after.

        low, high: among the edges, or outside of them.
        """
        inside = (self.edges[:-1] >= low) & ((self.edges[:-1] < high) if high is not None else True)
        found = self.counts[inside].sum(axis=0).tolist()
        return found[0], found[1], found[2], found[3]

    def buckets(self) -> list[dict[str, int]]:
        """One row for each power of two from the shortest to the longest document."""
        filled = np.flatnonzero(self.counts[:, 0])
        if not len(filled):
            return []
        rows = []
        for power in range(int(self.edges[filled[0]]).bit_length() - 1, self.longest.bit_length()):
            low, high = 1 << power, 1 << (power + 1)
            rows.append({"from": low, "to": high - 1} | dict(zip(_COUNTS, self.between(low, high), strict=True)))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Totals and buckets, for JSON."""
        totals = dict(zip(_COUNTS, self.between(0, None), strict=True))
        return {**totals, "median_length": self.median, "max_length": self.longest, "buckets": self.buckets()}


def source_borders(table: DocumentTable) -> list[int]:
    """Row at which each source begins, and the number of all rows: `source` is ascending."""
    numbers = np.arange(len(table.sources), dtype=table.source.dtype)  # another type would copy the column
    return [*np.searchsorted(table.source, numbers).tolist(), len(table)]


def tokens_used(table: DocumentTable, runs: Runs) -> IntArray:
    """Tokens of each document in the samples, repetitions counted, int64 [documents]. runs: of a plan."""
    used = np.zeros(len(table), np.int64)
    for block in run_blocks(runs):
        document = runs.document[block]
        known = document >= 0
        np.add.at(used, document[known], runs.length[block][known].astype(np.int64))
    return used


def measure_lengths(table: DocumentTable, used: IntArray, borders: Sequence[int] = ()) -> list[SourceLengths]:
    """Lengths of every source.

    Args:
        table: of the documents.
        used: of `tokens_used`, [documents].
        borders: lengths at which `between` is to be asked for, beside powers of two.
    """
    longest = int(table.length.max(initial=1))
    powers = [1 << power for power in range(longest.bit_length() + 1)]
    edges = np.unique(np.array([*powers, *(border for border in borders if border < powers[-1])], np.int64))
    rows = len(edges) - 1
    border = source_borders(table)
    found = []
    for index, name in enumerate(table.sources):
        counts = np.zeros((rows, 4), np.int64)
        for block in _blocks(border[index], border[index + 1]):
            length, tokens = table.length[block], used[block]
            row = np.searchsorted(edges, length, side="right") - 1
            # sums of a block are below 2^53, so that float64 is exact
            for column, weights in enumerate((None, length, tokens > 0, tokens)):
                counts[:, column] += np.bincount(row, weights, rows).astype(np.int64)
        mine = table.length[border[index] : border[index + 1]]
        median = int(np.median(mine)) if len(mine) else 0
        found.append(SourceLengths(name=name, edges=edges, counts=counts, median=median, longest=int(mine.max(initial=0))))
    return found


def length_name(tokens: int) -> str:
    """4096 -> 4K, 1048576 -> 1M, 100 -> 100."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


def plot_lengths(
    sources: Sequence[SourceLengths], path: Path, *, title: str, words: tuple[str, str], borders: Sequence[int] = ()
) -> None:
    """One panel a source: tokens by document length, before and after, as bars over powers of two.

    words: what before and after are called; borders: lengths to mark with a line, in tokens.
    """
    # here, because it costs more than most plans
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = [source.buckets() for source in sources]
    powers = [bucket["from"].bit_length() - 1 for buckets in rows for bucket in buckets]
    low, high = min(powers), max(powers)
    width, height = max(8.5, 1.8 + 0.5 * (high - low + 1)), 1.3 + 1.9 * len(sources)
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
    # margins in inches; letting matplotlib find them would double the time
    figure.subplots_adjust(left=0.9 / width, right=1 - 0.2 / width, bottom=0.6 / height, top=1 - 0.75 / height, hspace=0.3)
    for panel, source, buckets in zip(panels, sources, rows, strict=True):
        at = np.array([bucket["from"].bit_length() - 0.5 for bucket in buckets])  # between two ticks
        before, after = ([bucket[key] for bucket in buckets] for key in ("tokens_before", "tokens_after"))
        panel.bar(at - 0.2, before, 0.38, color=_BEFORE, label=f"{words[0]}: {sum(before):,} tokens")
        panel.bar(
            at + 0.2, after, 0.38, color=_AFTER, hatch="///", edgecolor="white", linewidth=0, label=f"{words[1]}: {sum(after):,}"
        )
        for border in filter(None, borders):  # 0 has no place on an axis of powers of two
            panel.axvline(math.log2(border), color="black", linewidth=0.8, linestyle=":")
        panel.set_title(source.name, loc="left", fontsize=10, parse_math=False)  # a name may hold a $
        panel.set_ylabel("tokens")
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderaxespad=0.0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
        panel.set_axisbelow(True)
    panels[-1].set_xlim(low - 0.2, high + 1.2)
    panels[-1].set_xticks(range(low, high + 2), [length_name(1 << power) for power in range(low, high + 2)])
    note = f"; dotted: {' and '.join(f'{border:,}' for border in borders)}" if borders else ""
    panels[-1].set_xlabel(f"document length in tokens{note}")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 3})


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for low in range(start, stop, _BLOCK):
        yield slice(low, min(low + _BLOCK, stop))
