"""Numbers as people write them: token counts with K, M, B."""

from __future__ import annotations

import re

__all__ = ["parse_count"]

_COUNT = re.compile(r"(\d[\d_,]*)(?:\.(\d+))?\s*([kKmMgGbB]?)")
# Lengths are powers of two (128K = 131,072); B is the budget unit of papers, a plain billion.
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "b": 10**9}


def parse_count(text: str) -> int:
    """A token count: plain digits, digits with `_` or `,`, or a number with K, M, G (powers of two) or B (10^9).

    >>> parse_count("128k"), parse_count("4M"), parse_count("1_048_576"), parse_count("1.26B")
    (131072, 4194304, 1048576, 1260000000)

    Raises:
        ValueError: not a count, or not a whole number of tokens.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a token count; write 4096, 1_048_576, 128k or 4M")
    digits: str = match[1]
    decimals: str | None = match[2]
    unit: str = match[3]
    whole = int(re.sub("[_,]", "", digits))
    scale = _UNITS[unit.lower()]
    if not decimals:
        return whole * scale
    numerator = int(decimals) * scale
    if numerator % int(10 ** len(decimals)):
        raise ValueError(f"{text!r} is not a whole number of tokens")
    return whole * scale + numerator // int(10 ** len(decimals))
