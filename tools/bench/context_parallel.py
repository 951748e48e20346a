"""B5: what splitting attention over a context-parallel group costs, without a group of devices.

python tools/bench/context_parallel.py

The product's exchange code runs for every rank of a group of 2 to 16, one rank after the other on one device (`in_process`), beside
one call of the kernel over the whole sequence. Efficiency = seconds of that call / seconds of all ranks together: `kernels` counts
calls of the attention kernel only, `with exchange` also merges, copies and what goes through the network's place. Balance = busiest rank /
mean. Equality is checked in float64 against plain matrix products over the whole sequence. The last table runs real gloo processes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Case, Result, command_line, compare, lengths, machine, print_table, ratio, short, table
from in_process import Cost, KernelMeter, run_ranks, watch
from rates import peak_flops
from torch import Tensor

from mcore_longctx.errors import LongctxError
from mcore_longctx.kernels.attention import MathKernel, choose_kernel
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.layout.packed import PackLayout, plain_layout
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.parallel.exchange import CP_COMM_TYPES, make_exchange

HEAD_DIM = {"cpu": 64, "cuda": 128}
TARGETS = {"p2p": "ring: at least 0.93 at 64K tokens per rank", "all_gather": "all_gather: at least 0.97"}


@dataclass(frozen=True)
class Setting:
    """One exchange over one group: `tokens` of the whole sequence, `heads` and `groups` of queries and keys."""

    cp_comm_type: str
    cp_size: int
    tokens: int
    heads: int
    groups: int
    head_dim: int

    @property
    def scale(self) -> float:
        """Of the softmax."""
        return float(self.head_dim**-0.5)

    @property
    def pack(self) -> PackLayout:
        """Of a plain batch."""
        return plain_layout(self.tokens, self.cp_size)

    @property
    def inner(self) -> int | None:
        """Neighbours that exchange heads in a hierarchy."""
        return 2 if self.cp_comm_type == "a2a+p2p" else None

    def kernel(self, dtype: torch.dtype) -> Any:
        """The one that the product chooses, watched."""
        kernel = choose_kernel(training_device(), dtype, self.head_dim)
        watch(kernel)
        return kernel

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """query, key, value, grad_out over the whole sequence [1, heads, s, d]."""
        generator = torch.Generator().manual_seed(self.heads)
        shapes = (self.heads, self.groups, self.groups, self.heads)
        made = [torch.randn(1, count, self.tokens, self.head_dim, generator=generator, dtype=torch.float32) for count in shapes]
        return [tensor.to(training_device(), dtype) for tensor in made]


class OneCall:
    """The kernel over the whole sequence: forward and backward."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.setting, self.inputs = setting, setting.tensors(dtype)
        self.kernel = setting.kernel(dtype)
        self.costs: list[list[Cost]] = []

    def step(self) -> None:
        """Forward and backward."""
        query, key, value, grad_out = self.inputs
        with KernelMeter() as meter:
            out, lse = self.kernel.forward(query, key, value, causal=True, scale=self.setting.scale)
            self.kernel.backward(grad_out, query, key, value, out, lse, causal=True, scale=self.setting.scale)
        self.costs.append([Cost(meter.seconds, meter.seconds, meter.flops)])

    def facts(self) -> dict[str, Any]:
        """The cost of a call in the middle of all."""
        return {"costs": median_costs(self.costs)}


class AllRanks:
    """The exchange on every rank, one after the other."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.setting = setting
        setting.kernel(dtype)
        whole = setting.tensors(dtype)
        self.rows = [
            torch.from_numpy(zigzag_positions(setting.tokens, setting.cp_size, rank)).to(whole[0].device)
            for rank in range(setting.cp_size)
        ]
        self.parts = [[tensor[:, :, rows].contiguous() for tensor in whole] for rows in self.rows]
        self.costs: list[list[Cost]] = []
        self.results: list[list[Tensor]] = []

    def step(self) -> None:
        """Forward and backward on every rank."""
        setting = self.setting

        def on_rank(group: Any, hierarchy: Any = None) -> list[Tensor]:
            exchange = make_exchange(setting.cp_comm_type, group, hierarchy)
            query, key, value, grad_out = self.parts[group.rank()]
            out, lse = exchange.forward(query, key, value, setting.pack, setting.scale)
            return [out, *exchange.backward(grad_out, query, key, value, out, lse, setting.pack, setting.scale)]

        self.results, costs = run_ranks(on_rank, setting.cp_size, inner=setting.inner)
        self.costs.append(costs)

    def facts(self) -> dict[str, Any]:
        """The cost of each rank, of a step in the middle of all."""
        return {"costs": median_costs(self.costs)}


def median_costs(steps: Sequence[list[Cost]]) -> list[Cost]:
    """Of the step whose kernels took the median time."""
    return sorted(steps, key=lambda costs: sum(cost.kernel_seconds for cost in costs))[len(steps) // 2]


# ------------------------------------------------------------------------------------------------------------------ equality


def equality_rows(
    types: Sequence[str], sizes: Sequence[int], heads: Sequence[tuple[int, int]], tokens: int
) -> list[tuple[Any, ...]]:
    """(heads, type, ranks, largest error, balance, FLOPs over those of one call) in float64."""
    rows: list[tuple[Any, ...]] = []
    for (queries, groups), cp_comm_type, cp_size in itertools.product(heads, types, sizes):
        setting = Setting(cp_comm_type, cp_size, tokens, queries, groups, head_dim=16)
        name = (f"{queries}/{groups}", cp_comm_type, cp_size)
        ranks = AllRanks(setting, torch.float64)
        try:
            ranks.step()
        except LongctxError as error:
            rows.append((*name, f"refused: {error.what}", "-", "-"))
            continue
        query, key, value, grad_out = setting.tensors(torch.float64)
        out, lse = MathKernel().forward(query, key, value, causal=True, scale=setting.scale)
        gradients = MathKernel().backward(grad_out, query, key, value, out, lse, causal=True, scale=setting.scale)
        worst = max(
            ((part - whole[:, :, ranks.rows[rank]]).abs().max() / whole.abs().max()).item()
            for rank, parts in enumerate(ranks.results)
            for part, whole in zip(parts, (out, *gradients), strict=True)
        )
        flops = [cost.flops for cost in ranks.costs[-1]]
        once = 3.5 * 4 * queries * setting.head_dim * tokens * (tokens + 1) / 2
        balance = max(flops) / statistics.mean(flops) if sum(flops) else float("nan")
        rows.append((*name, f"{worst:.1e}", f"{balance:.3f}", f"{sum(flops) / once:.3f}"))
    return rows


# ------------------------------------------------------------------------------------------------------------------ time


def timed(settings: Sequence[Setting], dtype: torch.dtype, rounds: int, warmup: int, calls: int) -> dict[str, Result]:
    """One call and all exchanges over one sequence, in turn."""
    first = settings[0]
    cases = {"one call": Case(OneCall, (first, dtype))}
    cases |= {setting.cp_comm_type: Case(AllRanks, (setting, dtype)) for setting in settings}
    return compare(cases, rounds=rounds, warmup=warmup, calls=calls)


def timed_rows(setting: Setting, results: dict[str, Result], peak: float) -> list[tuple[Any, ...]]:
    """(heads, tokens per rank, ranks, type, efficiency of kernels, with exchange, balance, rate, its share of the peak)."""
    name = (f"{setting.heads}/{setting.groups}", short(setting.tokens // setting.cp_size), setting.cp_size)
    single = results["one call"].facts.get("costs", [Cost()])[0]
    rows: list[tuple[Any, ...]] = []
    for cp_comm_type, result in results.items():
        if result.error is not None:
            rows.append((*name, cp_comm_type, result.error, *["-"] * 4))
            continue
        costs = result.facts["costs"]
        kernels, everything = sum(cost.kernel_seconds for cost in costs), sum(cost.seconds for cost in costs)
        seconds = [cost.seconds for cost in costs]
        rate = sum(cost.flops for cost in costs) / kernels if kernels else float("nan")
        rows.append(
            (
                *name,
                cp_comm_type,
                ratio(single.kernel_seconds, kernels),
                ratio(single.seconds, everything),
                f"{max(seconds) / statistics.mean(seconds):.3f}",
                f"{rate / 1e12:.3g}",
                f"{rate / peak:.0%}",
            )
        )
    return rows


# ------------------------------------------------------------------------------------------------------------------ gloo

_PROCESSES = multiprocessing.get_context("forkserver")


def gloo_seconds(setting: Setting, repeats: int) -> float:
    """CPU-seconds of all ranks together, real processes over gloo: the median of `repeats` after one warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = []
        processes = []
        for rank in range(setting.cp_size):
            parent, child = _PROCESSES.Pipe(duplex=False)
            process = _PROCESSES.Process(target=_gloo_rank, args=(rank, setting, repeats, folder, child), daemon=True)
            process.start()
            child.close()
            pipes.append(parent)
            processes.append(process)
        try:
            by_rank = [pipe.recv() for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return statistics.median(sum(times) for times in zip(*by_rank, strict=True))


def _gloo_rank(rank: int, setting: Setting, repeats: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder) / "store"), setting.cp_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=setting.cp_size, timeout=timedelta(minutes=10))
    group = dist.group.WORLD
    assert group is not None
    rows = torch.from_numpy(zigzag_positions(setting.tokens, setting.cp_size, rank))
    query, key, value, grad_out = (tensor[:, :, rows].contiguous() for tensor in setting.tensors(torch.float32))
    exchange = make_exchange(setting.cp_comm_type, group)
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.process_time()
        out, lse = exchange.forward(query, key, value, setting.pack, setting.scale)
        exchange.backward(grad_out, query, key, value, out, lse, setting.pack, setting.scale)
        times.append(time.process_time() - began)
    dist.barrier()
    pipe.send(times[1:])
    time.sleep(60)  # until it is ended: nobody is cut off in a collective


def gloo_rows(tokens: int, heads: tuple[int, int], sizes: Sequence[int], repeats: int) -> list[tuple[Any, ...]]:
    """(type, ranks, CPU-seconds of all ranks, over one process)."""
    alone = gloo_seconds(Setting("p2p", 1, tokens, *heads, HEAD_DIM["cpu"]), repeats)
    rows: list[tuple[Any, ...]] = [("one process", 1, f"{alone:.3g}", "1.00")]
    for cp_comm_type, cp_size in itertools.product(("p2p", "all_gather"), sizes):
        taken = gloo_seconds(Setting(cp_comm_type, cp_size, tokens, *heads, HEAD_DIM["cpu"]), repeats)
        rows.append((cp_comm_type, cp_size, f"{taken:.3g}", ratio(taken, alone)))
    return rows


def main() -> None:
    """Print three tables."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lengths, default=lengths("8K,64K" if on_cuda else "1K"), help="of each rank")
    parser.add_argument("--cp", type=lengths, default=[2, 4, 8, 16])
    parser.add_argument("--heads", default="32/8,4/1" if on_cuda else "8/2", help="query heads / key heads, of the timed part")
    parser.add_argument("--types", default=",".join(CP_COMM_TYPES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--equality-tokens", type=lengths, default=[512])
    parser.add_argument("--gloo-tokens", type=lengths, default=[8192])
    given = parser.parse_args()
    types, dtype = given.types.split(","), torch.bfloat16 if on_cuda else torch.float32
    head_dim = HEAD_DIM["cuda" if on_cuda else "cpu"]
    heads: list[tuple[int, int]] = [tuple(int(n) for n in pair.split("/")) for pair in given.heads.split(",")]  # type: ignore[misc]

    print(f"## B5 Context parallelism on one device\n\n`{command_line()}`\n\n{machine()}\n")
    print(f"Float64, {given.equality_tokens[0]:,} tokens, against one call of plain matrix products:\n")
    headers = (
        "q/kv heads",
        "type",
        "ranks",
        "largest error (of the largest entry)",
        "FLOPs, busiest rank / mean",
        "FLOPs / one call",
    )
    print(table(headers, equality_rows(types, given.cp, ((32, 8), (4, 1)), given.equality_tokens[0])))

    print(f"\n{str(dtype).removeprefix('torch.')}, head dimension {head_dim}, ranks one after the other, forward + backward:\n")
    headers = (
        "q/kv heads",
        "tokens/rank",
        "ranks",
        "type",
        "efficiency, kernels",
        "with exchange",
        "balance",
        "TFLOP/s in kernels",
        "of the peak",
    )
    peak, what = peak_flops()
    print_table(headers, timed_batches(given, types, heads, head_dim, dtype, peak))
    print(f"\nRates count the causal half, and a backward as 2.5 forwards; peak: {what}.")
    if not on_cuda:
        print("\nOn a GPU, 8K and 64K tokens per rank: not measured. Targets there: " + "; ".join(TARGETS.values()) + ".")
    print(f"\nReal gloo processes, fp32, {given.gloo_tokens[0]:,} tokens, 8/2 heads of {HEAD_DIM['cpu']}, forward + backward:\n")
    if on_cuda:
        print("not measured here (one CUDA device)")
    else:
        headers = ("type", "processes", "CPU-s of all processes", "/ one process")
        print(table(headers, gloo_rows(given.gloo_tokens[0], (8, 2), (2, 4), max(1, given.rounds - 1))))


def timed_batches(
    given: argparse.Namespace,
    types: Sequence[str],
    heads: Sequence[tuple[int, int]],
    head_dim: int,
    dtype: torch.dtype,
    peak: float,
) -> Iterator[list[tuple[Any, ...]]]:
    """Rows of the timed part, a group at a time."""
    on_cuda = torch.cuda.is_available()
    for pair, tokens, cp_size in itertools.product(heads, given.tokens, given.cp):
        settings = [Setting(cp_comm_type, cp_size, tokens * cp_size, *pair, head_dim) for cp_comm_type in types]
        results = timed(settings, dtype, given.rounds, warmup=3 if on_cuda else 0, calls=5 if on_cuda else 1)
        yield timed_rows(settings[0], results, peak)


if __name__ == "__main__":
    main()
