"""`mcore-longctx data`: build packed samples, look into them, check them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Documents and chats to packed samples that Megatron reads (.bin/.idx), with a record of what went into each.

  mcore-longctx data build RECIPE --stage extend --out FOLDER    the data of one stage, without running the recipe
  mcore-longctx data inspect FOLDER                              what is in packed data, or in any .bin/.idx pair
  mcore-longctx data inspect FOLDER --sample 3                   the documents that sample 3 is made of
  mcore-longctx data verify FOLDER                               every file against its hash, every token against the vocabulary
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="build, inspect and verify packed samples",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="data_verb", metavar="build|inspect|verify", required=True)

    build = verbs.add_parser("build", help="build the data of one stage of a recipe")
    build.add_argument("recipe", metavar="RECIPE", help="YAML file or preset")
    build.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    build.add_argument("--stage", required=True, help="the stage whose data is built")
    build.add_argument("--out", type=Path, help="folder to write; it must not exist (default: data/STAGE in the run folder)")
    build.add_argument(
        "--all", action="store_true", help="all samples that the documents give, not only as many as the stage needs"
    )

    inspect = verbs.add_parser("inspect", help="say what is in packed data, or in any .bin/.idx pair")
    inspect.add_argument("path", metavar="FOLDER|PREFIX", type=Path)
    inspect.add_argument("--sample", type=int, metavar="I", help="list the runs of sample I")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = verbs.add_parser("verify", help="check packed data against its manifest, its sidecar and the vocabulary")
    verify.add_argument("path", metavar="FOLDER", type=Path)
    verify.add_argument("--json", action="store_true", help="print the manifest")


def run(args: argparse.Namespace) -> int:
    """Do what the verb says."""
    return {"build": _build, "inspect": _inspect, "verify": _verify}[args.data_verb](args)


def _build(args: argparse.Namespace) -> int:
    from mcore_longctx.data.build import build_pretrain, build_sft
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.recipe.load import open_recipe
    from mcore_longctx.recipe.resolve import resolve

    file = open_recipe(args.recipe, args.overrides)
    recipe = file.recipe
    stage = next((stage for stage in recipe.stages if stage.name == args.stage), None)
    if stage is None:
        there = ", ".join(stage.name for stage in recipe.stages)
        raise ConfigError(f"no stage {args.stage!r}", where=file.where("stages"), fix=f"there are {there}")
    common: dict[str, Any] = {
        "tokenizer": recipe.tokenizer_folder,
        "model_vocab_size": resolve(file).shape.vocab_size,
        "seq_length": stage.seq_length,
        "seed": recipe.seed,
        "out": args.out if args.out is not None else recipe.run_folder / "data" / stage.name,
    }
    if stage.kind == "pretrain":
        needed = None if args.all else stage.iterations * stage.global_batch_size
        report = build_pretrain(recipe.data[stage.data], stage.data, num_samples=needed, **common)
    else:
        report = build_sft(recipe.data[stage.data], stage.data, **common)
    print(report)
    print(f"written: {report.folder}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from mcore_longctx.data.sidecar import read_runs
    from mcore_longctx.data.verify import describe_indexed, find_prefix
    from mcore_longctx.errors import DataError

    prefix = find_prefix(args.path)
    facts = describe_indexed(prefix)
    if args.sample is not None:
        runs = read_runs(prefix)
        if not 0 <= args.sample < len(runs):
            raise DataError(f"no sample {args.sample}, there are {len(runs):,}", where=prefix)
        rows = [vars(run) for run in runs.sample(args.sample)]
        print(json.dumps(rows, indent=1) if args.json else "\n".join(map(_run_in_words, rows)))
        return 0
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(
        f"{facts['prefix']}: {facts['sequences']:,} sequences in {facts['documents']:,} documents, {facts['tokens']:,} tokens ({facts['dtype']})"
    )
    print(f"  shortest sequence {facts['shortest_sequence']:,}, longest {facts['longest_sequence']:,} tokens")
    if not facts["has_runs"]:
        print("  no .runs.npz beside it: which documents the tokens came from is not known")
    return 0


def _run_in_words(run: dict[str, Any]) -> str:
    what = "padding" if run["is_padding"] else "literal" if run["source"] is None else f"{run['source']}  {run['document']}"
    span = f"{run['start']:,}..{run['start'] + run['length']:,}"
    return f"{run['length']:>12,} tokens  {'learned' if run['loss'] else 'no loss'}  {what}  [{span}]"


def _verify(args: argparse.Namespace) -> int:
    from mcore_longctx.data.verify import verify_data

    manifest = verify_data(args.path)
    if args.json:
        print(json.dumps(manifest, indent=1))
    else:
        tokens = manifest["samples"] * manifest["seq_length"]
        print(f"{args.path}: {manifest['samples']:,} samples of {manifest['seq_length']:,} tokens, {tokens:,} tokens: whole")
    return 0
