"""`mcore-longctx data`: tokenize, plan, pack, or all in one; look into packed samples, check and join them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_longctx.cli.data_engine import add_engine_options, refuse_without_engine, run_engine
from mcore_longctx.errors import ConfigError

_DESCRIPTION = """\
Documents and chats to packed samples that Megatron reads (.bin/.idx), with a record of where every token came from.

  mcore-longctx data build RECIPE --stage extend       tokenize, plan and pack the data of one stage of a recipe
or step by step over one folder:
  mcore-longctx data tokenize OUT --tokenizer Llama-3.1-8B books=books.jsonl code=repositories/
  mcore-longctx data plan OUT --seq-length 1M --share books=0.3 --share code=0.7 --keep 0.3 --repeat 2
  mcore-longctx data pack OUT --name long
and then:
  mcore-longctx data show OUT --sample 3               a sample as text, with the borders of its documents
  mcore-longctx data stats OUT                         lengths; of any .bin/.idx pair
  mcore-longctx data verify OUT                        every file against its hash, every token against the vocabulary
  mcore-longctx data merge ALL PREFIX PREFIX ...       several .bin/.idx pairs into one

Started again, each goes on where it was; the result is the same for any number of workers and starts.
"""


_DOCUMENTS_ONLY = (  # options of `data plan` that say nothing about chats
    "mode",
    "share",
    "chunks",
    "short_below",
    "keep",
    "long_above",
    "repeat",
    "min_length",
    "max_length",
    "tokens",
    "repeat_to_fill",
    "separator",
    "separator_kind",
    "no_separator_loss",
    "packing",
)


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="build, inspect and verify packed samples",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="data_verb", metavar="build|tokenize|plan|pack|show|stats|verify|merge", required=True)
    _add_build(verbs)
    _add_tokenize(verbs)
    _add_plan(verbs)

    packing = verbs.add_parser("pack", help="copy tokens by the plan into .bin/.idx")
    packing.add_argument("out", metavar="OUT", type=Path)
    packing.add_argument("--name", default="samples", help="of the files (default: samples)")
    _add_workers(packing)
    packing.add_argument("--json", action="store_true", help="print JSON")

    show = verbs.add_parser("show", help="a sample as text, with the borders of its documents")
    show.add_argument("path", metavar="FOLDER|PREFIX", type=Path)
    show.add_argument("--sample", type=int, default=0, metavar="I", help="(default: 0)")
    show.add_argument("--tokenizer", type=Path, metavar="PATH", help="to decode with (default: the one of the folder)")
    show.add_argument("--json", action="store_true", help="print JSON")

    stats = verbs.add_parser("stats", help="lengths of sequences and documents of any .bin/.idx pair")
    stats.add_argument("path", metavar="FOLDER|PREFIX", type=Path)
    stats.add_argument("--json", action="store_true", help="print JSON")

    verify = verbs.add_parser("verify", help="check packed data, or any .bin/.idx pair: sizes, pointers, ids, checksums")
    verify.add_argument("path", metavar="FOLDER|PREFIX", type=Path)
    verify.add_argument("--vocab-size", type=int, metavar="N", help="ids must be below it (default: from the manifest)")
    verify.add_argument("--json", action="store_true", help="print JSON")

    merge = verbs.add_parser("merge", help="join .bin/.idx pairs into one, in constant memory")
    merge.add_argument("out", metavar="PREFIX", type=Path, help="of the pair to write; it must not exist")
    merge.add_argument("prefixes", metavar="PREFIX", type=Path, nargs="+", help="of the pairs to join, in this order")
    merge.add_argument("--json", action="store_true", help="print JSON")


def _add_build(verbs: Any) -> None:
    build = verbs.add_parser("build", help="tokenize, plan and pack the data of one stage of a recipe")
    build.add_argument("recipe", metavar="RECIPE", help="YAML file or preset")
    build.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    build.add_argument("--stage", required=True, help="the stage whose data is built")
    build.add_argument("--out", type=Path, help="folder to fill (default: data/STAGE in the run folder)")
    build.add_argument(
        "--all", action="store_true", help="all samples that the documents give, not only as many as the stage needs"
    )
    _add_workers(build)
    _add_verify_fraction(build)
    build.add_argument("--dry-run", action="store_true", help="say what would be done and how large it would be")
    build.add_argument("--json", action="store_true", help="print JSON")
    add_engine_options(build)


def _add_tokenize(verbs: Any) -> None:
    tokenize = verbs.add_parser("tokenize", help="documents -> token shards and length tables")
    tokenize.add_argument("out", metavar="OUT", type=Path, help="folder to fill")
    # called overrides, so that NAME=PATH may stand behind options too (see main.parse)
    tokenize.add_argument(
        "overrides", metavar="NAME=PATH", nargs="*", help="a source: .jsonl(.gz, .zst), .parquet, .txt, .md, or a folder of them"
    )
    tokenize.add_argument("--tokenizer", required=True, type=Path, metavar="PATH", help="model folder, tokenizer.json or .model")
    tokenize.add_argument("--vocab-size", type=int, metavar="N", help="of the model (default: of the tokenizer)")
    tokenize.add_argument("--text-field", default="text", metavar="NAME", help="of a record (default: text)")
    tokenize.add_argument("--id-field", default="id", metavar="NAME", help="of a record (default: id)")
    tokenize.add_argument(
        "--folders",
        action="append",
        default=[],
        metavar="NAME",
        help="a source in which every folder directly below its path is one document (a repository); may be repeated",
    )
    tokenize.add_argument("--chats", action="store_true", help='records are chats: {"messages": [...]}')
    tokenize.add_argument("--range", default="64M", metavar="BYTES", help="of input a task (default: 64M)")
    tokenize.add_argument("--max-bad", type=int, default=0, metavar="N", help="bad records that are left out (default: 0)")
    _add_workers(tokenize)
    _add_verify_fraction(tokenize)
    tokenize.add_argument("--dry-run", action="store_true", help="say what would be done and how large it would be")
    tokenize.add_argument("--json", action="store_true", help="print JSON")


def _add_plan(verbs: Any) -> None:
    plan = verbs.add_parser("plan", help="decide which documents go where; reads only the length tables")
    plan.add_argument("out", metavar="OUT", type=Path, help="folder with tokens")
    plan.add_argument("--seq-length", required=True, metavar="N", help="tokens of a sample, for example 1M")
    plan.add_argument("--mode", choices=("ultralong", "fu", "prolong"), default="ultralong", help="(default: ultralong)")
    plan.add_argument(
        "--share", action="append", default=[], metavar="NAME=X", help="share of the tokens that a source gets; for all or none"
    )
    plan.add_argument(
        "--chunks",
        action="append",
        default=[],
        metavar="NAME=LENGTH[:X]",
        help="mode prolong: pieces of LENGTH tokens from single documents of a source, with share X; may be repeated",
    )
    plan.add_argument("--short-below", default="4096", metavar="N", help="documents below this are short (default: 4096)")
    plan.add_argument("--keep", type=float, default=1.0, metavar="P", help="probability to keep a short document (default: 1)")
    plan.add_argument("--long-above", default="8192", metavar="N", help="documents above this are long (default: 8192)")
    plan.add_argument("--repeat", type=float, default=1.0, metavar="X", help="how often a long one is taken (default: 1)")
    plan.add_argument("--min-length", default="1", metavar="N", help="drop shorter documents")
    plan.add_argument("--max-length", metavar="N", help="drop longer documents")
    plan.add_argument("--tokens", metavar="N", help="token budget, for example 1B (default: all there is)")
    plan.add_argument("--repeat-to-fill", action="store_true", help="repeat documents where a source is too small for its share")
    plan.add_argument("--separator", metavar="TEXT", help="between documents (default: <s>)")
    plan.add_argument(
        "--separator-kind",
        choices=("text", "token", "bos_eos", "none"),
        default="text",
        help="ordinary characters, a control token, BOS and EOS around documents, or nothing (default: text)",
    )
    plan.add_argument("--no-separator-loss", action="store_true", help="separators are not learned")
    plan.add_argument(
        "--packing", choices=("concatenate", "single", "best_fit", "intact"), default="concatenate", help="(default: concatenate)"
    )
    documents_only = {name: plan.get_default(name) for name in _DOCUMENTS_ONLY}
    plan.set_defaults(documents_only=documents_only)
    plan.add_argument("--seed", type=int, default=1234, help="(default: 1234)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")


def _add_workers(parser: Any) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores that are free to use)")


def _add_verify_fraction(parser: Any) -> None:
    parser.add_argument(
        "--verify-fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the documents that are encoded again with the reference tokenizer and compared (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the verb says."""
    return _VERBS[args.data_verb](args)


# ------------------------------------------------------------------ building
def _build(args: argparse.Namespace) -> int:
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
            section.sources, recipe.tokenizer_folder, chats=chats, vocab_size=resolve(file, need_model=False).shape.vocab_size
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


def _tokenize(args: argparse.Namespace) -> int:
    from mcore_longctx.data.build import check_output, expect
    from mcore_longctx.data.tokenizers import load_tokenizer
    from mcore_longctx.data.tokens.job import prepare_job
    from mcore_longctx.data.tokens.tokenize import run_job
    from mcore_longctx.data.workspace import lock_folder

    sources, workers, range_bytes = _sources(args), _workers(args), _count(args.range, "--range")
    _check_verify_fraction(args.verify_fraction, args.chats)
    if args.max_bad < 0:
        raise ConfigError(f"--max-bad {args.max_bad}: expected 0 or more")
    if args.dry_run:
        expected = expect(sources, args.tokenizer, chats=args.chats, vocab_size=args.vocab_size, range_bytes=range_bytes)
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


def _plan(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from mcore_longctx.data.planning.plan import make_chat_plan, make_plan, plan_text
    from mcore_longctx.data.planning.separator import make_separator
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
            )
    print(json.dumps(facts, indent=1) if args.json else plan_text(facts))
    return 0


def _pack(args: argparse.Namespace) -> int:
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


# ------------------------------------------------------------------ looking
def _show(args: argparse.Namespace) -> int:
    from mcore_longctx.data.inspect.show import sample_in_words, show_sample
    from mcore_longctx.data.tokenizers import load_tokenizer

    path = args.tokenizer if args.tokenizer is not None else _tokenizer_of(args.path)
    sample = show_sample(args.path, args.sample, None if path is None else load_tokenizer(path))
    print(json.dumps(sample, indent=1) if args.json else sample_in_words(sample))
    return 0


def _tokenizer_of(path: Path) -> Path | None:
    """The tokenizer that a folder's tokens were made with, if it is still where it was."""
    from mcore_longctx.data.tokens.job import open_job

    folder = path if path.is_dir() else path.parent
    if not (folder / "tokens").is_dir():
        return None
    tokenizer = open_job(folder).tokenizer
    return tokenizer if tokenizer.is_file() else None


def _stats(args: argparse.Namespace) -> int:
    from mcore_longctx.data.inspect.show import stats, stats_in_words

    facts = stats(args.path)
    print(json.dumps(facts, indent=1) if args.json else stats_in_words(facts))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mcore_longctx.data.inspect.verify import check_data, check_tokens, raise_for_faults
    from mcore_longctx.manifest import MANIFEST

    facts: dict[str, Any] = {}
    if (args.path / "tokens").is_dir():  # the shards that the samples were copied from
        tokens = facts["tokens_folder"] = check_tokens(args.path, vocab_size=args.vocab_size)
        if not args.json:
            raise_for_faults(tokens)
            print(f"{args.path / 'tokens'}: {tokens['shards']:,} shards, {tokens['tokens']:,} tokens: whole")
        # a manifest is written last: with it, files that are not there are missing
        if not (args.path / MANIFEST).is_file() and not list(args.path.glob("*.idx")):
            print(json.dumps(facts, indent=1) if args.json else f"{args.path}: not packed yet")
            raise_for_faults(tokens)
            return 0
    facts |= check_data(args.path, vocab_size=args.vocab_size)
    if args.json:
        print(json.dumps(facts, indent=1))
        raise_for_faults(facts.get("tokens_folder", facts))
    raise_for_faults(facts)
    if not args.json:
        counts = (
            f"{facts['sequences']:,} sequences, {facts['documents']:,} documents, {facts['tokens']:,} tokens ({facts['dtype']})"
        )
        print(f"{facts['prefix']}: whole; {counts}\n  compared: {', '.join(facts['checked'])}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from mcore_longctx.data.inspect.merge import merge_in_words, merge_indexed

    facts = merge_indexed(args.prefixes, args.out)
    print(json.dumps(facts, indent=1) if args.json else merge_in_words(facts))
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": _build,
    "tokenize": _tokenize,
    "plan": _plan,
    "pack": _pack,
    "show": _show,
    "stats": _stats,
    "verify": _verify,
    "merge": _merge,
}


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
    from mcore_longctx.recipe.units import parse_count

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
