"""`data build`, `tokenize`, `plan`, `pack`: from their arguments to the rooms that do the work, and a bar while they do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_longctx.cli.data_engine import refuse_without_engine, run_engine
from mcore_longctx.cli.data_methods import augment_section, sentence_section
from mcore_longctx.errors import ConfigError

__all__ = ["build", "pack", "plan", "tokenize"]


def build(args: argparse.Namespace) -> int:
    """Tokenize, plan and pack the data of one stage of a recipe."""
    from mcore_longctx.data.build import build, expect
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.recipe.resolve import resolve

    file = open_recipe(args.recipe, args.overrides)
    recipe = file.recipe
    stage = next((stage for stage in recipe.stages if stage.name == args.stage), None)
    if stage is None:
        there = ", ".join(stage.name for stage in recipe.stages)
        raise ConfigError(f"no stage {args.stage!r}", where=file.where("stages"), fix=f"there are {there}")
    section, chats = recipe.data[stage.data], stage.kind == "sft"
    _check_verify_fraction(args.verify_fraction, chats)
    needed = None if args.all or chats else stage.iterations * stage.global_batch_size
    out = args.out if args.out is not None else recipe.run_folder / "data" / stage.name
    if args.dry_run:
        expected = expect(
            section.sources,
            recipe.tokenizer_folder,
            chats=chats,
            vocab_size=resolve(file, need_model=False).shape.vocab_size,
            sentences=section.sentences,
        )
        print(json.dumps(expected.as_dict(), indent=1) if args.json else expected)
        if needed is not None and not args.json:
            print(f"the stage needs {needed:,} samples of {stage.seq_length:,} tokens: {needed * stage.seq_length:,} tokens")
        return 0
    arguments: dict[str, Any] = {
        "section": section,
        "name": stage.data,
        "chats": chats,
        "tokenizer": recipe.tokenizer_folder,
        "model_vocab_size": resolve(file).shape.vocab_size,
        "seq_length": stage.seq_length,
        "num_samples": needed,
        "seed": recipe.seed,
        "out": out,
        "verify_fraction": args.verify_fraction,
    }
    if args.engine is not None:
        return run_engine(args, arguments, _workers(args))
    refuse_without_engine(args)
    with _progress() as progress:
        report = build(**arguments, workers=_workers(args), progress=progress)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    return 0


def tokenize(args: argparse.Namespace) -> int:
    """Documents to token shards."""
    from mcore_longctx.data.build import check_output, expect
    from mcore_longctx.data.tokenizers import load_tokenizer
    from mcore_longctx.data.tokens.job import prepare_job
    from mcore_longctx.data.tokens.tokenize import run_job
    from mcore_longctx.data.workspace import lock_folder

    sources, workers, range_bytes = _sources(args), _workers(args), _count(args.range, "--range")
    sentences = sentence_section(args)
    _check_verify_fraction(args.verify_fraction, args.chats)
    if args.max_bad < 0:
        raise ConfigError(f"--max-bad {args.max_bad}: expected 0 or more")
    if args.dry_run:
        expected = expect(
            sources,
            args.tokenizer,
            chats=args.chats,
            vocab_size=args.vocab_size,
            range_bytes=range_bytes,
            sentences=sentences,
        )
        print(json.dumps(expected.as_dict(), indent=1) if args.json else expected)
        return 0
    check_output(args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    with lock_folder(args.out):
        job = prepare_job(
            args.out,
            sources,
            tokenizer,
            vocab_size=args.vocab_size,
            chats=args.chats,
            prompt_loss_from=_prompt_loss(args, sources),
            sentences=sentences,
            seed=args.seed,
            range_bytes=range_bytes,
        )
        with _progress() as progress:
            progress("to tokenize", job.size_missing, 0)
            report = run_job(
                job,
                tokenizer,
                workers=workers,
                max_bad=args.max_bad,
                verify_fraction=args.verify_fraction,
                on_task=lambda size, tokens: progress("tokenize", size, tokens),
            )
    assert report is not None
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    return 0


def plan(args: argparse.Namespace) -> int:
    """Decide which documents go where."""
    from dataclasses import replace

    from mcore_longctx.data.planning.plan import make_chat_plan, make_plan, plan_text
    from mcore_longctx.data.planning.separator import job_tokenizer, make_separator
    from mcore_longctx.data.tokens.job import open_job, read_documents_table
    from mcore_longctx.data.workspace import lock_folder
    from mcore_longctx.recipe.schema import ChunkSet, DataSection, LengthSampling, TokenCount

    job = open_job(args.out)
    if job.chats:
        _refuse_for_chats(args)
    separator = _separator(args)
    seq_length = _count(args.seq_length, "--seq-length")
    shares: dict[str, float] = {}
    for name, value in _pairs(args.share, "--share", job.sources):
        if name in shares:
            raise ConfigError(f"--share {name} is given twice", fix="give it once")
        shares[name] = _number(value, f"--share {name}")
    chunks: dict[str, list[ChunkSet]] = {}
    for name, value in _pairs(args.chunks, "--chunks", job.sources):
        length, _, share = value.partition(":")
        chunk = ChunkSet(
            length=TokenCount(_count(length, "--chunks")), share=_number(share, f"--chunks {name}") if share else None
        )
        chunks.setdefault(name, []).append(chunk)
    max_length = None if args.max_length is None else TokenCount(_count(args.max_length, "--max-length"))
    try:
        section = DataSection(
            sources=tuple(
                replace(source, share=shares.get(source.name), chunks=tuple(chunks.get(source.name, ())))
                for source in job.sources
            ),
            mode=args.mode,
            length_sampling=LengthSampling(
                short_below=TokenCount(_count(args.short_below, "--short-below")),
                keep_probability=args.keep,
                long_above=TokenCount(_count(args.long_above, "--long-above")),
                repetition=args.repeat,
                min_length=TokenCount(_count(args.min_length, "--min-length")),
                max_length=max_length,
            ),
            separator=separator,
            separator_kind=args.separator_kind,
            separator_loss=not args.no_separator_loss,
            packing=args.packing,
            repeat_to_fill=args.repeat_to_fill,
            augment=augment_section(args),
            sentences=job.sentences,
        )
    except ValueError as error:
        raise ConfigError(str(error), where="data plan") from None
    with lock_folder(args.out):
        table = read_documents_table(job)
        if job.chats:
            facts = make_chat_plan(args.out / "plan", table, name=args.out.name, seed=args.seed, seq_length=seq_length)
        else:
            facts = make_plan(
                args.out / "plan",
                table,
                section,
                name=args.out.name,
                seed=args.seed,
                seq_length=seq_length,
                separator=make_separator(section, job),
                token_budget=None if args.tokens is None else _count(args.tokens, "--tokens"),
                tokenizer=lambda: job_tokenizer(job),
            )
    print(json.dumps(facts, indent=1) if args.json else plan_text(facts))
    return 0


def pack(args: argparse.Namespace) -> int:
    """Copy tokens by the plan."""
    from mcore_longctx.data.pack import pack
    from mcore_longctx.data.tokens.job import open_job
    from mcore_longctx.data.workspace import lock_folder

    if not args.out.is_dir():
        raise ConfigError("no such folder", where=args.out, fix="run `data tokenize` and `data plan` first")
    workers = _workers(args)
    open_job(args.out)  # nothing is written into a folder that is not ours, not even a lock
    with lock_folder(args.out), _progress() as progress:
        report = pack(args.out, args.name, workers=workers, on_block=lambda tokens: progress("pack", 0, tokens))
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    return 0


# ------------------------------------------------------------------ arguments
def _sources(args: argparse.Namespace) -> list[Any]:
    from mcore_longctx.recipe.schema import DataSection, DocumentSource

    sources = []
    for text in args.overrides:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(
                f"{text!r} is not NAME=PATH", where="data tokenize", fix="give each source a name: books=books.jsonl"
            )
        try:
            source = DocumentSource(
                name=name,
                path=Path(path),
                text_field=args.text_field,
                id_field=args.id_field,
                document="folder" if name in args.folders else "record",
            )
        except ValueError as error:
            raise ConfigError(str(error), where="data tokenize") from None
        sources.append(source)
    unknown = set(args.folders) - {source.name for source in sources}
    if unknown:
        raise ConfigError(f"--folders {unknown.pop()}: no such source", where="data tokenize", fix="give NAME=PATH for it")
    try:
        DataSection(sources=tuple(sources))
    except ValueError as error:
        raise ConfigError(str(error), where="data tokenize", fix="give sources as NAME=PATH") from None
    return sources


def _prompt_loss(args: argparse.Namespace, sources: list[Any]) -> int | None:
    from mcore_longctx.recipe.schema import DataSection, TokenCount

    given: dict[str, Any] = {"prompt_loss": args.prompt_loss}
    if args.prompt_loss_from is not None:
        given["prompt_loss_from"] = TokenCount(_count(args.prompt_loss_from, "--prompt-loss-from"))
    try:
        return DataSection(sources=tuple(sources), **given).prompt_loss_tokens
    except ValueError as error:
        raise ConfigError(str(error), where="data tokenize") from None


def _pairs(texts: list[str], option: str, sources: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    names = [source.name for source in sources]
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"{option} {text}: expected NAME=VALUE of a source", fix=f"sources: {', '.join(names)}")
        yield name, value


def _refuse_for_chats(args: argparse.Namespace) -> None:
    for name, default in args.documents_only.items():
        if getattr(args, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning for chats, which are taken whole", fix="remove it")


def _separator(args: argparse.Namespace) -> str:
    """The separator's text; UltraLong's if none is given."""
    if args.separator is None:
        return "<s>"
    if args.separator_kind in ("bos_eos", "none"):
        raise ConfigError(f"--separator has no meaning with --separator-kind {args.separator_kind}", fix="remove it")
    if not args.separator:
        raise ConfigError("--separator is empty", fix="say --separator-kind none")
    return str(args.separator)


def _check_verify_fraction(fraction: float, chats: bool) -> None:
    if not 0 <= fraction <= 1:  # nan neither
        raise ConfigError(f"--verify-fraction {fraction}: expected 0 to 1")
    if fraction and chats:
        raise ConfigError("--verify-fraction has no meaning for chats", fix="remove it")


def _count(text: str, option: str) -> int:
    from mcore_longctx.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a number") from None


def _workers(args: argparse.Namespace) -> int:
    from mcore_longctx.data.workspace import usable_cores

    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    return args.workers if args.workers is not None else usable_cores()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with tokens per second on a terminal, nothing in the log of a job. What is called: `Progress` of `data/build.py`."""
    if not sys.stderr.isatty():  # even a disabled bar would start a thread
        yield lambda step, size, tokens: None
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}
    total_bytes: int | None = None

    def show(step: str, size: int, tokens: int) -> None:
        nonlocal total_bytes
        if step == "to tokenize":
            total_bytes = size
            return
        if step not in bars:
            total, unit = (total_bytes, "B") if step == "tokenize" else (None, " tokens")
            bars[step] = tqdm(desc=step, total=total, unit=unit, unit_scale=True, leave=False)
            bars[step].tokens = 0
        bar = bars[step]
        bar.tokens += tokens
        bar.set_postfix_str(f"{bar.tokens / max(1e-3, bar.format_dict['elapsed']) / 1e6:.1f} Mtok/s", refresh=False)
        bar.update(size if bar.unit == "B" else tokens)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
