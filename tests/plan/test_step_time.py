from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.calibration import CALIBRATION
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.models import find_model
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.recipe.schema import Parallel


def _setup(tp=1, cp=1, pp=1, dp=1, cp_type="p2p", a2a=None, **more):
    parallel = Parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        sequence_parallel=tp > 1,
        cp_comm_type=cp_type,
        hierarchical_context_parallel_sizes=(a2a, cp // a2a) if a2a else None,
    )
    values = {"shape": find_model("llama-3.1-8b"), "gpu": find_gpu("h100"), "seq_length": 2**20, "global_batch_size": dp} | more
    return Setup(parallel=parallel, **values)


def _copies_heads(setup):
    """An all-to-all over more ranks than there are heads: not all numbers of heads divide then."""
    p = setup.parallel
    return p.cp_comm_type == "a2a" and p.context_parallel_size > setup.shape.num_query_groups // p.tensor_model_parallel_size


def _terms(setup):
    return {term.name: term.value for term in step_time(setup).terms}


setups = st.builds(
    _setup,
    tp=st.sampled_from([1, 2, 4, 8]),
    cp=st.sampled_from([1, 2, 8, 32]),
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 8]),
    cp_type=st.sampled_from(["p2p", "all_gather", "a2a"]),
    seq_length=st.sampled_from([2**15, 2**17, 2**20, 2**22]),
    recompute=st.sampled_from(["none", "full", "attention_kept", "selective"]),
    kernel=st.sampled_from(["fa2", "fa3", "cudnn", "sdpa"]),
    gemm=st.sampled_from(["bf16", "fp8"]),
    loss=st.sampled_from(["chunked", "unfused"]),
    shape=st.sampled_from([find_model("llama-3.1-8b"), find_model("llama-3.1-70b"), find_model("qwen3-0.6b")]),
    offload_fraction=st.sampled_from([0.0, 0.5, 1.0]),
).filter(lambda setup: not _copies_heads(setup))


@given(setups)
def test_terms_add_up_and_none_is_negative(setup):
    time = step_time(setup)
    assert all(term.value >= 0 for term in time.terms)
    assert time.total == pytest.approx(sum(term.value for term in time.terms))
    assert 0 < time.micro_batch <= time.total
    assert all(term.formula and term.numbers for term in time.terms)


@given(setups)
@settings(max_examples=300)
def test_nothing_is_faster_than_its_attention_kernel_and_its_matrix_products(setup):
    """The ceiling: attention at the kernel's rate, twice forward under full recompute, and products at the rate that GEMMs reach."""
    time = step_time(setup)
    s, shape, rate = setup.seq_length, setup.shape, setup.gpu.kernel(setup.kernel)
    forward = 2.0 * s * s * shape.num_attention_heads * shape.kv_channels * shape.num_layers
    attention = forward * ((2 if setup.recompute == "full" else 1) / rate.forward + 2.5 / rate.backward)
    h, d = shape.hidden_size, shape.kv_channels
    layer = h * d * (2 * shape.num_attention_heads + 2 * shape.num_query_groups) + 3 * h * shape.ffn_hidden_size
    gemm = CALIBRATION.gemm_fp8 if setup.gemm == "fp8" else CALIBRATION.gemm_bf16
    linear = 6.0 * shape.num_layers * layer * s / (setup.gpu.peak_flops * gemm)
    floor = setup.global_batch_size * (attention + linear) / setup.parallel.world_size
    assert time.total > floor
    limit = 3 * forward / ((1 / rate.forward + 2.5 / rate.backward) * forward) / setup.gpu.peak_flops
    if setup.gemm == "bf16":
        assert time.mfu < max(limit, CALIBRATION.gemm_bf16)


@given(setups)
def test_a_longer_sequence_takes_longer_and_more_than_in_proportion(setup):
    one, two = step_time(setup), step_time(replace(setup, seq_length=2 * setup.seq_length))
    assert two.total > one.total
    grow = {"attention forward", "attention backward"}
    longer = {term.name: term.value for term in two.terms}
    for term in one.terms:
        if term.name in grow:
            assert longer[term.name] > 3 * term.value or setup.seq_length < 2**17  # short rings lose more


def test_twice_the_gpus_for_twice_the_batch_take_as_long():
    one, two = step_time(_setup(tp=8, cp=4, dp=2)), step_time(_setup(tp=8, cp=4, dp=4))
    assert two.total == pytest.approx(one.total, rel=0.01)
    assert two.tokens_per_second_per_gpu == pytest.approx(one.tokens_per_second_per_gpu, rel=0.01)


@pytest.mark.parametrize(
    ("policy", "kind", "published"),
    [("full", "p2p", 342.0), ("full", "all_gather", 325.0), ("attention_kept", "all_gather", 260.0)],
)
def test_the_worked_example_by_plain_arithmetic(policy, kind, published):
    """8B, 4M tokens, 256 H100 (TP 8, CP 16, DP 2), cuDNN: recomputed from the formulas, and near the plan that was made before them."""
    time = step_time(_setup(tp=8, cp=16, dp=2, cp_type=kind, seq_length=2**22, recompute=policy, kernel="cudnn"))
    s, ranks = 2**22, 128
    t = s / 16
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336
    again = 1 - 4096 * 14336 / layer
    expected = 6 * 32 * layer * s * (1 + again / 3) / ranks / (989e12 * 0.623)
    expected += 32 * (t / 8) * (20 * 4096 + 4 * 40 * 128 + 6 * 14336) * (3 + again) / (3.35e12 * 0.8)
    expected += 6 * 128256 * 4096 * s / ranks / (989e12 * 0.623)
    forward = 2 * s * s * 32 * 128 * 32 / ranks
    times = 2 if policy == "full" else 1
    ring = 1 + 900 / t if kind == "p2p" else 1
    expected += forward * ring * (times / 568e12 + 2.5 / 485e12)
    if kind == "all_gather":  # one key/value head a rank, bf16, its gradient float32, through the network adapter of a GPU
        expected += 32 * (times + 1 + 2) * (2 * 128 * 2) * t * 15 / (50e9 * 0.8)
    operations = 10 + (4 if policy == "full" else 3)
    expected += 32 * operations * t * 4096 * 2 * 7 / 8 / (450e9 * 0.8)
    expected += 26 * 8_030_261_248 / 256 / 3.35e12 + 0.15  # the exchange of gradients hides
    assert time.total == pytest.approx(expected, rel=1e-9)
    # a ring that loses 7 % at any length was taken for granted then; at 262,144 tokens a rank it loses 0.3 %
    tolerance = 0.07 if kind == "p2p" else 0.01
    assert time.total == pytest.approx(published, rel=tolerance)


def test_the_ring_hides_at_4m_and_not_with_short_chunks_of_many_heads():
    long = step_time(_setup(tp=8, cp=16, dp=2, seq_length=2**22, kernel="cudnn"))
    assert long.exchange_hidden
    short = step_time(_setup(cp=32, shape=find_model("llama-2-7b"), seq_length=2**17, kernel="fa3"))
    assert not short.exchange_hidden
    assert _terms(_setup(cp=32, shape=find_model("llama-2-7b"), seq_length=2**17, kernel="fa3"))["context-parallel exchange"] > 0


@pytest.mark.parametrize(
    ("kind", "more", "received"),
    [  # one layer, forward: 8 key/value heads of 128 in bf16 are 4,096 bytes of keys and values a token, queries and outputs 16,384
        ("p2p", {}, 4096 * 2**17 * 7),
        ("all_gather", {}, 4096 * 2**17 * 7),
        ("a2a", {}, (4096 + 16384) * 2**17 * 7 / 8),
        ("a2a+p2p", {"a2a": 4}, (4096 + 16384) * 2**17 * 3 / 4 + 4096 * 2**17),
        # more ranks than key/value heads: each head goes to the 4 or 2 ranks that have its queries, and round the ring so often
        ("a2a", {"cp": 32}, (4 * 4096 + 16384) * 2**15 * 31 / 32),
        ("a2a+p2p", {"cp": 32, "a2a": 16}, (2 * 4096 + 16384) * 2**15 * 15 / 16 + 2 * 4096 * 2**15),
    ],
)
def test_bytes_of_each_exchange(kind, more, received):
    assert step_time(_setup(**({"cp": 8, "cp_type": kind} | more))).exchange_bytes == received


@pytest.mark.parametrize("policy", ["attention_kept", "full"])
@pytest.mark.parametrize("precision", [2, 4])
@pytest.mark.parametrize(
    ("kind", "factor", "backward"),
    [  # of the forward's bytes. Sums of key and value gradients are float32, whatever the keys are
        ("p2p", 1.4, lambda e: 1 + 4 / e * 8 / 7),  # and go home: 8 hops, where the keys take 7
        ("all_gather", 1.0, lambda e: 1 + 4 / e),
        ("a2a", 1.0, lambda e: 2),  # do, q, k, v, o; then dq, dk, dv
    ],
)
def test_bytes_of_each_exchange_in_the_backward_pass(kind, factor, backward, precision, policy):
    """Over a link so slow that nothing hides: 1 KB/s."""
    slow = replace(find_gpu("h100"), nvlink_bandwidth=1e3)
    setup = _setup(cp=8, cp_type=kind, gpu=slow, bytes_per_element=precision, recompute=policy)
    time = step_time(setup)
    forwards = 2 if policy == "full" else 1
    moved = factor * time.exchange_bytes * (forwards + backward(precision)) * 32
    assert _terms(setup)["context-parallel exchange"] == pytest.approx(moved / (1e3 * CALIBRATION.nvlink), rel=1e-3)


def test_other_stacks_send_gradients_as_they_send_keys():
    slow = replace(find_gpu("h100"), nvlink_bandwidth=1e3)
    for kind, factor, backward in (("p2p", 1.4, 2), ("all_gather", 1.0, 2), ("a2a", 1.0, 1)):
        setup = _setup(cp=8, cp_type=kind, gpu=slow, loss="unfused")
        moved = factor * step_time(setup).exchange_bytes * (1 + backward) * 32
        assert _terms(setup)["context-parallel exchange"] == pytest.approx(moved / (1e3 * CALIBRATION.nvlink), rel=1e-3)


def test_full_recompute_runs_attention_forward_twice_and_nothing_else_does():
    twice, once = _terms(_setup(cp=8, recompute="full")), _terms(_setup(cp=8))
    assert twice["attention forward"] == pytest.approx(2 * once["attention forward"])
    assert twice["attention backward"] == once["attention backward"]


def test_a_pipeline_waits_for_its_first_and_last_stage():
    """1F1B: PP - 1 of m micro-batches of bubble, divided by the virtual chunks."""
    flat = _terms(_setup(pp=4, dp=1, global_batch_size=8))
    compute = sum(
        value for name, value in flat.items() if name not in ("pipeline bubble", "pipeline transfers", "optimizer", "fixed")
    )
    assert flat["pipeline bubble"] == pytest.approx(compute * 3 / 8)
    chunked = _terms(_setup(pp=4, dp=1, global_batch_size=8, virtual_pipeline_chunks=2))
    assert chunked["pipeline bubble"] == pytest.approx(flat["pipeline bubble"] / 2)


def test_offload_shows_only_when_the_link_is_slow():
    fast = _setup(tp=8, cp=4, offload_fraction=1.0)
    assert _terms(fast)["offload"] == 0
    assert step_time(fast).offload_bytes == pytest.approx(2 * 32 * 16512 * 2**20 / 4 / 8)  # 16,512 bytes a token and layer
    slow = replace(fast, gpu=replace(fast.gpu, pcie_bandwidth=1e8))
    assert _terms(slow)["offload"] > 0


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="has no attention kernel"):
        step_time(_setup(kernel="fa4"))
