"""Ring and all-gather attention on real gloo groups against one float64 math kernel over the whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mcore_longctx.errors import LayoutError
from mcore_longctx.kernels.attention import MathKernel
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.parallel.exchange import attention, make_exchange
from tests.multiproc import run_processes

EXCHANGES = ("p2p", "all_gather")
# largest absolute error at unit-variance inputs; bf16: gradients are rounded once per step
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.15}
SCALE = 0.3


def exchange_errors(seq_length: int) -> dict[str, float]:
    """Run in each rank: largest error of out, dq, dk, dv of this rank's rows, for both exchanges, dtypes and head counts."""
    group, errors = dist.group.WORLD, {}
    assert group is not None
    rows = torch.from_numpy(zigzag_positions(seq_length, group.size(), group.rank()))
    for dtype, tolerance in TOLERANCE.items():
        for heads, groups in ((8, 8), (8, 4), (8, 1)):
            generator = torch.Generator().manual_seed(groups)
            query, key, value, grad_out = (
                torch.randn(2, count, seq_length, 16, generator=generator, dtype=torch.float64).to(dtype)
                for count in (heads, groups, groups, heads)
            )
            wide = [tensor.double() for tensor in (grad_out, query, key, value)]
            out, lse = MathKernel().forward(*wide[1:], causal=True, scale=SCALE)
            expected = (out, *MathKernel().backward(*wide, out, lse, causal=True, scale=SCALE))
            for name in EXCHANGES:
                leaves = [tensor[:, :, rows].clone().requires_grad_() for tensor in (query, key, value)]
                local = attention(*leaves, make_exchange(name, group), None, SCALE)
                local.backward(grad_out[:, :, rows])
                found = (local.detach(), *(leaf.grad for leaf in leaves))
                for what, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
                    assert a.dtype is dtype
                    errors[f"{name} {dtype} {heads}/{groups} {what}"] = (
                        (a.double() - b[:, :, rows]).abs().max() / tolerance
                    ).item()
    return errors


@pytest.mark.multiproc
@pytest.mark.parametrize(("cp_size", "seq_length"), [(2, 48), (4, 64), (2, 4)])
def test_out_and_gradients_equal_one_kernel_over_the_whole_sequence(cp_size: int, seq_length: int) -> None:
    for rank, errors in enumerate(run_processes(exchange_errors, cp_size, seq_length)):
        assert errors
        wrong = {what: error for what, error in errors.items() if not error < 1}
        assert not wrong, f"rank {rank}, error in units of the tolerance: {wrong}"


def odd_rows_are_refused() -> list[str]:
    tensor = torch.zeros(1, 1, 3, 4)
    messages = []
    for name in EXCHANGES:
        try:
            attention(tensor, tensor, tensor, make_exchange(name, dist.group.WORLD), None, 1.0)
        except LayoutError as error:
            messages.append(str(error))
    return messages


@pytest.mark.multiproc
def test_a_rank_with_an_odd_number_of_tokens_is_refused() -> None:
    for messages in run_processes(odd_rows_are_refused, 2):
        assert messages == ["this context-parallel rank holds 3 tokens, which is not two equal chunks"] * 2


def subgroup_neighbours() -> float:
    """Ranks 1 and 3 of four as a ring: group ranks are not global ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    tensor = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(dist.get_rank() % 2), dtype=torch.float64)
    rows = torch.from_numpy(zigzag_positions(16, 2, group.rank()))
    local = tensor[:, :, rows]
    out, _ = MathKernel().forward(tensor, tensor, tensor, causal=True, scale=SCALE)
    return (attention(local, local, local, make_exchange("p2p", group), None, SCALE) - out[:, :, rows]).abs().max().item()


@pytest.mark.multiproc
def test_the_ring_runs_in_a_group_that_is_not_the_whole_world() -> None:
    assert max(run_processes(subgroup_neighbours, 4)) < 1e-12
