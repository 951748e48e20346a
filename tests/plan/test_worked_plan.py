"""UltraLong-8B on H100, worked out once by other formulas in another program: our plan agrees, or the difference has a name.

Those formulas (the reference of this project, written before the code) differ in three places, each named in docs/plan.md:

- *the ring*: they take 7 % off the kernel's rate for every ring; ours costs what its pieces cost, next to nothing from 64K tokens a rank on.
- *the layer that is run again*: they divide every byte by TP; ours was counted tensor by tensor (`own_stack`): under sequence parallelism
  QKV and the MLP see all rows of the rank, and attention's backward needs a float32 sum of the queries' gradient.
- *the exchange*: they keep gradients of keys and values in bf16; ours sums them in float32.

So times of an all-gather agree to 1 %, those of a ring are up to 8 % lower, and memory is up to a fifth higher.
"""

import pytest

from mcore_longctx.families import ModelShape
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.layouts import search
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.models import find_model
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.recipe import OptimizerSection, Parallel, Stage, TokenCount

M = 1 << 20
LLAMA = find_model("llama-3.1-8b")

# sequence, gbs, TP, CP, DP, exchange, policy, kernel: step s, tok/s/GPU, MFU %, GB a GPU
ROWS = [
    ((1, 8, 8, 4, 8, "p2p", "full", "cudnn"), (90, 365, 32, 25)),
    ((1, 8, 8, 4, 8, "all_gather", "full", "cudnn"), (85, 384, 34, 26)),
    ((1, 8, 4, 8, 8, "all_gather", "attention_kept", "cudnn"), (69, 476, 42, 42)),
    ((1, 8, 4, 8, 8, "all_gather", "attention_kept", "fa3"), (58, 563, 50, 42)),
    ((2, 4, 8, 16, 2, "p2p", "full", "cudnn"), (174, 188, 32, 17)),
    ((2, 4, 8, 8, 4, "all_gather", "attention_kept", "cudnn"), (132, 247, 42, 36)),
    ((2, 4, 8, 8, 4, "all_gather", "attention_kept", "fa3"), (111, 294, 50, 36)),
    ((4, 2, 8, 16, 2, "p2p", "full", "cudnn"), (342, 96, 32, 25)),
    ((4, 2, 8, 16, 2, "all_gather", "full", "cudnn"), (325, 101, 34, 29)),
    ((4, 2, 8, 16, 2, "all_gather", "attention_kept", "cudnn"), (260, 126, 43, 38)),
    ((4, 2, 8, 16, 2, "all_gather", "attention_kept", "fa3"), (217, 151, 51, 38)),
]


def setup_of(row: tuple, **changes: object) -> Setup:
    length, batch, tp, cp, dp, exchange, policy, kernel = row
    values = {
        "shape": LLAMA,
        "gpu": find_gpu("h100"),
        "seq_length": length * M,
        "global_batch_size": batch,
        "parallel": Parallel(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            data_parallel_size=dp,
            sequence_parallel=True,
            cp_comm_type=exchange,
        ),
        "recompute": policy,
        "kernel": kernel,
        "mlp_tile": None,  # theirs is not tiled
        **changes,
    }
    return Setup(**values)


@pytest.mark.parametrize(("row", "wanted"), ROWS, ids=lambda value: " ".join(map(str, value)))
def test_times_agree_but_for_the_ring(row: tuple, wanted: tuple) -> None:
    seconds, rate, mfu, _ = wanted
    time = step_time(setup_of(row))
    if row[5] == "p2p":
        assert 0.92 * seconds < time.total < 1.01 * seconds
        return
    # up to 1 % more than theirs: our gradients of gathered keys and values are float32
    assert time.total == pytest.approx(seconds, abs=0.5 + 0.015 * seconds)
    assert time.tokens_per_second_per_gpu == pytest.approx(rate, abs=0.5 + 0.015 * rate)
    assert 100 * time.mfu == pytest.approx(mfu, abs=0.5 + 0.015 * mfu)


def their_terms(row: tuple) -> dict[str, float]:
    """Their formulas, by the names of our terms (8B: 8.03e9 parameters; GB; 1,024 tokens of logits at a time, 4 % lost, 3 GB context)."""
    length, _, tp, cp, dp, exchange, policy, _ = row
    tokens = length * M / cp
    key_value = 2 * max(1, 8 // tp) * 128 * 2
    return {
        "weights": 2 * 8.030e9 / tp,
        "gradients": 4 * 8.030e9 / tp,
        "optimizer": 12 * 8.030e9 / tp / (dp * cp),
        "kept activations": {"full": 8192, "attention_kept": 16512}[policy] * tokens / tp * 32,
        "working set": 180_224 * tokens / tp,
        "key/value exchange": 4 * key_value * tokens if exchange == "p2p" else 2 * key_value * length * M,
    }


@pytest.mark.parametrize(("row", "wanted"), ROWS, ids=lambda value: " ".join(map(str, value)))
def test_memory_differs_in_the_layer_and_the_exchange_alone(row: tuple, wanted: tuple) -> None:
    theirs, ours = their_terms(row), {t.name: t.value for t in memory(setup_of(row)).terms}
    assert (sum(theirs.values()) * 1.04 + 3e9) / 1e9 == pytest.approx(wanted[3], abs=0.6)  # these are the formulas of the table
    for name in ("weights", "gradients", "optimizer", "kept activations"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.01), name
    named = sum(ours[name] - theirs[name] for name in ("working set", "key/value exchange")) / 1e9
    untiled = memory(setup_of(row)).total / 1e9
    assert untiled - wanted[3] == pytest.approx(1.04 * named, abs=1.2)  # positions and rounding
    tiled = memory(setup_of(row, mlp_tile=8192)).total / 1e9  # as our stages have it
    assert 0.98 * wanted[3] < tiled < 1.2 * wanted[3]


def test_stock_megatron_with_its_logits_agrees() -> None:
    """`layernorm mlp` at TP 8 CP 32: 264 s, 47 GB; at CP 16 it does not fit (85 GB)."""
    row = (4, 2, 8, 32, 1, "all_gather", "selective", "cudnn")
    setup = setup_of(row, loss="unfused")
    assert step_time(setup).total == pytest.approx(264, rel=0.01)
    assert memory(setup).total / 1e9 == pytest.approx(47, abs=2)
    at_16 = setup_of((4, 2, 8, 16, 2, "all_gather", "selective", "cudnn"), loss="unfused")
    assert memory(at_16).total / 1e9 == pytest.approx(85, abs=4)


# tokens in M, gbs, GPUs, GPU: policy, on the host?, step s; the host's GB a node where it is used
SMALLEST = [
    (1, 8, 8, "h100", "attention_kept", True, 2106, 554),
    (1, 8, 16, "h100", "attention_kept", False, 1077, 0),
    (1, 8, 16, "h100", "full", False, 1340, 0),
    (1, 8, 32, "h100", "attention_kept", False, 538, 0),
    (1, 8, 64, "h100", "attention_kept", False, 269, 0),
    (2, 4, 16, "h100", "attention_kept", True, 2073, 554),
    (2, 4, 32, "h100", "attention_kept", False, 1047, 0),
    (2, 4, 64, "h100", "attention_kept", False, 523, 0),
    (2, 4, 128, "h100", "attention_kept", False, 262, 0),
    (4, 2, 32, "h100", "attention_kept", True, 2043, 554),
    (4, 2, 64, "h100", "attention_kept", False, 1027, 0),
    (4, 2, 64, "h100", "full", False, 1285, 0),
    (4, 2, 128, "h100", "attention_kept", False, 514, 0),
    (1, 8, 8, "h200", "attention_kept", False, 2124, 0),
    (2, 4, 8, "h200", "attention_kept", True, 4089, 1108),
    (4, 2, 16, "h200", "attention_kept", True, 4089, 1108),
    (4, 2, 32, "h200", "attention_kept", False, 2043, 0),
]


def stage(length: int, batch: int) -> Stage:
    return Stage(
        name="extend",
        kind="pretrain",
        data="-",
        seq_length=TokenCount(length * M),
        global_batch_size=batch,
        optimizer=OptimizerSection(lr=1e-5),
        train_iters=150,
    )


@pytest.mark.parametrize("row", SMALLEST, ids=lambda row: " ".join(map(str, row[:6])))
def test_the_smallest_gpu_counts_fit_at_the_same_speed(row: tuple) -> None:
    length, batch, gpus, gpu, policy, on_host, seconds, host = row
    found = search(stage(length, batch), LLAMA, find_gpu(gpu), gpus)
    same = [c for c in found.fitting if c.setup.recompute == policy and (c.setup.offload_fraction > 0) == on_host]
    assert same
    assert same[0].seconds == pytest.approx(seconds, rel=0.025)  # ours also tries a2a over more ranks than key heads
    assert same[0].memory is not None
    assert same[0].memory.host_total / 1e9 <= host + 5  # ours offloads no more than it must


@pytest.mark.parametrize(("length", "batch", "gpus"), [(2, 4, 8), (4, 2, 8), (4, 2, 16)])
def test_where_nothing_fits_nothing_fits(length: int, batch: int, gpus: int) -> None:
    """At 4M on 16 they count on a tiled MLP (69 GB); our own layer, counted, takes more there: 78 GB."""
    assert not search(stage(length, batch), LLAMA, find_gpu("h100"), gpus).fitting


def model_on(shape: ModelShape, length: int, batch: int, gpus: int, policy: str, on_host: bool) -> float:
    found = search(stage(length, batch), shape, find_gpu("h100"), gpus)
    return next(c.seconds for c in found.fitting if c.setup.recompute == policy and (c.setup.offload_fraction > 0) == on_host)


def test_llama_70b_agrees() -> None:
    shape = find_model("llama-3.1-70b")
    assert model_on(shape, 1, 8, 256, "attention_kept", True) == pytest.approx(357, rel=0.02)
    assert model_on(shape, 1, 8, 256, "attention_kept", False) == pytest.approx(409, rel=0.03)
    assert model_on(shape, 4, 2, 512, "attention_kept", True) == pytest.approx(655, rel=0.025)  # CP 64 here: CP 32 needs 74 GB
