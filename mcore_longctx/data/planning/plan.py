"""`data plan`: which stretch of which document stands where in which sample, decided before any token is copied.

    OUT/plan/plan.runs      all runs of all samples (`data/files/sidecar.py`); `document` is a row of the table of documents
    OUT/plan/lengths.json   documents and tokens by length, as read and in the samples
    OUT/plan/lengths.png    the same as a picture
    OUT/plan/plan.json      settings, shares asked and got, what was left out and why. Written last: the plan is whole

Drawing (`data/planning/draw.py`) says what is taken and in which order, layout (`data/planning/layout.py`) where it stands, `augment`
(`data/planning/augmenting.py`) spreads the documents of a sample over it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import DocumentTable, hash64
from mcore_longctx.data.files.sidecar import LITERAL, PADDING, Runs, open_runs
from mcore_longctx.data.methods.labels import TextEncoder
from mcore_longctx.data.planning.augmenting import Augmented, augment_runs
from mcore_longctx.data.planning.draw import draw, hash_order
from mcore_longctx.data.planning.layout import Pieces, Separator, Stream, lay_out, run_blocks, stream_of
from mcore_longctx.data.planning.lengths import SourceLengths, measure_lengths, plot_lengths, tokens_used
from mcore_longctx.data.planning.plan_file import Asked, plan_there, read_plan, stored_crc32, write_plan_json
from mcore_longctx.data.planning.plan_hashes import lengths_sha256, plan_sha256
from mcore_longctx.data.planning.plan_text import many, plan_text
from mcore_longctx.data.planning.shares import Group, shares_got
from mcore_longctx.data.workspace import remove_leftovers
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import partial_path, versions, write_atomic
from mcore_longctx.recipe.schema import DataSection

__all__ = ["make_chat_plan", "make_plan", "plan_text", "read_plan"]

IntArray = npt.NDArray[np.int64]

_CHATS, _SAMPLES = 4, 5  # salts, beside those of `data/planning/draw.py`
_LONGEST = 2**31 - 1  # tokens of a sample


def make_plan(
    folder: Path,
    table: DocumentTable,
    section: DataSection,
    *,
    name: str,
    seed: int,
    seq_length: int,
    separator: Separator,
    token_budget: int | None = None,
    max_samples: int | None = None,
    tokenizer: Callable[[], TextEncoder] | None = None,
) -> dict[str, Any]:
    """Decide and write `folder`/plan.runs, lengths.json, lengths.png and, last, plan.json, whose contents are returned.

    Args:
        folder: OUT/plan; made if missing. A plan that is there is returned if it is the one that is asked for, else replaced
            (plan.json goes first).
        table: of the documents; its sources are those of `section`.
        section: mode, shares, length sampling, packing.
        name: of the data set, for titles.
        seed: of every decision.
        seq_length: tokens of a sample.
        separator: between or around documents; packing `single` and chunks, which are full of one document, use none.
        token_budget: tokens to draw, separators included and padding not; or None: all there is (as far as the shares allow).
        max_samples: samples that are kept at most.
        tokenizer: of the documents; asked for only by `augment` of type utk, which adds tokens.

    Raises:
        ConfigError: a seq_length that no index can hold, or OUT holds data that was packed by another plan; nothing is touched.
        DataError: a source too small for its share, chunk lengths that do not divide seq_length, not a single sample, or a tokenizer
            that has no tokens for the labels of `augment`.
    """
    assert table.sources == tuple(source.name for source in section.sources)
    _check_seq_length(seq_length)
    settings = json.loads(json.dumps(dataclasses.asdict(section), default=str))
    facts = {
        "method": "pretrain",
        "name": name,
        "settings": settings,
        "seed": seed,
        "token_budget": token_budget,
        "max_samples": max_samples,
        "separator": {"text": section.separator_text, **dataclasses.asdict(separator)},
    }
    there = plan_there(folder, Asked(facts, seq_length, table))
    if there is not None:
        return there
    if section.packing == "intact" and separator.wrapping - separator.between >= seq_length:
        raise DataError(f"BOS and EOS leave no room in samples of {seq_length:,} tokens", where=name, fix="raise seq_length")
    groups, sources, tokens_of_group, augmented = _draw_and_lay_out(
        folder,
        table,
        section,
        name=name,
        seed=seed,
        seq_length=seq_length,
        separator=separator,
        token_budget=token_budget,
        max_samples=max_samples,
        tokenizer=tokenizer,
    )
    sampling = section.length_sampling
    borders = [int(sampling.short_below)] if sampling.keep_probability < 1 else []
    borders += [int(sampling.long_above)] if sampling.repetition > 1 else []
    spans = (int(sampling.short_below), int(sampling.long_above) + 1)
    lengths, found = _measure(
        folder,
        table,
        name,
        words=("documents read", "in the samples"),
        borders=borders,
        spans=spans,
        separator_tokens=len(separator.before + separator.after),
    )
    low, high = spans
    cells = {each.name: [each.between(0, low), each.between(low, high), each.between(high, None)] for each in lengths}
    cut_tokens = [0] * len(section.sources) if augmented is None else augmented.cut_tokens
    tokens = [tokens_of_group.get(number, lengths[group.source].between(0, None)[3]) for number, group in enumerate(groups)]
    return write_plan_json(
        folder,
        {
            **facts,
            **found,
            **({} if augmented is None else {"augment": augmented.facts}),
            "length_sampling": {"borders": spans, "sources": cells},
            "shares": shares_got(groups, tokens),
            "left_out": {
                each.name: _left_out(row, each, labels, cuts=section.packing == "intact" and not source.chunks)
                for row, each, source, labels in zip(sources, lengths, section.sources, cut_tokens, strict=True)
            },
        },
    )


def make_chat_plan(folder: Path, table: DocumentTable, *, name: str, seed: int, seq_length: int) -> dict[str, Any]:
    """Plan of chats: whole, first-fit into samples in an order drawn from `seed`; what is free is padding without loss.

    One that is longer than `seq_length` is left out and counted. Nothing stands between the chats of a sample. Arguments, files and
    errors as in `make_plan`.
    """
    _check_seq_length(seq_length)
    settings = {"packing": "first_fit"}
    facts = {"method": "sft", "name": name, "settings": settings, "seed": seed, "token_budget": None, "max_samples": None}
    there = plan_there(folder, Asked(facts, seq_length, table))
    if there is not None:
        return there
    fits = np.flatnonzero(table.length <= seq_length)
    if not len(fits):
        raise DataError(f"no conversation of at most {seq_length:,} tokens", where=name, fix="add chats or raise seq_length")
    document = fits[hash_order(len(fits), lambda rows: hash64(seed, _CHATS, table.key[fits[rows]]))]
    stream = stream_of(table, document, table.length[document], packing="first_fit", separator=Separator(), seq_length=seq_length)
    _write_runs(folder, table, [stream], Separator())
    _, found = _measure(folder, table, name, words=("chats read", "in the samples"))
    left_out = {}
    for index, source in enumerate(table.sources):
        mine = table.length[(table.length > seq_length) & (table.source == index)]
        left_out[source] = {"too_long": {"documents": len(mine), "tokens": int(mine.sum())}}
    return write_plan_json(folder, {**facts, **found, "left_out": left_out})


# ------------------------------------------------------------------ deciding
def _check_seq_length(seq_length: int) -> None:
    if not 1 <= seq_length <= _LONGEST:
        raise ConfigError(
            f"seq_length is {seq_length:,}, expected 1 to {_LONGEST:,}: the index holds lengths in 32 bits", where="plan"
        )


def _draw_and_lay_out(
    folder: Path,
    table: DocumentTable,
    section: DataSection,
    *,
    name: str,
    seed: int,
    seq_length: int,
    separator: Separator,
    token_budget: int | None,
    max_samples: int | None,
    tokenizer: Callable[[], TextEncoder] | None,
) -> tuple[Sequence[Group], Sequence[dict[str, int]], dict[int, int], Augmented | None]:
    """Write plan.runs. Groups, what became of each source, tokens in the samples of each group of chunks, and what `augment` did.

    A function of its own so that all that was drawn has left the memory when the runs are measured.
    """
    drawn = draw(
        table,
        section,
        seed=seed,
        seq_length=seq_length,
        wrapping=separator.wrapping,
        between=separator.between,
        token_budget=token_budget,
    )
    streams = []
    for chunks in drawn.chunks:
        length = np.full(len(chunks.document), chunks.length, np.int64)
        pieces = Pieces(document=chunks.document, length=length, start=chunks.part * chunks.length)
        streams.append(Stream(table, pieces, Separator(), seq_length))
    if section.packing != "single":
        packing = section.packing
        streams.append(
            stream_of(table, drawn.document, drawn.length, packing=packing, separator=separator, seq_length=seq_length)
        )
    border = np.cumsum([0, *(stream.samples for stream in streams)])
    if not border[-1]:
        raise DataError(_nothing(section, table, seq_length, token_budget), where=name, fix="add documents or shorten seq_length")
    samples = None
    if drawn.chunks or section.packing == "best_fit":  # else the order of the samples is already one of hashes
        samples = _shuffled(streams, seed)
    if section.augment is None:
        _write_runs(folder, table, streams, separator, samples, max_samples)
        augmented = None
    else:
        aside = partial_path(folder / "laid-out.runs")
        try:
            _write_runs(folder, table, streams, separator, samples, max_samples, aside)
            augmented = augment_runs(
                aside, folder / "plan.runs", section.augment, seed=seed, table=table, tokenizer=tokenizer, where=name
            )
        finally:
            aside.unlink(missing_ok=True)
    written = (np.arange(border[-1]) if samples is None else samples)[:max_samples]
    kept = np.bincount(np.searchsorted(border, written, side="right") - 1, minlength=len(streams)).tolist()
    tokens = {chunks.group: kept[number] * seq_length for number, chunks in enumerate(drawn.chunks)}
    return drawn.groups, drawn.sources, tokens, augmented


def _shuffled(streams: Sequence[Stream], seed: int) -> IntArray:
    """The samples of all streams in an order drawn from the seed. Their numbers come from orders that were drawn from keys."""
    number = np.repeat(np.arange(len(streams)), [stream.samples for stream in streams])
    within = np.concatenate([np.arange(stream.samples) for stream in streams])
    return hash_order(len(number), lambda rows: hash64(seed, _SAMPLES, number[rows], within[rows]), number, within)


def _nothing(section: DataSection, table: DocumentTable, seq_length: int, budget: int | None) -> str:
    if budget is not None and budget < seq_length:
        return f"a budget of {budget:,} tokens is less than one sample of {seq_length:,}"
    tokens, longest = int(table.length.sum()), int(table.length.max(initial=0))
    if section.packing == "single":
        return f"no document of {seq_length:,} tokens left for packing 'single'; the longest has {longest:,}"
    return f"not one sample of {seq_length:,} tokens: the documents have {tokens:,} tokens before length sampling"


# ------------------------------------------------------------------ writing
def _write_runs(
    folder: Path,
    table: DocumentTable,
    streams: Sequence[Stream],
    separator: Separator,
    samples: IntArray | None = None,
    limit: int | None = None,
    path: Path | None = None,
) -> None:
    """Write the runs to `path` (None: plan.runs) of a folder whose plan is not whole from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / "plan.json").unlink(missing_ok=True)
    metadata = {"format": 1, "kind": "plan", "seq_length": streams[0].seq_length, "sources": table.sources}
    metadata |= {"documents": len(table), "begin_tokens": len(separator.before)}
    literals = separator.before + separator.after
    lay_out(
        folder / "plan.runs" if path is None else path,
        streams,
        samples=samples,
        limit=limit,
        literals=literals,
        metadata=metadata,
    )


def _measure(
    folder: Path,
    table: DocumentTable,
    name: str,
    *,
    words: tuple[str, str],
    borders: Sequence[int] = (),
    spans: Sequence[int] = (),
    separator_tokens: int | None = None,
) -> tuple[list[SourceLengths], dict[str, Any]]:
    """What the runs that were written hold; writes lengths.json and lengths.png.

    borders: lengths to mark in the picture; spans: lengths at which the result is asked for documents below and above;
    separator_tokens: literals that are separators, None: all.
    """
    runs = open_runs(folder / "plan.runs", kind="plan")
    lengths = measure_lengths(table, tokens_used(table, runs), spans)
    facts = {
        "seq_length": runs.seq_length,
        "samples": len(runs),
        "runs": len(runs.document),
        **_count(runs, len(runs.literals) if separator_tokens is None else separator_tokens),
        # where all documents are learned whole there is none
        "samples_without_loss": len(runs) - _samples_with_loss(runs) if len(table.loss_document) else 0,
        "begin_tokens": runs.facts["begin_tokens"],
        "documents": len(table),
        "documents_sha256": table.sha256(),
        "lengths_sha256": lengths_sha256(table),
        "plan_sha256": plan_sha256(table, runs),
        "runs_crc32": stored_crc32(folder / "plan.runs"),
        "versions": versions(),
        "lengths": {source.name: source.as_dict() for source in lengths},
    }
    text = json.dumps({"unit": "tokens", "sources": facts["lengths"]}, indent=1)
    picture = folder / "lengths.png"
    aside = partial_path(picture)
    try:
        write_atomic(folder / "lengths.json", text + "\n")
        title = f"{name}: {many(len(runs), 'sample')} of {runs.seq_length:,} tokens"
        plot_lengths(lengths, aside, title=title, words=words, borders=borders)
        aside.replace(picture)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=folder, fix="make room") from None
    finally:
        aside.unlink(missing_ok=True)
    return lengths, facts


def _count(runs: Runs, separator_tokens: int) -> dict[str, int]:
    """Tokens by kind. separator_tokens: literals behind these belong to `augment`."""
    found = {"tokens": len(runs) * runs.seq_length, "tokens_with_loss": 0, "tokens_of_separators": 0, "tokens_of_labels": 0}
    found |= {"tokens_of_padding": 0}
    for block in run_blocks(runs):
        document, length = runs.document[block], runs.length[block].astype(np.int64)
        found["tokens_with_loss"] += int(length[runs.loss[block]].sum())
        literal, is_label = document == LITERAL, runs.start[block] >= separator_tokens
        found["tokens_of_separators"] += int(length[literal & ~is_label].sum())
        found["tokens_of_labels"] += int(length[literal & is_label].sum())
        found["tokens_of_padding"] += int(length[document == PADDING].sum())
    return found


def _samples_with_loss(runs: Runs) -> int:
    """Samples of which at least one token is learned."""
    count, last = 0, -1
    for block in run_blocks(runs):
        learned = block.start + np.flatnonzero(runs.loss[block])
        found = np.unique(np.searchsorted(runs.first_run, learned, side="right")) - 1
        count += len(found) - int(last in found[:1])  # a sample may go on from one block to the next
        last = int(found[-1]) if len(found) else last
    return count


def _left_out(row: dict[str, int], lengths: SourceLengths, labels: int, *, cuts: bool) -> dict[str, dict[str, int]]:
    """Where the tokens of a source went.

    read - too_short - too_long - not_drawn, times the copies = drawn;
    drawn - remainder - cut - over_budget + repeated - tail - cut_by_labels = in_samples.

    labels: tokens for which labels of `augment` left no room;
    cuts: packing takes the beginning of a document that is longer than a sample, and no pieces.
    """
    used = lengths.between(0, None)[3]
    taken, usable = row["taken_tokens"], row["usable_tokens"]
    return {
        "read": {"documents": row["documents"], "tokens": row["tokens"]},
        "too_short": {"documents": row["short"], "tokens": row["short_tokens"]},
        "too_long": {"documents": row["long"], "tokens": row["long_tokens"]},
        "not_drawn": {"documents": row["not_drawn"], "tokens": row["not_drawn_tokens"]},
        "drawn": {"documents": row["drawn"], "tokens": row["drawn_tokens"]},  # every copy counts
        "remainder": {"tokens": 0 if cuts else row["drawn_tokens"] - usable},  # of documents that are cut in whole pieces
        "cut": {"tokens": row["drawn_tokens"] - usable if cuts else 0},  # of documents longer than a sample
        "over_budget": {"tokens": max(0, usable - taken)},
        "repeated": {"tokens": max(0, taken - usable)},  # taken again to fill the share
        "cut_by_labels": {"tokens": labels},  # at the ends of samples, for which labels and knots of `augment` left no room
        "tail": {"tokens": taken - used - labels},  # drawn, but in no whole sample that was wanted
        "in_samples": {"tokens": used},
    }
