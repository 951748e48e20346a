"""A training step at full length against plain float64 at a few positions: 2,048 tokens always, 256K and 4M where they are asked for."""

from __future__ import annotations

import pytest

from mcore_longctx.model import destroy_process_groups
from mcore_longctx.recipe.model_shape import ModelShape
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


def run(job: LongStep) -> Comparison:
    try:
        return compare_with_reference(job, run_step(job))
    finally:
        destroy_process_groups()


def check(found: Comparison, *, loss: float, update: float) -> None:
    print(found)  # noqa: T201  # the numbers of a step that takes minutes
    assert found.loss_error < loss
    assert found.update_error < update
    assert found.grad_norm < 1
    # neither too small for the weights' rounding nor nothing but a sign
    assert found.smallest_update > 0.02
    assert found.largest_update < 0.98


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # megatron-core reads it
def test_short_step() -> None:
    job = LongStep(
        shape=TINY,
        seq_length=2048,
        precision="fp32",
        activations=Activations(mlp_tile=TokenCount(512), loss_chunk=TokenCount(256)),
    )
    check(run(job), loss=1e-4, update=1e-3)
