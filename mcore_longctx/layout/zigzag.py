"""Zigzag context-parallel split: which token positions a rank holds.

A sequence of s tokens is cut in 2c equal chunks; rank r holds chunks r and 2c-1-r, so that under a causal mask every rank has
the same work. Pure arithmetic; the same rule as Transformer Engine and megatron-core.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import LayoutError

__all__ = ["check_seq_length", "zigzag_chunks", "zigzag_owner", "zigzag_positions"]


def check_seq_length(seq_length: int, cp_size: int, *, where: object = None) -> None:
    """Raise LayoutError unless `seq_length` tokens can be cut in 2 x `cp_size` equal chunks.

    With one rank nothing is cut and every length is fine.
    """
    unit = 2 * cp_size
    if cp_size == 1 or (seq_length > 0 and seq_length % unit == 0):
        return
    below = seq_length // unit * unit
    nearest = f"{below:,} or {below + unit:,}" if below else f"{unit:,}"
    raise LayoutError(
        f"seq_length {seq_length:,} is not a multiple of 2 x context_parallel_size ({unit})",
        where=where,
        fix=f"nearest: {nearest}",
    )


def zigzag_chunks(cp_size: int, cp_rank: int) -> tuple[int, int]:
    """The two chunks (of 2 x `cp_size`) that `cp_rank` holds, in the order in which they lie on the rank.

    >>> zigzag_chunks(4, 1)
    (1, 6)
    """
    return cp_rank, 2 * cp_size - 1 - cp_rank


def zigzag_positions(seq_length: int, cp_size: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """Global positions held by `cp_rank`, ascending, int64 [seq_length / cp_size].

    >>> zigzag_positions(8, 2, 0).tolist()
    [0, 1, 6, 7]

    Raises:
        LayoutError: `seq_length` is not a multiple of 2 x `cp_size`.
    """
    if cp_size == 1:
        return np.arange(seq_length, dtype=np.int64)
    check_seq_length(seq_length, cp_size)
    chunk = seq_length // (2 * cp_size)
    early, late = zigzag_chunks(cp_size, cp_rank)
    first = np.arange(chunk, dtype=np.int64)
    return np.concatenate([first + early * chunk, first + late * chunk])


def zigzag_owner(position: int, seq_length: int, cp_size: int) -> tuple[int, int]:
    """Rank that holds a global position, and the row at which it lies there.

    >>> zigzag_owner(6, 8, 2)
    (0, 2)
    """
    if cp_size == 1:
        return 0, position
    chunk = seq_length // (2 * cp_size)
    index, offset = divmod(position, chunk)
    if index < cp_size:
        return index, offset
    return 2 * cp_size - 1 - index, chunk + offset
