"""Weights of conversations: LongAlign's formula with its K and M, and the numbers of its example, by counting token by token."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.data.files.sidecar import PADDING, Runs
from mcore_longctx.data.methods.weights import learned_tokens, loss_weights
from mcore_longctx.layout import zigzag_positions

Turns = list[tuple[int, bool]]  # tokens and loss flag of each stretch of a conversation

conversations = st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=5)


def make_runs(samples: list[list[Turns]], seq_length: int) -> tuple[Runs, list[list[int]]]:
    """Samples of whole conversations, padded, and the lengths of the conversations."""
    rows: list[tuple[int, int, int, bool]] = []
    first, lengths, document = [0], [], 0
    for sample in samples:
        lengths.append([sum(length for length, _ in turns) for turns in sample])
        for turns in sample:
            start = 0
            for length, loss in turns:
                rows.append((document, start, length, loss))
                start += length
            document += 1
        rest = seq_length - sum(lengths[-1])
        assert rest >= 0
        if rest:
            rows.append((PADDING, 0, rest, False))
        first.append(len(rows))
    columns: Any = [np.array(column) for column in zip(*rows, strict=True)]
    return (
        Runs(
            seq_length=seq_length,
            sources=("chats",),
            first_run=np.array(first),
            document=columns[0],
            start=columns[1],
            length=columns[2].astype(np.int32),
            loss=columns[3],
            literals=np.zeros(0, np.int32),
        ),
        lengths,
    )


def labels(sample: list[Turns], seq_length: int, apart: bool) -> list[int | None]:
    """By hand, for each place of a sample: the conversation whose token is learned there, or None."""
    tokens: list[int | None] = []
    for number, turns in enumerate(sample):
        flags = [flag for length, flag in turns for _ in range(length)]
        if apart:
            flags[0] = False
        tokens += [number if flag else None for flag in flags]
    tokens += [None] * (seq_length - len(tokens))
    return [*tokens[1:], None]


def all_weights(runs: Runs, lengths: list[list[int]], sample: list[Turns], index: int, apart: bool) -> tuple[Any, int]:
    mask = np.array([one is not None for one in labels(sample, runs.seq_length, apart)])
    return loss_weights(runs, index, lengths[index], np.arange(runs.seq_length), mask, apart=apart)


@given(packs=st.lists(conversations, min_size=1, max_size=4), apart=st.booleans(), seed=st.integers(0, 99))
def test_the_step_is_longaligns_formula_with_its_k_and_m(packs: list[list[Turns]], apart: bool, seed: int) -> None:
    """As published: each token times K / (N_i M), summed in a pack, mean over the K packs; and 1/M sum_i L_i / N_i."""
    runs, lengths = make_runs(packs, 240)
    rng = np.random.default_rng(seed)
    losses = rng.integers(1, 1000, (len(packs), 240)).tolist()
    by_hand = [labels(sample, 240, apart) for sample in packs]
    counts = [[row.count(number) for number in range(len(sample))] for row, sample in zip(by_hand, packs, strict=True)]
    m, k = sum(n > 0 for row in counts for n in row), len(packs)
    if m == 0:
        assert all(all_weights(runs, lengths, sample, i, apart)[1] == 0 for i, sample in enumerate(packs))
        return
    published = definition = Fraction(0)
    for row, n, loss in zip(by_hand, counts, losses, strict=True):
        pack = sum(
            (Fraction(k * value, n[who] * m) for who, value in zip(row, loss, strict=True) if who is not None), Fraction(0)
        )
        published += pack / k
        for number, size in enumerate(n):
            if size:
                definition += Fraction(sum(v for who, v in zip(row, loss, strict=True) if who == number), size * m)
    assert published == definition
    top, bottom, conversations_learned = 0.0, 0.0, 0
    for index, sample in enumerate(packs):
        weights, count = all_weights(runs, lengths, sample, index, apart)
        assert learned_tokens(runs, index, lengths[index], apart=apart).tolist() == counts[index]
        top += float((weights.astype(np.float64) * losses[index]).sum())
        bottom += float(weights.astype(np.float64).sum())
        conversations_learned += count
    assert conversations_learned == m
    # float32 keeps 24 bits: each weight is off by at most 2^-24 of itself, and so are sums of positive terms
    assert bottom == pytest.approx(m, rel=2**-23)
    assert top / m == pytest.approx(float(published), rel=2**-23)


def test_the_example_of_two_packs_gives_each_conversation_a_quarter() -> None:
    """Answers of 200, and of 10, 20 and 30 tokens: a pack mean gives 0.50, 0.083, 0.167, 0.25; a token mean 0.77 to the first."""
    packs: list[list[Turns]] = [[[(5, False), (200, True)]], [[(5, False), (n, True)] for n in (10, 20, 30)]]
    runs, lengths = make_runs(packs, 256)
    shares = []
    for index, sample in enumerate(packs):
        weights, count = all_weights(runs, lengths, sample, index, False)
        who = labels(sample, 256, False)
        shares += [sum(w for w, one in zip(weights.tolist(), who, strict=True) if one == number) / 4 for number in range(count)]
    assert shares == pytest.approx([0.25] * 4, rel=2**-23)


@given(sample=conversations, apart=st.booleans(), cp_size=st.sampled_from([1, 2, 4]))
def test_context_parallel_shares_hold_the_weights_of_their_own_labels(sample: list[Turns], apart: bool, cp_size: int) -> None:
    runs, lengths = make_runs([sample], 240)
    whole, count = all_weights(runs, lengths, sample, 0, apart)
    found = np.full(240, np.nan, np.float32)
    for rank in range(cp_size):
        places = zigzag_positions(240, cp_size, rank)
        mask = np.array([one is not None for one in labels(sample, 240, apart)])[places]
        found[places], learned = loss_weights(runs, 0, lengths[0], places, mask, apart=apart)
        assert learned == count  # of the sample, not of the share
    assert np.array_equal(found, whole)


def test_fillers_and_padding_have_no_weight() -> None:
    runs, lengths = make_runs([[[(2, False), (3, True)]]], 9)
    places, mask = np.array([-1, 0, 1, 2, 3, 4, 5, 8]), np.array([0, 0, 1, 1, 1, 0, 0, 0], bool)
    weights, count = loss_weights(runs, 0, lengths[0], places, mask, apart=True)
    assert weights.tolist() == [0, 0, *[np.float32(1 / 3)] * 3, 0, 0, 0]
    assert count == 1


def test_a_prompt_that_is_learned_counts() -> None:
    """With prompt_loss the prompt is a part of N; the first token of a conversation is learned only from what stands before it."""
    sample: list[Turns] = [[(4, True), (2, True)], [(3, True)]]
    runs, lengths = make_runs([sample], 9)
    assert learned_tokens(runs, 0, lengths[0], apart=False).tolist() == [5, 3]
    assert learned_tokens(runs, 0, lengths[0], apart=True).tolist() == [5, 2]
