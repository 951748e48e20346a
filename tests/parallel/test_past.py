"""Attention over past rows in pieces, merged, equals one softmax over all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch import Tensor

from mcore_longctx.parallel import past
from mcore_longctx.parallel.past import past_attention

ALONE: Any = SimpleNamespace(size=lambda: 1)  # a group of one rank: nothing is sent
TOLERANCE = 1e-12  # float64: sums of some hundred terms of order 1, in another order


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One softmax over all keys, the last of which are the queries' own: [b, n, t, d]."""
    groups = query.size(1) // key.size(1)
    keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ keys.transpose(-1, -2) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(key.size(2) - query.size(2) + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values


@settings(max_examples=60)
@given(data=st.data())
def test_any_cut_of_the_past_gives_one_softmax_over_all_keys(data: st.DataObject) -> None:
    draw = data.draw
    batch, groups, heads = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    rows, new, kept = draw(st.integers(0, 150)), draw(st.integers(1, 9)), draw(st.integers(0, 3))
    cut = draw(st.integers(0, rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) * 3

    query = drawn(batch, groups * heads, new, 8)
    whole = drawn(rows + new, batch, groups, 8 * 3)  # rows of a projection, of which keys and values are views
    keys, values = whole[..., :8], whole[..., 8:16]
    parts = ((keys[:cut], values[:cut]), (keys[cut:rows], values[cut:rows]), (keys[:0], values[:0]))[: max(kept, 2)]
    new_key, new_value = (tensor[rows:].permute(1, 2, 0, 3) for tensor in (keys, values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past, "_KEYS_AT_ONCE", draw(st.sampled_from([16, 64, 128])))
        patch.setattr(past, "_BLOCKS", draw(st.sampled_from([1, 8, 16])))
        found = past_attention(query, new_key, new_value, parts, ALONE, 0.3)
    expected = plain(query, *(tensor.permute(1, 2, 0, 3) for tensor in (keys, values)), 0.3)
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("new", "pieces"), [(1, 64), (16, 64), (256, 4), (4096, 1)])
def test_a_single_query_is_spread_over_many_pieces_and_many_queries_are_not(new: int, pieces: int) -> None:
    """32 query heads over 8 key heads: enough thread blocks at every number of queries, and never more results than needed."""
    seen = []

    class Recorder:
        name = "recorder"

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
            assert key.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()  # nothing of the past is copied
            assert query.size(1) == key.size(1) == 8
            seen.append((query.size(0), key.size(2)))
            return torch.zeros(query.shape), torch.zeros(query.shape[:3])

    keys = torch.zeros(1, dtype=torch.bfloat16).expand(300_000, 1, 8, 2)
    past._parts_of_rows(torch.zeros(1, 32, new, 2), keys, keys, Recorder(), 1.0)
    at_once = [(count, rows) for count, rows in seen if count > 1 or pieces == 1]
    assert at_once[0] == (pieces, 2**17 // pieces)
    assert sum(count * rows for count, rows in seen) == 300_000
    assert max(count * rows for count, rows in seen) == 2**17


def test_memory_does_not_grow_with_the_past() -> None:
    """Two numbers of rows past `_KEYS_AT_ONCE`: what is alive at once is the same to a few results."""
    query, new = torch.randn(1, 8, 2, 16), torch.randn(1, 2, 2, 16)
    peaks = []
    for rows in (2 * past._KEYS_AT_ONCE, 6 * past._KEYS_AT_ONCE):
        keys = torch.randn(rows, 1, 2, 16)
        with LiveBytes([query, new, keys]) as live:
            past_attention(query, new, new, ((keys, keys),), ALONE, 0.25)
        peaks.append(live.peak_above_start)
        assert peaks[-1] < keys.nbytes / 20
    result = 4 * 8 * 2 * (16 + 1)  # float32 out and lse
    assert peaks[1] - peaks[0] <= 4 * (6 - 2) * result
