"""`mcore-longctx report`: one HTML page of a run folder, and the table of before and after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Write RUN_FOLDER/report.html, one page that needs no network, and print the table of before and after. Parts that are not there
(yet) are named. `run` does this as its last step; it can be repeated at any time and needs neither torch nor a GPU.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="write report.html of a run and print the table of before and after",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="for example runs/tiny-cpu")


def run(args: argparse.Namespace) -> int:
    """Write the page, print the table."""
    from mcore_longctx.report import summary_table, write_report

    path = write_report(args.run_folder)
    print(summary_table(args.run_folder))
    print(f"report: {path}")
    return 0
