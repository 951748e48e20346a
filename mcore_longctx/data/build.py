"""Documents or chats to a folder of packed samples that appears whole.

OUT/NAME.bin NAME.idx    the samples, for Megatron's IndexedDataset and GPTDataset too
OUT/NAME.runs.npz        which document every token came from, and its loss flag
OUT/lengths.json .png    document lengths of each source before and after
OUT/manifest.json        settings, seeds, counts, hashes of the input files and of everything above
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mcore_longctx.data.indexed import token_dtype
from mcore_longctx.data.lengths import SourceLengths, length_name, measure_lengths, plot_lengths
from mcore_longctx.data.pack import lay_out, pack_whole, separators, write_samples
from mcore_longctx.data.plan import Plan, plan_concatenated, plan_single
from mcore_longctx.data.readers import SourceReader
from mcore_longctx.data.sft import ChatEncoder
from mcore_longctx.data.shards import DocumentTable, TokenWriter, hash64
from mcore_longctx.data.sidecar import LITERAL, PADDING, Runs
from mcore_longctx.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import staged_folder, write_manifest
from mcore_longctx.recipe.schema import DataSection

__all__ = ["BuildReport", "build_pretrain", "build_sft"]

T = TypeVar("T")

_TOKENS = "documents.tokens"  # tokens of all documents; removed before the folder appears


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What was built. `str(report)` is the text for the screen."""

    folder: Path
    name: str
    seq_length: int
    samples: int
    samples_needed: int | None  # None: as many as the documents give
    sources: tuple[SourceLengths, ...]
    text: str

    @property
    def prefix(self) -> Path:
        """Path of .bin, .idx and .runs.npz without suffix."""
        return self.folder / self.name

    def __str__(self) -> str:
        return self.text


def build_pretrain(
    section: DataSection,
    name: str,
    *,
    tokenizer: Path,
    model_vocab_size: int,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    out: Path,
) -> BuildReport:
    """Read documents, tokenize, sample by length, pack, and write the folder `out`.

    Args:
        section: sources, length sampling, separator and packing.
        name: of the data set; the files are called after it.
        tokenizer: tokenizer.json or a folder that holds it.
        model_vocab_size: entries of the model's embedding.
        seq_length: tokens of a sample.
        num_samples: samples that the training stage needs, None for all that the documents give. One more is written, because
            Megatron's GPTDataset, which reads seq_length + 1 tokens a sample, loses the last one. If the documents give fewer,
            all of them are written and the report says so.
        seed: of every decision.
        out: folder that must not exist.

    Raises:
        DataError: an input that cannot be read, a vocabulary that does not fit, or not a single sample.
        ConfigError: `out` exists.
    """
    _check_name(name)
    tools = load_tokenizer(tokenizer)
    check_vocabulary(tools, model_vocab_size)
    separator = tools.encode(section.separator)
    max_samples = None if num_samples is None else num_samples + 1
    with staged_folder(out) as folder:
        with TokenWriter(folder / _TOKENS, token_dtype(model_vocab_size), [source.name for source in section.sources]) as writer:
            inputs = _tokenize_documents(section, tools, writer)
            table = writer.table()
            plan = _plan(section, table, seed, len(separator), seq_length, max_samples)
            filler = separators(plan, len(separator) if section.packing == "concatenate" else 0)
            runs = lay_out(table, plan, filler, separator, seq_length=seq_length, max_samples=max_samples)
            if not len(runs):
                raise DataError(_nothing(section, table, seq_length), where=name, fix="add documents or shorten seq_length")
            write_samples(folder / name, runs, table, writer.tokens(), dtype=writer.dtype)
        sources = measure_lengths(table, runs)
        too_short = int((table.length < seq_length).sum()) if section.packing == "single" else 0
        text = _pretrain_text(section, name, sources, runs, num_samples, too_short)
        facts = {
            "method": "pretrain",
            "samples_needed": num_samples,
            "separator": {"text": section.separator, "token_ids": separator.tolist()},
            "dropped_too_short": too_short,
        }
        _finish(folder, name, section, tools, sources, runs, {**facts, "seed": seed, "inputs": inputs})
    return _report(out, name, sources, runs, num_samples, text)


def build_sft(
    section: DataSection, name: str, *, tokenizer: Path, model_vocab_size: int, seq_length: int, seed: int, out: Path
) -> BuildReport:
    """Read chats, render and tokenize them, pack whole conversations into samples, and write the folder `out`.

    Conversations go first-fit into samples in an order drawn from `seed`; what is free is padding without loss. One that is
    longer than `seq_length` is dropped and counted. Nothing is masked between the conversations of a sample. Arguments and
    errors as in `build_pretrain`; of `section` only the sources are used, and other settings are refused.
    """
    _check_name(name)
    _refuse_unused(section, name)
    tools = load_tokenizer(tokenizer)
    check_vocabulary(tools, model_vocab_size)
    encoder, pad_id = ChatEncoder(tools), _pad_id(tools)
    with staged_folder(out) as folder:
        with TokenWriter(folder / _TOKENS, token_dtype(model_vocab_size), [source.name for source in section.sources]) as writer:
            inputs = _tokenize_chats(section, encoder, writer)
            table = writer.table()
            fits = np.flatnonzero(table.length <= seq_length)
            if not len(fits):
                raise DataError(
                    f"no conversation of at most {seq_length:,} tokens", where=name, fix="add chats or raise seq_length"
                )
            fits = fits[np.lexsort((fits, hash64(seed, table.key[fits])))]
            whole = Plan(document=fits, start=np.zeros(len(fits), np.int64), length=table.length[fits])
            plan, padding = pack_whole(whole, seq_length)
            runs = lay_out(table, plan, padding, np.zeros(0, np.int32), seq_length=seq_length, max_samples=None)
            write_samples(folder / name, runs, table, writer.tokens(), dtype=writer.dtype, pad_id=pad_id)
        sources, too_long = measure_lengths(table, runs), len(table) - len(fits)
        text = _sft_text(name, sources, runs, too_long)
        facts = {"method": "sft", "samples_needed": None, "pad_token_id": pad_id, "dropped_too_long": too_long}
        _finish(folder, name, section, tools, sources, runs, {**facts, "seed": seed, "inputs": inputs})
    return _report(out, name, sources, runs, None, text)


# ------------------------------------------------------------------ reading
def _tokenize_documents(section: DataSection, tokenizer: Tokenizer, writer: TokenWriter) -> dict[str, Any]:
    def read(index: int, reader: SourceReader) -> int:
        empty = 0
        for document in _progress(reader.documents(section.sources[index].text_field), writer.sources[index]):
            # each part alone, so that its loss flag covers exactly its own characters
            segments = [(tokenizer.encode(part.text), part.loss) for part in document.parts]
            empty += not writer.add(index, document.id, segments)
        return empty

    return _read_sources(section, read)


def _tokenize_chats(section: DataSection, encoder: ChatEncoder, writer: TokenWriter) -> dict[str, Any]:
    def read(index: int, reader: SourceReader) -> int:
        for chat in _progress(reader.chats(), writer.sources[index]):
            writer.add(index, chat.id, encoder.encode(chat))
        return 0

    return _read_sources(section, read)


def _read_sources(section: DataSection, read: Callable[[int, SourceReader], int]) -> dict[str, Any]:
    """Run `read` over every source; what was found there, for the manifest."""
    inputs = {}
    for index, source in enumerate(section.sources):
        reader = SourceReader(source.path)
        empty = read(index, reader)
        inputs[source.name] = {
            "path": str(source.path),
            "files": [dataclasses.asdict(file) for file in reader.files],
            "files_ignored": reader.ignored,
            "documents_empty": reader.empty + empty,
        }
    return inputs


def _progress(items: Iterable[T], name: str) -> Iterable[T]:
    if not sys.stderr.isatty():  # even a disabled bar would start a thread
        return items
    from tqdm import tqdm

    return tqdm(items, desc=name, unit=" documents", mininterval=1.0, leave=False)


# ------------------------------------------------------------------ deciding
def _plan(
    section: DataSection, table: DocumentTable, seed: int, separator_length: int, seq_length: int, max_samples: int | None
) -> Plan:
    shares = [
        source.share for source in section.sources if source.share is not None
    ] or None  # all or none: the schema sees to it
    sampling = section.length_sampling
    if section.packing == "single":
        return plan_single(table, sampling, shares, seed=seed, seq_length=seq_length, sample_budget=max_samples)
    budget = None if max_samples is None else max_samples * seq_length
    return plan_concatenated(table, sampling, shares, seed=seed, separator_length=separator_length, token_budget=budget)


def _nothing(section: DataSection, table: DocumentTable, seq_length: int) -> str:
    tokens, longest = int(table.length.sum()), int(table.length.max(initial=0))
    if section.packing == "single":
        return f"no document of {seq_length:,} tokens left for packing 'single'; the longest has {longest:,}"
    return f"not one sample of {seq_length:,} tokens: the documents have {tokens:,} tokens before length sampling"


def _refuse_unused(section: DataSection, name: str) -> None:
    plain = DataSection(sources=section.sources)
    for field in ("length_sampling", "separator", "packing"):
        if getattr(section, field) != getattr(plain, field):
            raise ConfigError("has no meaning for chats, which are taken whole", where=f"data.{name}.{field}", fix="remove it")
    if any(source.share is not None for source in section.sources):
        raise ConfigError("share has no meaning for chats, every one is taken", where=f"data.{name}.sources", fix="remove it")


def _check_name(name: str) -> None:
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(f"{name!r} cannot be a file name", where="data", fix="rename the data set")


def _pad_id(tokenizer: Tokenizer) -> int:
    for role in ("pad_token", "eos_token"):
        text = tokenizer.special_tokens.get(role)
        found = tokenizer.control_id(text) if text is not None else None
        if found is not None:
            return found
    where = tokenizer.path.parent / "tokenizer_config.json"
    raise DataError("no pad_token and no eos_token that the tokenizer knows", where=where, fix="name one of them there")


# ------------------------------------------------------------------ telling
def _finish(
    folder: Path,
    name: str,
    section: DataSection,
    tokenizer: Tokenizer,
    sources: list[SourceLengths],
    runs: Runs,
    facts: dict[str, Any],
) -> None:
    """Write lengths.json, lengths.png and, last, the manifest."""
    lengths = {source.name: source.as_dict() for source in sources}
    (folder / "lengths.json").write_text(json.dumps({"unit": "tokens", "sources": lengths}, indent=1) + "\n")
    what = "documents" if facts["method"] == "pretrain" else "chats"
    title = f"{name}: {_many(len(runs), 'sample')} of {runs.seq_length:,} tokens"
    sampling = section.length_sampling
    borders = [int(sampling.short_below)] if sampling.keep_probability < 1 else []
    borders += [int(sampling.long_above)] if sampling.repetition > 1 else []
    plot_lengths(sources, folder / "lengths.png", title=title, words=(f"{what} read", "in the samples"), borders=borders)
    write_manifest(
        folder,
        "data",
        name=name,
        seq_length=runs.seq_length,
        samples=len(runs),
        tokens=int(runs.length.sum()),
        tokens_with_loss=int(runs.length[runs.loss].sum()),
        tokens_of_separators=int(runs.length[runs.source == LITERAL].sum()),
        tokens_of_padding=int(runs.length[runs.source == PADDING].sum()),
        tokenizer={"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        settings=json.loads(json.dumps(dataclasses.asdict(section), default=str)),
        sources=lengths,
        **facts,
    )


def _report(out: Path, name: str, sources: list[SourceLengths], runs: Runs, samples_needed: int | None, text: str) -> BuildReport:
    return BuildReport(
        folder=out,
        name=name,
        seq_length=runs.seq_length,
        samples=len(runs),
        samples_needed=samples_needed,
        sources=tuple(sources),
        text=text,
    )


def _pretrain_text(
    section: DataSection, name: str, sources: list[SourceLengths], runs: Runs, samples_needed: int | None, too_short: int
) -> str:
    head = f"{name}: {_many(len(runs), 'sample')} of {runs.seq_length:,} tokens"
    if samples_needed is not None and len(runs) < samples_needed:
        head += f", FEWER than the {samples_needed:,} that the stage needs: the documents give no more"
    elif samples_needed is not None and len(runs) > samples_needed:
        head += f" ({samples_needed:,} needed; one more, because Megatron's own GPTDataset loses the last)"
    sampling = section.length_sampling
    low, high = sampling.short_below, sampling.long_above + 1
    spans = [(0, low), (low, high), (high, None)]
    titles = [f"below {length_name(low)}", "between", f"above {length_name(sampling.long_above)}"]
    rows = [["source", "documents", "tokens read", "in samples", *titles]]
    for source in sources:
        documents, before, _, after = source.between(0, None)
        cells = [source.between(*span) for span in spans]
        moved = [f"{_percent(cell[1], before)} -> {_percent(cell[3], after)}" for cell in cells]
        rows.append([source.name, f"{documents:,}", f"{before:,}", f"{after:,}", *moved])
    lines = [head, *_table(rows), "  (share of the source's tokens in documents of these lengths: read -> in the samples)"]
    if too_short:
        lines.append(f"  dropped: {_many(too_short, 'document')} shorter than a sample (packing: single)")
    return "\n".join(lines)


def _sft_text(name: str, sources: list[SourceLengths], runs: Runs, too_long: int) -> str:
    total, padding = int(runs.length.sum()), int(runs.length[runs.source == PADDING].sum())
    learned = int(runs.length[runs.loss].sum())
    head = (
        f"{name}: {_many(len(runs), 'sample')} of {runs.seq_length:,} tokens, {_percent(learned, total)} learned (answers), "
        f"{_percent(padding, total)} padding"
    )
    rows = [["source", "chats", "tokens read", "in samples", "median", "longest"]]
    for source in sources:
        chats, before, _, after = source.between(0, None)
        median, longest = (int(f(source.length)) if chats else 0 for f in (np.median, np.max))
        rows.append([source.name, f"{chats:,}", f"{before:,}", f"{after:,}", f"{median:,}", f"{longest:,}"])
    lines = [head, *_table(rows)]
    if too_long:
        lines.append(f"  dropped: {_many(too_long, 'conversation')} longer than {runs.seq_length:,} tokens")
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
