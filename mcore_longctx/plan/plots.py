"""Memory and step time of one layout against the sequence length: `plan --plot`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.candidates import USABLE, at_peak
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.plan.tables import count, gigabytes

__all__ = ["longest_that_fits", "plot_lengths"]

_SUFFIXES = (".png", ".svg", ".pdf")
_SHORTEST = 32 * 1024
_BARS = 9
# Okabe and Ito's colours, told apart by colour-blind readers: (what the reader sees, the terms that are in it, colour)
_MEMORY = (
    ("weights, gradients, optimizer", ("weights", "gradients", "optimizer", "states"), "#767676"),
    ("kept activations", ("kept activations",), "#0072B2"),
    ("one layer in backward", ("working set",), "#56B4E9"),
    ("key/value exchange", ("key/value exchange",), "#009E73"),
    ("loss head", ("loss head",), "#D55E00"),
    ("the rest", (), "#CCCCCC"),
)
_TIME = (
    ("attention", ("attention forward", "attention backward"), "#0072B2", "-"),
    ("linear layers, elementwise, head", ("linear layers", "elementwise", "head"), "#D55E00", (0, (5, 2))),
    (
        "collectives, exchange, pipeline",
        ("context-parallel exchange", "tensor-parallel collectives", "pipeline bubble", "pipeline transfers"),
        "#009E73",
        (0, (1, 1.2)),
    ),
    ("the rest", (), "#767676", (0, (6, 2, 1, 2))),
)
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "mcore-longctx",  # the same plan gives the same bytes
}


def plot_lengths(setup: Setup, path: Path, lengths: Sequence[int] = ()) -> None:
    """Draw memory by term beside the board's, and step time by part, for one layout, policy and GPU; sequences of a step stay as many.

    Args:
        setup: the layout; its own length is marked.
        path: .png, .svg or .pdf.
        lengths: of the bars; empty: doubling, up to the first that does not fit and to twice the setup's own.

    Raises:
        ConfigError: another kind of file, or matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--plot {path}: a picture ends in {', '.join(_SUFFIXES)}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure  # a figure of its own: no window system is asked for
    except ImportError:
        raise ConfigError("--plot draws with matplotlib, which is not installed", fix="pip install matplotlib") from None
    lengths = list(lengths) or _doubling(setup)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_memory(left, setup, lengths)
        _draw_time(right, setup, lengths)
        shape, p = setup.shape, setup.parallel
        policy = f"recompute {setup.recompute}" + (f", {setup.offload_fraction:.0%} offloaded" if setup.offload_fraction else "")
        figure.suptitle(
            f"{shape.num_layers} layers of {shape.hidden_size:,} on {p.world_size:,} x {setup.gpu.name}: {p.describe()}; {policy};"
            f" {setup.global_batch_size} sequences a step",
            fontsize=9.5,
            color="#222222",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def longest_that_fits(setup: Setup, most: int = 1 << 28) -> int:
    """The longest sequence whose planned memory is within 92 % of the board on this layout, in whole units that the layout divides; 0: none.

    Memory grows with the length, so it is found by halving.
    """
    p = setup.parallel
    unit = 2 * p.context_parallel_size * p.tensor_model_parallel_size
    low, high = 0, most // unit
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory(replace(setup, seq_length=middle * unit)).total <= USABLE * setup.gpu.memory_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * unit


def _doubling(setup: Setup) -> list[int]:
    """At most nine lengths, up to the first that does not fit, and to twice the setup's own."""
    unit = 2 * setup.parallel.context_parallel_size * setup.parallel.tensor_model_parallel_size
    fits, longest = longest_that_fits(setup), 2 * setup.seq_length
    while longest <= min(fits, 8 * setup.seq_length):
        longest *= 2
    lengths = [
        longest >> i for i in range(_BARS) if (longest >> i) % unit == 0 and longest >> i >= min(_SHORTEST, setup.seq_length)
    ]
    return lengths[::-1] or [setup.seq_length]


def _draw_memory(axes: Any, setup: Setup, lengths: Sequence[int]) -> None:
    """Stacked bars, with the board as a line."""
    board = setup.gpu.memory_bytes
    at = range(len(lengths))
    amounts = []
    for length in lengths:
        needed = memory(replace(setup, seq_length=length))
        amounts.append({term.name: term.value for term in needed.terms if at_peak(term)})
    bottoms = [0.0] * len(lengths)
    for label, names, colour in _MEMORY:
        named = {name for _, group, _ in _MEMORY for name in group}
        heights = [
            sum(value for name, value in amount.items() if (name in names if names else name not in named)) / 1e9
            for amount in amounts
        ]
        if any(heights):
            axes.bar(at, heights, bottom=bottoms, width=0.72, color=colour, label=label, linewidth=0)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    top = 1.45 * board / 1e9
    axes.axhline(board / 1e9, color="#222222", linewidth=1.2)
    axes.axhline(USABLE * board / 1e9, color="#222222", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(-0.45, board / 1e9 * 1.015, f"{setup.gpu.name}: {gigabytes(board)} GB", va="bottom", fontsize=8.5)
    axes.text(-0.45, USABLE * board / 1e9 * 0.985, f"{USABLE:.0%}: fits", va="top", fontsize=8.5)
    for place, total in zip(at, bottoms, strict=True):
        beyond = total > top
        y = top * 0.985 if beyond else total + 0.01 * top
        axes.text(
            place,
            y,
            f"{total:,.0f}",
            ha="center",
            va="top" if beyond else "bottom",
            fontsize=8.5,
            color="white" if beyond else "#222222",
            fontweight="bold" if lengths[place] == setup.seq_length else "normal",
        )
    fits = longest_that_fits(setup)
    axes.set_title("memory of a GPU, GB" + (f"; fits up to {_rounded(fits)}" if fits else "; nothing fits"))
    if lengths[0] <= fits <= lengths[-1]:
        axes.axvline(_place(fits, lengths), color="#CC79A7", linewidth=1.4, zorder=0.6)
        axes.text(
            _place(fits, lengths) - 0.06,
            top * 0.985,
            f"fits up to {_rounded(fits)}",
            rotation=90,
            ha="right",
            va="top",
            color="#A3457D",
            fontsize=8.5,
        )
    axes.set_ylim(0, top)
    _length_axis(axes, lengths)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(0.0, 0.61))


def _draw_time(axes: Any, setup: Setup, lengths: Sequence[int]) -> None:
    """Lines over doubling lengths: attention grows fourfold, the rest twofold."""
    times = [step_time(replace(setup, seq_length=length)) for length in lengths]
    at = range(len(lengths))
    named = {name for _, group, *_ in _TIME for name in group}
    axes.plot(at, [time.total for time in times], color="#222222", linewidth=2.0, marker="o", markersize=4, label="step")
    for label, names, colour, dashes in _TIME:
        seconds = [
            sum(term.value for term in time.terms if (term.name in names if names else term.name not in named)) for time in times
        ]
        if any(value > 0.001 * time.total for value, time in zip(seconds, times, strict=True)):
            shown = [value if value > 0 else float("nan") for value in seconds]
            axes.plot(at, shown, color=colour, linewidth=1.6, linestyle=dashes, label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-3, min(time.total for time in times) / 300))
    for place, time in zip(at, times, strict=True):
        is_own = lengths[place] == setup.seq_length
        text = f"{time.total:,.0f} s" if time.total >= 10 else f"{time.total:.1f} s"
        axes.annotate(
            f"{text}\n{time.mfu:.0%}",
            (place, time.total),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            va="bottom",
            fontsize=8,
            fontweight="bold" if is_own else "normal",
        )
    axes.set_title("time of a step and causal MFU")
    axes.margins(y=0.2)
    axes.set_ylim(top=max(time.total for time in times) * 6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f} s" if value >= 1 else f"{1000 * value:,.0f} ms")
    _length_axis(axes, lengths)
    axes.legend(loc="lower right")


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xticks(range(len(lengths)), [count(length) for length in lengths])
    axes.set_xlim(-0.6, len(lengths) - 0.4)
    axes.set_xlabel("tokens of a sequence")


def _place(length: int, lengths: Sequence[int]) -> float:
    """Where a length stands between the bars, on their logarithmic scale."""
    for i, (below, above) in enumerate(pairwise(lengths)):
        if below <= length <= above:
            return i + math.log(length / below) / math.log(above / below)
    return 0.0


def _rounded(length: int) -> str:
    """To three digits, in the unit that people would use."""
    if length >= 1 << 20:
        return f"{length / (1 << 20):.3g}M"
    return f"{length / (1 << 10):.3g}K"
