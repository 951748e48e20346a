"""The top of the page: what it is about, and the figures that say it all."""

from __future__ import annotations

from mcore_longctx.report.counts import (
    by_length,
    compare,
    needle_counts,
    percent_interval,
    ruler_averages,
    ruler_tasks,
    same_samples,
    shared_samples,
)
from mcore_longctx.report.losses import loss_bins, paired, percent_change, relative_change, same_windows, shared, short_loss
from mcore_longctx.report.run_folder import Column, RunFolder
from mcore_longctx.report.sections.training import duration
from mcore_longctx.report.style import short_count
from mcore_longctx.tasks.statistics import mean_interval

__all__ = ["all_same", "subtitle", "tiles"]

Tile = tuple[str, str, str]


def subtitle(folder: RunFolder) -> str:
    """The model, and from which length to which."""
    lengths = [f"{length:,}" for length in (folder.original_length, folder.trained_length) if length is not None]
    model = str(folder.recipe.model.path) if folder.recipe is not None else "an unknown model"
    return f"{model}, {' → '.join(lengths)} tokens of context" if len(lengths) == 2 else model


def all_same(folder: RunFolder) -> bool:
    """Whether the columns measured each part on the same samples and windows, where they measured it."""
    columns = folder.columns
    return (
        all(same_samples([column.needles.get(kind, {}) for column in columns]) for kind in folder.needle_kinds)
        and same_samples([column.ruler for column in columns])
        and same_samples([column.short_suite for column in columns])
        and same_windows([column.loss_by_position for column in columns])
        and same_windows([column.short_context for column in columns])
    )


def tiles(folder: RunFolder) -> list[Tile]:
    """(what, number, note) of the figures at the top: base against the final model."""
    found = []
    if folder.base is not None and folder.final is not None:
        found += [*_retrieval(folder, folder.base, folder.final), *_losses(folder.base, folder.final)]
    steps = [step for step in folder.run.get("steps", ()) if step.get("name") != "report"]
    seconds = sum(float(step.get("seconds", 0)) for step in steps)
    if seconds:
        found.append(("wall time", duration(seconds), f"{len(steps)} steps"))
    return found


def _retrieval(folder: RunFolder, base: Column, final: Column) -> list[Tile]:
    found = []
    before, after = (needle_counts(folder.needles(column), by_length) for column in (base, final))
    for length in sorted(before.keys() & after.keys())[-1:]:
        note = f"base {percent_interval(before[length])}, {final.label} {percent_interval(after[length])}"
        found.append((f"{folder.needle_kinds[0].plural} at {length:,}", f"{before[length]} → {after[length]}", note))
    rulers = shared_samples(base.ruler, final.ruler)
    tasks = ruler_tasks(rulers)
    averages = [ruler_averages(rows, tasks) for rows in rulers]
    for length in sorted(averages[0].keys() & averages[1].keys())[-1:]:
        intervals = [one[length].interval for one in averages]
        note = f"points of 100, {len(tasks)} tasks; {percent_interval(intervals[0])}, {percent_interval(intervals[1])}"
        found.append((f"ruler-like at {length:,}", " → ".join(f"{100 * one.mean:.1f}" for one in intervals), note))
    return found


def _losses(base: Column, final: Column) -> list[Tile]:
    found = []
    bins_before, bins_after = loss_bins(base), loss_bins(final)
    for one in sorted(bins_before.keys() & bins_after.keys())[-1:]:
        same = shared(bins_before[one], bins_after[one])
        if not same[0]:
            continue
        levels = [mean_interval(losses).mean for losses in same]
        change = paired(bins_before[one], bins_after[one])
        note = f"paired {change.mean:+.3f} ± {change.half_width:.3f} nats" if change else "nats per token"
        found.append((f"loss at {short_count(one[0])}–{short_count(one[1])}", f"{levels[0]:.2f} → {levels[1]:.2f}", note))
    change = relative_change(short_loss(base), short_loss(final))
    if change is not None:
        found.append(("short-context loss", percent_change(change), f"paired, {change.count} windows"))
    changed = compare(base.short_suite, final.short_suite)
    if changed is not None:
        right = [
            sum(bool(row["correct"]) for row in rows.values()) for rows in shared_samples(base.short_suite, final.short_suite)
        ]
        number = f"{right[0]} → {right[1]} of {changed.same}"
        found.append(("short suite", number, f"{changed.won} won, {changed.lost} lost"))
    return found
