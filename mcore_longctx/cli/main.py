"""The command `mcore-longctx`: one verb per file, each imports its room only when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mcore_longctx import __version__
from mcore_longctx.errors import LongctxError

VERBS = (
    "plan",
    "run",
    "launch",
    "convert",
    "quantize",
    "data",
    "train",
    "evaluate",
    "harness",
    "report",
    "compare",
    "args",
    "parity",
    "doctor",
    "slice",
)

_DESCRIPTION = """\
Take a Llama-family model from 128K to 1M, 2M and 4M tokens of context with Megatron-Core (UltraLong recipe, arXiv 2504.06214).

  mcore-longctx run tiny-cpu                      the whole recipe on a tiny model, on two CPU cores
  mcore-longctx run ultralong-8b-4m --dry-run     what the 4M recipe would do, stage by stage
  mcore-longctx convert inspect FOLDER            what is in a checkpoint, and what its rope really is
"""

_EPILOG = """\
exit codes: 0 done; 1 a check found a difference or a run failed; 2 bad input or usage; 3 no progress; 75 stopped on a signal
with a checkpoint saved (start it again to go on). Every verb has --help.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Imports no torch."""
    parser = argparse.ArgumentParser(
        prog="mcore-longctx", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mcore-longctx {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        _module(verb).add_parser(subparsers)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. `section.name=value` may stand anywhere after the recipe, also behind options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    unknown = [text for text in rest if text not in overrides]
    if unknown or (overrides and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. An error is one line on stderr."""
    args = parse(argv)
    try:
        return int(_module(args.verb).run(args))
    except LongctxError as error:
        if args.debug:
            traceback.print_exc()
        print(f"mcore-longctx: {error}", file=sys.stderr)
        leave_note(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("mcore-longctx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        details = traceback.format_exc()
        try:
            log = Path(f"mcore-longctx-error-{os.getpid()}.log").absolute()
            log.write_text(details, encoding="utf-8", errors="backslashreplace")
        except OSError as unwritable:
            print(f"{details}mcore-longctx: {what} (no log here: {unwritable.strerror})", file=sys.stderr)
        else:
            print(f"mcore-longctx: {what} (details in {log})", file=sys.stderr)
        return 1


def leave_note(error: LongctxError) -> None:
    """Tell whoever started this rank (`launch.local`): torchrun makes 1 of every exit code, and stops the others at once."""
    note = os.environ.get("MCORE_LONGCTX_ERROR_NOTE")
    if note:
        aside = Path(f"{note}.{os.getpid()}")
        aside.write_text(f"failed {error.exit_code} {error}\n", encoding="utf-8")
        aside.replace(note)  # whole, also when this rank is stopped while it writes


def _module(verb: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"mcore_longctx.cli.{verb}")
