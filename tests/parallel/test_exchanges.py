"""Every cp_comm_type on real gloo groups against one float64 matrix-product kernel over each whole document."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.kernels.attention import CpuFlashKernel
from mcore_longctx.layout.packed import PackLayout, pack_from_cu_seqlens, pack_layout, plain_layout
from mcore_longctx.layout.plans import ring_plan
from mcore_longctx.parallel import exchange as exchange_module
from mcore_longctx.parallel.exchange import Exchange, _RingExchange, attention, make_exchange, replayed_attention
from mcore_longctx.parallel.ring import ring_backward, ring_forward
from tests.multiproc import run_processes
from tests.parallel.packs import SCALE, hierarchical_groups, on_rank, random_tensors, reference

# largest absolute error at unit-variance inputs; bf16: gradients are rounded once per step
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.15}
HEADS = [(8, 8), (8, 2), (8, 1), (24, 6)]  # groups of 1, 4, 8 and 4 query heads; key heads that do and do not divide by the ranks
CASES = [(torch.float64, heads) for heads in HEADS] + [(torch.float32, (8, 2)), (torch.bfloat16, (8, 2))]


def exchanges() -> dict[str, Exchange]:
    """All types over the world, `a2a+p2p` with every size of the neighbours' group."""
    world = dist.group.WORLD
    assert world is not None
    made = {kind: make_exchange(kind, world) for kind in ("p2p", "all_gather", "a2a")}
    for inner in (2, 4):
        if inner < world.size():
            made[f"a2a({inner})+p2p"] = make_exchange("a2a+p2p", world, hierarchical_groups(inner))
    return made


def packs(cp: int) -> dict[str, tuple[list[int], PackLayout]]:
    """Lengths of the documents and how they are laid out."""
    mixed = [37, 5, 1, 16 * cp, 22, 2 * cp + 1]
    tiny = [1, 2 * cp - 1, 1, max(1, cp - 1), 1]
    unit = 2 * cp
    cu, padded = [0, 5 * cp + 1, 5 * cp + 4, 5 * cp + 4], [0, 8 * cp, 8 * cp + 3 * unit, 24 * cp]  # padded more than it needs
    hybrid = pack_layout(mixed, cp, limit=20)
    assert {d.rank is None for d in hybrid.documents} == {True, False}
    return {
        "plain": ([16 * cp], plain_layout(16 * cp, cp)),
        "one odd document": ([16 * cp - 3], pack_layout([16 * cp - 3], cp, split="zigzag")),
        "zigzag": (mixed, pack_layout(mixed, cp, split="zigzag", multiple=8)),
        "hybrid": (mixed, hybrid),
        "all shorter than 2 cp": (tiny, pack_layout(tiny, cp, split="zigzag")),
        "as it is chosen": (mixed, pack_layout(mixed, cp)),
        "stock cu_seqlens, empty tail": ([5 * cp + 1, 3], pack_from_cu_seqlens(cu, padded, cp)),
    }


def largest_error(exchange: Exchange, layout: PackLayout, inputs: list[Tensor], expected: list[Tensor]) -> float:
    """Of out and gradients, in units of the tolerance; inf where padding is touched. Padding holds NaN everywhere."""
    rank = dist.get_rank()
    query, key, value, grad_out = (on_rank(tensor, layout, rank) for tensor in inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = attention(*leaves, exchange, layout, SCALE)
    out.backward(grad_out)
    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    errors = []
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert a.dtype is query.dtype
        errors.append((a.double() - on_rank(b, layout, rank, padding=0.0)).abs())
    real = torch.from_numpy(layout.real(rank))
    if any(error[:, :, ~real].ne(0).any() for error in errors):
        return math.inf
    return max(error.max().item() for error in errors) / TOLERANCE[query.dtype]


def all_errors() -> dict[str, float]:
    """Run in each rank: largest error of every exchange, pack, dtype and head count."""
    errors = {}
    made, world = exchanges(), dist.get_world_size()
    for pack_name, (lengths, layout) in packs(world).items():
        for dtype, heads in CASES:
            inputs = random_tensors(*heads, sum(lengths), 2 if pack_name == "plain" else 1, dtype)
            expected = reference(*inputs, lengths)
            for name, exchange in made.items():
                label = f"{name}, {pack_name}, {dtype}, {heads}"
                errors[label] = largest_error(exchange, layout, inputs, expected)
    return errors


@pytest.mark.multiproc
@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_out_and_gradients_equal_one_kernel_over_each_document(cp_size: int) -> None:
    kinds = {2: 3, 4: 4, 8: 5}[cp_size]
    for rank, errors in enumerate(run_processes(all_errors, cp_size)):
        assert len(errors) == kinds * 7 * len(CASES)
        wrong = {what: error for what, error in errors.items() if not error < 1}
        assert not wrong, f"rank {rank}, error in units of the tolerance: {wrong}"


def replay_differences() -> dict[str, float]:
    """Out and lse kept by each exchange, then only the backward: gradients against those of the ordinary step."""
    differences = {}
    lengths, layout = packs(dist.get_world_size())["hybrid"]
    inputs = random_tensors(8, 2, sum(lengths), 1, torch.float32)
    query, key, value, grad_out = (on_rank(tensor, layout, dist.get_rank()) for tensor in inputs)
    for name, exchange in exchanges().items():
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        attention(*leaves, exchange, layout, SCALE).backward(grad_out)
        kept, lse = exchange.forward(query, key, value, layout, SCALE)
        assert lse.numel() == query.numel() // query.size(3), "lse takes one number for each row and head"
        again = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        out = replayed_attention(*again, kept, lse, exchange, layout, SCALE)
        assert out.data_ptr() == kept.data_ptr(), "the kept output is copied"
        out.backward(grad_out)
        differences[name] = max((a.grad - b.grad).abs().max().item() for a, b in zip(leaves, again, strict=True))
    return differences


@pytest.mark.multiproc
def test_a_kept_output_has_the_gradients_of_the_attention_bit_for_bit() -> None:
    for differences in run_processes(replay_differences, 4):
        assert differences == dict.fromkeys(("p2p", "all_gather", "a2a", "a2a(2)+p2p"), 0.0)


def swapped_groups() -> tuple[float, str]:
    """Error of `a2a+p2p` when the ring gets the neighbours; and what is said about it."""
    inner, outer = hierarchical_groups(2)
    lengths, layout = packs(dist.get_world_size())["zigzag"]
    inputs = random_tensors(8, 8, sum(lengths), 1, torch.float64)
    error = largest_error(_RingExchange(outer, inner, ()), layout, inputs, reference(*inputs, lengths))
    with pytest.raises(LayoutError) as caught:
        make_exchange("a2a+p2p", dist.group.WORLD, [outer, inner])
    return error * TOLERANCE[torch.float64], str(caught.value)


@pytest.mark.multiproc
def test_swapped_hierarchical_groups_are_wrong_by_far_and_refused() -> None:
    for rank, (error, message) in enumerate(run_processes(swapped_groups, 4)):
        assert error > 0.1
        assert message == (
            f"the hierarchical context-parallel groups of rank {rank} are not its 2 neighbours, then every 2th rank; "
            "the first group is for a2a, the second for p2p"
        )


def subgroup_neighbours() -> float:
    """Ranks 1 and 3 of four as a ring: group ranks are not global ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    layout, inputs = plain_layout(16, 2), random_tensors(2, 2, 16, 1, torch.float64)
    local = [on_rank(tensor, layout, group.rank()) for tensor in inputs]
    out = attention(*local[:3], make_exchange("p2p", group), layout, SCALE)
    return (out - on_rank(reference(*inputs, [16])[0], layout, group.rank())).abs().max().item()


@pytest.mark.multiproc
def test_the_ring_runs_in_a_group_that_is_not_the_whole_world() -> None:
    assert max(run_processes(subgroup_neighbours, 4)) < 1e-12


class Watcher(CpuFlashKernel):
    """Counts, at every call, the bytes of all tensors that were made since `gc.freeze` and are alive."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def forward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        self.bytes.append(new_bytes())
        return super().forward(*tensors, causal=causal, scale=scale)

    def backward(self, *tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        self.bytes.append(new_bytes())
        return super().backward(*tensors, causal=causal, scale=scale)


def new_bytes() -> int:
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def bytes_in_each_step(rows: int) -> tuple[list[int], list[int]]:
    """Bytes alive beside the arguments when each ring step calls its kernel: forward, backward."""
    group = dist.group.WORLD
    assert group is not None
    plan = ring_plan(plain_layout(rows * group.size(), group.size()), 1, group.rank())
    query, key, value, grad_out = random_tensors(8, 2, rows, 1, torch.float32)
    forward, backward = Watcher(), Watcher()
    gc.freeze()
    out, lse = ring_forward(query, key, value, plan, group, forward, SCALE)
    ring_backward(grad_out, query, key, value, out, lse, plan, group, backward, SCALE)
    return forward.bytes, backward.bytes


@pytest.mark.multiproc
def test_memory_of_the_ring_grows_neither_with_the_steps_nor_with_the_ranks() -> None:
    of_four, of_eight = (run_processes(bytes_in_each_step, ranks, 64)[0] for ranks in (4, 8))
    for four, eight in zip(of_four, of_eight, strict=True):
        assert (len(four), len(eight)) == (4, 8)
        assert max(eight) == max(four) > 0
        assert len(set(eight[2:-1])) == 1


def refusals() -> dict[str, str]:
    world = dist.group.WORLD
    assert world is not None
    inner, _ = hierarchical_groups(2)
    messages = {}
    for name, attempt in {
        "name": lambda: make_exchange("ring", world),
        "no groups": lambda: make_exchange("a2a+p2p", world),
        "one group": lambda: make_exchange("a2a+p2p", world, [world]),
        "product": lambda: make_exchange("a2a+p2p", world, [inner, world]),
        "heads": lambda: attention(
            *random_tensors(6, 2, 16, 1, torch.float32)[:3], make_exchange("a2a", world), plain_layout(64, 4), SCALE
        ),
        "kernel": lambda: attention(
            *random_tensors(6, 2, 16, 1, torch.float32)[:3],
            make_exchange("p2p", world, kernels=("flash3",)),
            plain_layout(64, 4),
            SCALE,
        ),
    }.items():
        with pytest.raises((ConfigError, LayoutError)) as caught:
            attempt()
        messages[name] = str(caught.value)
    return messages


@pytest.mark.multiproc
def test_what_cannot_be_exchanged_is_refused_before_anything_is_sent() -> None:
    sizes = "set hierarchical_context_parallel_sizes to [a2a ranks, p2p ranks], in the config and in initialize_model_parallel"
    no_groups = f"cp_comm_type a2a+p2p without its two groups: ranks would attend to their own rows only; {sizes}"
    for messages in run_processes(refusals, 4):
        assert messages == {
            "name": "cp_comm_type is 'ring'; use one of p2p, all_gather, a2a, a2a+p2p",
            "no groups": no_groups,
            "one group": no_groups,
            "product": "hierarchical context-parallel groups of 2 x 4 ranks do not make 4; "
            "the product of hierarchical_context_parallel_sizes is context_parallel_size",
            "heads": "a2a over 4 ranks cannot divide 6 query heads and 2 key heads (of one tensor-parallel rank); "
            "use a2a over 1, 2, 3, 6 ranks, and p2p for the rest (a2a+p2p)",
            "kernel": "attention kernel 'flash3' cannot be used for float32 heads of 16 on cpu (flash3: needs CUDA); "
            "let the rule choose one",
        }


def test_packs_of_several_documents_pass_over_the_kernel_that_plans_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(exchange_module, "attention_kernel", lambda query, wanted: asked.append(wanted) or CpuFlashKernel())
    query, key, value, grad_out = random_tensors(4, 2, 8, 1, torch.float32)
    for kernels in ((), ("cudnn",)):
        alone = _RingExchange(None, None, kernels)
        for lengths in ([8], [3, 5]):
            layout = pack_layout(lengths, 1)
            out, lse = alone.forward(query, key, value, layout, SCALE)
            alone.backward(grad_out, query, key, value, out, lse, layout, SCALE)
    one, several = asked[0], asked[2]
    assert one == ()
    assert "cudnn" not in several
    assert {"cpu_flash", "flash3", "flash", "efficient", "math"} <= set(several)
    assert asked == [one, one, several, several] + [("cudnn",)] * 4
