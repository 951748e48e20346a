"""Zigzag order: every rank equal causal work, every position once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import LayoutError
from mcore_longctx.layout import check_seq_length, zigzag_owner, zigzag_positions


@given(cp=st.integers(1, 16), chunk=st.integers(1, 9))
def test_every_position_lies_on_one_rank(cp: int, chunk: int) -> None:
    length = 2 * cp * chunk
    held = np.concatenate([zigzag_positions(length, cp, rank) for rank in range(cp)])
    assert sorted(held.tolist()) == list(range(length))


@given(cp=st.integers(1, 16), chunk=st.integers(1, 9))
def test_every_rank_has_equal_causal_work(cp: int, chunk: int) -> None:
    work = {int((zigzag_positions(2 * cp * chunk, cp, rank) + 1).sum()) for rank in range(cp)}
    assert len(work) == 1


@given(cp=st.integers(1, 8), chunk=st.integers(1, 5), data=st.data())
def test_owner_finds_the_row_of_a_position(cp: int, chunk: int, data: st.DataObject) -> None:
    length = 2 * cp * chunk
    position = data.draw(st.integers(0, length - 1))
    rank, row = zigzag_owner(position, length, cp)
    assert zigzag_positions(length, cp, rank)[row] == position


def test_a_length_that_does_not_divide_is_refused_with_its_neighbours() -> None:
    with pytest.raises(
        LayoutError,
        match=r"seq_length 1,000,000 is not a multiple of 2 x context_parallel_size \(128\); nearest: 999,936 or 1,000,064",
    ):
        check_seq_length(1_000_000, 64)


def test_one_rank_takes_any_length() -> None:
    check_seq_length(7, 1)
    assert zigzag_positions(7, 1, 0).tolist() == list(range(7))
