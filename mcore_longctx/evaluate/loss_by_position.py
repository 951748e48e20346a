"""Next-token loss on held-out text by position, and at the base model's own length.

A window is a stretch of held-out text. The loss of the token at position p, given the p tokens before it, belongs to p; counts and
sums per log-spaced bin are all that leaves a rank. The window is the unit of every interval: tokens inside one are correlated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mcore_longctx.evaluate.held_out import Windows
from mcore_longctx.evaluate.rows import RowFile
from mcore_longctx.evaluate.slices import local_slice, sum_over_ranks

__all__ = ["FIRST_BIN", "bin_edges", "score_windows", "window_losses", "window_rows"]

FIRST_BIN = 16


def bin_edges(length: int) -> list[int]:
    """Log-spaced bins of positions: 0-16, 16-32, 32-64, ... up to `length`.

    >>> bin_edges(100)
    [0, 16, 32, 64, 100]
    """
    edges, edge = [0], FIRST_BIN
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def window_losses(model: Any, tokens: npt.NDArray[np.int64], edges: list[int]) -> tuple[list[int], list[float]]:
    """Number of predicted tokens and sum of their losses (nats) per bin. All ranks of the model must call it.

    Args:
        model: of `build_gpt_model`, in one pipeline stage.
        tokens: int64 [s]; s must divide by 2 x context_parallel_size. Position 0 has nothing before it and is not counted.
        edges: ascending, from 0 to s.
    """
    input_ids, position_ids = local_slice(tokens)
    following = torch.from_numpy(np.append(tokens[1:], 0)).to(input_ids.device)
    labels = following[position_ids]  # [1, s/c]
    with torch.no_grad():
        losses = model(input_ids, position_ids, labels=labels)  # [1, s/c]
    predicted = position_ids[0].cpu().numpy() + 1
    inside = predicted < len(tokens)  # the last position has no next token
    bins = np.searchsorted(edges, predicted[inside], side="right") - 1
    values = losses[0].double().cpu().numpy()[inside]
    count = len(edges) - 1
    local = np.stack([np.bincount(bins, minlength=count).astype(np.float64), np.bincount(bins, values, minlength=count)])
    counts, sums = sum_over_ranks(local)
    return counts.astype(np.int64).tolist(), sums.tolist()


def window_rows(out: Path, task: str, identity: Mapping[str, Any]) -> RowFile:
    """The file of a task's rows, in the folder `out`. All ranks call it."""
    return RowFile(out / f"{task}.jsonl", ("length", "index", "start"), identity)


def score_windows(
    model: Any,
    windows: Windows,
    *,
    task: str,
    rows: RowFile,
    say: Callable[[str], None],
    step: Callable[[], None],
) -> None:
    """Measure every window; write `rows`, one line per window as soon as it is known, and go on from lines that are there.

    Args:
        model: of `build_gpt_model`.
        windows: held-out text.
        task: `loss_by_position` (counts and sums per bin) or `short_context` (one count and sum).
        rows: of `window_rows`, with the same task.
        say: takes a line of progress, on every rank.
        step: called after each window, also a skipped one.
    """
    length = windows.tokens.shape[1]
    edges = bin_edges(length) if task == "loss_by_position" else [0, length]
    started, scores = time.monotonic(), []  # of these windows alone: the file may hold others, of another number of windows
    with rows:
        for index, (tokens, start) in enumerate(zip(windows.tokens, windows.starts.tolist(), strict=True)):
            if (length, index, start) not in rows:
                begun = time.monotonic()
                counts, sums = window_losses(model, tokens, edges)
                rows.add(_row(task, length, index, start, edges, counts, sums, time.monotonic() - begun))
            scores.append(rows.rows[length, index, start]["score"])
            step()
    mean = float(np.mean(scores))
    say(
        f"{task.replace('_', ' ')}  {len(scores)} windows of {length:,}  {mean:.4f} nats per token  {time.monotonic() - started:.0f} s"
    )


def _row(
    task: str, length: int, index: int, start: int, edges: list[int], counts: list[int], sums: list[float], seconds: float
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": task,
        "length": length,
        "depth": None,
        "index": index,
        "correct": None,
        "score": sum(sums) / sum(counts),  # mean loss, nats per token
        "start": start,
        "seconds": round(seconds, 4),
    }
    if task == "loss_by_position":
        return {**row, "edges": edges, "counts": counts, "sums": sums}
    return {**row, "count": counts[0], "sum": sums[0]}
