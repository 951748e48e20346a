"""Bins: each way of packing whole pieces against a plain one, and bounds that no packing may pass."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcore_longctx.data.planning.bins import best_fit, first_fit, next_fit

sizes = st.lists(st.integers(1, 20), min_size=1, max_size=60)


@given(sizes=sizes)
@settings(deadline=None)
def test_first_fit_takes_the_first_bin_with_room(sizes: list[int]) -> None:
    room: list[int] = []
    expected = []
    for size in sizes:
        index = next((i for i, free in enumerate(room) if free >= size), len(room))
        if index == len(room):
            room.append(20)
        room[index] -= size
        expected.append(index)
    assert first_fit(np.array(sizes), 20).tolist() == expected


@given(sizes=sizes)
@settings(deadline=None)
@example(sizes=[10] * 9)
def test_best_fit_takes_the_fullest_bin_with_room(sizes: list[int]) -> None:
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [index for index, free in enumerate(room) if free >= size]
        if not fitting:
            fitting = [len(room)]
            room.append(20)
        room[min(fitting, key=lambda index: room[index])] -= size
    bins = best_fit(np.array(sizes), 20)
    free = 20 - np.bincount(bins, sizes)
    assert sorted(free.tolist()) == sorted(room)


@given(sizes=sizes)
@settings(deadline=None)
def test_next_fit_never_goes_back(sizes: list[int]) -> None:
    expected, index, room = [], -1, 0
    for size in sizes:
        if size > room:
            index, room = index + 1, 20
        room -= size
        expected.append(index)
    assert next_fit(np.array(sizes), 20).tolist() == expected


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8))
@settings(deadline=None)
def test_best_fit_is_within_eleven_ninths_of_the_best(sizes: list[int]) -> None:
    """Bound of first-fit-decreasing and best-fit-decreasing: 11/9 of the best packing and 6/9 (Dosa 2007)."""

    def fewest(left: list[int], rooms: tuple[int, ...], bound: int) -> int:
        if len(rooms) >= bound or not left:
            return min(bound, len(rooms))
        size, rest = left[0], left[1:]
        for index in {room: index for index, room in enumerate(rooms) if room >= size}.values():
            bound = fewest(rest, (*rooms[:index], rooms[index] - size, *rooms[index + 1 :]), bound)
        return fewest(rest, (*rooms, 20 - size), bound)

    best = fewest(sorted(sizes, reverse=True), (), len(sizes) + 1)
    bins = best_fit(np.array(sizes), 20)
    assert np.bincount(bins, sizes).max() <= 20
    assert bins.max() + 1 <= 11 / 9 * best + 6 / 9


def test_a_million_pieces_are_packed_in_seconds() -> None:
    rng = np.random.default_rng(0)
    pieces = np.minimum(rng.lognormal(7.0, 1.5, 1_000_000), 1 << 17).astype(np.int64) + 1
    for function in (first_fit, best_fit, next_fit):
        bins = function(pieces, (1 << 17) + 1)
        assert np.bincount(bins, pieces).max() <= (1 << 17) + 1
        least = -(-int(pieces.sum()) // ((1 << 17) + 1))
        assert bins.max() + 1 <= least * (1.02 if function is not next_fit else 1.1)


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 7, 8, 9, 63, 64, 65, 4096, 1 << 22])
def test_best_fit_at_the_edges_of_its_bit_sets(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    pieces = rng.integers(1, capacity + 1, 200)
    pieces[:2] = capacity, 1
    bins = best_fit(pieces, capacity)
    assert np.bincount(bins, pieces).max() <= capacity
    half = int((pieces > capacity / 2).sum())
    assert max(half, -(-int(pieces.sum()) // capacity)) <= bins.max() + 1 <= 11 / 9 * (half + pieces.sum() / capacity) + 1
