"""Packing of whole pieces into samples: first-fit, best-fit-decreasing and next-fit, none of them quadratic.

Each function gives the bin of every piece; what is left free in a bin becomes padding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["best_fit", "first_fit", "next_fit"]

IntArray = npt.NDArray[np.int64]

_BLOCK = 1 << 18  # pieces whose successors are looked up at once


def first_fit(sizes: IntArray, capacity: int) -> IntArray:
    """Bin of each piece, int64 [pieces]: the first bin with room, in the given order of pieces; a new one if there is none.

    O(n log n): a tree over the bins holds the largest room below each node. Bins that are not opened yet are full of room, so the
    first leaf that fits is also the right one to open.

    Args:
        sizes: 1 to `capacity` each, [pieces].
        capacity: of a bin.
    """
    if not len(sizes):
        return np.zeros(0, np.int64)
    # any two bins hold more than one capacity together, or the later one would not have been opened
    most = min(len(sizes), 2 * int(sizes.sum()) // capacity + 1)
    leaves = 1 << (most - 1).bit_length()
    room = [capacity] * (2 * leaves)  # node i lies over 2 i and 2 i + 1
    bins = np.empty(len(sizes), np.int64)
    for piece, size in enumerate(sizes.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        bins[piece] = node - leaves
        left = room[node] = room[node] - size
        while node > 1:
            other = room[node ^ 1]
            left = max(left, other)
            node >>= 1
            if room[node] == left:
                break
            room[node] = left
    return bins


def best_fit(sizes: IntArray, capacity: int) -> IntArray:
    """Bin of each piece by best-fit-decreasing, int64 [pieces]: the largest first, each into the fullest bin that still has room.

    arXiv 2404.10830 packs documents so. A piece that leaves the least room is found in a bit set over the rooms, in two levels, so
    the cost of a piece does not grow with the number of bins. Pieces of one size fill a bin at once: after the first of them no
    other bin is fuller. Ties go to the piece that stands first and to the bin that got this room last.

    Args:
        sizes: 1 to `capacity` each, [pieces].
        capacity: of a bin.
    """
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(-sizes, return_counts=True)  # ascending, so the sizes descend
    bits = (capacity.bit_length() + 1) // 2
    words, summary = (
        [0] * ((capacity >> bits) + 1),
        0,
    )  # bit r of the set: there is a bin with room r; summary: words that are not 0
    bins_of_room: dict[int, list[int]] = {}
    opened, chosen, repeats = 0, [], []
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        left = count
        while left:
            room = _smallest(words, summary, bits, size)
            if room is None:
                index, room, opened = opened, capacity, opened + 1
            else:
                stack = bins_of_room[room]
                index = stack.pop()
                if not stack:
                    del bins_of_room[room]
                    words[room >> bits] ^= 1 << (room & ((1 << bits) - 1))
                    if not words[room >> bits]:
                        summary ^= 1 << (room >> bits)
            taken = min(left, room // size)
            chosen.append(index)
            repeats.append(taken)
            left -= taken
            room -= taken * size
            if room in bins_of_room:
                bins_of_room[room].append(index)
            elif room:
                bins_of_room[room] = [index]
                words[room >> bits] |= 1 << (room & ((1 << bits) - 1))
                summary |= 1 << (room >> bits)
    bins = np.empty(len(sizes), np.int64)
    bins[order] = np.repeat(np.array(chosen, np.int64), np.array(repeats, np.int64))
    return bins


def next_fit(sizes: IntArray, capacity: int) -> IntArray:
    """Bin of each piece, int64 [pieces], ascending: pieces in order; one that does not fit in the rest of its bin starts the next.

    Args:
        sizes: 1 to `capacity` each, [pieces].
        capacity: of a bin.
    """
    stops = np.cumsum(sizes, dtype=np.int64)
    starts, piece = [], 0
    while piece < len(sizes):
        low, high = piece, min(piece + _BLOCK, len(sizes))
        following = np.searchsorted(stops, stops[low:high] - sizes[low:high] + capacity, side="right").tolist()
        while piece < high:
            starts.append(piece)
            piece = following[piece - low]
    starts.append(len(sizes))
    count: IntArray = np.array(starts, np.int64)
    return np.repeat(np.arange(len(count) - 1), count[1:] - count[:-1])


def _smallest(words: list[int], summary: int, bits: int, size: int) -> int | None:
    """Smallest member of the bit set that is at least `size`."""
    word = size >> bits
    found = words[word] >> (size & ((1 << bits) - 1))
    if found:
        return size + (found & -found).bit_length() - 1
    found = summary >> (word + 1)
    if not found:
        return None
    word += (found & -found).bit_length()
    return (word << bits) + (words[word] & -words[word]).bit_length() - 1
