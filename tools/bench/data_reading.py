"""One context-parallel rank reads its part of packed samples: CPU time from the page cache, waiting time from a cold one.

python tools/bench/data_reading.py PREFIX CP_SIZE STEP_SECONDS           prints one line of JSON

Warm: `PackedSamples.cp_slice` beside numpy copies of the same bytes, those that it delivers (tokens, labels, positions, loss mask) and
those that are stored (two chunks of ids and one id behind each), in turns over all samples. Every copy is into new memory, as a slice is.
Cold: the file is dropped from the page cache before each step. A step asks for its part, then does something else (here: sleeps).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.indexed import IndexedReader
from mcore_longctx.data.samples import PackedSamples, ReadAhead
from mcore_longctx.layout import zigzag_chunks

ROUNDS = 5
Arrays = tuple[npt.NDArray[Any], ...]


def main(prefix: str, cp_size: int, step_seconds: float) -> None:
    """Measure and print."""
    rank = cp_size // 2
    warm = warm_times(Path(prefix), cp_size, rank)
    cold = {
        name: cold_waits(Path(prefix), cp_size, rank, step_seconds, ahead=ahead)
        for name, ahead in (("read when asked for", False), ("read one step ahead", True))
    }
    print(json.dumps({"warm": warm, "cold": cold}))


def warm_times(prefix: Path, cp_size: int, rank: int) -> dict[str, float]:
    """CPU-milliseconds of a call, medians."""
    samples, stored = PackedSamples(prefix), IndexedReader(prefix)
    chunk = samples.seq_length // (2 * cp_size)
    starts = [at * chunk for at in zigzag_chunks(cp_size, rank)]

    def copy_stored(index: int) -> None:
        for start in starts:
            stored.get(index, start, min(chunk + 1, samples.seq_length - start)).copy()

    delivered = samples.cp_slice(0, cp_size, rank)
    check_delivered(delivered, stored[0])
    calls: dict[str, Callable[[int], Any]] = {
        "slice": lambda index: samples.cp_slice(index, cp_size, rank),
        "copy of what it delivers": lambda _: [array.copy() for array in delivered],
        "copy of what is stored": copy_stored,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):  # the first fills the page cache
        for index in range(len(samples)):
            for name, call in calls.items():
                began = time.process_time_ns()
                call(index)
                if round_:
                    times[name].append((time.process_time_ns() - began) / 1e6)
    return {
        **{name: statistics.median(taken) for name, taken in times.items()},
        "bytes delivered": sum(array.nbytes for array in delivered),
        "bytes stored": sum(min(chunk + 1, samples.seq_length - start) for start in starts) * stored.dtype.itemsize,
    }


def check_delivered(part: Arrays, sample: npt.NDArray[Any]) -> None:
    """Compare a rank's part with the whole sample as it is stored. Raises SystemExit: what is timed must be right."""
    tokens, labels, _, positions = part
    has_next = positions + 1 < len(sample)
    if not (np.array_equal(tokens, sample[positions]) and np.array_equal(labels[has_next], sample[positions[has_next] + 1])):
        raise SystemExit("cp_slice does not deliver the tokens that are stored")


def cold_waits(prefix: Path, cp_size: int, rank: int, step_seconds: float, *, ahead: bool) -> dict[str, Any]:
    """Milliseconds for which each step waits for its part, and the bytes that came from the disk.

    The first step is left out: nothing can be ready for it.
    """
    samples = PackedSamples(prefix)
    reader: ReadAhead[int, Arrays] = ReadAhead(lambda index: samples.cp_slice(index, cp_size, rank))
    drop_from_page_cache(prefix)
    from_disk = bytes_from_disk()
    waits = []
    for step in range(len(samples)):
        drop_from_page_cache(prefix)
        began = time.perf_counter_ns()
        if ahead:
            reader.get(step, min(step + 1, len(samples) - 1))
        else:
            samples.cp_slice(step, cp_size, rank)
        waits.append((time.perf_counter_ns() - began) / 1e6)
        time.sleep(step_seconds)
    return {
        "median": statistics.median(waits[1:]),
        "longest": max(waits[1:]),
        "from disk": bytes_from_disk() - from_disk,
        "steps": len(samples),
    }


def drop_from_page_cache(prefix: Path) -> None:
    """Let the kernel forget what it holds of PREFIX.bin, except pages that a process has mapped."""
    with prefix.with_name(f"{prefix.name}.bin").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """That this process has caused to be read from a storage device."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
