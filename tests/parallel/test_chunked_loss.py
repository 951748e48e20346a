"""The chunked loss against torch's cross entropy over whole logits in float64, on one rank and on several."""

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
from torch.utils._pytree import tree_leaves

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.parallel.chunked_loss import chunked_linear_cross_entropy, default_chunk
from tests.multiproc import run_processes

HIDDEN, VOCAB, REAL = 24, 96, 85
# largest error over the largest entry, against the same operands in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BF16_LAST_ROUNDING = 2**-8  # half a unit in the last place of the largest entry
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

    def to(self, device: str) -> Problem:
        """Everything on another device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.detach().to(device))
        return self


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


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_a_gpu_equals_torch_on_the_cpu(dtype: torch.dtype, tolerance: float, weighted: bool) -> None:
    problem = Problem(dtype, 300, vocab=1024, real=1000).to("cuda")
    for chunk in (64, 37, None):
        found = errors(problem, weighted, chunk)
        assert not worst(found, tolerance), found
        if dtype is torch.bfloat16:
            assert found["losses"] < 1e-5, "logits must not be rounded to bfloat16"


GROUPED = [(48, 16), (48, 7), (48, None), (4, 8), (8, 1)]


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


def without_any_weight(group: Any = None, sp: bool = False) -> None:
    """No token counts: the sum and every gradient are exactly 0, and ranks do not wait for each other."""
    size, rank = rank_of(group)
    problem = Problem(torch.float32, 40)
    hidden = (problem.hidden.chunk(size)[rank] if sp else problem.hidden).clone().requires_grad_()
    weight = problem.weight.chunk(size)[rank].clone().requires_grad_()
    total, losses = chunked_linear_cross_entropy(
        hidden, weight, problem.labels, group=group, sequence_parallel=sp, chunk=8, loss_weights=torch.zeros(40)
    )
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert total == 0
    assert not any(tensor.any() for tensor in (losses, hidden.grad, weight.grad))


def without_any_weight_on_ranks() -> None:
    for sp in (False, True):
        without_any_weight(dist.group.WORLD, sp)


@pytest.mark.multiproc
def test_a_batch_without_any_weight_gives_zeros() -> None:
    without_any_weight()
    run_processes(without_any_weight_on_ranks, 2)


def test_bf16_is_as_near_to_float64_as_its_rounding_allows() -> None:
    problem = Problem(torch.bfloat16, 600)
    for weighted in (False, True):
        found = errors(problem, weighted, 50)
        assert found["loss"] < 1e-5
        assert found["losses"] < 1e-5, "logits must not be rounded to bfloat16"
        # the last rounding of an entry near the largest: 2^-8 of it at worst
        assert max(found["hidden"], found["weight"]) < BF16_LAST_ROUNDING + 2e-3


def test_weight_gradient_of_64_chunks_in_bf16_is_as_good_as_one_gemm_summed_in_float32() -> None:
    problem = Problem(torch.bfloat16, 64 * 32)

    def distance(chunk: int) -> float:
        weight = problem.weight.clone().requires_grad_()
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False  # type: ignore[attr-defined]
        total, _ = chunked_linear_cross_entropy(
            problem.hidden, weight, problem.labels, real_vocab_size=REAL, loss_weights=problem.weights.float(), chunk=chunk
        )
        (UPSTREAM * total).backward()
        return relative(weight.main_grad, problem.weight_grad)  # type: ignore[attr-defined]

    assert distance(32) < 1.02 * distance(64 * 32)
    assert distance(32) < 2e-3

    summed_in_bf16 = torch.zeros_like(problem.weight)  # what the test would see if sums were kept in bfloat16
    for piece in torch.arange(64 * 32).split(32):
        summed_in_bf16 += torch.ones(32, VOCAB, dtype=torch.bfloat16).t() @ problem.hidden[piece]
    expected = torch.ones(64 * 32, VOCAB, dtype=torch.float64).t() @ problem.hidden.double()
    assert relative(summed_in_bf16, expected) > 2e-3


def test_gradients_pass_gradcheck() -> None:
    problem = Problem(torch.float64, 7, vocab=12, real=11)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_linear_cross_entropy(h, w, problem.labels, real_vocab_size=11, chunk=3), (hidden, weight)
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_logits_of_tens_of_thousands_stay_finite(weighted: bool) -> None:
    problem = Problem(torch.float32, 60, scale=1e4)
    assert problem.losses.max() > 3e4
    found = errors(problem, weighted, 16)
    assert not worst(found, 1e-5), found


@pytest.mark.parametrize("weighted", [False, True])
def test_a_label_that_is_no_token_is_fine_where_its_weight_is_zero(weighted: bool) -> None:
    problem = Problem(torch.float64, 40)
    without = torch.where(problem.weights == 0)[0]
    problem.labels[without[::3]], problem.labels[without[1::3]], problem.labels[without[2::3]] = -100, REAL, 2**40
    found = errors(problem, weighted, 7)
    del found["losses"]  # these have no meaning there
    assert not worst(found, 1e-12), found


class Gemms(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counted.total()


def gemms(weighted: bool, *, hidden_grad: bool = True, weight_grad: bool = True, no_grad: bool = False) -> tuple[int, int]:
    """Matrix products in forward and backward; 100 rows in chunks of 10, of which rows 30 to 49 have no weight."""
    problem = Problem(torch.float32, 100)
    hidden, weight = problem.hidden.requires_grad_(hidden_grad), problem.weight.requires_grad_(weight_grad)
    loss_weights = torch.ones(100)
    loss_weights[30:50] = 0
    with torch.set_grad_enabled(not no_grad), Gemms() as forward:
        result = chunked_linear_cross_entropy(
            hidden, weight, problem.labels, chunk=10, loss_weights=loss_weights if weighted else None
        )
    if no_grad:
        return forward.total, 0
    with Gemms() as backward:
        (result[0] if weighted else result.sum()).backward()  # type: ignore[union-attr]
    return forward.total, backward.total


def test_number_of_matrix_products() -> None:
    assert gemms(weighted=True) == (3 * 8, 0), "three for each of the eight chunks that have weight"
    assert gemms(weighted=False) == (10, 3 * 10)
    assert gemms(weighted=True, hidden_grad=False) == gemms(weighted=True, weight_grad=False) == (2 * 8, 0)
    assert gemms(weighted=False, weight_grad=False) == (10, 2 * 10)
    assert gemms(weighted=True, no_grad=True) == (8, 0)


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_is_kept_under_no_grad(weighted: bool) -> None:
    problem = Problem(torch.float32, 100)
    weight = problem.weight.requires_grad_()
    loss_weights = torch.ones(100) if weighted else None
    states = [tensor for tensor in (problem.hidden, weight, problem.labels, loss_weights) if tensor is not None]
    with torch.no_grad(), LiveBytes(states) as live:
        result = chunked_linear_cross_entropy(problem.hidden, weight, problem.labels, chunk=10, loss_weights=loss_weights)
        assert live.now - live.at_start == 400 + 4 * weighted
    assert all(tensor.grad_fn is None for tensor in (result if isinstance(result, tuple) else [result]))


def extra_bytes(
    rows: int, weighted: bool, dtype: torch.dtype = torch.float32, chunk: int = 256, group: Any = None, sp: bool = False
) -> int:
    """Most bytes of forward and backward beyond inputs, losses, lse and the gradient of hidden."""
    size, _ = rank_of(group)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows // size if sp else rows, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(512 // size, 32, generator=generator).to(dtype).requires_grad_()
    labels, weights, upstream = torch.randint(512, (rows,), generator=generator), torch.rand(rows), torch.rand(rows)
    options: dict[str, Any] = {"group": group, "sequence_parallel": sp, "chunk": chunk}
    with LiveBytes((hidden, weight, labels, weights, upstream)) as live:
        if weighted:
            chunked_linear_cross_entropy(hidden, weight, labels, loss_weights=weights, **options)[0].backward()
        else:
            chunked_linear_cross_entropy(hidden, weight, labels, **options).backward(upstream)
    assert hidden.grad is not None
    return live.peak_above_start - hidden.grad.nbytes - rows * (4 if weighted else 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_extra_memory_does_not_grow_with_tokens(weighted: bool, dtype: torch.dtype) -> None:
    small, large = (extra_bytes(rows, weighted, dtype) for rows in (2048, 16384))
    assert abs(large - small) < 1024, "a flag for each chunk is all that may grow"
    assert large < 4 * 256 * 512 * 4, "a few chunks of logits"


def extra_bytes_of_ranks(sp: bool) -> list[int]:
    group = dist.group.WORLD
    return [extra_bytes(rows, weighted, chunk=64, group=group, sp=sp) for weighted in (False, True) for rows in (2048, 16384)]


@pytest.mark.multiproc
@pytest.mark.parametrize("sp", [False, True])
def test_extra_memory_of_several_ranks_does_not_grow_with_tokens(sp: bool) -> None:
    a_number_a_token = (16384 - 2048) * 4
    for per_token, per_token_large, weighted, weighted_large in run_processes(extra_bytes_of_ranks, 2, sp):
        # gloo's threads let go of a chunk's hidden states (8 KiB) when they come to it
        assert per_token_large - per_token < 0.7 * a_number_a_token
        assert weighted_large - weighted < 0.7 * a_number_a_token


class LargestOperand(TorchDispatchMode):
    """Operators that are given, or return, a tensor of 2^31 elements or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.numel() >= 2**31 for leaf in tree_leaves((args, kwargs, results))):
            self.names.add(func.overloadpacket.__name__)
        return results


def test_no_operator_computes_on_2_to_the_31_elements_at_4m_tokens_of_128256_words() -> None:
    hidden = torch.empty(2**22, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(2**22, dtype=torch.int64, device="meta")
    with LargestOperand() as mode:
        losses = chunked_linear_cross_entropy(hidden, weight, labels, chunk=2**14)
        losses.backward(torch.empty_like(losses))
    assert mode.names <= {"slice", "detach", "empty_like", "new_empty"}, mode.names
    assert default_chunk(128256, torch.bfloat16) * 128256 < 2**31


def test_default_chunk_is_256_mib_of_logits_rounded_down_to_whole_tiles() -> None:
    assert default_chunk(128256, torch.bfloat16) == 512
    assert default_chunk(128256 // 8, torch.bfloat16) == 4096
    assert default_chunk(8192, torch.float32) == 8192
    assert default_chunk(8192, torch.float64) == 4096
    assert default_chunk(2**30, torch.float32) == 128


class Buffered:
    """What Megatron's DDP gives a parameter."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, **attributes: Any) -> None:
        self.weight: Any = weight.clone().requires_grad_()
        self.weight.main_grad = torch.ones(weight.shape, dtype=dtype)
        self.weight.grad_added_to_main_grad = False
        for name, value in attributes.items():
            setattr(self.weight, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_weight_gradient_is_added_to_main_grad(weighted: bool, dtype: torch.dtype) -> None:
    problem = Problem(torch.float32, 50)
    for attributes in ({}, {"zero_out_wgrad": True}):
        weight = Buffered(problem.weight, dtype, **attributes).weight
        buffer = weight.main_grad
        for _ in range(2):  # micro-batches
            if weighted:
                total, _ = chunked_linear_cross_entropy(
                    problem.hidden, weight, problem.labels, real_vocab_size=REAL, loss_weights=problem.weights.float(), chunk=8
                )
            else:
                losses = chunked_linear_cross_entropy(problem.hidden, weight, problem.labels, real_vocab_size=REAL, chunk=8)
                total = (losses * problem.weights).sum()
            (UPSTREAM * total).backward()
            assert weight.grad.shape == weight.shape
            assert weight.grad.dtype is weight.dtype
            assert not attributes or not weight.grad.any(), "a shared weight must be given zeros"
            weight.grad = None
        assert weight.grad_added_to_main_grad
        assert weight.main_grad is buffer
        assert relative(buffer, 1 + 2 * problem.weight_grad) < (1e-6 if dtype is torch.float32 else 8e-3)


def test_gradients_made_in_forward_are_handed_out_once() -> None:
    problem = Problem(torch.float32, 10)
    hidden = problem.hidden.requires_grad_()
    total, _ = chunked_linear_cross_entropy(hidden, problem.weight, problem.labels, loss_weights=torch.ones(10))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="leave loss_weights out"):
        total.backward()


def test_float16_gradients_are_not_made_before_the_loss_scale_is_known() -> None:
    hidden, weight, labels = torch.zeros(4, 8).half(), torch.zeros(6, 8).half(), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"^loss_weights with float16: .*; leave loss_weights out$"):
        chunked_linear_cross_entropy(hidden, weight, labels, loss_weights=torch.ones(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "labels are [9] for 10 rows of hidden: every token has one"),
        ({"loss_weights": torch.ones(3)}, "loss_weights are [3], labels [10]: every token has one"),
        ({"chunk": 0}, "chunk is 0, expected at least one token"),
        ({"real_vocab_size": 97}, "real_vocab_size is 97, the weights have 96 rows"),
        (
            {"hidden": torch.zeros(10, 5)},
            "hidden is [10, 5] torch.float32, weight [96, 24] torch.float32; expected [rows, h] and [v, h] of one dtype",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(change: dict[str, Any], message: str) -> None:
    problem = Problem(torch.float32, 10)
    arguments: dict[str, Any] = {"hidden": problem.hidden, "weight": problem.weight, "labels": problem.labels} | change
    with pytest.raises(LayoutError) as caught:
        chunked_linear_cross_entropy(**arguments)
    assert str(caught.value) == message
