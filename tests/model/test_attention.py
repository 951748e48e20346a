"""What LongContextAttention refuses, and the contract of a Megatron core attention."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType

from mcore_longctx.errors import ConfigError, LongctxError
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
    expected, lse = MathKernel().forward(*permuted, causal=True, scale=softmax_scale or 0.25)
    assert (out - expected.permute(2, 0, 1, 3).flatten(2)).abs().max() < 1e-5
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    core_attention(softmax_scale=softmax_scale)(*leaves, None).backward(out)
    gradients = MathKernel().backward(expected, *permuted, expected, lse, causal=True, scale=softmax_scale or 0.25)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (leaf.grad - gradient.permute(2, 0, 1, 3)).abs().max() < 1e-5


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


def packed_params(qkv_format: str) -> PackedSeqParams:
    """Documents of 5 and 3 tokens in 12 rows."""
    real, padded = (torch.tensor(sums, dtype=torch.int32) for sums in ([0, 5, 8], [0, 6, 12]))
    return PackedSeqParams(
        qkv_format=qkv_format, cu_seqlens_q=real, cu_seqlens_q_padded=padded, max_seqlen_q=6, cu_seqlens_kv=None, max_seqlen_kv=6
    )


@pytest.mark.parametrize("qkv_format", ["thd", "sbhd"])
def test_a_pack_takes_and_gives_megatrons_shapes_and_its_documents_do_not_meet(qkv_format: str) -> None:
    leaves = [tensor[:, :1].clone() for tensor in qkv()]
    leaves = [tensor.squeeze(1) if qkv_format == "thd" else tensor for tensor in leaves]
    grad_out = torch.randn(12, 1, 8 * 16, generator=torch.Generator().manual_seed(9))
    for tensor in (*leaves, grad_out):
        tensor[5:6], tensor[9:] = math.nan, math.nan
    leaves, core = [tensor.requires_grad_() for tensor in leaves], core_attention()
    out = core(*leaves, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=packed_params(qkv_format))
    assert out.shape == ((12, 8 * 16) if qkv_format == "thd" else (12, 1, 8 * 16))
    out.backward(grad_out.view(out.shape))
    found = [out.detach().view(12, 8, 16), *(leaf.grad.view(12, -1, 16) for leaf in leaves)]
    for rows in (slice(0, 5), slice(6, 9)):
        q, k, v, o = (tensor.detach().view(12, -1, 16)[rows].transpose(0, 1)[None] for tensor in (*leaves, grad_out))
        expected, lse = MathKernel().forward(q, k, v, causal=True, scale=0.25)
        gradients = MathKernel().backward(o, q, k, v, expected, lse, causal=True, scale=0.25)
        for a, b in zip(found, (expected, *gradients), strict=True):
            assert (a[rows].transpose(0, 1) - b[0]).abs().max() < 1e-5
    for tensor in found:
        assert not tensor[5:6].any()
        assert not tensor[9:].any()


@pytest.mark.parametrize("qkv_format", ["thd", "sbhd"])
def test_a_pack_is_recorded_and_replayed(qkv_format: str) -> None:
    core, params = core_attention(), packed_params(qkv_format)
    leaves = [tensor[:, :1].squeeze(1) if qkv_format == "thd" else tensor[:, :1] for tensor in qkv()]
    with core.recording() as kept:
        recorded = core(*leaves, None, packed_seq_params=params)
    plain, again = ([tensor.clone().requires_grad_() for tensor in leaves] for _ in range(2))
    out = core(*plain, None, packed_seq_params=params)
    with core.replaying(*kept):
        replayed = core(*again, None, packed_seq_params=params)
    assert torch.equal(out, recorded)
    assert torch.equal(out, replayed)
    (out * out.detach()).sum().backward()
    (replayed * out.detach()).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(again, plain, strict=True))
    assert core.forward_calls == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_format": "bshd"}, "qkv_format is 'bshd', only 'thd' and 'sbhd' are supported"),
        ({"cu_seqlens_q": None}, "without cu_seqlens_q"),
        ({"local_cp_size": 1}, "they name a context-parallel group of their own; switch hybrid (dynamic) context parallelism off"),
        ({"cu_seqlens_kv": torch.tensor([0, 4, 8])}, "cu_seqlens_kv are not those of the queries; only self-attention is computed"),
        ({"max_seqlen_q": 5}, "max_seqlen_q is 5, the longest document has 6 rows with its padding; max_seqlen counts padded rows,"
         " before the split over ranks"),
        ({"cu_seqlens_q_padded": None}, "context-parallel rank 0 holds 12 rows of a pack that has 8 on each of 1 (8 in all, padding"
         " included); slice tokens, labels and positions with the pack's own rows (PackLayout.source)"),
        ({"cu_seqlens_q": torch.tensor([0, 7, 8])}, "document 0 has 7 tokens in 6 rows"),
    ],
)  # fmt: skip
def test_a_pack_that_means_nothing_is_one_line(changes: dict[str, Any], message: str) -> None:
    params = packed_params("thd")
    for name, value in changes.items():
        setattr(params, name, value)
    with pytest.raises(LongctxError) as caught:
        core_attention()(*(tensor[:, :1] for tensor in qkv()), None, packed_seq_params=params)
    assert str(caught.value) == f"packed_seq_params: {message}"


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
