"""The tiled feed-forward against plain torch in float64, on one rank and on several."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_longctx.errors import LayoutError
from mcore_longctx.parallel.tiled_mlp import tiled_swiglu
from tests.multiproc import run_processes

HIDDEN, INNER = 24, 40
# largest error over the largest entry, against the same operands in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class Problem:
    """Whole tensors that a dtype holds exactly, and what torch makes of them in float64."""

    def __init__(self, dtype: torch.dtype, rows: int, batch: int = 2) -> None:
        generator = torch.Generator().manual_seed(rows)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.x, self.upstream = normal(rows, batch, HIDDEN), normal(rows, batch, HIDDEN)
        self.gate_up, self.down = normal(2 * INNER, HIDDEN, std=0.3), normal(HIDDEN, INNER, std=0.3)
        leaves = [tensor.double().detach().clone().requires_grad_() for tensor in (self.x, self.gate_up, self.down)]
        self.out = swiglu(*leaves)
        self.out.backward(self.upstream.double())
        self.x_grad, self.gate_up_grad, self.down_grad = (leaf.grad for leaf in leaves)

    def to(self, device: str) -> Problem:
        """Everything on another device."""
        for name, value in vars(self).items():
            setattr(self, name, value.detach().to(device))
        return self


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def own_columns(gate_up: Tensor, rank: int, size: int) -> Tensor:
    """This rank's part of gate above its part of up."""
    return torch.cat([half.chunk(size)[rank] for half in gate_up.chunk(2)])


def errors(problem: Problem, tile: int | None, group: Any = None, sp: bool = False, skip: bool = False) -> dict[str, float]:
    """Relative errors of this rank's part."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())

    def own_rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(size)[rank] if sp else tensor

    x = own_rows(problem.x).clone().requires_grad_()
    gate_up = own_columns(problem.gate_up, rank, size).clone().requires_grad_()
    down = problem.down.chunk(size, dim=1)[rank].clone().requires_grad_()
    out = tiled_swiglu(x, gate_up, down, group=group, sequence_parallel=sp, tile=tile, skip_forward=skip)
    assert out.shape == x.shape
    assert out.dtype is x.dtype
    out.backward(own_rows(problem.upstream))
    found = {
        "x": relative(x.grad, own_rows(problem.x_grad)),
        "gate and up": relative(gate_up.grad, own_columns(problem.gate_up_grad, rank, size)),
        "down": relative(down.grad, problem.down_grad.chunk(size, dim=1)[rank]),
    }
    if skip:
        assert out.untyped_storage().nbytes() == out.element_size()
    else:
        found["out"] = relative(out.detach(), own_rows(problem.out.detach()))
    return found


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "tile"), [(30, None), (30, 7), (30, 60), (30, 1000), (30, 1), (1, 5)])
def test_result_and_gradients_equal_torch(dtype: torch.dtype, rows: int, tile: int | None, skip: bool) -> None:
    found = errors(Problem(dtype, rows), tile, skip=skip)
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_a_gpu_equals_torch_on_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    problem = Problem(dtype, 300).to("cuda")
    for tile in (None, 64, 37):
        for skip in (False, True):
            found = errors(problem, tile, skip=skip)
            assert max(found.values()) < tolerance, found


def errors_of_ranks() -> dict[str, float]:
    """Run in each rank: errors in units of the tolerance."""
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        problem = Problem(dtype, 32)
        for sp in (False, True):
            for tile in (None, 8, 7, 1000):
                for skip in (False, True):
                    for what, error in errors(problem, tile, dist.group.WORLD, sp, skip).items():
                        found[f"{dtype}, sp {sp}, tile {tile}, skip {skip}: {what}"] = error / tolerance
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize("size", [2, 4])
def test_columns_over_several_ranks_equal_torch(size: int) -> None:
    for rank, found in enumerate(run_processes(errors_of_ranks, size)):
        wrong = {what: error for what, error in found.items() if not error < 1}
        assert found
        assert not wrong, f"rank {rank}: {wrong}"


def test_gradients_pass_gradcheck() -> None:
    problem = Problem(torch.float64, 3, batch=1)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (problem.x, problem.gate_up, problem.down))
    assert torch.autograd.gradcheck(lambda *tensors: tiled_swiglu(*tensors, tile=2), leaves)


def test_gradients_with_a_bias_pass_gradcheck_and_its_shape_is_checked() -> None:
    problem, bias = Problem(torch.float64, 3, batch=1), torch.randn(2 * INNER, dtype=torch.float64)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (problem.x, problem.gate_up, problem.down, bias))
    assert torch.autograd.gradcheck(lambda *tensors: tiled_swiglu(*tensors, tile=2), leaves)
    x, gate_up, down, bias = leaves
    gate, up = F.linear(x, gate_up, bias).chunk(2, dim=-1)
    assert relative(tiled_swiglu(x, gate_up, down, bias, tile=2), F.linear(F.silu(gate) * up, down)) < 1e-12
    with pytest.raises(LayoutError, match=r"^the bias of gate and up is \[40\], expected \[80\]$"):
        tiled_swiglu(x, gate_up, down, bias[:INNER])


def test_bf16_is_rounded_as_autograd_rounds() -> None:
    problem = Problem(torch.bfloat16, 200)
    leaves = [tensor.clone().requires_grad_() for tensor in (problem.x, problem.gate_up, problem.down)]
    swiglu(*leaves).backward(problem.upstream)
    stock = [
        relative(leaf.grad, expected)
        for leaf, expected in zip(leaves, (problem.x_grad, problem.gate_up_grad, problem.down_grad), strict=True)
    ]
    for tile in (None, 32):
        found = errors(problem, tile)
        assert found["x"] < 1.1 * stock[0]
        assert found["gate and up"] < 1.1 * stock[1]
        assert found["down"] < 1.1 * stock[2]
        assert found["out"] < 5e-3


def test_weight_gradients_of_many_tiles_in_bf16_are_summed_in_float32() -> None:
    problem = Problem(torch.bfloat16, 1024)

    def distance(tile: int | None) -> float:
        weights: list[Any] = [tensor.clone().requires_grad_() for tensor in (problem.gate_up, problem.down)]
        for weight in weights:
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
        tiled_swiglu(problem.x, *weights, tile=tile).backward(problem.upstream)
        return max(relative(w.main_grad, g) for w, g in zip(weights, (problem.gate_up_grad, problem.down_grad), strict=True))

    assert distance(32) < 1.02 * distance(None)
    assert distance(32) < 5e-3


class Gemms(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            self.shapes[tuple(result.shape)] += 1
        return result


@pytest.mark.parametrize("tile", [None, 10])
def test_a_recomputed_layer_makes_gate_and_up_twice_and_down_once(tile: int | None) -> None:
    problem = Problem(torch.float32, 30, batch=1)
    leaves = [tensor.clone().requires_grad_() for tensor in (problem.x, problem.gate_up, problem.down)]
    tiles = 1 if tile is None else 3
    rows = 30 // tiles
    with torch.no_grad(), Gemms() as first_run:
        tiled_swiglu(*leaves, tile=tile)
    assert first_run.shapes == {(rows, 2 * INNER): tiles, (rows, HIDDEN): tiles}
    with Gemms() as second_run:
        out = tiled_swiglu(*leaves, tile=tile, skip_forward=True)
    assert not second_run.shapes
    with Gemms() as backward:
        out.backward(problem.upstream)
    assert backward.shapes == {
        (rows, 2 * INNER): tiles,  # gate and up again
        (rows, INNER): tiles,  # gradient of their product
        (HIDDEN, INNER): tiles,
        (rows, HIDDEN): tiles,  # gradient of x: with one of the product of down it would be two
        (2 * INNER, HIDDEN): tiles,
    }


def extra_bytes(rows: int, dtype: torch.dtype = torch.float32, tile: int = 256, group: Any = None, sp: bool = False) -> int:
    """Most bytes of forward and backward beyond x, weights, upstream gradient, out and the gradient of x."""
    size = 1 if group is None else group.size()
    x, upstream = (torch.randn(rows // size if sp else rows, 1, 32).to(dtype) for _ in range(2))
    gate_up, down = torch.randn(2 * 112 // size, 32).to(dtype), torch.randn(32, 112 // size).to(dtype)
    states = [tensor.requires_grad_() for tensor in (x, gate_up, down)]
    with LiveBytes((*states, upstream)) as live:
        out = tiled_swiglu(x, gate_up, down, tile=tile, group=group, sequence_parallel=sp)
        out.backward(upstream)
    return live.peak_above_start - 2 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_does_not_grow_with_tokens(dtype: torch.dtype) -> None:
    assert extra_bytes(2048, dtype) == extra_bytes(16384, dtype) < 8 * 256 * 112 * 4


def extra_bytes_of_ranks() -> list[int]:
    return [extra_bytes(rows, tile=64, group=dist.group.WORLD, sp=sp) for sp in (False, True) for rows in (2048, 16384)]


@pytest.mark.multiproc
def test_extra_memory_of_several_ranks_does_not_grow_with_tokens() -> None:
    a_number_a_token = (16384 - 2048) * 4
    for whole, whole_large, split, split_large in run_processes(extra_bytes_of_ranks, 2):
        # gloo's threads let go of a tile (8 KiB) when they come to it
        assert whole_large - whole < 0.7 * a_number_a_token
        assert split_large - split < 0.7 * a_number_a_token


def test_only_x_is_kept_for_backward_and_nothing_under_no_grad() -> None:
    problem = Problem(torch.float32, 30)
    states = [tensor.clone().requires_grad_() for tensor in (problem.x, problem.gate_up, problem.down)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        out = tiled_swiglu(*states, tile=7)
    assert kept == [tensor.data_ptr() for tensor in states]
    out.backward(problem.upstream)
    with torch.no_grad(), LiveBytes(states) as live:
        out = tiled_swiglu(*states, tile=7)
        assert live.now - live.at_start == out.nbytes
    assert out.grad_fn is None


def test_frozen_weights_and_inputs_cost_nothing() -> None:
    problem = Problem(torch.float32, 30)
    x = problem.x.clone().requires_grad_()
    with Gemms() as gemms:
        tiled_swiglu(x, problem.gate_up, problem.down).backward(problem.upstream)
    assert gemms.shapes.total() == 2 + 3
    assert relative(x.grad, problem.x_grad) < 1e-6  # type: ignore[arg-type]
    down = problem.down.clone().requires_grad_()
    with Gemms() as gemms:
        tiled_swiglu(problem.x, problem.gate_up, down).backward(problem.upstream)
    assert relative(down.grad, problem.down_grad) < 1e-6  # type: ignore[arg-type]
    assert gemms.shapes[(HIDDEN, INNER)] == 1
    assert gemms.shapes[(2 * INNER, HIDDEN)] == 0


def test_strided_tensors_are_read_as_they_are() -> None:
    problem = Problem(torch.float64, 30)
    x = problem.x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    upstream = problem.upstream.transpose(0, 1).contiguous().transpose(0, 1)
    out = tiled_swiglu(x, problem.gate_up, problem.down, tile=7)
    out.backward(upstream)
    assert not x.is_contiguous()
    assert relative(out.detach(), problem.out) < 1e-12
    assert relative(x.grad, problem.x_grad) < 1e-12  # type: ignore[arg-type]
    summed = tiled_swiglu(x, problem.gate_up, problem.down, tile=7).sum()
    summed.backward()  # an expanded gradient


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 0}, "tile is 0, expected at least one token"),
        (
            {"gate_up_weight": torch.zeros(40, 24)},
            "x is [30, 2, 24], gate and up are [40, 24], down is [24, 40]; expected [..., h], [2 f, h] and [h, f]",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(change: dict[str, Any], message: str) -> None:
    problem = Problem(torch.float32, 30)
    arguments: dict[str, Any] = {"x": problem.x, "gate_up_weight": problem.gate_up, "down_weight": problem.down} | change
    with pytest.raises(LayoutError) as caught:
        tiled_swiglu(**arguments)
    assert str(caught.value) == message
