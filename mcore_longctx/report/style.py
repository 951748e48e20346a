"""How the report's pictures look: colours, lines, lengths on axes, SVG that needs no network.

Colours are Okabe and Ito's, told apart by colour-blind readers; lines differ in dashes and markers too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mcore_longctx.report.counts import Count

__all__ = [
    "COLOURS",
    "DASHES",
    "HEIGHT",
    "INK",
    "WIDTH",
    "cell_colour",
    "colour",
    "darker",
    "figure_in_style",
    "line",
    "scientific",
    "short_count",
    "svg",
]

COLOURS = ("#767676", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("-", (0, (5, 2)), "-", (0, (1, 1.2)), (0, (6, 2, 1, 2)), "-")
MARKERS = ("o", "s", "D", "^", "v", "P")
MISSED, HALF, FOUND = (213, 94, 0), (245, 235, 205), (0, 114, 178)
INK, FAINT = "#222222", "#DDDDDD"
WIDTH, HEIGHT = 5.0, 3.1  # inches: half of a page, still readable when a telephone shrinks it

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "text.parse_math": False,  # names come from files: a dollar sign is a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "svg.hashsalt": "mcore-longctx",  # the same data gives the same bytes
}


def short_count(tokens: int) -> str:
    """A length for an axis: 512, 4K, 1M.

    >>> short_count(4096), short_count(1 << 20), short_count(1000)
    ('4K', '1M', '1,000')
    """
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size:,}{unit}"
    return f"{tokens:,}"


def scientific(value: float) -> str:
    """A learning rate: 2e-4, 7.5e-5.

    >>> scientific(2e-4), scientific(7.5e-5)
    ('2e-4', '7.5e-5')
    """
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def cell_colour(count: Count) -> tuple[str, str]:
    """Background and text colour of a needle cell: hue by rate, strength by certainty, the same in every grid."""
    rate = count.rate
    low, high, share = (MISSED, HALF, 2 * rate) if rate < 0.5 else (HALF, FOUND, 2 * rate - 1)
    pure = [a + (b - a) * share for a, b in zip(low, high, strict=True)]
    strength = 0.15 + 0.85 * count.certainty
    mixed = [round(255 + (value - 255) * strength) for value in pure]
    luminance = sum(weight * _linear(value) for weight, value in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))
    text = "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"  # whichever contrasts more
    return "#{:02x}{:02x}{:02x}".format(*mixed), text


def _linear(value: int) -> float:
    share = value / 255
    return float(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)


def colour(i: int) -> str:
    """Colour of column number `i`."""
    return COLOURS[i % len(COLOURS)]


def darker(hexadecimal: str) -> str:
    """A colour at 60 % of its brightness, for whiskers that are seen on their bar and beside it."""
    return "#" + "".join(f"{int(hexadecimal[i : i + 2], 16) * 6 // 10:02x}" for i in (1, 3, 5))


def line(i: int) -> dict[str, Any]:
    """Colour, dashes and marker of column number `i`."""
    return {
        "color": colour(i),
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.5,
    }


@contextmanager
def figure_in_style(width: float = WIDTH, height: float = HEIGHT) -> Iterator[Figure]:
    """A figure in the report's style. No pyplot: nothing global, no window, no backend to choose."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure as a data URI."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()
