"""A training step at full length against plain float64 at a few positions.

2,048 tokens always; 262,144 tokens on a CPU with `pytest -m long` (`make test-long`, minutes); 4,194,304 tokens on one GPU of 80 GB with
`pytest -m gpu`. The code is the same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mcore_longctx.families import ModelShape
from mcore_longctx.model import destroy_process_groups
from mcore_longctx.recipe.schema import Activations, TokenCount
from tests.gpu.long_step import Comparison, LongStep, compare_with_reference, run_step

TINY = ModelShape(
    num_layers=1,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=1,
    num_query_groups=1,
    kv_channels=32,
    vocab_size=2048,
)
SMALL = ModelShape(
    num_layers=2,
    hidden_size=512,  # 4M rows of 512 are 2^31 elements: the first count that does not fit 32 bits
    ffn_hidden_size=1792,
    num_attention_heads=4,
    num_query_groups=1,
    kv_channels=128,
    vocab_size=128_256,
)
# losses in nats, updates in units of their largest entry. Found at 262,144 tokens: 8e-7 and 2e-6. Angles rounded to float32 there would
# show (1e-5 and 2e-4), at 2,048 tokens they would not.
FLOAT32 = {"loss": 5e-6, "update": 5e-5}
# bf16: the same weights, activations rounded to 8 bits at every operation
BFLOAT16 = {"loss": 0.1, "update": 0.15}

reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # megatron-core does


def run(job: LongStep) -> Comparison:
    try:
        return compare_with_reference(job, run_step(job))
    finally:
        destroy_process_groups()


def check(found: Comparison, job: LongStep, *, loss: float, update: float) -> None:
    print(found)  # noqa: T201  # the numbers of a step that takes minutes
    assert found.loss_error < loss
    assert found.update_error < update
    assert found.grad_norm < 1  # not clipped
    # updates that are neither lost in the rounding of weights nor mere signs
    assert found.smallest_update > 0.02
    assert found.largest_update < 0.98
    assert found.attention_forwards == (2 if job.activations.recompute == "full" else 1)


@reads_grad
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("recompute", ["attention_kept", "full", "none"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp32 on the CPU; the step for a GPU is marked gpu")
def test_a_short_step_equals_the_reference(recompute: str, layers: int) -> None:
    activations = Activations(recompute=recompute, mlp_tile=TokenCount(512), loss_chunk=TokenCount(256))  # type: ignore[arg-type]
    job = LongStep(shape=replace(TINY, num_layers=layers), seq_length=2048, precision="fp32", activations=activations)
    check(run(job), job, **FLOAT32)


@reads_grad
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA; the step for a GPU is marked gpu")
def test_a_step_at_256k_tokens_on_a_cpu_equals_the_reference() -> None:
    activations = Activations(
        recompute="attention_kept", offload_fraction=1.0, mlp_tile=TokenCount(8192), loss_chunk=TokenCount(4096)
    )
    job = LongStep(shape=TINY, seq_length=262_144, precision="fp32", activations=activations)
    check(run(job), job, **FLOAT32)


@reads_grad
@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_at_4m_tokens_on_one_gpu_equals_the_reference() -> None:
    room = torch.cuda.get_device_properties(0).total_memory / 2**30
    if room < 76:
        pytest.skip(f"needs a GPU of 80 GB, this one has {room:.0f} GiB")
    activations = Activations(recompute="attention_kept", offload_fraction=1.0, mlp_tile=TokenCount(65_536))
    job = LongStep(shape=SMALL, seq_length=4_194_304, precision="bf16", activations=activations)
    check(run(job), job, **BFLOAT16)
