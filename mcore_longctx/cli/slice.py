"""`mcore-longctx slice`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    subparsers.add_parser("slice", help="being built", description="Being built.")


def run(args: argparse.Namespace) -> int:
    """Not there yet."""
    raise NotImplementedError
