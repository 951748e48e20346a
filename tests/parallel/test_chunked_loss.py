"""The chunked loss against torch's cross entropy over whole logits in float64, on one rank and on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.parallel.chunked_loss import chunked_linear_cross_entropy
from tests.multiproc import run_processes

HIDDEN, VOCAB, REAL = 24, 96, 85
# largest error over the largest entry, against the same operands in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
# bfloat16 holds 8 bits: a gradient returned in it is off by up to 2^-9 for its last rounding alone
BF16_NORM = 2e-3
UPSTREAM = 0.37


class Problem:
    """Whole tensors in float64 that a dtype holds exactly, and what torch makes of them."""

    def __init__(self, dtype: torch.dtype, rows: int, *, vocab: int = VOCAB, real: int = REAL, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(rows)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.real = real
        self.hidden, self.weight = (scale * normal(rows, HIDDEN)).to(dtype), (0.3 * normal(vocab, HIDDEN)).to(dtype)
        self.labels = torch.randint(real, (rows,), generator=generator)
        self.weights = torch.rand(rows, generator=generator, dtype=torch.float64)
        self.weights[rows // 3 : rows // 2] = 0  # a run that holds whole chunks
        self.weights[::7] = 0
        hidden, weight = (tensor.double().detach().clone().requires_grad_() for tensor in (self.hidden, self.weight))
        self.losses = F.cross_entropy(F.linear(hidden, weight[:real]), self.labels, reduction="none")
        self.total = (self.losses * self.weights).sum()
        (UPSTREAM * self.total).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        self.hidden_grad, self.weight_grad = hidden.grad, weight.grad


def relative(found: Tensor, expected: Tensor) -> float:
    largest = expected.abs().max().item()
    return (found.double() - expected).abs().max().item() / (largest or 1.0)


def rank_of(group: Any) -> tuple[int, int]:
    return (1, 0) if group is None else (group.size(), group.rank())


def errors(problem: Problem, weighted: bool, chunk: int | None, group: Any = None, sp: bool = False) -> dict[str, float]:
    """Relative errors of this rank's part."""
    size, rank = rank_of(group)
    rows = problem.hidden.chunk(size)[rank] if sp else problem.hidden
    hidden, weight = rows.clone().requires_grad_(), problem.weight.chunk(size)[rank].clone().requires_grad_()
    options: dict[str, Any] = {"group": group, "sequence_parallel": sp, "real_vocab_size": problem.real, "chunk": chunk}
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    weights = problem.weights.to(wide)
    if weighted:
        total, losses = chunked_linear_cross_entropy(hidden, weight, problem.labels, loss_weights=weights, **options)
        assert not losses.requires_grad
        expected_losses = problem.losses.detach() * (problem.weights != 0)
    else:
        losses = chunked_linear_cross_entropy(hidden, weight, problem.labels, **options)
        total, expected_losses = (losses * weights).sum(), problem.losses.detach()
    assert total.dtype is losses.dtype is wide
    (UPSTREAM * total).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    own_grad = problem.hidden_grad.chunk(size)[rank] if sp else problem.hidden_grad
    is_zero = (problem.weights.chunk(size)[rank] if sp else problem.weights) == 0
    first = rank * weight.size(0)
    return {
        "loss": relative(total.detach(), problem.total.detach()),
        "losses": relative(losses.detach(), expected_losses),
        "hidden": relative(hidden.grad, own_grad),
        # of the largest entry of the whole matrix: a rank's part may be zero
        "weight": relative(weight.grad, problem.weight_grad[first : first + weight.size(0)])
        if problem.real > first
        else weight.grad.abs().max().item(),
        "gradients of rows without weight": hidden.grad[is_zero].abs().sum().item(),
        "gradients of padding": weight.grad[max(problem.real - first, 0) :].abs().sum().item(),
    }


def worst(found: dict[str, float], tolerance: float) -> dict[str, float]:
    exact = [name for name in found if name.startswith("gradients of")]
    return {name: error for name, error in found.items() if not error <= (0 if name in exact else tolerance)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "chunk"), [(100, 13), (64, 16), (64, None), (30, 1000), (1, 8), (5, 1)])
def test_losses_and_gradients_equal_torch(dtype: torch.dtype, weighted: bool, rows: int, chunk: int | None) -> None:
    found = errors(Problem(dtype, rows), weighted, chunk)
    assert not worst(found, TOLERANCE[dtype]), found


GROUPED = [(96, 16), (96, 7), (96, None), (4, 8), (96, 1), (96, 1000)]


def grouped_errors(vocab: int, real: int) -> dict[str, dict[str, float]]:
    """Run in each rank."""
    wrong, group = {}, dist.group.WORLD
    for dtype, tolerance in TOLERANCE.items():
        for rows, chunk in GROUPED:
            problem = Problem(dtype, rows, vocab=vocab, real=real)
            for sp in (False, True):
                for weighted in (False, True):
                    found = worst(errors(problem, weighted, chunk, group, sp), tolerance)
                    if found:
                        wrong[f"{dtype}, {rows} rows by {chunk}, sp {sp}, weighted {weighted}"] = found
    return wrong


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("size", "vocab", "real"),
    [(2, 96, 85), (2, 128, 60), (4, 128, 65)],
    ids=["padded", "a rank of padding", "two ranks of padding"],
)
def test_a_vocabulary_over_several_ranks_equals_torch(size: int, vocab: int, real: int) -> None:
    for rank, wrong in enumerate(run_processes(grouped_errors, size, vocab, real)):
        assert not wrong, f"rank {rank}: {wrong}"
