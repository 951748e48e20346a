"""Counts, losses and the verdict: what the report and the table of `make demo` say, computed from the evaluation files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.report.run_folder import Column, Row, RunFolder, read_run_folder
from mcore_longctx.tasks.statistics import MeanInterval, exact_mcnemar, mean_interval, paired_mean_interval, wilson_interval

__all__ = [
    "SHORT_CONTEXT_LIMIT",
    "Count",
    "Verdict",
    "compare_needles",
    "judge",
    "loss_bins",
    "needle_counts",
    "relative_change",
    "short_loss",
    "summary_rows",
    "summary_table",
]

SHORT_CONTEXT_LIMIT = 0.02  # the base's short-context loss may rise by this share; more counts as damage
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Count:
    """`right` of `all` needle samples, with Wilson's 95 % interval."""

    right: int
    all: int

    @property
    def rate(self) -> float:
        """Share of right samples; 0 without samples."""
        return self.right / self.all if self.all else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 %."""
        return wilson_interval(self.right, self.all)

    @property
    def certainty(self) -> float:
        """1 minus the width of the interval: 0.2 for 1/1, 0.72 for 10/10, 0.94 for 60/60."""
        low, high = self.interval
        return 1 - (high - low)

    def __str__(self) -> str:
        return f"{self.right}/{self.all}"


@dataclass(frozen=True)
class Verdict:
    """`extended` says whether the context grew by the project's own measure; `sentences` say why, with numbers."""

    extended: bool | None
    sentences: list[str]

    @property
    def headline(self) -> str:
        """One line. `None` means that there is too little to judge."""
        if self.extended is None:
            return "not judged"
        return "the context was extended" if self.extended else "extension not shown"


def needle_counts(column: Column, by: Callable[[Row], Any]) -> dict[Any, Count]:
    """Right and all samples per group, for example per length, or per (length, depth)."""
    right: dict[Any, int] = {}
    every: dict[Any, int] = {}
    for row in column.needle.values():
        group = by(row)
        every[group] = every.get(group, 0) + 1
        right[group] = right.get(group, 0) + bool(row["correct"])
    return {group: Count(right[group], every[group]) for group in sorted(every)}


def by_length(row: Row) -> int:
    """Group of a needle row: its length."""
    return int(row["length"])


def by_cell(row: Row) -> tuple[int, float]:
    """Group of a needle row: its cell of the grid."""
    return int(row["length"]), float(row["depth"])


def compare_needles(before: Column, after: Column, length: int) -> tuple[int, int, float] | None:
    """(lost, won, exact p) on the samples of one length that both columns measured; None if they share none.

    A sample counts as the same when its seed and its expected answer are.
    """
    lost = won = same = 0
    for key, row in before.needle.items():
        other = after.needle.get(key)
        if key[0] != length or other is None or (row["seed"], row.get("expected")) != (other["seed"], other.get("expected")):
            continue
        same += 1
        lost += bool(row["correct"]) and not other["correct"]
        won += bool(other["correct"]) and not row["correct"]
    return (lost, won, exact_mcnemar(lost, won)) if same else None


def loss_bins(column: Column) -> dict[tuple[int, int], dict[int, float]]:
    """(first, end) position of each bin -> window -> mean loss in nats per token."""
    bins: dict[tuple[int, int], dict[int, float]] = {}
    for window, row in sorted(column.loss_by_position.items()):
        for first, end, count, total in zip(row["edges"][:-1], row["edges"][1:], row["counts"], row["sums"], strict=True):
            if count:
                bins.setdefault((first, end), {})[window] = total / count
    return bins


def short_loss(column: Column) -> dict[int, float]:
    """Window -> mean loss in nats per token at the base model's own length."""
    return {window: row["sum"] / row["count"] for window, row in sorted(column.short_context.items())}


def paired(before: Mapping[int, float], after: Mapping[int, float]) -> MeanInterval | None:
    """Interval of after - before over the windows that both measured; None without two of them."""
    same = sorted(before.keys() & after.keys())
    if len(same) < 2:
        return None
    return paired_mean_interval([before[window] for window in same], [after[window] for window in same])


def relative_change(before: Mapping[int, float], after: Mapping[int, float]) -> MeanInterval | None:
    """`paired` as a share of the mean before."""
    change = paired(before, after)
    if change is None:
        return None
    level = mean_interval([before[window] for window in sorted(before.keys() & after.keys())]).mean
    return MeanInterval(change.mean / level, change.half_width / level, change.count)


def judge(folder: RunFolder) -> Verdict:
    """Whether the extension happened: base, scaled base and final model compared on the same samples.

    Extended means all of: at the longest length the final model's needle interval lies above the base's (without needles: its
    loss in the last bin is lower than the base's by more than the paired interval); it beats scaling alone by more than chance
    in needle, last-bin loss or short-context loss; its short-context loss is at most 2 % above the base's.
    """
    columns = {column.name: column for column in folder.columns}
    base, scaled = columns.get("before"), columns.get("scaled")
    trained = [column for column in folder.columns if column.name not in ("before", "scaled")]
    if base is None or not trained:
        return Verdict(None, ["There is nothing to compare yet: the base and a trained model must both be measured."])
    final = trained[-1]
    grew, sentences = _grew(folder, base, final)
    better, words = _beats_scaling(scaled, final)
    sentences.append(words)
    kept, words = _kept_short_context(base, final)
    sentences.append(words)
    if grew is None or better is None or kept is None:
        return Verdict(False if False in (grew, better, kept) else None, sentences)
    return Verdict(grew and better and kept, sentences)


def _grew(folder: RunFolder, base: Column, final: Column) -> tuple[bool | None, list[str]]:
    before, after = needle_counts(base, by_length), needle_counts(final, by_length)
    lengths = sorted(before.keys() & after.keys())
    original = folder.original_length
    if lengths:
        longest = lengths[-1]
        times = f", {longest / original:g} times the base's {original:,}" if original else ""
        grew = after[longest].interval[0] > before[longest].interval[1]
        sentences = [
            f"At {longest:,} tokens{times}, the base finds {before[longest]} pass keys, the model {final.label} {after[longest]}"
            + (f" ({_p(compare_needles(base, final, longest))})." if compare_needles(base, final, longest) else ".")
        ]
        own = before.get(original) if original else None
        if own is not None and own.interval[0] < 0.5:
            sentences.append(
                f"Beware: the base finds only {own} at its own {original:,} tokens, so its misses further out say little about length."
            )
        return grew, sentences
    last = _last_bin(base, final)
    if last is None:
        return None, ["Neither needle nor loss by position was measured before and after."]
    (first, end), change = last
    return change.high < 0, [f"Loss at positions {first:,} to {end:,} changed by {_signed(change)} nats per token."]


def _beats_scaling(scaled: Column | None, final: Column) -> tuple[bool | None, str]:
    if scaled is None:
        return None, "The base with scaled rope alone was not measured."
    wins: list[str] = []
    others: list[str] = []
    before, after = needle_counts(scaled, by_length), needle_counts(final, by_length)
    lengths = sorted(before.keys() & after.keys())
    if lengths:
        longest = lengths[-1]
        changed = compare_needles(scaled, final, longest)
        text = f"pass keys at {longest:,} ({before[longest]} to {after[longest]}, {_p(changed)})"
        is_win = changed is not None and changed[1] > changed[0] and changed[2] < SIGNIFICANT
        (wins if is_win else others).append(text)
    last = _last_bin(scaled, final)
    if last is not None:
        (first, end), change = last
        (wins if change.high < 0 else others).append(f"loss at {first:,} to {end:,} ({_signed(change)})")
    short = paired(short_loss(scaled), short_loss(final))
    if short is not None:
        (wins if short.high < 0 else others).append(f"short-context loss ({_signed(short)})")
    if not wins and not others:
        return None, "Scaling alone and the trained model share no measurement."
    if not wins:
        return False, f"Not better than scaling alone by more than chance: {'; '.join(others)}."
    return True, f"Better than scaling alone by more than chance in {'; '.join(wins)}." + (
        f" Not in {'; '.join(others)}." if others else ""
    )


def _kept_short_context(base: Column, final: Column) -> tuple[bool | None, str]:
    change = relative_change(short_loss(base), short_loss(final))
    if change is None:
        return None, "Short-context loss was not measured before and after."
    kept = change.mean <= SHORT_CONTEXT_LIMIT
    within = "within" if kept else "more than"
    return (
        kept,
        f"Short-context loss changed by {percent_change(change)}, {within} the limit of +{100 * SHORT_CONTEXT_LIMIT:g} %.",
    )


def _last_bin(before: Column, after: Column) -> tuple[tuple[int, int], MeanInterval] | None:
    bins_before, bins_after = loss_bins(before), loss_bins(after)
    same = sorted(bins_before.keys() & bins_after.keys())
    if not same:
        return None
    change = paired(bins_before[same[-1]], bins_after[same[-1]])
    return (same[-1], change) if change is not None else None


def _p(changed: tuple[int, int, float] | None) -> str:
    if changed is None:
        return "no samples in common"
    lost, won, p = changed
    value = f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"
    return f"{won} won, {lost} lost, exact p = {value}"


def _signed(change: MeanInterval) -> str:
    return f"{change.mean:+.3f} ± {change.half_width:.3f}"


def percent_change(change: MeanInterval) -> str:
    """For example `+1.1 ± 0.2 %`."""
    return f"{100 * change.mean:+.1f} ± {100 * change.half_width:.1f} %"


def percent_interval(count: Count) -> str:
    """For example `83-94 %`."""
    low, high = count.interval
    return f"{math.floor(100 * low)}–{math.ceil(100 * high)} %"


def summary_rows(folder: RunFolder) -> list[tuple[str, list[str]]]:
    """Rows of the before/after table: a title and one text per column."""
    rows: list[tuple[str, list[str]]] = []
    counts = [needle_counts(column, by_length) for column in folder.columns]
    for length in sorted({length for found in counts for length in found}):
        cells = [f"{found[length]} ({percent_interval(found[length])})" if length in found else "-" for found in counts]
        rows.append((f"pass keys found at {length:,}", cells))
    bins = [loss_bins(column) for column in folder.columns]
    for first, end in sorted({one for found in bins for one in found})[-3:]:
        rows.append((f"loss at positions {first:,}-{end:,}", [_loss(found.get((first, end))) for found in bins]))
    short = [short_loss(column) for column in folder.columns]
    if any(short):
        lengths = {int(row["length"]) for column in folder.columns for row in column.short_context.values()}
        title = f"loss, windows of {max(lengths):,}"
        rows.append((title, [_loss(found) for found in short]))
        base = next((found for column, found in zip(folder.columns, short, strict=True) if column.name == "before"), {})
        changes = [relative_change(base, found) for found in short]
        cells = [
            "-" if column.name == "before" or change is None else percent_change(change)
            for column, change in zip(folder.columns, changes, strict=True)
        ]
        rows.append(("  its change, paired", cells))
    return rows


def _loss(windows: Mapping[int, float] | None) -> str:
    return f"{mean_interval(list(windows.values())).mean:.3f}" if windows else "-"


def summary_table(run_folder: Path) -> str:
    """The before/after table as text, with intervals and a verdict, as `make demo` prints it.

    Raises:
        ConfigError: not a run folder, or a damaged file.
    """
    folder = read_run_folder(run_folder)
    verdict = judge(folder)
    lines = [*_text_table(["", *(column.label for column in folder.columns)], summary_rows(folder))] if folder.columns else []
    lines += [
        "",
        "Pass keys: found/asked (Wilson 95 %). Loss: nats per token on held-out text; ± is a paired 95 % interval over windows.",
        f"Verdict: {verdict.headline}.",
        *(f"  {sentence}" for sentence in verdict.sentences),
    ]
    return "\n".join(lines)


def _text_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    table = [list(head), *([title, *cells] for title, cells in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
