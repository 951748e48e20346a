"""`data show`, `stats`, `verify`, `merge`: looking at packed data, ours or not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["merge", "show", "stats", "verify"]


def show(args: argparse.Namespace) -> int:
    """A sample as text."""
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


def stats(args: argparse.Namespace) -> int:
    """Lengths of a dataset."""
    from mcore_longctx.data.inspect.show import stats, stats_in_words

    facts = stats(args.path)
    print(json.dumps(facts, indent=1) if args.json else stats_in_words(facts))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check data, or shards that are not packed yet."""
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


def merge(args: argparse.Namespace) -> int:
    """Join datasets."""
    from mcore_longctx.data.inspect.merge import merge_in_words, merge_indexed

    facts = merge_indexed(args.prefixes, args.out)
    print(json.dumps(facts, indent=1) if args.json else merge_in_words(facts))
    return 0
