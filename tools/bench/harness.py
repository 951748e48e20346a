"""What every benchmark shares: one process a case, interleaved rounds, peak bytes, the machine in words, Markdown tables.

    results = compare({"ours": Case(setup, ("ours", 4096)), "stock": Case(setup, ("stock", 4096))}, rounds=5)
    print(table(("case", "CPU-s", "bytes"), [(name, seconds(result), result.peak_bytes) for name, result in results.items()]))

`setup(*arguments)` runs in a fresh process and returns an object with

    step()      one timed call
    states()    tensors that are there before and after a step: weights, gradients, inputs (optional)
    facts()     what else is to be told, picklable, asked after the last step (optional)

The first round counts bytes; where there are more, its time is dropped (it also warms caches). Contenders take turns A B C A B C, so
that a machine that slows down slows all of them. On a GPU a round is `warmup` calls and then `calls` timed ones, with CUDA events.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mcore_longctx.errors import LongctxError

__all__ = [
    "Case",
    "Result",
    "Spread",
    "available_bytes",
    "command_line",
    "compare",
    "lengths",
    "machine",
    "measure",
    "print_table",
    "table",
]

NOT_MEASURED = "not measured"

_PROCESSES = multiprocessing.get_context("forkserver")
# processes are forked from one that has imported what is slow; importing megatron-core may start CUDA, which does not survive a fork
_PROCESSES.set_forkserver_preload(["torch" if torch.cuda.is_available() else "mcore_longctx.megatron_compat"])


@dataclass(frozen=True)
class Case:
    """A contender: `setup(*arguments)` in a process of its own."""

    setup: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Median and the range that 80 % of the samples are in (all of them, where there are fewer than ten)."""

    low: float
    median: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        ordered = sorted(samples)
        cut = len(ordered) // 10
        return cls(ordered[cut], statistics.median(ordered), ordered[-1 - cut], len(ordered))

    def __str__(self) -> str:
        if self.samples == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass
class Result:
    """What came of one case. `error` says in a few words why there are no numbers.

    `peak_bytes` is above the states. CPU: `LiveBytes`, and `resident_bytes` is the growth of the process's resident memory in the
    same call. CUDA: the most that was allocated, and `resident_bytes` the most that the allocator reserved.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    clocks: list[tuple[float, float]] = field(default_factory=list)  # (SM MHz, W), sampled while it ran
    error: str | None = None

    @property
    def spread(self) -> Spread | None:
        """Seconds of a call; None where there are none."""
        return Spread.of(self.seconds) if self.seconds else None


def compare(
    cases: Mapping[str, Case], *, rounds: int, warmup: int = 0, calls: int = 1, deadline: float = 3600.0, say: bool = True
) -> dict[str, Result]:
    """Measure all cases in turn, `rounds` times. A case that fails is not tried again."""
    results = {name: Result() for name in cases}
    for round_ in range(rounds):
        for name, case in cases.items():
            result = results[name]
            if result.error is not None:
                continue
            found = measure(case, count_bytes=round_ == 0, warmup=warmup, calls=calls, deadline=deadline)
            _add(result, found, keep_time=round_ > 0 or rounds == 1)
            if say:
                told = found.error or f"{Spread.of(found.seconds)} s"
                print(f"  round {round_ + 1} of {rounds}, {name}: {told}", file=sys.stderr, flush=True)
    return results


def _add(result: Result, found: Result, *, keep_time: bool) -> None:
    result.error = found.error
    if keep_time:
        result.seconds += found.seconds
    result.clocks += found.clocks
    result.facts |= found.facts
    if found.peak_bytes is not None:
        result.peak_bytes, result.resident_bytes = found.peak_bytes, found.resident_bytes


def measure(case: Case, *, count_bytes: bool, warmup: int = 0, calls: int = 1, deadline: float = 3600.0) -> Result:
    """Run one case in a fresh process. Never raises for what the case does: see `Result.error`."""
    parent, child = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_in_process, args=(child, case, count_bytes, warmup, calls), daemon=True)
    process.start()
    child.close()
    clocks: list[tuple[float, float]] = []
    ends = time.monotonic() + deadline
    try:
        while not parent.poll(1.0):
            clocks += _gpu_clocks()
            if time.monotonic() > ends:
                return Result(error=f"no result after {deadline:g} s")
        result: Result = parent.recv()
    except EOFError:
        process.join()
        return Result(error=f"the process died ({_exit_reason(process.exitcode)})")
    finally:
        process.kill()
        process.join()
        parent.close()
    result.clocks = clocks
    return result


def _exit_reason(code: int | None) -> str:
    return "signal 9: out of memory?" if code == -9 else f"exit code {code}"


def _in_process(pipe: Any, case: Case, count_bytes: bool, warmup: int, calls: int) -> None:
    torch.set_num_threads(1)
    try:
        result = _run(case, count_bytes, warmup, calls)
    except torch.cuda.OutOfMemoryError:
        result = Result(error="out of memory")
    except LongctxError as error:
        result = Result(error=f"refused: {error.what}")
    except BaseException:
        traceback.print_exc()
        result = Result(error=traceback.format_exc().strip().splitlines()[-1][:200])
    pipe.send(result)
    pipe.close()


def _run(case: Case, count_bytes: bool, warmup: int, calls: int) -> Result:
    subject = case.setup(*case.arguments)
    result = Result()
    states = list(subject.states()) if hasattr(subject, "states") else []
    run = _timed_on_cuda if torch.cuda.is_available() else _timed_on_cpu
    if count_bytes:
        result.seconds, result.peak_bytes, result.resident_bytes = run(subject.step, states, 1)
    else:
        for _ in range(warmup):
            subject.step()
        result.seconds, *_ = run(subject.step, None, calls)
    if hasattr(subject, "facts"):
        result.facts = subject.facts()
    return result


_M_MMAP_THRESHOLD = -3  # malloc.h


def _timed_on_cpu(
    step: Callable[[], Any], states: Iterable[Any] | None, calls: int
) -> tuple[list[float], int | None, int | None]:
    """CPU-seconds of this process and its children, and bytes where `states` is given."""
    from live_bytes import LiveBytes

    if states is None:
        return [_cpu_seconds(step) for _ in range(calls)], None, None
    # give every block from 1 MiB on back to the system when it is freed: else the resident size holds what malloc keeps for later
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    before = _restart_resident_peak()
    with LiveBytes(states) as live:
        taken = _cpu_seconds(step)
    return [taken], live.peak_above_start, _status_bytes("VmHWM") - before


def _cpu_seconds(step: Callable[[], Any]) -> float:
    began = _cpu_now()
    step()
    return _cpu_now() - began


def _cpu_now() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _timed_on_cuda(
    step: Callable[[], Any], states: Iterable[Any] | None, calls: int
) -> tuple[list[float], int | None, int | None]:
    """Seconds between CUDA events, and the allocator's bytes where `states` is given (cold: nothing is cached)."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    taken = []
    for _ in range(calls):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last) / 1e3)
    if states is None:
        return taken, None, None
    return taken, torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - reserved


def _restart_resident_peak() -> int:
    """Let VmHWM begin at the present resident size, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# ------------------------------------------------------------------------------------------------------------------ the machine


def machine() -> str:
    """One line: processor or GPU, its software, and how busy the machine is."""
    from mcore_longctx.megatron_compat import MEGATRON_VERSION

    software = f"Python {platform.python_version()}, torch {torch.__version__}, megatron-core {MEGATRON_VERSION}"
    cores = len(os.sched_getaffinity(0))
    line = f"{_processor()}, {cores} cores (1 used by each process), {_total_bytes() / 2**30:.0f} GiB, {software}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        driver = _nvidia_smi("driver_version,clocks.max.sm,power.limit")
        line = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
            f"cuDNN {torch.backends.cudnn.version()}, driver, SM clock and power limit: {driver or 'unknown'}; {line}"
        )
    return f"{line}; load {os.getloadavg()[0]:.1f} when it began"


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _nvidia_smi(query: str) -> str:
    try:
        ran = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _gpu_clocks() -> list[tuple[float, float]]:
    """(SM clock in MHz, power in W) now; nothing without a GPU."""
    numbers = re.findall(r"[\d.]+", _nvidia_smi("clocks.sm,power.draw"))
    return [(float(numbers[0]), float(numbers[1]))] if len(numbers) >= 2 else []


# ------------------------------------------------------------------------------------------------------------------ printing


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. None and missing cells read `not measured`."""
    head = ["| " + " | ".join(headers) + " |", "| " + " | ".join("---" for _ in headers) + " |"]
    return "\n".join([*head, *_row_lines(len(headers), rows)])


def print_table(headers: Sequence[str], batches: Iterable[Iterable[Sequence[object]]]) -> None:
    """Print a table whose rows take long to measure: each batch as soon as it is there."""
    print(table(headers, []), flush=True)
    for batch in batches:
        print("\n".join(_row_lines(len(headers), batch)), flush=True)


def _row_lines(columns: int, rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[NOT_MEASURED if cell is None else str(cell) for cell in row] for row in rows]
    return ["| " + " | ".join(row + [NOT_MEASURED] * (columns - len(row))) + " |" for row in cells]


def command_line() -> str:
    """The command that was given, for the head of a table."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"tools/bench/{script.name}", *sys.argv[1:]])


def lengths(text: str) -> list[int]:
    """`4K,64K,1M` -> [4096, 65536, 1048576]: K and M are binary, as everywhere in the project."""
    units = {"K": 2**10, "M": 2**20, "": 1}
    found = [re.fullmatch(r"(\d+)([KM]?)", part.strip().upper()) for part in text.split(",")]
    if any(match is None for match in found):
        raise SystemExit(f"{text!r} is no list of lengths such as 4K,64K,1M")
    return [int(match[1]) * units[match[2]] for match in found if match]


def short(tokens: int) -> str:
    """65536 -> 64K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def ratio(value: float | None, base: float | None) -> str | None:
    """`value` / `base` with two digits behind the point, or None."""
    return f"{value / base:.2f}" if value is not None and base else None
