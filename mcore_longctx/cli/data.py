"""`mcore-longctx data`: tokenize, plan, pack, or all in one; look into packed samples, check and join them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mcore_longctx.cli.data_engine import add_engine_options
from mcore_longctx.cli.data_methods import add_augment, add_sentences
from mcore_longctx.cli.data_offsets import add_token_offsets
from mcore_longctx.cli.data_synth import add_synth

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
and before: which tokens a long training moved most, for `data tokenize --sentences logit_offset`
  mcore-longctx data token-offsets BASE TRAINED --text books.jsonl --out offsets.json
chats that nobody has written:
  mcore-longctx data synth tables OUT.jsonl --tokenizer MODEL --length 32K:1000

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
    "augment",
    "augment_chunks",
    "augment_probability",
    "augment_group",
    "augment_any_order",
    "augment_no_backtrace",
)


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="build, inspect and verify packed samples",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(
        dest="data_verb", metavar="build|tokenize|plan|pack|show|stats|verify|merge|synth|token-offsets", required=True
    )
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

    add_synth(verbs)
    add_token_offsets(verbs)


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
    tokenize.add_argument(
        "--prompt-loss", choices=("none", "long_only", "all"), default="none", help="chats: prompts that are learned too"
    )
    tokenize.add_argument(
        "--prompt-loss-from", metavar="N", help="tokens of the prompts that long_only learns, at least (default: 4096)"
    )
    add_sentences(tokenize)
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
    add_augment(plan)
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
    from mcore_longctx.cli import data_build, data_inspect, data_offsets, data_synth

    verb = args.data_verb.replace("-", "_")
    doer = next(room for room in (data_build, data_inspect, data_synth, data_offsets) if verb in room.__all__)
    return int(getattr(doer, verb)(args))
