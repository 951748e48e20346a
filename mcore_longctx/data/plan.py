"""`data plan`: which stretch of which document stands where in which sample, decided before any token is copied.

    OUT/plan/plan.runs      all runs of all samples (`data/sidecar.py`); `document` is a row of the table of documents
    OUT/plan/lengths.json   documents and tokens by length, as read and in the samples
    OUT/plan/lengths.png    the same as a picture
    OUT/plan/plan.json      settings, shares asked and got, what was left out and why. Written last: the plan is whole

Drawing (`data/draw.py`) says what is taken and in which order, layout (`data/layout.py`) where it stands.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.draw import Drawn, draw, hash_order
from mcore_longctx.data.layout import Pieces, Separator, Stream, lay_out, stream_of
from mcore_longctx.data.lengths import SourceLengths, measure_lengths, plot_lengths, tokens_used
from mcore_longctx.data.plan_text import many, plan_text
from mcore_longctx.data.shards import DocumentTable, hash64
from mcore_longctx.data.shares import shares_got
from mcore_longctx.data.sidecar import LITERAL, PADDING, Runs, open_runs
from mcore_longctx.data.workspace import partial_path
from mcore_longctx.errors import DataError
from mcore_longctx.manifest import versions, write_atomic
from mcore_longctx.recipe.schema import DataSection

__all__ = ["make_chat_plan", "make_plan", "plan_text", "read_plan"]

IntArray = npt.NDArray[np.int64]

_CHATS, _SAMPLES = 4, 5  # salts, beside those of `data/draw.py`
_ROWS = 1 << 18  # runs or documents at once


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
) -> dict[str, Any]:
    """Decide and write `folder`/plan.runs, lengths.json, lengths.png and, last, plan.json, whose contents are returned.

    Args:
        folder: OUT/plan; made if missing. A plan that is there is replaced (plan.json goes first).
        table: of the documents; its sources are those of `section`.
        section: mode, shares, length sampling, packing.
        name: of the data set, for titles.
        seed: of every decision.
        seq_length: tokens of a sample.
        separator: between or around documents; packing `single` and chunks, which are full of one document, use none.
        token_budget: tokens to draw, separators included and padding not; or None: all there is (as far as the shares allow).
        max_samples: samples that are kept at most.

    Raises:
        DataError: a source too small for its share, chunk lengths that do not divide seq_length, or not a single sample.
    """
    assert table.sources == tuple(source.name for source in section.sources)
    if section.packing == "intact" and separator.wrapping - separator.between >= seq_length:
        raise DataError(f"BOS and EOS leave no room in samples of {seq_length:,} tokens", where=name, fix="raise seq_length")
    drawn = draw(
        table,
        section,
        seed=seed,
        seq_length=seq_length,
        wrapping=separator.wrapping,
        between=separator.between,
        token_budget=token_budget,
    )
    streams = _streams(table, section, drawn, separator, seq_length)
    is_shuffled = bool(drawn.chunks) or section.packing == "best_fit"
    samples = _shuffled(streams, seed) if is_shuffled else None
    if not sum(stream.samples for stream in streams):
        raise DataError(_nothing(section, table, seq_length), where=name, fix="add documents or shorten seq_length")
    sampling = section.length_sampling
    borders = [int(sampling.short_below)] if sampling.keep_probability < 1 else []
    borders += [int(sampling.long_above)] if sampling.repetition > 1 else []
    facts = {
        "method": "pretrain",
        "name": name,
        "settings": json.loads(json.dumps(dataclasses.asdict(section), default=str)),
        "seed": seed,
        "token_budget": token_budget,
        "max_samples": max_samples,
        "separator": {"text": section.separator_text, **dataclasses.asdict(separator)},
    }
    planned = _Planned(folder, table, streams, samples, max_samples, separator, borders)
    spans = (int(sampling.short_below), int(sampling.long_above) + 1)
    lengths, facts = planned.write(facts, words=("documents read", "in the samples"), spans=spans)
    facts["shares"] = shares_got(drawn.groups, _tokens_of_groups(drawn, streams, samples, max_samples, lengths))
    facts["left_out"] = _left_out(table, drawn, lengths)
    return planned.finish(facts)


def make_chat_plan(folder: Path, table: DocumentTable, *, name: str, seed: int, seq_length: int) -> dict[str, Any]:
    """Plan of chats: whole, first-fit into samples in an order drawn from `seed`; what is free is padding without loss.

    One that is longer than `seq_length` is left out and counted. Nothing stands between the chats of a sample. Arguments, files and
    errors as in `make_plan`.
    """
    fits = np.flatnonzero(table.length <= seq_length)
    if not len(fits):
        raise DataError(f"no conversation of at most {seq_length:,} tokens", where=name, fix="add chats or raise seq_length")
    hashes = hash64(seed, _CHATS, table.key[fits])
    document = fits[hash_order(hashes, np.zeros(len(fits), np.int8))]
    nothing = Separator()
    stream = stream_of(table, document, table.length[document], packing="first_fit", separator=nothing, seq_length=seq_length)
    planned = _Planned(folder, table, [stream], None, None, nothing, [])
    facts: dict[str, Any] = {"method": "sft", "name": name, "settings": {"packing": "first_fit"}, "seed": seed}
    facts |= {"token_budget": None, "max_samples": None}
    _, facts = planned.write(facts, words=("chats read", "in the samples"), spans=None)
    is_long = table.length > seq_length
    facts["left_out"] = {}
    for index, source in enumerate(table.sources):
        mine = table.length[is_long & (table.source == index)]
        facts["left_out"][source] = {"too_long": {"documents": len(mine), "tokens": int(mine.sum())}}
    return planned.finish(facts)


def read_plan(folder: Path) -> tuple[Runs, dict[str, Any]]:
    """Map plan.runs and read plan.json of OUT/plan. `document` of the runs is a row of the table (LITERAL, PADDING below 0).

    Raises:
        DataError: no plan, not finished, or damaged.
    """
    path = folder / "plan.json"
    damaged = DataError("damaged, or not written by mcore-longctx", where=path, fix="run `data plan` again")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("checksum") != _checksum(facts) or facts["kind"] != "plan":
            raise damaged
    except FileNotFoundError:
        raise DataError("no finished plan here", where=folder, fix="run `data plan`") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    runs = open_runs(folder / "plan.runs", kind="plan")
    if _stored_crc32(folder / "plan.runs") != facts["runs_crc32"]:
        raise DataError(
            "is not the file that plan.json was written with", where=folder / "plan.runs", fix="run `data plan` again"
        )
    return runs, facts


# ------------------------------------------------------------------ deciding
def _streams(table: DocumentTable, section: DataSection, drawn: Drawn, separator: Separator, seq_length: int) -> list[Stream]:
    """A stream for the chunks of each group, and one for all documents that are packed."""
    streams = []
    for chunks in drawn.chunks:
        length = np.full(len(chunks.document), chunks.length, np.int64)
        pieces = Pieces(document=chunks.document, length=length, start=chunks.part * chunks.length)
        streams.append(Stream(table, pieces, Separator(), seq_length))
    if section.packing != "single":
        packed = stream_of(
            table, drawn.document, drawn.length, packing=section.packing, separator=separator, seq_length=seq_length
        )
        streams.append(packed)
    return streams


def _shuffled(streams: Sequence[Stream], seed: int) -> IntArray:
    """The samples of all streams in an order drawn from the seed. Their numbers come from orders that were drawn from keys."""
    hashes = [hash64(seed, _SAMPLES, number, np.arange(stream.samples)) for number, stream in enumerate(streams)]
    number = np.repeat(np.arange(len(streams)), [stream.samples for stream in streams])
    return hash_order(np.concatenate(hashes), number)


def _nothing(section: DataSection, table: DocumentTable, seq_length: int) -> str:
    tokens, longest = int(table.length.sum()), int(table.length.max(initial=0))
    if section.packing == "single":
        return f"no document of {seq_length:,} tokens left for packing 'single'; the longest has {longest:,}"
    return f"not one sample of {seq_length:,} tokens: the documents have {tokens:,} tokens before length sampling"


# ------------------------------------------------------------------ writing
@dataclasses.dataclass
class _Planned:
    """A plan on its way to the disk."""

    folder: Path
    table: DocumentTable
    streams: Sequence[Stream]
    samples: IntArray | None
    max_samples: int | None
    separator: Separator
    borders: Sequence[int]  # lengths to mark in the picture

    def write(
        self, facts: dict[str, Any], *, words: tuple[str, str], spans: tuple[int, int] | None
    ) -> tuple[list[SourceLengths], dict[str, Any]]:
        """Runs, lengths and picture; `facts` with what they say. spans: borders of length sampling, for the text."""
        table, seq_length = self.table, self.streams[0].seq_length
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "plan.json").unlink(missing_ok=True)
        path = self.folder / "plan.runs"
        lay_out(
            path,
            self.streams,
            samples=self.samples,
            limit=self.max_samples,
            literals=self.separator.before + self.separator.after,
            metadata={
                "format": 1,
                "kind": "plan",
                "seq_length": seq_length,
                "sources": table.sources,
                "documents": len(table),
                "begin_tokens": len(self.separator.before),
            },
        )
        runs = open_runs(path, kind="plan")
        lengths = measure_lengths(table, tokens_used(table, runs), spans or ())
        facts = {
            "format": 1,
            "kind": "plan",
            **facts,
            "seq_length": seq_length,
            "samples": len(runs),
            "runs": len(runs.document),
            **_count(runs),
            "begin_tokens": len(self.separator.before),
            "documents": len(table),
            "documents_sha256": table.sha256(),
            "lengths_sha256": _lengths_sha256(table),
            "plan_sha256": _plan_sha256(table, runs),
            "runs_crc32": _stored_crc32(path),
            "versions": versions(),
            "lengths": {source.name: source.as_dict() for source in lengths},
        }
        if spans is not None:
            low, high = spans
            cells = {s.name: [s.between(0, low), s.between(low, high), s.between(high, None)] for s in lengths}
            facts["length_sampling"] = {"borders": spans, "sources": cells}
        text = json.dumps({"unit": "tokens", "sources": facts["lengths"]}, indent=1)
        write_atomic(self.folder / "lengths.json", text + "\n")
        picture = self.folder / "lengths.png"
        aside = partial_path(picture)
        try:
            title = f"{facts['name']}: {many(len(runs), 'sample')} of {seq_length:,} tokens"
            plot_lengths(lengths, aside, title=title, words=words, borders=self.borders)
            aside.replace(picture)
        except OSError as error:
            raise DataError(f"cannot be written ({error.strerror})", where=picture, fix="make room") from None
        finally:
            aside.unlink(missing_ok=True)
        return lengths, facts

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write plan.json."""
        facts = json.loads(json.dumps(facts))
        write_atomic(self.folder / "plan.json", json.dumps(facts | {"checksum": _checksum(facts)}, indent=1) + "\n")
        return facts


def _count(runs: Runs) -> dict[str, int]:
    found = {"tokens": len(runs) * runs.seq_length, "tokens_with_loss": 0, "tokens_of_separators": 0, "tokens_of_padding": 0}
    for low in range(0, len(runs.document), _ROWS):
        block = slice(low, low + _ROWS)
        document, length = runs.document[block], runs.length[block].astype(np.int64)
        found["tokens_with_loss"] += int(length[runs.loss[block]].sum())
        found["tokens_of_separators"] += int(length[document == LITERAL].sum())
        found["tokens_of_padding"] += int(length[document == PADDING].sum())
    return found


def _tokens_of_groups(
    drawn: Drawn, streams: Sequence[Stream], samples: IntArray | None, limit: int | None, lengths: Sequence[SourceLengths]
) -> list[int]:
    """Tokens of documents that each group has in the samples."""
    tokens = [lengths[group.source].between(0, None)[3] for group in drawn.groups]
    border = np.cumsum([0, *(stream.samples for stream in streams)])
    written = np.arange(border[-1]) if samples is None else samples
    stream_of_sample = np.searchsorted(border, written[:limit], side="right") - 1
    kept = np.bincount(stream_of_sample, minlength=len(streams)).tolist()
    for number, chunks in enumerate(drawn.chunks):
        tokens[chunks.group] = kept[number] * streams[number].seq_length
    return tokens


def _left_out(table: DocumentTable, drawn: Drawn, lengths: Sequence[SourceLengths]) -> dict[str, dict[str, Any]]:
    """For each source where its tokens went: read - too short - too long - not drawn + copies = drawn, and so on to the samples."""
    taken = np.zeros(len(table.sources), np.int64)
    for low in range(0, len(drawn.document), _ROWS):
        block = slice(low, low + _ROWS)
        source = table.source[drawn.document[block]]
        taken += np.bincount(source, drawn.length[block], len(taken)).astype(np.int64)
    for chunks in drawn.chunks:
        taken[drawn.groups[chunks.group].source] += len(chunks.document) * chunks.length
    found = {}
    for measured, facts, mine in zip(lengths, drawn.sources, taken.tolist(), strict=True):
        in_samples = measured.between(0, None)[3]
        found[measured.name] = {
            "read": {"documents": facts["documents"], "tokens": facts["tokens"]},
            "too_short": {"documents": facts["short"], "tokens": facts["short_tokens"]},
            "too_long": {"documents": facts["long"], "tokens": facts["long_tokens"]},
            "not_drawn": {"documents": facts["not_drawn"], "tokens": facts["not_drawn_tokens"]},
            "drawn": {"documents": facts["drawn"], "tokens": facts["drawn_tokens"]},  # every copy counts
            "remainder": {"tokens": facts["drawn_tokens"] - facts["usable_tokens"]},  # of documents that were cut
            "over_budget": {"tokens": max(0, facts["usable_tokens"] - mine)},
            "repeated": {"tokens": max(0, mine - facts["usable_tokens"])},  # taken again to fill the share
            "tail": {"tokens": mine - in_samples},  # drawn, but in no whole sample that was wanted
            "in_samples": {"tokens": in_samples},
        }
    return found


# ------------------------------------------------------------------ hashes
def _plan_sha256(table: DocumentTable, runs: Runs) -> str:
    """Hash of all runs with keys of documents in place of rows: the same for any order in which documents were read."""
    digest = hashlib.sha256(np.array([runs.seq_length, len(runs), len(runs.literals)], "<i8").tobytes())
    digest.update(runs.literals.astype("<i4").tobytes())
    for low in range(0, len(runs.document), _ROWS):
        block = slice(low, low + _ROWS)
        document = runs.document[block]
        known = document >= 0
        key = document.astype(np.uint64)  # -1 and -2 become the largest numbers
        key[known] = table.key[document[known]]
        digest.update(key.tobytes() + known.tobytes() + runs.start[block].tobytes())
        digest.update(runs.length[block].tobytes() + runs.loss[block].tobytes())
    return digest.hexdigest()


def _lengths_sha256(table: DocumentTable) -> str:
    """Hash of keys, lengths and loss flags in the order of the keys: the same for any order in which documents were read."""
    digest, order = hashlib.sha256(), np.argsort(table.key)
    for low in range(0, len(order), _ROWS):
        rows = order[low : low + _ROWS]
        digest.update(table.key[rows].tobytes() + table.length[rows].tobytes())
    key = table.key[table.loss_document] if len(table.loss_document) else np.zeros(0, np.uint64)
    rows = np.lexsort((table.loss_stop, key))
    digest.update(key[rows].tobytes() + table.loss_stop[rows].tobytes() + table.loss_flag[rows].tobytes())
    return digest.hexdigest()


def _stored_crc32(path: Path) -> int:
    """The checksum at the end of a file of columns, which covers every byte before it."""
    with path.open("rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
