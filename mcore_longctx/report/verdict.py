"""Whether the context was extended, judged from the evaluation's files, in sentences with numbers."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.report.counts import (
    Changed,
    by_length,
    compare,
    needle_counts,
    p_value,
    ruler_averages,
    ruler_effective_length,
    ruler_scorings,
    ruler_tasks,
    shared_samples,
    suite_changed,
    suite_counts,
)
from mcore_longctx.report.losses import last_bin, paired, percent_change, relative_change, short_loss, signed
from mcore_longctx.report.run_folder import Column, RunFolder

__all__ = ["SHORT_CONTEXT_LIMIT", "Verdict", "WorstDrop", "judge", "worst_drop"]

SHORT_CONTEXT_LIMIT = 0.02  # the base's short-context loss may rise by this share; more counts as damage
SIGNIFICANT = 0.05


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


@dataclass(frozen=True)
class WorstDrop:
    """The task of the short suite that lost most of its answers. `of`: tasks among which it is the worst."""

    task: str
    before: str
    after: str
    changed: Changed
    of: int

    @property
    def sentence(self) -> str:
        """With both p: of this task alone, and as the worst of so many (Bonferroni)."""
        p = self.changed.p
        as_worst = f"; as the worst of {self.of} tasks, {p_value(min(1.0, p * self.of))}" if self.of > 1 else ""
        changed = f"{self.changed.won} won, {self.changed.lost} lost, exact p = {p_value(p)}{as_worst}"
        return f"Worst drop in the short suite: {self.task}, {self.before} to {self.after} ({changed})."


def judge(folder: RunFolder) -> Verdict:
    """Whether the extension happened: base, scaled base and final model compared on the same samples.

    Extended means all of: at the longest length the final model's needle interval lies above the base's (without needles: its
    loss in the last bin is lower than the base's by more than the paired interval); it beats scaling alone by more than chance
    in needle, last-bin loss or short-context loss; its short-context loss is at most 2 % above the base's. The ruler-like tasks and
    the short suite are told beside it and decide nothing.
    """
    base, final = folder.base, folder.final
    scaled = next((column for column in folder.columns if column.name == "scaled"), None)
    if base is None or final is None:
        return Verdict(None, ["There is nothing to compare yet: the base and a trained model must both be measured."])
    grew, sentences = _grew(folder, base, final)
    better, words = _beats_scaling(folder, scaled, final)
    sentences.append(words)
    kept, words = _kept_short_context(base, final)
    sentences += [words, *_beside(base, final)]
    if grew is None or better is None or kept is None:
        return Verdict(False if False in (grew, better, kept) else None, sentences)
    return Verdict(grew and better and kept, sentences)


def worst_drop(before: Column, after: Column) -> WorstDrop | None:
    """The task of the short suite with the largest loss of right answers on the same questions; None where no task lost any."""
    changes = suite_changed(before.short_suite, after.short_suite)
    drops = {task: (changed.won - changed.lost) / changed.same for task, changed in changes.items()}
    task = min(drops, key=lambda name: (drops[name], changes[name].p), default=None)
    if task is None or drops[task] >= 0:
        return None
    counts = [str(suite_counts(column.short_suite)[task]) for column in (before, after)]
    return WorstDrop(task, counts[0], counts[1], changes[task], len(changes))


def _grew(folder: RunFolder, base: Column, final: Column) -> tuple[bool | None, list[str]]:
    rows_before, rows_after = folder.needles(base), folder.needles(final)
    before, after = needle_counts(rows_before, by_length), needle_counts(rows_after, by_length)
    lengths = sorted(before.keys() & after.keys())
    original = folder.original_length
    if lengths:
        longest, what = lengths[-1], folder.needle_kinds[0].plural
        times = f", {longest / original:g} times the base's {original:,}" if original else ""
        grew = after[longest].interval[0] > before[longest].interval[1]
        changed = compare(rows_before, rows_after, longest)
        sentences = [
            f"At {longest:,} tokens{times}, the base finds {before[longest]} {what}, the model {final.label} {after[longest]}"
            + (f" ({_won_and_lost(changed)})." if changed is not None else ".")
        ]
        own = before.get(original) if original else None
        if own is not None and own.rate < 0.5:
            sentences.append(
                f"Beware: the base finds only {own} at its own {original:,} tokens, so its misses further out say little about length."
            )
        elif own is not None and own.interval[0] < 0.5:
            sentences.append(
                f"Beware: {own} at the base's own {original:,} tokens are too few to say that it can do this at all."
            )
        return grew, sentences
    last = last_bin(base, final)
    if last is None:
        return None, ["Neither needle nor loss by position was measured on the same text before and after."]
    (first, end), change = last
    return change.high < 0, [f"Loss at positions {first:,} to {end:,} changed by {signed(change)} nats per token."]


def _beats_scaling(folder: RunFolder, scaled: Column | None, final: Column) -> tuple[bool | None, str]:
    if scaled is None:
        return None, "The base with scaled rope alone was not measured."
    wins: list[str] = []
    others: list[str] = []
    rows_before, rows_after = folder.needles(scaled), folder.needles(final)
    before, after = needle_counts(rows_before, by_length), needle_counts(rows_after, by_length)
    lengths = sorted(before.keys() & after.keys())
    if lengths:
        longest = lengths[-1]
        changed = compare(rows_before, rows_after, longest)
        counts = f"{before[longest]} to {after[longest]}, {_won_and_lost(changed)}"
        is_win = changed is not None and changed.won > changed.lost and changed.p < SIGNIFICANT
        (wins if is_win else others).append(f"{folder.needle_kinds[0].plural} at {longest:,} ({counts})")
    last = last_bin(scaled, final)
    if last is not None:
        (first, end), change = last
        (wins if change.high < 0 else others).append(f"loss at {first:,} to {end:,} ({signed(change)})")
    short = paired(short_loss(scaled), short_loss(final))
    if short is not None:
        (wins if short.high < 0 else others).append(f"short-context loss ({signed(short)})")
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
        return None, "Short-context loss was not measured on the same windows before and after."
    kept = change.mean <= SHORT_CONTEXT_LIMIT
    within = "within" if kept else "more than"
    return (
        kept,
        f"Short-context loss changed by {percent_change(change)}, {within} the limit of +{100 * SHORT_CONTEXT_LIMIT:g} %.",
    )


def _beside(base: Column, final: Column) -> list[str]:
    """What else was measured before and after, on the same samples; it decides nothing."""
    sentences = []
    rulers = shared_samples(base.ruler, final.ruler)
    tasks = ruler_tasks(rulers)
    averages = [ruler_averages(rows, tasks) for rows in rulers]
    if base.ruler and final.ruler and not rulers[0]:
        ways = ruler_scorings([base.ruler, final.ruler])
        why = f"scored in two ways ({' and '.join(ways)})" if len(ways) > 1 else "measured on other samples"
        sentences.append(f"The ruler-like tasks were {why} before and after: not comparable.")
    same = sorted(averages[0].keys() & averages[1].keys())
    if same:
        before, after = (100 * found[same[-1]].interval.mean for found in averages)
        lengths = [ruler_effective_length(found).mean for found in averages]
        effective = " to ".join(f"{length:,}" if length is not None else "none" for length in lengths)
        changed = compare(*rulers, same[-1])
        words = f" ({_won_and_lost(changed)})" if changed is not None else ""
        sentences.append(
            f"Ruler-like average at {same[-1]:,} tokens: {before:.1f} to {after:.1f} of 100{words}; effective length {effective}."
        )
    worst = worst_drop(base, final)
    if worst is not None:
        sentences.append(worst.sentence)
    return sentences


def _won_and_lost(changed: Changed | None) -> str:
    if changed is None:
        return "no samples in common"
    return f"{changed.won} won, {changed.lost} lost, exact p = {p_value(changed.p)}"
