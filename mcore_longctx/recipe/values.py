"""Kinds of value that several sections of the recipe share."""

from __future__ import annotations

import re

__all__ = ["TokenCount", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can name a folder."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} names a folder; use letters, digits, '.', '_' and '-'")


class TokenCount(int):
    """A number of tokens: `4096`, `1_048_576`, `128k` (131,072), `4M` (4,194,304), `1.26B` (a plain 1,260,000,000)."""
