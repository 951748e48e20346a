"""What LongContextAttention refuses, and the contract of a Megatron core attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend, AttnMaskType

from mcore_longctx.errors import ConfigError
from mcore_longctx.kernels.attention import MathKernel
from mcore_longctx.model import LongContextAttention


class OneRank:
    """A context-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def core_attention(cp_comm_type: str | None = None, softmax_scale: float | None = None, **changed: Any) -> LongContextAttention:
    settings = {
        "attention_dropout": 0.0,
        "kv_channels": 16,
        "window_size": None,
        "softmax_type": "vanilla",
        "params_dtype": torch.float32,
    } | changed
    return LongContextAttention(
        config=SimpleNamespace(**settings),
        layer_number=3,
        attn_mask_type=settings.get("mask", AttnMaskType.causal),
        attention_type=settings.get("kind", "self"),
        cp_comm_type=cp_comm_type,
        softmax_scale=softmax_scale,
        pg_collection=SimpleNamespace(cp=OneRank()),
    )


def qkv() -> list[torch.Tensor]:
    return [torch.randn(12, 2, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (8, 4, 4)]


@pytest.mark.parametrize("softmax_scale", [None, 0.4])
def test_it_takes_and_gives_megatrons_shapes(softmax_scale: float | None) -> None:
    query, key, value = qkv()
    out = core_attention(softmax_scale=softmax_scale)(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    assert out.shape == (12, 2, 8 * 16)
    permuted = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    expected, _ = MathKernel().forward(*permuted, causal=True, scale=softmax_scale or 0.25)
    assert (out - expected.permute(2, 0, 1, 3).flatten(2)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cp_comm_type": "ring"}, "cp_comm_type is 'ring'; use one of p2p, all_gather, a2a, a2a+p2p"),
        ({"attention_backend": AttnBackend.unfused}, "attention_backend is 'unfused'; use auto, flash or fused"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, only 0.0 is supported"),
        ({"window_size": (128, 0)}, "window_size is (128, 0), only None is supported"),
        ({"softmax_type": "learnable"}, "softmax_type is 'learnable', only 'vanilla' is supported"),
        ({"kind": "cross"}, "cross attention with a causal mask; only causal self-attention is computed"),
        ({"mask": AttnMaskType.padding}, "self attention with a padding mask; only causal self-attention is computed"),
    ],
)
def test_what_it_does_not_compute_is_refused_when_the_model_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        core_attention(**settings)
    assert str(caught.value) == f"attention of layer 3: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 12, 12, dtype=torch.bool)}, "an attention mask is given"),
        ({"attention_bias": torch.zeros(1)}, "an attention bias is given"),
        ({"attn_mask_type": AttnMaskType.no_mask}, "a no_mask mask is asked for, only causal is computed"),
    ],
)
def test_what_it_does_not_compute_is_refused_in_the_forward(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="attention of layer 3: ") as caught:
        core_attention()(*qkv(), **({"attention_mask": None} | arguments))
    assert message in str(caught.value)


def test_a_recorded_attention_is_replayed_without_being_computed_and_with_the_same_gradients() -> None:
    core, grad_out = core_attention(), torch.randn(12, 2, 8 * 16)
    plain = [tensor.requires_grad_() for tensor in qkv()]
    out = core(*plain, None)
    out.backward(grad_out)
    with core.recording() as kept:
        recorded = core(*(tensor.detach().requires_grad_() for tensor in plain), None)
    assert not recorded.requires_grad
    assert core.forward_calls == 2
    kept_out, lse = kept
    assert kept_out.data_ptr() == recorded.data_ptr()
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 12 * 2 * 8 * (16 * 4 + 4)
    again = [tensor.detach().requires_grad_() for tensor in plain]
    with core.replaying(kept_out, lse):
        replayed = core(*again, None)
    replayed.backward(grad_out)
    assert core.forward_calls == 2
    assert torch.equal(replayed, out)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(again, plain, strict=True))
