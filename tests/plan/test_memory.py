from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.plan import other_stacks
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.models import find_model
from tests.plan.test_step_time import _setup, setups

GB = 1e9


def _terms(setup):
    return {term.name: term.value for term in memory(setup).terms}


@given(setups)
def test_the_total_is_all_terms_less_the_loss_or_the_layer_whichever_needs_less(setup):
    found = memory(setup)
    terms = list(found.terms)
    assert all(term.value >= 0 for term in terms)
    names = [term.name for term in terms]
    loss = names.index("loss head")
    layer = sum(terms[i].value for i in (loss - 2, loss - 1))  # the working set and the exchange stand before the loss
    assert found.total == pytest.approx(sum(term.value for term in terms) - min(layer, terms[loss].value))
    assert found.host_total == pytest.approx(sum(term.value for term in found.host))


@given(setups)
def test_memory_falls_with_tensor_and_context_parallelism(setup):
    shape = find_model("llama-3.1-8b")  # heads divide by all the sizes
    setup = replace(setup, shape=shape)
    p = setup.parallel
    if p.cp_comm_type == "a2a":  # runs out of heads to divide
        p = replace(p, cp_comm_type="p2p")
        setup = replace(setup, parallel=p)
    more_cp = replace(setup, parallel=replace(p, context_parallel_size=2 * p.context_parallel_size))
    more_tp = replace(
        setup, parallel=replace(p, tensor_model_parallel_size=2 * p.tensor_model_parallel_size, sequence_parallel=True)
    )
    if p.context_parallel_size > 1:  # the first step of CP adds buffers
        assert memory(more_cp).total <= memory(setup).total * 1.001
    if 1 < p.tensor_model_parallel_size < 8:
        assert memory(more_tp).total <= memory(setup).total * 1.001


@given(setups, st.sampled_from([2, 4]))
def test_a_longer_sequence_takes_more(setup, times):
    assert memory(replace(setup, seq_length=times * setup.seq_length)).total > memory(setup).total


def test_states_of_the_distributed_optimizer_by_hand():
    """8B at TP 8, CP 16, DP 2: bf16 weights and float32 gradients of an eighth, 12 bytes of a 1/256."""
    terms = _terms(_setup(tp=8, cp=16, dp=2, seq_length=2**22))
    count = 8_030_261_248
    assert terms["weights"] == 2 * count / 8
    assert terms["gradients"] == 4 * count / 8
    assert terms["optimizer"] == pytest.approx(12 * count / 8 / 32)


@pytest.mark.parametrize(("policy", "kept"), [("full", 8.6), ("attention_kept", 17.3)])
def test_kept_activations_of_the_worked_example(policy, kept):
    """8,192 and 16,512 bytes a token and layer: 262,144 tokens of a rank over TP 8, 32 layers."""
    terms = _terms(_setup(tp=8, cp=16, dp=2, seq_length=2**22, recompute=policy))
    by_hand = {"full": 2 * 4096, "attention_kept": 2 * 4096 + 2 * 32 * 128 + 4 * 32}[policy] * 262144 / 8 * 32
    assert terms["kept activations"] == pytest.approx(by_hand)
    assert by_hand / GB == pytest.approx(kept, abs=0.05)


def test_the_first_stage_waits_for_as_many_micro_batches_as_there_are_stages():
    few, many = _setup(pp=4, dp=1, global_batch_size=2), _setup(pp=4, dp=1, global_batch_size=8)
    one = _setup(pp=4, dp=1, global_batch_size=1)
    kept = [_terms(setup)["kept activations"] for setup in (one, few, many)]
    assert kept[1:] == pytest.approx([2 * kept[0], 4 * kept[0]])


def test_logits_that_are_made_are_the_wall():
    """Stock Megatron at 4M, TP 8, CP 16: 25 GB of logits unfused, 42 GB with the fused loss."""
    for loss, size in (("unfused", 25.2), ("native", 42.0)):
        terms = _terms(_setup(tp=8, cp=16, dp=2, seq_length=2**22, recompute="selective", loss=loss))
        assert terms["loss head"] / GB == pytest.approx(size, abs=0.1)


def test_a_layer_of_hugging_face_by_hand():
    """Qwen3-8B, eager, MLP backward, a token: two norms with float32 copies, q/k norms, q k v o, residuals, 12 f."""
    setup = _setup(
        cp=8,
        shape=find_model("qwen3-8b"),
        recompute="full",
        sharding="zero3",
        optimizer="adam_bf16",
        mlp_tile=None,
        offload_fraction=1.0,
    )
    h, f, qd, kvd = 4096, 12288, 4096, 1024
    norms, heads = 2 * 8 * h, 6 * (qd + kvd)
    by_hand = norms + heads + 4 * qd + 4 * kvd + 2 * h + 2 * h + 12 * f
    layer, exchange = other_stacks.layer_bytes(setup)
    assert layer.value == by_hand * 2**20 / 8
    assert exchange.value == 0


def test_zero3_keeps_a_pipeline_stage_gathered():
    """torchtitan 405B: 2 bytes of gathered weights and 4 of gradients of the stage, whole, besides the shards."""
    setup = _setup(
        tp=8, pp=8, dp=8, shape=find_model("llama-3.1-405b"), seq_length=32768, global_batch_size=64, sharding="zero3", loss="hf"
    )
    terms = _terms(replace(setup, recompute="full", gpu=find_gpu("h100_500w"), kernel="sdpa24", mlp_tile=None))
    assert terms["gathered weights"] * 2 == terms["undivided gradients"]
    assert (terms["gathered weights"] + terms["undivided gradients"]) / GB == pytest.approx(38, abs=2)


def test_host_memory_of_offload_and_of_the_optimizer():
    """Kept activations of 8B at 1M on one node: 554 GB; Adam on the host 16 bytes a parameter."""
    host = {t.name: t.value for t in memory(_setup(tp=2, cp=4, offload_fraction=1.0)).host}
    assert sum(value for name, value in host.items() if name.startswith("offloaded")) / GB == pytest.approx(554, abs=1)
    setup = _setup(cp=8, cp_type="a2a", sharding="zero3", optimizer="adam_cpu", recompute="full", loss="chunked")
    assert {t.name: t.value for t in memory(setup).host}["optimizer"] == 16 * 8_030_261_248
    assert {t.name: t.value for t in memory(setup).host}["data loader"] == 8 * 4 * 28 * 2**20
