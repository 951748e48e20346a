"""Moving rows: the order is that of the plan, and nothing breaks at 2^31 elements."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import Tensor

from mcore_longctx.layout.packed import plain_layout
from mcore_longctx.layout.plans import ring_plan
from mcore_longctx.layout.zigzag import zigzag_owner, zigzag_positions
from mcore_longctx.parallel.rows import as_rows, empty_rows, from_rows, order_on, put_rows, take_rows

WIDTH = 2**11
ROWS_AT_LIMIT = 2**31 // WIDTH


def test_rows_are_a_view_where_they_lie_as_megatron_holds_them() -> None:
    held = torch.arange(24.0).view(4, 1, 2, 3)
    tensor = held.permute(1, 2, 0, 3)
    assert as_rows(tensor).data_ptr() == held.data_ptr()
    assert as_rows(tensor[:, :, :2]).data_ptr() == held.data_ptr()
    assert torch.equal(from_rows(as_rows(tensor.contiguous())), tensor)
    made = empty_rows(tensor, rows=6, dtype=torch.float64, zero=True)
    assert made.shape == (1, 2, 6, 3)
    assert made.permute(2, 0, 1, 3).is_contiguous()


def test_rows_of_neighbours_join_in_the_order_of_the_sequence() -> None:
    plan = ring_plan(plain_layout(48, 4), 4, 0)
    laid = torch.cat([torch.from_numpy(zigzag_positions(48, 4, rank)) for rank in range(4)])
    joined = take_rows(laid, order_on(plan, torch.device("cpu")))
    assert joined.tolist() == list(range(48))
    back = torch.empty_like(laid)
    put_rows(back, order_on(plan, torch.device("cpu")), joined)
    assert torch.equal(back, laid)


def numbered(rows: int) -> Tensor:
    """int8 [1, 2, rows, 1024] in rows: every entry tells its row and head."""
    held = torch.empty(rows, 1, 2, WIDTH // 2, dtype=torch.int8)
    held[:, 0, 0] = (torch.arange(rows) % 127).to(torch.int8).unsqueeze(-1)
    held[:, 0, 1] = (torch.arange(rows) % 113).to(torch.int8).unsqueeze(-1)
    return from_rows(held)


def is_numbered(rows: Tensor, order: Tensor) -> bool:
    """Whether row k of [rows, 1, 2, 1024] is row order[k] of `numbered`."""
    of_head = [(order % prime).to(torch.int8) for prime in (127, 113)]
    return all(torch.equal(rows[:, 0, head, column], of_head[head]) for head in (0, 1) for column in (0, -1))


@pytest.mark.parametrize("rows", [ROWS_AT_LIMIT - 1, ROWS_AT_LIMIT, ROWS_AT_LIMIT + 1])
def test_rows_are_cut_and_put_in_order_at_the_32_bit_limit(rows: int) -> None:
    if psutil.virtual_memory().available < 8 * 2**30:
        pytest.skip("needs 8 GiB of free memory")
    tensor = numbered(rows)
    assert tensor.numel() == rows * WIDTH
    order = torch.arange(rows - 1, -1, -1)
    taken = take_rows(as_rows(tensor), order)
    assert is_numbered(taken, order)
    tensor.zero_()
    put_rows(as_rows(tensor), order, taken)  # back again, in the memory of the first
    del taken
    assert is_numbered(as_rows(tensor), torch.arange(rows))
    late = tensor[:, :, rows - 3 :]  # a cut beyond the limit
    assert is_numbered(as_rows(late), torch.arange(rows - 3, rows))


@pytest.mark.parametrize("chunk", [ROWS_AT_LIMIT // 8 - 1, ROWS_AT_LIMIT // 8 + 1])
def test_the_zigzag_order_of_neighbours_joins_at_the_32_bit_limit(chunk: int) -> None:
    """Four neighbours, two chunks each: 2^31 elements minus and plus eight rows."""
    if psutil.virtual_memory().available < 8 * 2**30:
        pytest.skip("needs 8 GiB of free memory")
    layout = plain_layout(8 * chunk, 4)
    order = order_on(ring_plan(layout, 4, 0), torch.device("cpu"))
    joined = take_rows(as_rows(numbered(8 * chunk)), order)
    assert is_numbered(joined, order)
    for position in (0, chunk, 4 * chunk - 1, 4 * chunk, 8 * chunk - 1):
        owner, row = zigzag_owner(position, 8 * chunk, 4)
        assert order[position] == owner * 2 * chunk + row


def test_layouts_count_with_64_bits() -> None:
    length = 2**33
    layout = plain_layout(length, 16)
    assert layout.rows == 2**29
    assert layout.attention_work().tolist() == [sum_of_pairs(length, 16, rank) for rank in range(16)]
    last = ring_plan(layout, 1, 0).steps[15][0]
    assert (last.queries.stop, last.keys.stop) == (2**29, 2**29)
    assert zigzag_owner(length - 1, length, 16) == (0, 2**29 - 1)


def sum_of_pairs(length: int, cp: int, rank: int) -> int:
    chunk = length // (2 * cp)
    edges = [(index * chunk, (index + 1) * chunk) for index in (rank, 2 * cp - 1 - rank)]
    return sum(b * (b + 1) // 2 - a * (a + 1) // 2 for a, b in edges)
