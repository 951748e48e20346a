"""On one CUDA device, over NCCL: recompute policies, offload, loss and MLP in tiles, sizes at 2^31. `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.model.norm import RMSNorm
from mcore_longctx.model.offload import ActivationOffload, CudaCopier
from mcore_longctx.parallel.chunked_loss import chunked_linear_cross_entropy
from mcore_longctx.parallel.tiled_mlp import tiled_swiglu
from mcore_longctx.recipe.schema import Activations, Parallel, TokenCount
from tests.gpu.test_model_gpu import CUDA_SHAPE, LLAMA3
from tests.model.llama import build, hf_llama, megatron_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("_one_device"),
]
TOKENS = 1024


@pytest.fixture(scope="module")
def _one_device() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    init_process_groups(Parallel(), seed=0)
    assert torch.distributed.get_backend() == "nccl"
    yield
    destroy_process_groups()


def activations(recompute: str, offload: float = 0.0) -> Activations:
    return Activations(
        recompute=recompute,  # type: ignore[arg-type]
        offload_fraction=offload,
        mlp_tile=TokenCount(256),
        loss_chunk=TokenCount(128),
    )


def step(policy: Activations, precision: str, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], int, int]:
    """Loss, gradients, attention forwards of a layer, and bytes that were allocated between forward and backward."""
    model = build(
        Parallel(), weights, new_groups=False, shape=CUDA_SHAPE, rope=LLAMA3, precision=precision, seq_length=TOKENS, activations=policy
    )  # fmt: skip
    ids = torch.randint(CUDA_SHAPE.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(2)).cuda()
    positions, labels = torch.arange(TOKENS, device="cuda")[None], ids.roll(-1, 1)
    before = torch.cuda.memory_allocated()
    loss = model(ids, positions, labels=labels, loss_weights=torch.full(labels.shape, 1 / TOKENS, device="cuda"))
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    forwards = {layer.self_attention.core_attention.forward_calls for layer in model.decoder.layers}
    assert len(forwards) == 1
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, forwards.pop(), kept


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_recompute_policies_and_offload_give_the_gradients_of_none(precision: str, tolerance: float) -> None:
    """Attention's backward sums with atomics: equal to rounding, not to the bit."""
    weights = megatron_names(dict(hf_llama(CUDA_SHAPE, LLAMA3).state_dict()), CUDA_SHAPE)
    loss, gradients, forwards, kept_none = step(activations("none"), precision, weights)
    assert forwards == 1
    kept = {}
    for name, policy, calls in (
        ("full", activations("full"), 2),
        ("attention_kept", activations("attention_kept"), 1),
        ("full, offload", activations("full", 1.0), 2),
        ("attention_kept, offload", activations("attention_kept", 1.0), 1),
    ):
        other_loss, other, forwards, kept[name] = step(policy, precision, weights)
        assert forwards == calls, name
        assert other_loss == pytest.approx(loss.item(), rel=tolerance), name
        for parameter, wanted in gradients.items():
            error = (other[parameter].float() - wanted.float()).norm() / wanted.float().norm()
            assert error < tolerance, f"{name}, {parameter}: {error:.1e}"
    assert kept["full"] < kept["attention_kept"] < kept_none


def test_offloaded_tensors_come_back_bit_for_bit_and_leave_the_device() -> None:
    layers, size = 8, (64, 2**16)
    offload = ActivationOffload(1.0, layers)
    kept: list[Any] = []
    before = torch.cuda.memory_allocated()
    expected = [torch.randn(size, generator=torch.Generator().manual_seed(layer)) for layer in range(layers)]
    for layer in range(layers):
        tensors = [expected[layer].cuda(), expected[layer][:, :16].t().cuda()]
        kept.append(offload.put(layer + 1, tensors))
        del tensors
    torch.cuda.synchronize()
    one = 64 * 2**16 * 4
    assert torch.cuda.memory_allocated() - before < 4 * one  # two layers may still be on their way out
    for layer in reversed(range(layers)):
        back, part = offload.get(kept[layer])
        assert torch.equal(back.cpu(), expected[layer])
        assert torch.equal(part.cpu(), expected[layer][:, :16].t())
        del back, part
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_copy_to_the_host_does_not_wait_for_the_computation_behind_it() -> None:
    """Host memory is page-locked: a copy of 1 GiB is started in far less time than it takes."""
    copier = CudaCopier(torch.device("cuda", 0))
    tensor = torch.ones(2**28, device="cuda")
    buffer = copier.allocate_host(tensor)
    copier.wait(copier.to_host([tensor], [buffer]))
    torch.cuda.synchronize()
    began, started = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    event = copier.to_host([tensor], [buffer])
    started.record()  # on the computation's stream, which does not wait
    started.synchronize()
    assert not event.query()
    torch.cuda.synchronize()
    assert buffer[-1] == 1
    assert began.elapsed_time(started) < 5


@pytest.mark.parametrize("more_rows", [-1, 0, 1])
def test_norm_mlp_and_loss_over_two_to_the_31_elements(more_rows: int) -> None:
    """4,096 columns and 2^19 rows, one less and one more: the last rows against float64, gradients as well."""
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free device memory")
    rows, hidden, inner, words = 2**19 + more_rows, 4096, 512, 8192  # the logits would be 2^32 elements
    generator = torch.Generator("cuda").manual_seed(3)

    def random(*size: int, scale: float) -> Tensor:
        made = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        return made.mul_(scale).requires_grad_()

    x = random(rows, hidden, scale=1.0)
    gate_up, down = random(2 * inner, hidden, scale=hidden**-0.5), random(hidden, inner, scale=inner**-0.5)
    head = random(words, hidden, scale=hidden**-0.5)
    labels = torch.randint(words, (rows,), generator=generator, device="cuda")
    last = slice(rows - 128, rows)
    weights = torch.zeros(rows, device="cuda")
    weights[last] = 1.0  # so that the reference needs these rows only
    norm = RMSNorm(type("Config", (), {"params_dtype": torch.bfloat16, "sequence_parallel": False})(), hidden).cuda()
    mlp = tiled_swiglu(norm(x).unsqueeze(1), gate_up, down, tile=16_384).squeeze(1)
    loss, losses = chunked_linear_cross_entropy(mlp, head, labels, loss_weights=weights)
    loss.backward()

    leaves = [x[last].detach().double(), *(w.detach().double() for w in (norm.weight, gate_up, down, head))]
    for leaf in leaves:
        leaf.requires_grad_()
    wide, scale, w1, w2, w3 = leaves
    normed = F.rms_norm(wide, (hidden,), scale, norm.eps)
    gate, up = (normed @ w1.t()).chunk(2, dim=-1)
    expected = F.cross_entropy((F.silu(gate) * up) @ w2.t() @ w3.t(), labels[last], reduction="none")
    expected.sum().backward()
    assert (losses[last].double() - expected).abs().max() < 0.05
    assert x.grad is not None
    assert not x.grad[:1024].any()
    for found, leaf in zip((x.grad[last], norm.weight.grad, gate_up.grad, down.grad, head.grad), leaves, strict=True):
        assert found is not None
        assert leaf.grad is not None
        assert (found.double() - leaf.grad).norm() < 0.05 * leaf.grad.norm()


def test_the_norm_over_two_to_the_32_elements() -> None:
    """Where torch's kernels of 2025 began again at the first row: the last rows against float64, both ways."""
    rows, hidden = 2**20 + 1, 4096
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    norm = RMSNorm(type("Config", (), {"params_dtype": torch.bfloat16, "sequence_parallel": False})(), hidden).cuda()
    x = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 1, rows - 2, rows - 1], device="cuda")
    values, of_out = (torch.randn(4, hidden, device="cuda", dtype=torch.bfloat16) for _ in "xg")
    x[ends] = values
    x.requires_grad_()
    out = norm(x)
    grad_out = torch.zeros_like(x)
    grad_out[ends] = of_out
    out.backward(grad_out)
    wide = values.double().requires_grad_()
    expected = F.rms_norm(wide, (hidden,), norm.weight.detach().double(), norm.eps)
    expected.backward(of_out.double())
    assert x.grad is not None
    assert wide.grad is not None
    assert (out[ends].double() - expected).norm() < 0.01 * expected.norm()
    assert (x.grad[ends].double() - wide.grad).norm() < 0.01 * wide.grad.norm()
