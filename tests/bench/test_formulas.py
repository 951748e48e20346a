"""The formulas against the figures that are published with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from formulas import KernelRate, attended_seconds, kept_bytes, step_flops
from models import LLAMA_8B

LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)


@pytest.mark.parametrize(
    ("policy", "small", "large"), [("full", 8192, 16384), ("attention_kept", 16512, 33024), ("none", 139392, 274688)]
)
def test_bytes_kept_of_a_token_and_layer(policy: str, small: int, large: int) -> None:
    assert (kept_bytes(LLAMA_8B, policy, 2), kept_bytes(LLAMA_70B, policy, 2)) == (small, large)


@pytest.mark.parametrize(
    ("tokens", "total", "share"),
    [(2**17, 1.94e16, 0.696), (2**19, 2.40e17, 0.902), (2**20, 9.12e17, 0.948), (2**22, 1.40e19, 0.987)],
)
def test_flops_of_a_step(tokens: int, total: float, share: float) -> None:
    flops = step_flops(LLAMA_8B, tokens)
    assert flops.total == pytest.approx(total, rel=0.005)
    assert flops.attention / flops.total == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize(
    ("forward", "backward", "policy", "mfu"),
    [(366, 330, "full", 0.24), (568, 485, "attention_kept", 0.44), (680, 585, "attention_kept", 0.53), (680, 585, "full", 0.42)],
)
def test_the_limit_at_1m_is_the_published_one(forward: float, backward: float, policy: str, mfu: float) -> None:
    rate = KernelRate(forward * 1e12, backward * 1e12)
    seconds = attended_seconds(LLAMA_8B, 2**20, policy, rate, 0.6 * 989e12, head=True)
    assert step_flops(LLAMA_8B, 2**20).total / seconds / 989e12 == pytest.approx(mfu, abs=0.006)


def test_a_kernel_rate_over_both_directions() -> None:
    assert KernelRate(100.0, 100.0).both == pytest.approx(100)
    assert KernelRate(350.0, 125.0).both == pytest.approx(3.5 / (1 / 350 + 2.5 / 125))
