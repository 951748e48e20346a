"""Angles at explicit positions: bit-equal to transformers in float32, exact in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.packed_seq_params import PackedSeqParams

from mcore_longctx.errors import ConfigError
from mcore_longctx.layout.packed import pack_from_cu_seqlens
from mcore_longctx.layout.zigzag import zigzag_positions
from mcore_longctx.model.rotary import LongContextRotary, hf_inverse_frequencies
from mcore_longctx.rope import RopeBand, RopeScaling, write_hf_rope

LLAMA = {"head_dim": 128, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
BANDS = (RopeBand(pairs=16, rule="none"), RopeBand(pairs=24, rule="mix", ntk_share=0.3), RopeBand(pairs=24, rule="ntk"))
ROPES = {
    "none": RopeScaling(type="none", head_dim=128, rope_theta=500_000.0),
    "abf": RopeScaling(type="abf", head_dim=64, rope_theta=3_580_165_449.0),
    "ntk": RopeScaling(type="ntk", factor=8, **LLAMA),
    "linear": RopeScaling(type="linear", factor=4, **LLAMA),
    "llama3 x8": RopeScaling(type="llama3", factor=8, **LLAMA),
    "llama3 x512": RopeScaling(type="llama3", factor=512, **LLAMA),
    "yarn x32": RopeScaling(type="yarn", factor=32, **LLAMA),
    "yarn x512, 4/1": RopeScaling(type="yarn", factor=512, beta_fast=4, **LLAMA),
    "yarn not truncated": RopeScaling(type="yarn", factor=16, truncate=False, **LLAMA),
    "yarn attention factor": RopeScaling(type="yarn", factor=4, attention_factor=1.1, **LLAMA),
    "bands": RopeScaling(type="bands", factor=8, bands=BANDS, **LLAMA),
    "longrope": RopeScaling(type="longrope", long_factor=[1 + pair / 7 for pair in range(64)], head_dim=128, rope_theta=1e6),
    "yarn mscale pair": RopeScaling(type="yarn", factor=40, mscale=0.707, mscale_all_dim=1.0, **LLAMA),
}
NEAR_4M = torch.tensor([[0, 1, 511, 131_071, 1_048_575, 4_194_303]])


def hf_rotary(rope: RopeScaling) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = write_hf_rope(replace(rope, max_position_embeddings=rope.resolved_max_position_embeddings or 4_194_304))
    return LlamaRotaryEmbedding(LlamaConfig(**fields, hidden_size=rope.head_dim, num_attention_heads=1, head_dim=rope.head_dim))


@pytest.mark.parametrize("name", ROPES)
def test_float32_angles_are_the_bits_that_transformers_makes(name: str) -> None:
    rope = ROPES[name]
    theirs = hf_rotary(rope)
    assert torch.equal(hf_inverse_frequencies(rope), theirs.inv_freq)
    cos, sin = theirs(torch.zeros(1), NEAR_4M)
    angles = LongContextRotary(rope).angles(NEAR_4M)[:, 0, 0]
    assert angles.dtype is torch.float32
    assert torch.equal(angles.cos() * theirs.attention_scaling, cos[0])
    assert torch.equal(angles.sin() * theirs.attention_scaling, sin[0])
    assert theirs.attention_scaling == pytest.approx(rope.frequencies()[1], rel=1e-15)


@pytest.mark.parametrize("name", ROPES)
def test_float32_frequencies_round_the_exact_ones(name: str) -> None:
    exact = torch.from_numpy(ROPES[name].frequencies()[0])
    assert ((hf_inverse_frequencies(ROPES[name]).double() - exact).abs() / exact).max() < 1e-6


@st.composite
def ropes_that_transformers_knows(draw: st.DrawFn) -> RopeScaling:
    common = {
        "head_dim": draw(st.sampled_from([32, 64, 80, 96, 128])),
        "rope_theta": draw(st.sampled_from([10_000.0, 500_000.0, 3_580_165_449.0])),
    }
    kind = draw(st.sampled_from(["none", "linear", "llama3", "yarn"]))
    if kind == "none":
        return RopeScaling(type="none", **common)
    common |= {
        "factor": draw(st.sampled_from([1.0, 1.5, 4.0, 8.0, 40.0, 128.0, 512.0])),
        "original_max_position_embeddings": draw(st.sampled_from([2048, 8192, 131_072])),
    }
    slow = draw(st.sampled_from([0.5, 1.0, 2.0]))
    fast = slow * draw(st.sampled_from([2.0, 4.0, 32.0]))
    if kind == "linear":
        return RopeScaling(type="linear", **common)
    if kind == "llama3":
        return RopeScaling(type="llama3", low_freq_factor=slow, high_freq_factor=fast, **common)
    return RopeScaling(type="yarn", beta_slow=slow, beta_fast=fast, truncate=draw(st.booleans()), **common)


@settings(max_examples=80, deadline=None)
@given(ropes_that_transformers_knows())
def test_float32_frequencies_are_transformers_bits_for_any_settings(rope: RopeScaling) -> None:
    theirs = hf_rotary(rope)
    assert torch.equal(hf_inverse_frequencies(rope), theirs.inv_freq)
    assert theirs.attention_scaling == pytest.approx(rope.frequencies()[1], rel=1e-15)


def test_yarn_with_its_ramp_in_rotations_has_float32_frequencies_too() -> None:
    rope = RopeScaling(type="yarn", factor=512, ramp="rotations", alpha=1, beta=4, **LLAMA)
    exact = torch.from_numpy(rope.frequencies()[0])
    assert ((hf_inverse_frequencies(rope).double() - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("name", ["none", "llama3 x512", "yarn x512, 4/1"])
def test_float64_phases_are_exact_up_to_4m(name: str) -> None:
    angles = LongContextRotary(ROPES[name], phase_dtype="float64").angles(NEAR_4M)[:, 0, 0, : ROPES[name].head_dim // 2]
    turns = np.longdouble(2) * np.longdouble("3.14159265358979323846264338327950288")
    exact = np.outer(NEAR_4M[0].numpy().astype(np.longdouble), ROPES[name].frequencies()[0].astype(np.longdouble)) % turns
    assert 0 <= angles.min() <= angles.max() <= 6.2832
    difference = (angles.double().numpy() - exact.astype(np.float64)) % (2 * math.pi)
    assert np.minimum(difference, 2 * math.pi - difference).max() < 5e-7


def rotated_products(phase_dtype: Any, start: int) -> torch.Tensor:
    """q . k at a fixed distance of 1,000 tokens, for 64 positions from `start`."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(128, generator=generator) for _ in range(2))
    rotary = LongContextRotary(ROPES["none"], phase_dtype=phase_dtype)

    def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = rotary.angles(positions[None])[:, 0, 0].double()
        rotated = torch.cat((-x[64:], x[:64]))
        return x * angles.cos() + rotated * angles.sin()

    positions = torch.arange(start, start + 64)
    return (turn(q, positions) * turn(k, positions - 1000)).sum(-1)


def test_float64_phases_keep_q_k_constant_near_4m_where_float32_does_not() -> None:
    near = rotated_products("float64", 1000)
    assert (rotated_products("float64", 4_194_304 - 64) - near.mean()).abs().max() < 1e-5
    assert (rotated_products("float32", 4_194_304 - 64) - near.mean()).abs().max() > 1e-2


def test_positions_of_each_sample_are_used_as_they_are_given() -> None:
    rotary = LongContextRotary(ROPES["llama3 x8"])
    positions = torch.tensor([[5, 0, 7], [1, 2, 3]])
    angles = rotary.angles(positions)
    assert angles.shape == (3, 2, 1, 128)
    for sample in range(2):
        alone = rotary.angles(positions[sample : sample + 1])
        assert alone.shape == (3, 1, 1, 128)
        assert torch.equal(angles[:, sample], alone[:, 0])
    assert rotary.angles(positions[:1].expand(4, -1)).shape == (3, 1, 1, 128)


class TwoRanks:
    """A context-parallel group of two, seen from one of them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return self._rank


def test_a_stock_model_that_sets_no_positions_gets_the_zigzag_positions_of_its_rank() -> None:
    for rank, expected in ((0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])):
        rotary = LongContextRotary(ROPES["none"], TwoRanks(rank))
        assert torch.equal(rotary(8), rotary.angles(torch.tensor([expected])))
        rotary.set_positions(torch.tensor([[9, 8, 7, 6]]))
        assert torch.equal(rotary(8), rotary.angles(torch.tensor([[9, 8, 7, 6]])))


def pack(qkv_format: str, max_seqlen: int) -> PackedSeqParams:
    """Documents of 5, 1 and 0 tokens, padded for two ranks to 8, 4 and 4 rows."""
    real, padded = (torch.tensor(sums, dtype=torch.int32) for sums in ([0, 5, 6, 6], [0, 8, 12, 16]))
    return PackedSeqParams(
        qkv_format=qkv_format,
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def angles_of_pack(rotary: LongContextRotary, params: PackedSeqParams) -> torch.Tensor:
    """As GPTModel asks for them: first the length, then the angles."""
    config = SimpleNamespace(context_parallel_size=2, sequence_parallel=False)
    hidden = torch.zeros(8, 1, 4)
    # the two ranks agree through a collective, which has tests of its own
    params._longctx_layout, params._longctx_agreed_rows = pack_from_cu_seqlens([0, 5, 6, 6], [0, 8, 12, 16], 2), 8
    length = rotary.get_rotary_seq_len(None, SimpleNamespace(input_tensor=None), hidden, config, params)
    return rotary(length, packed_seq=params.qkv_format == "thd", cp_group=None)


def test_a_pack_whose_rows_are_given_no_positions_gets_those_inside_its_documents() -> None:
    for rank, expected in ((0, [0, 1, 6, 7, 0, 3, 0, 0]), (1, [2, 3, 4, 5, 1, 2, 0, 0])):
        rotary = LongContextRotary(ROPES["llama3 x8"], TwoRanks(rank))
        assert torch.equal(angles_of_pack(rotary, pack("sbhd", 8)), rotary.angles(torch.tensor([expected])))
        # and the next batch, which is no pack, does not
        zigzag = torch.from_numpy(zigzag_positions(8, 2, rank)).unsqueeze(0)
        assert torch.equal(rotary(8), rotary.angles(zigzag))
        rotary.set_positions(torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2]]))
        assert torch.equal(angles_of_pack(rotary, pack("sbhd", 8)), rotary.angles(torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2]])))


@pytest.mark.parametrize(("max_seqlen", "rows"), [(8, 8), (12, 12), (16, 17)])
def test_a_thd_pack_gets_a_table_that_megatron_reads_from_the_start_of_each_document(max_seqlen: int, rows: int) -> None:
    """A table of exactly the 16 rows of the pack would be read as positions that run through all documents."""
    rotary = LongContextRotary(ROPES["llama3 x8"], TwoRanks(1))
    rotary.set_positions(torch.zeros(1, 8, dtype=torch.int64))  # the positions of rows are not those of a table
    table = angles_of_pack(rotary, pack("thd", max_seqlen))
    assert table.shape == (rows, 1, 1, 128)
    assert torch.equal(table, rotary.angles(torch.arange(rows)[None]))
    queries = torch.randn(8, 2, 128, generator=torch.Generator().manual_seed(0))
    sums = torch.tensor([0, 8, 12, 16], dtype=torch.int32)
    turned = _apply_rotary_pos_emb_thd(queries, sums, table, cp_group=TwoRanks(1))
    angles = rotary.angles(torch.tensor([[2, 3, 4, 5, 1, 2, 1, 2]]))[:, 0]
    halves = torch.cat((-queries[..., 64:], queries[..., :64]), dim=-1)
    assert (turned - queries * angles.cos() - halves * angles.sin()).abs().max() < 1e-6


def test_a_model_cast_to_bf16_keeps_its_frequencies() -> None:
    rotary = LongContextRotary(ROPES["none"])
    before = rotary.inv_freq.clone()
    assert torch.equal(rotary.bfloat16().inv_freq, before)
    assert not rotary.state_dict()


def test_dynamic_scaling_is_refused() -> None:
    rope = RopeScaling(type="dynamic", head_dim=128, rope_theta=1e4, factor=2, max_position_embeddings=4096)
    with pytest.raises(ConfigError, match="dynamic"):
        LongContextRotary(rope)


def test_angles_made_in_pieces_are_those_made_at_once() -> None:
    rope = RopeScaling(type="none", head_dim=8, rope_theta=10_000.0)
    positions = torch.arange(140_000).unsqueeze(0)
    for phase_dtype in ("float32", "float64"):
        rotary = LongContextRotary(rope, phase_dtype=phase_dtype)
        pieces = [rotary.angles(positions[:, start : start + 1000]) for start in range(0, 140_000, 1000)]
        assert torch.equal(rotary.angles(positions), torch.cat(pieces))
