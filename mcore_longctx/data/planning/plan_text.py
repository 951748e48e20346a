"""A plan as a table for the screen."""

from __future__ import annotations

from typing import Any

from mcore_longctx.data.planning.lengths import length_name

__all__ = ["many", "plan_text"]

_REASONS = {
    "too_short": "shorter than min_length",
    "too_long": "longer than max_length",
    "remainder": "too few for a whole piece",
    "cut": "cut off documents longer than a sample",
    "over_budget": "not needed for the share",
    "tail": "that fill no sample",
    "cut_by_labels": "cut off at the ends of samples, where labels and knots took their room",
}


def plan_text(facts: dict[str, Any], samples_needed: int | None = None) -> str:
    """The contents of plan.json as a table for the screen. samples_needed: of the stage, said if there are fewer or more."""
    head = f"{facts['name']}: {many(facts['samples'], 'sample')} of {facts['seq_length']:,} tokens"
    if facts["method"] == "sft":
        return "\n".join([_chat_head(facts, head), *_chat_lines(facts), *_unlearned_lines(facts)])
    if samples_needed is not None and facts["samples"] < samples_needed:
        head += f", FEWER than the {samples_needed:,} that the stage needs: the documents give no more"
    elif samples_needed is not None and facts["samples"] > samples_needed:
        head += f" ({samples_needed:,} needed; one more, because Megatron's own GPTDataset loses the last)"
    if facts["tokens_of_padding"]:
        head += f", {_percent(facts['tokens_of_padding'], facts['tokens'])} padding"
    low, high = facts["length_sampling"]["borders"]
    titles = [f"below {length_name(low)}", "between", f"above {length_name(high - 1)}"]
    if "augment" in facts:
        head += f", {_augment_words(facts)}"
    rows = [["source", "documents", "tokens read", "in samples", *titles]]
    for name, cells in facts["length_sampling"]["sources"].items():
        lengths = facts["lengths"][name]
        before, after = lengths["tokens_before"], lengths["tokens_after"]
        moved = [f"{_percent(cell[1], before)} -> {_percent(cell[3], after)}" for cell in cells]
        rows.append([name, f"{lengths['documents_before']:,}", f"{before:,}", f"{after:,}", *moved])
    lines = [head, *_table(rows), "  (share of the source's tokens in documents of these lengths: read -> in the samples)"]
    return "\n".join(lines + _share_lines(facts) + _dropped_lines(facts) + _unlearned_lines(facts))


def many(count: int, noun: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _augment_words(facts: dict[str, Any]) -> str:
    how = facts["augment"]
    chunks = " or ".join(map(str, how["chunks"]))
    words = f"{how['type']}: documents of {100 * how['probability']:.0f} % of the samples in {chunks} pieces"
    return words + (
        f", {100 * facts['tokens_of_labels'] / facts['tokens']:.2f} % labels and knots" if how["type"] == "utk" else ""
    )


def _share_lines(facts: dict[str, Any]) -> list[str]:
    """Shares asked and got, where there are any."""
    rows = [["share of", "asked", "got", "tokens", "taken"]]
    for row in facts["shares"]:
        if row["share_asked"] is None:
            return []
        name = row["source"] + (f", chunks of {length_name(row['chunk_length'])}" if row["chunk_length"] else "")
        shares = [f"{100 * row[key]:.2f} %" for key in ("share_asked", "share_got")]
        rows.append([name, *shares, f"{row['tokens_got']:,}", f"{row['times_taken']:.2f} x"])
    return _table(rows)


def _dropped_lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for reason, words in _REASONS.items():
        tokens = sum(source.get(reason, {"tokens": 0})["tokens"] for source in facts["left_out"].values())
        if tokens:
            lines.append(f"  left out: {many(tokens, 'token')} {words}")
    return lines


def _unlearned_lines(facts: dict[str, Any]) -> list[str]:
    unlearned = facts.get("samples_without_loss", 0)  # a plan of an earlier version does not say
    if not unlearned:
        return []
    return [f"  nothing is learned in {unlearned:,} of {many(facts['samples'], 'sample')}: a training step of these alone stops"]


def _chat_head(facts: dict[str, Any], head: str) -> str:
    learned, padding = (_percent(facts[key], facts["tokens"]) for key in ("tokens_with_loss", "tokens_of_padding"))
    return f"{head}, {learned} learned (answers), {padding} padding"


def _chat_lines(facts: dict[str, Any]) -> list[str]:
    rows = [["source", "chats", "tokens read", "in samples", "median", "longest"]]
    for name, lengths in facts["lengths"].items():
        keys = ("documents_before", "tokens_before", "tokens_after", "median_length", "max_length")
        rows.append([name, *(f"{lengths[key]:,}" for key in keys)])
    too_long = sum(source["too_long"]["documents"] for source in facts["left_out"].values())
    dropped = [f"  dropped: {many(too_long, 'conversation')} longer than {facts['seq_length']:,} tokens"] if too_long else []
    return _table(rows) + dropped


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
