"""The formulas of our own layers against the bytes that live in a step of the real model (`counted_steps`).

Sizes are small but unlike each other, and lengths such that bytes of tokens outgrow all others: the difference of two lengths is bytes per
token, the difference of two depths what one layer keeps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.families import ModelShape
from mcore_longctx.model import destroy_process_groups
from mcore_longctx.model.offload import ActivationOffload
from mcore_longctx.parallel.chunked_loss import LOGIT_BYTES, default_chunk
from mcore_longctx.plan import own_stack
from mcore_longctx.plan.hardware import Gpu, find_gpu
from mcore_longctx.plan.models import known_models
from mcore_longctx.plan.setup import Setup
from mcore_longctx.recipe.schema import Parallel
from tests.multiproc import run_processes
from tests.plan.counted_steps import Case, Counted, counted, with_layers

# h, q d, g d and f differ, so that no symbol can stand for another
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=88,
    ffn_hidden_size=176,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=128,
)
SHAPES = {
    "grouped": SHAPE,
    "every query its key": replace(SHAPE, num_query_groups=6),
    "wide": replace(SHAPE, hidden_size=352),
    "normed heads": replace(SHAPE, qk_layernorm=True),
}
CPU = Gpu(
    name="cpu",
    peak_flops=1e12,
    memory_bytes=1e9,
    memory_bandwidth=1e9,
    nvlink_bandwidth=1e9,
    network_bandwidth=1e9,
    pcie_bandwidth=1e9,
    gpus_per_node=1,
    host_memory_bytes=1e9,
    kernels={},
    default_kernel="cpu_flash",  # without scratch memory
    source="",
)
POLICIES = ("none", "full", "attention_kept")
CLOSE = 0.002  # of bytes per token; the promise is 2 %
OF_RANKS = 0.02  # with several ranks: when an exchange ends, and with it its buffers, is a matter of time


def setup(case: Case, length: int) -> Setup:
    return Setup(
        shape=case.shape,
        gpu=CPU,
        seq_length=length,
        global_batch_size=1,
        parallel=case.parallel,
        recompute=case.recompute,
        mlp_tile=case.mlp_tile,
        loss_chunk=case.loss_chunk,
        bytes_per_element={"fp32": 4, "bf16": 2}[case.precision],
    )


def planned(case: Case, length: int) -> float:
    """Everything beyond weights, gradients and the batch, which the steps do not count."""
    at = setup(case, length)
    layer = own_stack.working_set_bytes(at).value + own_stack.exchange_bytes(at).value
    batch = 28 * at.tokens_per_rank
    always = own_stack.kept_bytes(at).value + own_stack.position_bytes(at).value - batch
    return always + max(layer, own_stack.loss_head_bytes(at).value)


def per_token(case: Case, values: list[float]) -> float:
    first, second = case.lengths
    return (values[1] - values[0]) / (second - first) * case.parallel.context_parallel_size


def check_peak(case: Case, ranks: list[list[Counted]], close: float = CLOSE) -> None:
    worst = max(per_token(case, [step.peak for step in steps]) for steps in ranks)
    expected = per_token(case, [planned(case, length) for length in case.lengths])
    assert expected == pytest.approx(worst, rel=close), f"{case}: planned {expected:.1f}, counted {worst:.1f} bytes a token"


def run_alone(case: Case) -> list[Counted]:
    try:
        return counted(case)
    finally:
        destroy_process_groups()


# ------------------------------------------------------------------------------------------------------------ one rank


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_a_token_in_a_whole_step_are_the_planned_ones(shape: str, recompute: Any, precision: Any) -> None:
    case = Case(SHAPES[shape], (4096, 8192), recompute=recompute, precision=precision)
    check_peak(case, [run_alone(case)])


@pytest.mark.parametrize(
    ("recompute", "precision"), [("none", "bf16"), ("none", "fp32"), ("full", "fp32"), ("attention_kept", "fp32")]
)
def test_so_they_are_without_a_tile(recompute: Any, precision: Any) -> None:
    """In bf16 and recomputed a CPU sums weight gradients over float32 copies of its one tile, which a GPU does not make."""
    case = Case(SHAPE, (4096, 8192), recompute=recompute, precision=precision, mlp_tile=None)
    check_peak(case, [run_alone(case)])


@pytest.mark.parametrize("mlp_tile", [64, None])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", POLICIES)
def test_a_layer_keeps_what_is_planned(recompute: Any, precision: Any, mlp_tile: int | None) -> None:
    case = Case(SHAPE, (1024, 2048), recompute=recompute, precision=precision, mlp_tile=mlp_tile)
    shallow, deep = (run_alone(with_layers(case, layers)) for layers in (2, 4))
    found = [(few.kept, many.kept) for few, many in zip(shallow, deep, strict=True)]
    of_a_layer = per_token(case, [(many - few) / 2 for few, many in found])
    expected = per_token(case, [own_stack.kept_bytes(setup(case, length)).value / 2 for length in case.lengths])
    assert of_a_layer == pytest.approx(expected, rel=CLOSE)


def test_a_tile_s_buffers_are_five_times_its_share_of_the_mlp() -> None:
    case = Case(replace(SHAPE, ffn_hidden_size=1408), (4096,), mlp_tile=1024)
    larger = replace(case, mlp_tile=2048)
    found = run_alone(larger)[0].peak - run_alone(case)[0].peak
    assert found == pytest.approx(planned(larger, 4096) - planned(case, 4096), rel=CLOSE)
    assert found == pytest.approx(1024 * 5 * 1408 * 4, rel=CLOSE)


def test_the_loss_takes_a_chunk_of_logits_and_the_gradients_of_head_and_hidden_states() -> None:
    """In absolute bytes, with a vocabulary that makes it the largest moment (bf16 on a CPU would copy weights to float32)."""
    large = Case(replace(SHAPE, vocab_size=8192), (2048,), recompute="full", loss_chunk=512)
    at = setup(large, 2048)
    assert own_stack.loss_head_bytes(at).value > own_stack.working_set_bytes(at).value
    found = {chunk: run_alone(replace(large, loss_chunk=chunk))[0].peak for chunk in (512, 1024)}
    for chunk, peak in found.items():
        assert peak == pytest.approx(planned(replace(large, loss_chunk=chunk), 2048), rel=0.02)
    assert found[1024] - found[512] == pytest.approx(512 * 4 * 8192, rel=0.02)


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b"])
def test_a_chunk_that_is_not_given_is_the_one_that_the_loss_takes(name: str, tp: int) -> None:
    parallel = Parallel(tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    shape = known_models()[name]
    planned_chunk = own_stack.loss_chunk(
        Setup(shape=shape, gpu=find_gpu("h100"), seq_length=2**20, global_batch_size=1, parallel=parallel)
    )
    assert planned_chunk == default_chunk(shape.padded_vocab_size(tp) // tp, torch.bfloat16)
    assert own_stack._LOGIT_BYTES == LOGIT_BYTES


# --------------------------------------------------------------------------------------------------------- several ranks


def layout(kind: str, size: int = 2) -> Parallel:
    if kind == "tp":
        return Parallel(tensor_model_parallel_size=size, sequence_parallel=True)
    return Parallel(context_parallel_size=size, cp_comm_type=kind)


def check_on_ranks(cases: list[Case]) -> None:
    """Each in processes of its own: nothing of one case lives in the next."""
    for case in cases:
        check_peak(case, run_processes(counted, case.parallel.world_size, case, timeout=200), OF_RANKS)


@pytest.mark.multiproc
@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_the_exchange_of_two_ranks_takes_what_is_planned(kind: str) -> None:
    shapes = [SHAPES["grouped"], SHAPES["every query its key"]]
    cases = [Case(shape, (8192, 16384), layout(kind), "attention_kept", "bf16") for shape in shapes]
    check_on_ranks([*cases, Case(SHAPE, (8192, 16384), layout(kind), "full", "fp32")])


@pytest.mark.multiproc
def test_more_ranks_take_more_with_all_gather_and_one_more_pair_of_buffers_with_a_ring() -> None:
    check_on_ranks([Case(SHAPE, (12288, 24576), layout(kind, 3), "attention_kept", "bf16") for kind in ("p2p", "all_gather")])


@pytest.mark.multiproc
def test_tensor_parallel_ranks_gather_what_they_do_not_hold() -> None:
    cases = [Case(SHAPES["grouped"], (8192, 16384), layout("tp"), policy, "bf16") for policy in POLICIES]
    check_on_ranks([*cases, Case(SHAPES["wide"], (8192, 16384), layout("tp"), "full", "bf16")])


# ------------------------------------------------------------------------------------------------------------ arithmetic


def llama(**changes: Any) -> Setup:
    base = Setup(shape=known_models()["llama-3.1-8b"], gpu=find_gpu("h100"), seq_length=2**22, global_batch_size=1)
    return replace(base, **changes)


def test_what_the_policies_keep_of_an_8b_llama_is_the_published_number() -> None:
    """docs/memory.md and LoongTrain's policy: 8,192 and 16,512 bytes of a token and layer in bf16."""
    for recompute, kept in (("full", 8192), ("attention_kept", 16512)):
        assert own_stack.kept_bytes(llama(recompute=recompute)).value == kept * 32 * 2**22


@given(st.integers(1, 16), st.floats(0, 1))
@settings(deadline=None)
def test_whole_layers_are_offloaded_as_the_trainer_rounds_and_two_are_in_flight(half: int, fraction: float) -> None:
    layers = 2 * half
    of = llama(shape=replace(known_models()["llama-3.1-8b"], num_layers=layers), offload_fraction=fraction)
    away = ActivationOffload(fraction, layers).layers
    assert own_stack.offloaded_bytes(of).value == away * 16512 * 2**22
    assert own_stack.kept_bytes(of).value == (layers - away + min(2, away)) * 16512 * 2**22


@given(
    st.sampled_from(["p2p", "all_gather", "a2a+p2p"]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from(POLICIES),
    st.sampled_from([None, 8192]),
)
@settings(deadline=None)
def test_terms_are_finite_and_shrink_with_ranks(kind: str, tp: int, cp: int, policy: Any, tile: int | None) -> None:
    def at(tp: int, cp: int) -> Setup:
        inner = 2 if tp < 8 else 1
        hierarchy = {"hierarchical_context_parallel_sizes": (inner, cp // inner)} if kind == "a2a+p2p" else {}
        p = Parallel(
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
            context_parallel_size=cp,
            cp_comm_type=kind,
            **hierarchy,
        )
        return llama(parallel=p, recompute=policy, mlp_tile=tile)

    here, more = at(tp, cp), at(tp, 2 * cp)
    for function in (own_stack.kept_bytes, own_stack.working_set_bytes, own_stack.exchange_bytes, own_stack.loss_head_bytes):
        term = function(here)
        assert 0 <= term.value < 1e15
        assert term.formula
        assert term.numbers
    assert own_stack.kept_bytes(more).value == own_stack.kept_bytes(here).value / 2
    assert own_stack.working_set_bytes(more).value < own_stack.working_set_bytes(here).value


def test_kernels_of_a_gpu_have_scratch_memory_and_that_of_the_cpu_has_none() -> None:
    """A float32 gradient of the queries and their row sums: 4 q d + 4 q = 16,512 bytes of a token of an 8B Llama."""
    of_cpu = own_stack.working_set_bytes(llama(gpu=CPU)).value
    assert own_stack.working_set_bytes(llama(kernel="cudnn")).value == of_cpu + 16512 * 2**22
    assert own_stack.working_set_bytes(llama(kernel="fa3")).value == of_cpu + (16384 + 2 * 128 + 2 * 4096) * 2**22


def test_a_number_can_be_followed_by_hand() -> None:
    """8B, 4M tokens on TP 8, CP 16: 262,144 tokens of a rank, the projection's moment:

    e (4 h + 3 q d + 3 g d) / T + 4 d e + e h + e h (gathered) + 4 / T.
    """
    parallel = Parallel(tensor_model_parallel_size=8, sequence_parallel=True, context_parallel_size=16)
    term = own_stack.working_set_bytes(llama(parallel=parallel))
    by_hand = 262_144 * (2 * (4 * 4096 + 3 * 4096 + 3 * 1024) / 8 + 4 * 128 * 2 + 2 * 4096 + 2 * 4096 + 4 / 8)
    assert term.value == by_hand
    assert term.note == "the output projection is differentiated"
    assert "262,144 x" in term.numbers
