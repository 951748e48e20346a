"""`data synth`: long chats for `sft` stages, computed or by a writer. From the arguments to `data/synthesis/`, and a bar meanwhile."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError

__all__ = ["add_synth", "synth"]

_LONGEST_TIMEOUT = 10**9  # seconds; no clock of the system waits for ever
_DESCRIPTION = """\
Long chats as JSON lines, which `data build` (stages of kind sft) and `data tokenize --chats` read. docs/synthesis.md

  mcore-longctx data synth tables tables.jsonl --tokenizer MODEL --length 32K:1000
  mcore-longctx data synth keyvalue numbers.jsonl --tokenizer MODEL --length 4K:350
  mcore-longctx data synth hierarchical books.jsonl BOOKS --tokenizer MODEL --length 180K:2000 --length 1M:200 \\
      --writer 'python ask_my_model.py --port 8000'

Every chat is a function of the seed and its number. The same command gives the same file with any number of workers.
"""


def add_synth(verbs: Any) -> None:
    """Add the verb to `data`."""
    parser = verbs.add_parser(
        "synth",
        help="make long chats: tables, dictionaries, questions about documents",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="synth_kind", metavar="tables|keyvalue|hierarchical", required=True)
    for name, what in (("tables", "tables with computed answers"), ("keyvalue", "dictionaries of numbers with computed answers")):
        kind = kinds.add_parser(name, help=what)
        _add_common(kind)
        kind.add_argument(
            "--turns", type=int, default=4, metavar="N", help="questions of a chat, fewer in short ones (default: 4)"
        )
    chats = kinds.add_parser("hierarchical", help="several documents in a chat and questions about them, by a writer")
    _add_common(chats)
    chats.add_argument(
        "inputs", metavar="DOCUMENTS", type=Path, nargs="+", help=".jsonl(.gz, .zst), .parquet, .txt, .md, or a folder"
    )
    chats.add_argument("--chunk", default="4096", metavar="N", help="tokens of a chunk (default: 4096)")
    chats.add_argument(
        "--question-tokens", type=int, default=192, metavar="N", help="set aside for a question and its answer (default: 192)"
    )
    for option, default, what in (
        ("--hierarchical", 5, "questions behind a document that know its structure"),
        ("--diverse", 5, "other questions behind a document"),
        ("--revisit", 9, "questions behind a document about earlier ones"),
        ("--follow-up", 3, "questions about an earlier document that is taken up again"),
    ):
        chats.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    chats.add_argument(
        "--follow-up-probability",
        type=float,
        default=0.6,
        metavar="P",
        help="that an earlier document is taken up (default: 0.6)",
    )
    chats.add_argument(
        "--writer",
        metavar="COMMAND",
        help="reads requests and prints answers, JSON lines; no shell is started (default: built in)",
    )
    chats.add_argument(
        "--closed-book",
        metavar="COMMAND",
        help="answers questions without the document: those it gets right go (default: a rule)",
    )
    chats.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds without an answer after which a command is ended"
    )
    chats.add_argument(
        "--max-rejected",
        type=float,
        default=0.1,
        metavar="X",
        help="share of items that may stay without an answer (default: 0.1)",
    )


def _add_common(parser: Any) -> None:
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="file to write; for several lengths OUT-LENGTH.jsonl each")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="PATH", help="model folder with a chat template")
    parser.add_argument(
        "--length",
        required=True,
        action="append",
        metavar="LENGTH:CHATS",
        help="so many chats of at most LENGTH tokens; may be repeated, a file for each",
    )
    parser.add_argument("--seed", type=int, default=1234, help="(default: 1234)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores that are free to use)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def synth(args: argparse.Namespace) -> int:
    """Make the chats."""
    from mcore_longctx.data.workspace import usable_cores

    wanted = [_wanted(text) for text in args.length]
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    workers = args.workers if args.workers is not None else usable_cores()
    report = _hierarchical(args, wanted, workers) if args.synth_kind == "hierarchical" else _computed(args, wanted, workers)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    return 0


def _computed(args: argparse.Namespace, wanted: list[Any], workers: int) -> Any:
    from mcore_longctx.data.synthesis.key_value import make_key_value_chat
    from mcore_longctx.data.synthesis.tables import make_tables_chat
    from mcore_longctx.data.synthesis.writing import write_made

    if args.turns < 1:
        raise ConfigError(f"--turns {args.turns}: expected 1 or more")
    make = make_tables_chat if args.synth_kind == "tables" else make_key_value_chat
    with _bar("chats", sum(one.chats for one in wanted)) as advance:
        return write_made(
            args.out,
            wanted,
            args.tokenizer,
            lambda count, index, length: make(count, seed=args.seed, index=index, length=length, turns=args.turns),
            workers=workers,
            on_chat=lambda tokens: advance(),
        )


def _hierarchical(args: argparse.Namespace, wanted: list[Any], workers: int) -> Any:
    from mcore_longctx.data.synthesis.hierarchical import HierarchicalSettings, make_hierarchical_chats
    from mcore_longctx.data.synthesis.question_plan import QuestionCounts
    from mcore_longctx.data.synthesis.writer import Writer

    if not 0 < args.timeout <= _LONGEST_TIMEOUT:  # not for nan either
        raise ConfigError(f"--timeout {args.timeout}: expected more than 0 seconds, at most {_LONGEST_TIMEOUT:,}")
    writers = [
        None if text is None else Writer(command=_command(text, option), timeout=args.timeout)
        for option, text in (("--writer", args.writer), ("--closed-book", args.closed_book))
    ]
    try:
        settings = HierarchicalSettings(
            seed=args.seed,
            chunk=_count(args.chunk, "--chunk"),
            counts=QuestionCounts(
                hierarchical=args.hierarchical,
                diverse=args.diverse,
                revisit=args.revisit,
                follow_up=args.follow_up,
                follow_up_probability=args.follow_up_probability,
            ),
            question_tokens=args.question_tokens,
            writer=writers[0] or Writer(),
            closed_book=writers[1],
            max_rejected=args.max_rejected,
        )
    except ValueError as error:
        raise ConfigError(str(error), where="data synth hierarchical") from None
    with _bar("answers", None) as advance:
        return make_hierarchical_chats(
            args.out, args.inputs, wanted, args.tokenizer, settings, workers=workers, on_answer=advance
        )


def _wanted(text: str) -> Any:
    from mcore_longctx.data.synthesis.writing import Wanted

    length, colon, chats = text.partition(":")
    if not colon:
        raise ConfigError(f"--length {text}: expected LENGTH:CHATS, for example 32K:1000")
    found = Wanted(length=_count(length, "--length"), chats=_count(chats, "--length"), text=length)
    if found.length < 1 or found.chats < 1:
        raise ConfigError(f"--length {text}: expected 1 or more tokens and chats")
    return found


def _command(text: str, option: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{option}: {text!r} cannot be split into words ({error})") from None
    if not words:
        raise ConfigError(f"{option} is empty", fix="give a program and its arguments")
    return words


def _count(text: str, option: str) -> int:
    from mcore_longctx.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


@contextmanager
def _bar(unit: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing in the log of a job."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", leave=False) as bar:

        def advance() -> None:
            bar.update()

        yield advance
