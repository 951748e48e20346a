"""Document lengths of each source before and after: counts by power of two, their table and their picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.shards import DocumentTable
from mcore_longctx.data.sidecar import Runs

__all__ = ["SourceLengths", "length_name", "measure_lengths", "plot_lengths"]

IntArray = npt.NDArray[np.int64]

# Okabe-Ito: told apart by readers with any colour blindness, and in grey
_BEFORE, _AFTER = "#999999", "#0072B2"


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceLengths:
    """Lengths of one source's documents, and how many tokens of each are in the samples. Row d is one document."""

    name: str
    length: IntArray  # [documents] tokens, as read
    used: IntArray  # [documents] tokens in the samples, repetitions counted

    def between(self, low: int, high: int | None) -> tuple[int, int, int, int]:
        """Documents of `low` to `high` - 1 tokens: documents and tokens before, documents and tokens after."""
        inside = (self.length >= low) & ((self.length < high) if high is not None else True)
        used = self.used[inside]
        return int(inside.sum()), int(self.length[inside].sum()), int((used > 0).sum()), int(used.sum())

    def buckets(self) -> list[dict[str, int]]:
        """One row for each power of two from the shortest to the longest document."""
        if not len(self.length):
            return []
        rows = []
        for power in range(int(self.length.min()).bit_length() - 1, int(self.length.max()).bit_length()):
            low, high = 1 << power, 1 << (power + 1)
            names = ("documents_before", "tokens_before", "documents_after", "tokens_after")
            rows.append({"from": low, "to": high - 1} | dict(zip(names, self.between(low, high), strict=True)))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Totals and buckets, for JSON."""
        documents, tokens, documents_after, tokens_after = self.between(0, None)
        return {
            "documents_before": documents,
            "tokens_before": tokens,
            "documents_after": documents_after,
            "tokens_after": tokens_after,
            "median_length": int(np.median(self.length)) if documents else 0,
            "max_length": int(self.length.max(initial=0)),
            "buckets": self.buckets(),
        }


def measure_lengths(table: DocumentTable, runs: Runs) -> list[SourceLengths]:
    """Lengths of every source. runs: with `document` as rows of the table, as `lay_out` makes them."""
    is_document = runs.source >= 0
    used = np.zeros(len(table), np.int64)
    np.add.at(used, runs.document[is_document], runs.length[is_document])
    return [
        SourceLengths(name=name, length=table.length[table.source == index], used=used[table.source == index])
        for index, name in enumerate(table.sources)
    ]


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = [source.buckets() for source in sources]
    powers = [bucket["from"].bit_length() - 1 for buckets in rows for bucket in buckets]
    low, high = min(powers), max(powers)
    width = max(6.0, 1.8 + 0.62 * (high - low + 1))
    figure = Figure(figsize=(width, 1.1 + 1.9 * len(sources)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
    for panel, source, buckets in zip(panels, sources, rows, strict=True):
        at = np.array([bucket["from"].bit_length() - 0.5 for bucket in buckets])  # between two ticks
        before, after = ([bucket[key] for bucket in buckets] for key in ("tokens_before", "tokens_after"))
        panel.bar(at - 0.2, before, 0.38, color=_BEFORE, label=f"{words[0]}: {sum(before):,} tokens")
        panel.bar(
            at + 0.2, after, 0.38, color=_AFTER, hatch="///", edgecolor="white", linewidth=0, label=f"{words[1]}: {sum(after):,}"
        )
        for border in borders:
            panel.axvline(math.log2(border), color="black", linewidth=0.8, linestyle=":")
        panel.set_title(source.name, loc="left", fontsize=10, parse_math=False)  # a name may hold a $
        panel.set_ylabel("tokens")
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
        panel.set_axisbelow(True)
    panels[-1].set_xlim(low - 0.2, high + 1.2)
    panels[-1].set_xticks(range(low, high + 2), [length_name(1 << power) for power in range(low, high + 2)])
    note = f"; dotted: {' and '.join(f'{border:,}' for border in borders)}" if borders else ""
    panels[-1].set_xlabel(f"document length in tokens{note}")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(path, metadata={"Software": None})
