"""`data token-offsets`: which tokens a long training moved most, from two models, for `sentences` of rule logit_offset."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_token_offsets", "token_offsets"]

_SHOWN = 10


def add_token_offsets(verbs: Any) -> None:
    """Add the verb to `data`."""
    offsets = verbs.add_parser("token-offsets", help="which tokens a long training moved most, for --sentences logit_offset")
    offsets.add_argument(
        "before", metavar="BEFORE", type=Path, help="model before long training: torch_dist or Hugging Face folder"
    )
    offsets.add_argument("after", metavar="AFTER", type=Path, help="the same model after it")
    offsets.add_argument("--text", required=True, type=Path, metavar="PATH", help="documents: .txt, .jsonl, .parquet or a folder")
    offsets.add_argument("--out", required=True, type=Path, metavar="FILE", help="table to write (JSON)")
    offsets.add_argument("--window", default="2048", metavar="N", help="tokens that the models see at once (default: 2048)")
    offsets.add_argument("--tokens", default="1M", metavar="N", help="of the text, at most (default: 1M)")
    offsets.add_argument("--share", type=float, default=0.2, metavar="X", help="of the token types (default: 0.2)")
    offsets.add_argument("--least", type=int, default=5, metavar="N", help="places that a type needs (default: 5)")
    offsets.add_argument("--config", type=Path, metavar="PATH", help="config.json, for a torch_dist folder without a card")
    offsets.add_argument("--json", action="store_true", help="print JSON")


def token_offsets(args: argparse.Namespace) -> int:
    """Compare two models on a text."""
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.units import parse_count

    counts = {}
    for name in ("window", "tokens"):
        try:
            counts[name] = parse_count(getattr(args, name))
        except ValueError as error:
            raise ConfigError(f"--{name}: {error}") from None
        if counts[name] < 2:
            raise ConfigError(f"--{name} is {counts[name]}, expected 2 or more")
    if not args.out.parent.is_dir():
        raise ConfigError("no such folder", where=args.out.parent, fix="make it first")
    from mcore_longctx.data.tokenizers import load_tokenizer
    from mcore_longctx.evaluate.model_sources import read_source
    from mcore_longctx.evaluate.token_offsets import measure_token_offsets

    table = measure_token_offsets(
        args.before,
        args.after,
        args.text,
        args.out,
        window=counts["window"],
        most_tokens=counts["tokens"],
        share=args.share,
        least=args.least,
        config=args.config,
    )
    if args.json:
        print(json.dumps({name: value for name, value in table.items() if name != "types"}, indent=1))
        return 0
    tokenizer = load_tokenizer(read_source(args.before, args.config).tokenizer_folder)
    print(
        f"{len(table['impactful']):,} of {len(table['types']):,} token types moved most, on {table['tokens']:,} tokens: {args.out}"
    )
    for row in table["types"][:_SHOWN]:
        print(f"  {row['offset']:8.4f}  {row['count']:>8,} x  {tokenizer.decode([row['id']])!r}")
    return 0
