"""Options of `data plan` and `data tokenize` that name a method: --augment and --sentences, and the sections that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError

__all__ = ["add_augment", "add_sentences", "augment_section", "sentence_section"]


def add_augment(plan: Any) -> None:
    """Add --augment and what belongs to it."""
    plan.add_argument(
        "--augment",
        choices=("cip", "utk"),
        help="cut the documents of a sample and spread the pieces over it: chunk-interleaved, or Untie the Knots",
    )
    plan.add_argument("--augment-chunks", metavar="N[,N]", help="pieces of a document; utk draws one of them (default: 2)")
    plan.add_argument("--augment-probability", type=float, metavar="P", help="share of the samples that are changed (default: 1)")
    plan.add_argument("--augment-group", type=int, metavar="N", help="cip: documents interleaved with each other (default: all)")
    plan.add_argument("--augment-any-order", action="store_true", help="utk: pieces of a document need not keep their order")
    plan.add_argument("--augment-no-backtrace", action="store_true", help="utk: no labels behind the last piece of a document")


def add_sentences(tokenize: Any) -> None:
    """Add --sentences and what belongs to it."""
    tokenize.add_argument(
        "--sentences",
        choices=("digits", "logit_offset"),
        help="of each document only sentences, those with a digit or with a token of --offsets first",
    )
    tokenize.add_argument("--keep-sentences", type=float, metavar="X", help="share of a document's tokens (default: 0.3)")
    tokenize.add_argument("--offsets", type=Path, metavar="FILE", help="table of `data token-offsets`, for logit_offset")
    tokenize.add_argument("--seed", type=int, default=1234, help="of the choice of sentences (default: 1234)")


def augment_section(args: argparse.Namespace) -> Any:
    """The `augment` of a data section, None without --augment. Raises ConfigError, or ValueError as the section does."""
    from mcore_longctx.recipe.data import AugmentSection

    given = {
        "chunks": None if args.augment_chunks is None else _numbers(args.augment_chunks, "--augment-chunks"),
        "probability": args.augment_probability,
        "documents_per_group": args.augment_group,
        "keep_order": False if args.augment_any_order else None,
        "backtrace": False if args.augment_no_backtrace else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.augment is None:
        if given:
            raise ConfigError("options of --augment, and no --augment", where="data plan", fix="say --augment cip or utk")
        return None
    return AugmentSection(type=args.augment, **given)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers, for example 2,3") from None


def sentence_section(args: argparse.Namespace) -> Any:
    """The `sentences` of a data section, None without --sentences. Raises ConfigError."""
    from mcore_longctx.recipe.data import SentenceSection

    if args.sentences is None:
        if args.keep_sentences is not None or args.offsets is not None:
            raise ConfigError("--keep-sentences or --offsets, and no --sentences", where="data tokenize", fix="give a rule")
        return None
    keep = {} if args.keep_sentences is None else {"keep": args.keep_sentences}
    try:
        return SentenceSection(rule=args.sentences, offsets=args.offsets, **keep)
    except ValueError as error:
        raise ConfigError(str(error), where="data tokenize") from None
