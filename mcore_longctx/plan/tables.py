"""Numbers and columns as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["columns", "count", "duration", "gigabytes", "side_by_side", "size"]


def gigabytes(value: float) -> str:
    """Bytes in decimal gigabytes, as boards are sold, without the unit.

    >>> gigabytes(5.94e9), gigabytes(80e9), gigabytes(554.2e9), gigabytes(2.2e12), gigabytes(0)
    ('5.9', '80', '554', '2,200', '0')
    """
    text = f"{value / 1e9:,.1f}" if abs(value) < 99.95e9 else f"{value / 1e9:,.0f}"
    return text.removesuffix(".0")


def size(value: float) -> str:
    """Bytes in the unit that people would use, decimal.

    >>> size(1.97e9), size(12.6e6), size(2048), size(2.2e12)
    ('2 GB', '13 MB', '0 MB', '2,200 GB')
    """
    return f"{gigabytes(value)} GB" if value >= 99.5e6 else f"{value / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """A time in the unit that people would use.

    >>> duration(0.042), duration(9.27), duration(260.2), duration(4500), duration(39000), duration(5e5)
    ('42 ms', '9.3 s', '260 s', '75 min', '10.8 h', '139 h')
    """
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds:,.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 99.95 * 3600 else f"{seconds / 3600:,.0f} h"


def count(tokens: float) -> str:
    """A length as people write it: powers of two with K and M, others with all digits.

    >>> count(4194304), count(131072), count(8388608), count(1_000_000), count(96)
    ('4M', '128K', '8M', '1,000,000', '96')
    """
    for unit, text in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens / unit:,.0f}{text}"
    return f"{tokens:,.0f}"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (), gap: int = 2) -> list[str]:
    """Lines of a table: the columns numbered in `left` begin at the left, the others end at the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return [
        (" " * gap)
        .join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in (heads, *rows)
    ]


def side_by_side(left: Sequence[str], right: Sequence[str], gap: int = 4) -> list[str]:
    """Two blocks of lines beside each other."""
    width = max((len(line) for line in left), default=0) + gap
    longest = max(len(left), len(right))
    padded = [*left, *[""] * (longest - len(left))], [*right, *[""] * (longest - len(right))]
    return [f"{a:<{width}}{b}".rstrip() for a, b in zip(*padded, strict=True)]
