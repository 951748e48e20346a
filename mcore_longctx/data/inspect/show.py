"""`data show`: one sample as text, with its borders. `data stats`: how long the sequences, documents and runs of a dataset are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.indexed import IndexedReader, find_prefix
from mcore_longctx.data.files.sidecar import LITERAL, PADDING, Runs, check_index, read_runs
from mcore_longctx.data.methods.labels import literal_names, separator_tokens
from mcore_longctx.errors import DataError

__all__ = ["Decoder", "sample_in_words", "show_sample", "stats", "stats_in_words"]

_ROWS = 1 << 20  # runs looked at once

IntArray = npt.NDArray[np.int64]


class Decoder(Protocol):
    """What `show_sample` needs of a tokenizer."""

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """Text of ids."""


def show_sample(
    path: Path | str, index: int, tokenizer: Decoder | None = None, *, first_tokens: int = 24, last_tokens: int = 24
) -> dict[str, Any]:
    """One sample, or one sequence of any indexed dataset, run by run.

    Args:
        path: a folder with one dataset, or a prefix.
        index: of the sample.
        tokenizer: None: ids are shown.
        first_tokens: how many tokens of the beginning of a run are shown,
        last_tokens: and of its end.

    Returns:
        facts for JSON and `sample_in_words`: prefix, sample, samples, tokens, document, sequences_of_document (first, and one behind
        the last) and documents by the index, has_runs, and runs, each with begin and stop (positions in the sample), what ("document", "separator", "padding"; with `augment`
        "label", "backtrace", "knot ..."; without a sidecar "sequence"), source, document, start (in the document), loss, head and tail (text or ids; tail None if head is all).

    Raises:
        DataError: there is no such sample, or the dataset is damaged.
    """
    prefix = find_prefix(Path(path))
    reader, runs = IndexedReader(prefix), _runs_beside(prefix)
    if not 0 <= index < len(reader):
        raise DataError(f"no sample {index:,}, there are {len(reader):,}", where=prefix)
    tokens = reader[index]
    rows = [_whole_sequence(len(tokens))] if runs is None else _rows_of(runs, index)
    shown = [row | _ends(tokens[row["begin"] : row["stop"]], tokenizer, first_tokens, last_tokens) for row in rows]
    document = int(np.searchsorted(reader.document_indices[1:], index, side="right"))
    first, stop = (int(border) for border in reader.document_indices[document : document + 2])
    return {
        "prefix": str(prefix),
        "sample": index,
        "samples": len(reader),
        "tokens": len(tokens),
        "document": document,
        "sequences_of_document": [first, stop],
        "documents": len(reader.document_indices) - 1,
        "has_runs": runs is not None,
        "runs": shown,
    }


def _runs_beside(prefix: Path) -> Runs | None:
    if not Path(f"{prefix}.runs").is_file():
        return None
    runs = read_runs(prefix)
    check_index(prefix, runs)
    return runs


def _whole_sequence(length: int) -> dict[str, Any]:
    return {"begin": 0, "stop": length, "what": "sequence", "source": None, "document": None, "start": 0, "loss": None}


def _rows_of(runs: Runs, index: int) -> list[dict[str, Any]]:
    rows, begin, name_of = [], 0, literal_names(runs)
    for run in runs.sample(index):
        what = "document" if run.document is not None else "padding" if run.is_padding else name_of(run.start)
        place = {"source": run.source, "document": run.document, "start": run.start}
        rows.append({"begin": begin, "stop": begin + run.length, "what": what, **place, "loss": run.loss})
        begin += run.length
    return rows


def _ends(tokens: npt.NDArray[Any], tokenizer: Decoder | None, first: int, last: int) -> dict[str, Any]:
    def text(ids: npt.NDArray[Any]) -> str | list[int]:
        # a cut inside a character decodes to U+FFFD, which says what is there
        return tokenizer.decode(ids) if tokenizer is not None else [int(token) for token in ids]

    if len(tokens) <= first + last:
        return {"head": text(tokens), "tail": None}
    return {"head": text(tokens[:first]), "tail": text(tokens[len(tokens) - last :])}


def sample_in_words(facts: dict[str, Any]) -> str:
    """What `show_sample` found, for the screen."""
    lines = [f"{facts['prefix']}: sample {facts['sample']:,} of {facts['samples']:,}, {facts['tokens']:,} tokens"]
    if not facts["has_runs"]:
        first, stop = facts["sequences_of_document"]
        part = "which is all of it" if stop - first == 1 else f"which has the sequences {first:,} to {stop - 1:,}"
        lines.append(f"  document {facts['document']:,} of {facts['documents']:,}, {part}; no sidecar says more")
    width = len(f"{facts['tokens']:,}")
    for row in facts["runs"]:
        loss = {True: "", False: "  no loss", None: ""}[row["loss"]]
        what = row["what"]
        if what == "document":
            what = f"{row['source']} / {row['document']} from token {row['start']:,}"
        elif what != "sequence":
            what = f"---- {what} ----"
        lines.append(f"{row['begin']:>{width},} .. {row['stop']:>{width},}  {what}{loss}")
        if row["what"] == "padding":
            continue
        lines.append(f"    {_quoted(row['head'])}")
        if row["tail"] is not None:
            lines.append(f"    ... {_quoted(row['tail'])}")
    return "\n".join(lines)


def _quoted(text: str | list[int]) -> str:
    return repr(text) if isinstance(text, str) else " ".join(map(str, text))


# ------------------------------------------------------------------ lengths
def stats(path: Path | str) -> dict[str, Any]:
    """Lengths in any indexed dataset; the tokens themselves are not read.

    Args:
        path: a folder with one dataset, or a prefix.

    Returns:
        facts for JSON and `stats_in_words`: prefix, dtype, has_runs, and `lengths`: rows of sequences and of documents (without a
        sidecar: those of the index), with a sidecar also the runs and the documents of each source, separators and padding. Each
        row has what, source, count, tokens, min, median, p90, max (nearest rank) and buckets: count and tokens by power of two.
        A document counts once, with its tokens up to the last one that a sample holds: a sidecar knows no more of its length.

    Raises:
        DataError: the dataset is damaged.
    """
    prefix = find_prefix(Path(path))
    reader, runs = IndexedReader(prefix), _runs_beside(prefix)
    rows = [_row("sequences", None, reader.sequence_lengths)]
    if runs is None:
        item = reader.dtype.itemsize
        ends = reader.document_indices.astype(np.int64)
        inside = ends < len(reader)
        stops = np.full(len(ends), reader.index.bytes // item)
        stops[inside] = reader.sequence_pointers[ends[inside]] // item
        rows.append(_row("documents", None, np.diff(stops)))
    else:
        rows += _rows_of_sources(runs)
    return {"prefix": str(prefix), "dtype": reader.dtype.name, "has_runs": runs is not None, "lengths": rows}


def _rows_of_sources(runs: Runs) -> list[dict[str, Any]]:
    """Runs and documents of each source, separators, padding."""
    known_length = np.zeros(len(runs.document_source), np.int64)  # of each document, however often a sample holds it
    for low in range(0, len(runs.document), _ROWS):
        document, start, length = (column[low : low + _ROWS] for column in (runs.document, runs.start, runs.length))
        known = document >= 0
        np.maximum.at(known_length, document[known], start[known] + length[known])
    rows = []
    for number, source in enumerate(runs.sources):
        mine = runs.document_source == number
        rows.append(_row("documents", source, known_length[mine]))
        is_run = np.zeros(len(runs.document), np.bool_)
        for low in range(0, len(is_run), _ROWS):
            document = runs.document[low : low + _ROWS]
            is_run[low : low + len(document)] = (document >= 0) & mine[np.maximum(document, 0)] if len(mine) else False
        rows.append(_row("runs", source, runs.length[is_run]))
    literal, separators = runs.document == LITERAL, runs.start < separator_tokens(runs)
    rows.append(_row("separators", None, runs.length[literal & separators]))
    if "augment" in runs.facts:
        rows.append(_row("labels and knots", None, runs.length[literal & ~separators]))
    rows.append(_row("padding", None, runs.length[runs.document == PADDING]))
    return rows


def _row(what: str, source: str | None, lengths: npt.NDArray[Any]) -> dict[str, Any]:
    count = len(lengths)
    row: dict[str, Any] = {"what": what, "source": source, "count": count, "tokens": int(lengths.sum(dtype=np.int64))}
    ranks = {"min": 0, "median": (count - 1) // 2, "p90": -(-9 * count // 10) - 1, "max": count - 1}
    if not count:
        return {**row, **dict.fromkeys(ranks, 0), "buckets": []}
    ordered = np.partition(lengths, sorted(set(ranks.values())))
    power = np.frexp(lengths.astype(np.float64))[1]  # bits of the length: exact, lengths are below 2^53
    counts = np.bincount(power)
    tokens = np.bincount(power, weights=lengths.astype(np.float64))  # exact below 2^53 tokens
    buckets = [
        {"from": (1 << bits) >> 1, "to": (1 << bits) - 1, "count": int(counts[bits]), "tokens": int(tokens[bits])}
        for bits in np.flatnonzero(counts).tolist()
    ]
    return {**row, **{name: int(ordered[rank]) for name, rank in ranks.items()}, "buckets": buckets}


def stats_in_words(facts: dict[str, Any]) -> str:
    """What `stats` found, as a table for the screen."""
    head = ("", "count", "tokens", "min", "median", "p90", "max")
    table: list[tuple[str, ...]] = [head]
    table += [(_name(row), *(f"{row[column]:,}" for column in head[1:])) for row in facts["lengths"]]
    lines = [f"{facts['prefix']} ({facts['dtype']})", *_aligned(table)]
    for row in facts["lengths"]:
        if row["what"] == "documents" or (row["what"] == "sequences" and not facts["has_runs"]):
            buckets = [(f"{b['from']:,} to {b['to']:,}", f"{b['count']:,}", f"{b['tokens']:,}") for b in row["buckets"]]
            lines += ["", *_aligned([(_name(row), "count", "tokens"), *buckets])]
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return str(row["what"]) if row["source"] is None else f"{row['what']} of {row['source']}"


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
