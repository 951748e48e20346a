"""Losses of held-out text: by position with a fitted law, at the base's own length, and what changed window by window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mcore_longctx.report.run_folder import Column, Window
from mcore_longctx.tasks.power_law import PowerLaw, fit_power_law
from mcore_longctx.tasks.statistics import MeanInterval, mean_interval, paired_mean_interval

__all__ = [
    "last_bin",
    "loss_bins",
    "loss_law",
    "middle",
    "paired",
    "percent_change",
    "relative_change",
    "same_windows",
    "shared",
    "short_loss",
    "signed",
    "windows_note",
]

Bin = tuple[int, int]


def loss_bins(column: Column) -> dict[Bin, dict[Window, float]]:
    """(first, end) position of each bin -> window -> mean loss in nats per token."""
    bins: dict[Bin, dict[Window, float]] = {}
    for window, row in column.loss_by_position.items():
        for first, end, count, total in zip(row["edges"][:-1], row["edges"][1:], row["counts"], row["sums"], strict=True):
            if count:
                bins.setdefault((first, end), {})[window] = total / count
    return bins


def short_loss(column: Column) -> dict[Window, float]:
    """Window -> mean loss in nats per token at the base model's own length."""
    return {window: row["sum"] / row["count"] for window, row in column.short_context.items()}


def same_windows(columns: Sequence[Mapping[Window, object]]) -> bool:
    """Whether all columns that measured any windows measured the same ones."""
    return len({frozenset(column) for column in columns if column}) < 2


def windows_note(columns: Sequence[Mapping[Window, object]], own: Mapping[Window, object]) -> str:
    """For example ` (2 windows)`, where the columns did not measure the same ones and their means are of different text; else nothing."""
    return "" if same_windows(columns) else f" ({len(own)} window{'s' * (len(own) > 1)})"


def shared(before: Mapping[Window, float], after: Mapping[Window, float]) -> tuple[list[float], list[float]]:
    """Losses of both columns on the windows that both measured, in one order."""
    same = [window for window in before if window in after]
    return [before[window] for window in same], [after[window] for window in same]


def paired(before: Mapping[Window, float], after: Mapping[Window, float]) -> MeanInterval | None:
    """Interval of after - before over the windows that both measured; None without two of them."""
    old, new = shared(before, after)
    return paired_mean_interval(old, new) if len(old) > 1 else None


def relative_change(before: Mapping[Window, float], after: Mapping[Window, float]) -> MeanInterval | None:
    """`paired` as a share of the mean before."""
    change = paired(before, after)
    if change is None:
        return None
    level = mean_interval(shared(before, after)[0]).mean
    if level == 0:
        return None
    return MeanInterval(change.mean / level, change.half_width / level, change.count)


def middle(one: Bin) -> float:
    """Geometric middle of a bin's positions, tokens; the first bin begins at 0 and is taken from half its end."""
    first, end = one
    return math.sqrt(max(first, end / 2) * end)


def loss_law(column: Column) -> PowerLaw | None:
    """The power law through the bins' mean losses; None where they are too few or do not fall.

    The first bin is left out: there the loss falls so steeply that its mean is not the loss at its middle.
    """
    bins = loss_bins(column)
    means = {one: mean_interval(list(windows.values())).mean for one, windows in bins.items()}
    points = [(middle(one), mean) for one, mean in sorted(means.items())[1:] if math.isfinite(mean)]
    return fit_power_law([c for c, _ in points], [mean for _, mean in points])


def last_bin(before: Column, after: Column) -> tuple[Bin, MeanInterval] | None:
    """The furthest bin that both columns measured, and its paired change."""
    bins_before, bins_after = loss_bins(before), loss_bins(after)
    same = sorted(bins_before.keys() & bins_after.keys())
    if not same:
        return None
    change = paired(bins_before[same[-1]], bins_after[same[-1]])
    return (same[-1], change) if change is not None else None


def signed(change: MeanInterval) -> str:
    """For example `-0.201 ± 0.013`."""
    return f"{change.mean:+.3f} ± {change.half_width:.3f}"


def percent_change(change: MeanInterval) -> str:
    """For example `+1.1 ± 0.2 %`."""
    return f"{100 * change.mean:+.1f} ± {100 * change.half_width:.1f} %"
