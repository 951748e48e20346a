"""On one CUDA device: the model against transformers. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling
from tests.model.llama import SHAPE, build, hf_llama, megatron_names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA_SHAPE = replace(SHAPE, num_layers=2, hidden_size=256, num_attention_heads=8, num_query_groups=2, kv_channels=64)
LLAMA3 = RopeScaling(type="llama3", head_dim=64, rope_theta=500_000.0, factor=8, original_max_position_embeddings=64)
YARN = RopeScaling(type="yarn", head_dim=64, rope_theta=500_000.0, factor=8, original_max_position_embeddings=64)


@pytest.fixture(scope="module")
def _one_device() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    init_process_groups(Parallel(), seed=0)
    yield
    destroy_process_groups()


@pytest.mark.usefixtures("_one_device")
@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=lambda rope: rope.type)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 0.1)])
def test_loss_and_gradients_equal_transformers_in_float32(precision: Any, tolerance: float, rope: RopeScaling) -> None:
    hf = hf_llama(CUDA_SHAPE, rope).cuda()
    model = build(
        Parallel(),
        megatron_names(dict(hf.state_dict()), CUDA_SHAPE),
        shape=CUDA_SHAPE,
        rope=rope,
        precision=precision,
        seq_length=512,
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    ids = torch.randint(CUDA_SHAPE.vocab_size, (2, 512), generator=torch.Generator().manual_seed(2)).cuda()
    positions, labels = torch.arange(512, device="cuda").expand(2, -1), ids.roll(-1, 1)
    loss = model(ids, positions, labels=labels).mean()
    loss.backward()
    expected = torch.nn.functional.cross_entropy(hf(ids).logits.transpose(1, 2), labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    gradients = megatron_names({name: parameter.grad for name, parameter in hf.named_parameters()}, CUDA_SHAPE)
    for name, parameter in model.named_parameters():
        wanted, found = gradients[name], parameter.grad[: len(gradients[name])].float()
        error = (found - wanted).norm() / wanted.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.usefixtures("_one_device")
def test_logits_at_rows_equal_transformers_also_far_out() -> None:
    hf = hf_llama(CUDA_SHAPE, LLAMA3).cuda()
    model = build(Parallel(), megatron_names(dict(hf.state_dict()), CUDA_SHAPE), shape=CUDA_SHAPE, rope=LLAMA3, seq_length=512)
    ids = torch.randint(CUDA_SHAPE.vocab_size, (1, 512), generator=torch.Generator().manual_seed(3)).cuda()
    rows = torch.tensor([0, 17, 511], device="cuda")
    for start in (0, 1_000_000):
        positions = torch.arange(start, start + 512, device="cuda")[None]
        with torch.no_grad():
            wanted = hf(ids, position_ids=positions).logits[0, rows]
        found = model.logits_at(ids, positions, rows)
        assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 2e-4
