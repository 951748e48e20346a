"""The table of before and after: rows for the page, and as text for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from mcore_longctx.report.counts import (
    Average,
    by_length,
    compare,
    needle_counts,
    p_value,
    percent_interval,
    ruler_averages,
    ruler_scorings,
    ruler_tasks,
    suite_counts,
)
from mcore_longctx.report.losses import loss_bins, percent_change, relative_change, short_loss, windows_note
from mcore_longctx.report.run_folder import RunFolder, Window, read_run_folder
from mcore_longctx.report.verdict import judge
from mcore_longctx.tasks.statistics import mean_interval, score_interval

__all__ = ["summary_rows", "summary_table"]

WIDTH = 120
_BINS = 3  # of the loss by position: the last ones
SummaryRow = tuple[str, list[str]]


def summary_rows(folder: RunFolder) -> list[SummaryRow]:
    """Rows of the before/after table: a title and one text per column. A title that begins with a space belongs to the row above."""
    return [*_needle_rows(folder), *_ruler_rows(folder), *_loss_rows(folder), *_short_rows(folder), *_suite_rows(folder)]


def _needle_rows(folder: RunFolder) -> list[SummaryRow]:
    rows = []
    for kind in folder.needle_kinds:
        counts = [needle_counts(column.needles.get(kind, {}), by_length) for column in folder.columns]
        shared = ", shared" if kind.shared else ""
        for length in sorted({length for found in counts for length in found}):
            cells = [f"{found[length]} ({percent_interval(found[length])})" if length in found else "-" for found in counts]
            rows.append((f"{kind.plural} found at {tokens(length)}{shared}", cells))
    return rows


def _ruler_rows(folder: RunFolder) -> list[SummaryRow]:
    """Columns that were scored in two ways stand in rows of their own: they are not comparable."""
    rulers = [column.ruler for column in folder.columns]
    tasks = ruler_tasks(rulers)
    of = f", {len(tasks)} tasks" if len(tasks) > 1 else ""
    ways = ruler_scorings(rulers)
    rows = []
    for way in ways:
        averages = [ruler_averages(rows, tasks) if ruler_scorings([rows]) == [way] else {} for rows in rulers]
        for length in sorted({length for found in averages for length in found}):
            scored = f", {way}" if len(ways) > 1 else ""
            rows.append((f"ruler-like at {tokens(length)}{of}{scored}", [_average(found.get(length)) for found in averages]))
    return rows


def _average(average: Average | None) -> str:
    if average is None:
        return "-"
    interval = average.interval
    if not average.is_whole:
        return f"{average.tasks} tasks yet"
    if average.samples[0] != average.samples[1]:  # then points of all samples are no average of tasks
        return f"{100 * interval.mean:.1f} % ({percent_interval(interval)})"
    return f"{average.count} ({percent_interval(interval)})"


def _loss_rows(folder: RunFolder) -> list[SummaryRow]:
    bins = [loss_bins(column) for column in folder.columns]
    last = sorted({one for found in bins for one in found})[-_BINS:]
    return [
        (f"loss at positions {tokens(first)}-{tokens(end)}", _losses([found.get((first, end), {}) for found in bins]))
        for first, end in last
    ]


def _short_rows(folder: RunFolder) -> list[SummaryRow]:
    short = [short_loss(column) for column in folder.columns]
    if not any(short):
        return []
    lengths = {int(row["length"]) for column in folder.columns for row in column.short_context.values()}
    base = short_loss(folder.base) if folder.base is not None else {}
    changes = [relative_change(base, found) for found in short]
    cells = [
        "-" if column is folder.base or change is None else percent_change(change)
        for column, change in zip(folder.columns, changes, strict=True)
    ]
    return [(f"loss, windows of {tokens(max(lengths))}", _losses(short)), ("  its change, paired", cells)]


def _suite_rows(folder: RunFolder) -> list[SummaryRow]:
    counts, changes = [], []
    for column in folder.columns:
        right = [float(row["correct"]) for row in column.short_suite.values()]
        counts.append(f"{sum(right):.0f}/{len(right)} ({percent_interval(score_interval(right))})" if right else "-")
        changed = compare(folder.base.short_suite, column.short_suite) if folder.base not in (None, column) else None
        changes.append(f"+{changed.won} -{changed.lost}, p = {p_value(changed.p)}" if changed is not None else "-")
    if all(cell == "-" for cell in counts):
        return []
    tasks = {task for column in folder.columns for task in suite_counts(column.short_suite)}
    return [(f"short suite, {len(tasks)} task{'s' * (len(tasks) > 1)}", counts), ("  questions won, lost", changes)]


def tokens(count: int) -> str:
    """A length for a narrow table: 4,096, 128K, 1M.

    >>> tokens(4096), tokens(131_072), tokens(1 << 21)
    ('4,096', '128K', '2M')
    """
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= 1 << 16 and count % size == 0:
            return f"{count // size:,}{unit}"
    return f"{count:,}"


def _losses(columns: Sequence[Mapping[Window, float]]) -> list[str]:
    return [
        f"{mean_interval(list(windows.values())).mean:.3f}{windows_note(columns, windows)}" if windows else "-"
        for windows in columns
    ]


def summary_table(run_folder: Path) -> str:
    """The before/after table as text, with intervals and a verdict, as `make demo` prints it; at most 120 characters wide.

    Raises:
        ConfigError: not a run folder, or a damaged file.
    """
    folder = read_run_folder(run_folder)
    verdict = judge(folder)
    rows = summary_rows(folder)
    lines = _text_tables([column.label for column in folder.columns], rows) if folder.columns else []
    notes = ["Pass keys, facts: found/asked (Wilson 95 %)."] if folder.needle_kinds else []
    if any(column.ruler for column in folder.columns):
        notes.append("Ruler-like: points/samples over all tasks (95 %); our own prompts, not comparable with RULER.")
    if any(column.short_suite for column in folder.columns):
        notes.append("Short suite: right/asked (Wilson 95 %); won and lost against the base, exact McNemar p.")
    notes.append("Loss: nats per token on held-out text; ± is a paired 95 % interval over windows.")
    lines += ["", *textwrap.wrap(" ".join(notes), WIDTH), f"Verdict: {verdict.headline}."]
    for sentence in verdict.sentences:
        lines += textwrap.wrap(sentence, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _text_tables(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """One table, or several below each other where the columns do not fit beside each other; the first column stands in each."""
    titles = ["", *(title for title, _ in rows)]
    texts = [[label, *(cells[i] for _, cells in rows)] for i, label in enumerate(head)]
    first = [title.ljust(max(map(len, titles))) for title in titles]
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in texts]
    blocks: list[list[list[str]]] = [[]]
    for column in columns:
        width = len(first[0]) + sum(2 + len(other[0]) for other in [*blocks[-1], column])
        if width > WIDTH and blocks[-1]:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        table = ["  ".join(cells) for cells in zip(first, *block, strict=True)]
        lines += [""] * bool(lines) + [table[0], "-" * len(table[0]), *table[1:]]
    return lines
