"""All ranks of a group in one process and on one device, one running at a time: the product's own exchange code, without processes.

    def on_rank(group):                 # group: what torch.distributed would give
        return ring_forward(query, key, value, group, scale)

    results, seconds = run_ranks(on_rank, 8)

Each rank is a thread that runs until it must wait for another, and then hands over. Tensors are copied as a network would, from the
sender's memory into the receiver's. What a rank is charged for is what ran while it had the turn: CPU-seconds of its thread, or the time
between CUDA events, and of that the time inside fused attention operators, with their FLOPs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from mcore_longctx.errors import LongctxError

__all__ = ["Cost", "InProcessGroup", "KernelMeter", "run_ranks", "watch"]


@dataclass
class Cost:
    """Seconds of a rank, of the calls of its attention kernel, and the FLOPs of these."""

    seconds: float = 0.0
    kernel_seconds: float = 0.0
    flops: float = 0.0


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, inner: int | None = None) -> tuple[list[Any], list[Cost]]:
    """Call `function(group, *arguments)` for every rank of a group of `size`. Results and costs, by rank.

    With `inner`, `function(group, hierarchy, *arguments)`: the hierarchy is the rank's two groups, `inner` neighbours first.

    Raises:
        LongctxError: a rank refused what was asked for.
        RuntimeError: a rank raised anything else (its exception is the cause), or all ranks wait for each other.
    """
    turns = _Turns(size)
    world = _World(turns)
    results: list[Any] = [None] * size
    costs = [Cost() for _ in range(size)]
    failures: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        groups: list[Any] = [InProcessGroup(world, list(range(size)), rank)]
        if inner is not None:
            first = rank // inner * inner
            groups.append([InProcessGroup(world, ranks, rank) for ranks in _hierarchy(rank, first, inner, size)])
        try:
            turns.wait_for_turn(rank)
            with KernelMeter() as meter:
                clock = turns.clocks[rank] = _Clock()
                results[rank] = function(*groups, *arguments)
                costs[rank].seconds = clock.stop()
            costs[rank].kernel_seconds, costs[rank].flops = meter.seconds, meter.flops
        except BaseException as error:  # told below, in the caller's thread
            failures.append((rank, error))
            turns.failed = True
        finally:
            turns.leave(rank)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.forget()
    if failures:
        rank, error = failures[0]
        if isinstance(error, LongctxError):
            raise error
        raise RuntimeError(f"rank {rank} of {size}: {error}") from error
    return results, costs


def _hierarchy(rank: int, first: int, inner: int, size: int) -> tuple[list[int], list[int]]:
    """Neighbours that exchange heads, and the ranks at the same place in the other neighbourhoods, which form rings."""
    return list(range(first, first + inner)), list(range(rank % inner, size, inner))


class _Turns:
    """One thread at a time, in order of rank."""

    def __init__(self, size: int) -> None:
        self.changed = threading.Condition()
        self.holder = 0
        self.alive = [True] * size
        self.clocks: list[_Clock | None] = [None] * size
        self.progress = 0  # messages and collectives so far: while it stands still, everybody waits
        self.failed = False  # by one rank: the others give up

    def wait_for_turn(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.holder == rank)

    def leave(self, rank: int) -> None:
        with self.changed:
            self.alive[rank] = False
            self.progress += 1
            self._pass_on(rank)

    def wait_until(self, rank: int, is_ready: Callable[[], bool]) -> None:
        """Let the others run until `is_ready`."""
        if is_ready():
            return
        clock = self.clocks[rank]
        assert clock is not None
        clock.pause()
        seen, idle = self.progress, 0
        with self.changed:
            while not is_ready():
                if self.failed:
                    raise RuntimeError("another rank failed")
                idle = idle + 1 if self.progress == seen else 0
                seen = self.progress
                if idle > 2 * len(self.alive):
                    raise RuntimeError("all ranks wait for each other")
                self._pass_on(rank)
                self.changed.wait_for(lambda: self.holder == rank)
        clock.go_on()

    def _pass_on(self, rank: int) -> None:
        size = len(self.alive)
        following = [(rank + i) % size for i in range(1, size + 1) if self.alive[(rank + i) % size]]
        self.holder = following[0] if following else -1
        self.changed.notify_all()


class _Clock:
    """Time in which one rank has the turn."""

    def __init__(self) -> None:
        self.on_cuda = torch.cuda.is_available()
        self.total = 0.0
        self.spans: list[tuple[Any, Any]] = []
        self.began: Any = None
        self.go_on()

    def go_on(self) -> None:
        self.began = _now(self.on_cuda)

    def pause(self) -> None:
        self.spans.append((self.began, _now(self.on_cuda)))

    def stop(self) -> float:
        self.pause()
        return _elapsed(self.spans, self.on_cuda)


def _now(on_cuda: bool) -> Any:
    if not on_cuda:
        return time.thread_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(spans: Sequence[tuple[Any, Any]], on_cuda: bool) -> float:
    if not on_cuda:
        return sum(last - first for first, last in spans)
    torch.cuda.synchronize()
    return sum(first.elapsed_time(last) for first, last in spans) / 1e3


class KernelMeter:
    """Time and FLOPs of the calls of a watched attention kernel by this thread: a backward counts 2.5 forwards, causal half the pairs.

    watch(kernel)
    with KernelMeter() as meter:
        ...
    meter.seconds, meter.flops
    """

    def __init__(self) -> None:
        self.on_cuda = torch.cuda.is_available()
        self.spans: dict[str, list[tuple[Any, Any]]] = {"forward": [], "backward": []}
        self.flops_of = {"forward": 0.0, "backward": 0.0}

    def __enter__(self) -> KernelMeter:
        """Count from now on."""
        _active.meter = self
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        _active.meter = None

    @property
    def seconds(self) -> float:
        """Of all calls so far."""
        return sum(_elapsed(spans, self.on_cuda) for spans in self.spans.values())

    @property
    def flops(self) -> float:
        """Of all calls so far."""
        return sum(self.flops_of.values())

    def rate(self, direction: str) -> float:
        """FLOP/s of the forward or of the backward calls."""
        return self.flops_of[direction] / _elapsed(self.spans[direction], self.on_cuda)


_active = threading.local()


def watch(kernel: Any) -> None:
    """Let meters see the calls of this kernel object. `choose_kernel` gives everybody the same one."""
    if not hasattr(kernel, "is_watched"):
        kernel.forward, kernel.backward = _watched(kernel.forward, "forward"), _watched(kernel.backward, "backward")
        kernel.is_watched = True


def _watched(function: Callable[..., Any], direction: str) -> Callable[..., Any]:
    def call(*tensors: Tensor, causal: bool, scale: float) -> Any:
        meter: KernelMeter | None = getattr(_active, "meter", None)
        if meter is None:
            return function(*tensors, causal=causal, scale=scale)
        first = _now(meter.on_cuda)
        results = function(*tensors, causal=causal, scale=scale)
        meter.spans[direction].append((first, _now(meter.on_cuda)))
        query, key = tensors[:2] if direction == "forward" else tensors[1:3]
        meter.flops_of[direction] += _attention_flops(query, key, causal) * (2.5 if direction == "backward" else 1.0)
        return results

    return call


def _attention_flops(query: Tensor, key: Tensor, causal: bool) -> float:
    """Of a forward call: query [b, n, s_q, d], key [b, g, s_k, d]."""
    batch, heads, queries, width = query.shape
    pairs = queries * (queries + 1) / 2 if causal else queries * key.size(2)
    return 4.0 * batch * heads * width * pairs


class _World:
    """What is under way between the ranks of one `run_ranks`."""

    def __init__(self, turns: _Turns) -> None:
        self.turns = turns
        self.messages: dict[tuple[Any, ...], list[_Message]] = {}
        self.meetings: dict[tuple[Any, ...], _Meeting] = {}
        self.groups: list[InProcessGroup] = []

    def forget(self) -> None:
        for group in self.groups:
            distributed_c10d._world.pg_group_ranks.pop(group, None)


@dataclass
class _Message:
    source: Tensor | None = None
    target: Tensor | None = None
    done: bool = False


class _Wait(dist.Work):
    """Done when `finish` has run, which may let others run first."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self.finish = finish

    def wait(self, timeout: Any = None) -> bool:
        self.finish()
        return True


@dataclass(eq=False)
class _Meeting:
    """A collective: every rank brings a tensor, looks at those of the others, and says when it is done with them."""

    brought: dict[int, Tensor] = field(default_factory=dict)
    left: int = 0


class InProcessGroup(dist.ProcessGroup):
    """The ranks `ranks` of a world of threads, as `torch.distributed` functions see them: p2p, all-gather, reduce-scatter, all-to-all."""

    def __init__(self, world: _World, ranks: list[int], world_rank: int) -> None:
        super().__init__(ranks.index(world_rank), len(ranks))
        self.world, self.ranks, self.world_rank = world, ranks, world_rank
        self.meetings = 0
        world.groups.append(self)
        # dist.get_global_rank and point-to-point operations look a group up here
        distributed_c10d._world.pg_group_ranks[self] = {rank: i for i, rank in enumerate(ranks)}

    def getBackendName(self) -> str:  # noqa: N802
        """For torch."""
        return "in-process"

    # ------------------------------------------------------------------ point to point

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> dist.Work:
        """Offer a tensor; done when it has been received."""
        return self._post((tuple(self.ranks), self.rank(), dst, tag), _Message(source=tensors[0]))

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> dist.Work:
        """Ask for a tensor; done when it is there."""
        return self._post((tuple(self.ranks), src, self.rank(), tag), _Message(target=tensors[0]))

    def _post(self, key: tuple[Any, ...], mine: _Message) -> dist.Work:
        """The two halves of a message meet in order; whoever comes second moves it, as a network would in the background."""
        waiting = self.world.messages.setdefault(key, [])
        is_send = mine.source is not None
        if waiting and (waiting[0].source is None) == is_send:
            message = waiting.pop(0)
            if is_send:
                message.source = mine.source
            else:
                message.target = mine.target
            assert message.source is not None
            assert message.target is not None
            message.target.copy_(message.source)
            message.done = True
        else:
            message = mine
            waiting.append(message)
        turns = self.world.turns
        turns.progress += 1
        return _Wait(lambda: turns.wait_until(self.world_rank, lambda: message.done))

    # ------------------------------------------------------------------ collectives

    def _meet(self, tensor: Tensor, take: Callable[[list[Tensor]], Any]) -> dist.Work:
        key = (tuple(self.ranks), self.meetings)
        self.meetings += 1
        meeting = self.world.meetings.setdefault(key, _Meeting())
        meeting.brought[self.rank()] = tensor
        turns, size = self.world.turns, self.size()
        turns.progress += 1
        turns.wait_until(self.world_rank, lambda: len(meeting.brought) == size)
        take([meeting.brought[i] for i in range(size)])
        meeting.left += 1
        turns.progress += 1
        # nobody changes what it brought before all have looked
        turns.wait_until(self.world_rank, lambda: meeting.left == size)
        self.world.meetings.pop(key, None)
        return _Wait(lambda: None)

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> dist.Work:
        """Flat tensors of all ranks, one behind the other."""
        return self._meet(
            tensor, lambda tensors: [part.copy_(t) for part, t in zip(output.chunk(self.size()), tensors, strict=True)]
        )

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> dist.Work:
        """Sum of each rank's own part of flat tensors."""

        def take(tensors: list[Tensor]) -> None:
            parts = [t.chunk(self.size())[self.rank()] for t in tensors]
            output.copy_(parts[0])
            for part in parts[1:]:
                output.add_(part)

        return self._meet(tensor, take)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], input_sizes: list[int], options: Any = None
    ) -> dist.Work:
        """Equal parts of the first axis change ranks."""
        if output_sizes or input_sizes:
            raise NotImplementedError("only equal parts")

        def take(tensors: list[Tensor]) -> None:
            for part, t in zip(output.chunk(self.size()), tensors, strict=True):
                part.copy_(t.chunk(self.size())[self.rank()])

        return self._meet(tensor, take)

    _allgather_base = all_gather_single  # their names before torch 2.13
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
