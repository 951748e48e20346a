"""How long the verbs that need no torch take to start: medians of interleaved rounds, beside a bare interpreter.

python tools/bench/startup.py
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

CASES = {
    "bare python": ["-c", "pass"],
    "--help": ["-m", "mcore_longctx", "--help"],
    "run ultralong-8b-4m --dry-run": ["-m", "mcore_longctx", "run", "ultralong-8b-4m", "--dry-run"],
    "run tiny-cpu rope.factr=2 (refused)": ["-m", "mcore_longctx", "run", "tiny-cpu", "rope.factr=2"],
    "convert inspect examples/tiny-llama": ["-m", "mcore_longctx", "convert", "inspect", "examples/tiny-llama"],
    "data --help": ["-m", "mcore_longctx", "data", "--help"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """CPU-seconds and wall-seconds of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(rounds + 1):  # the first round warms the file cache
        for name, arguments in CASES.items():
            times[name].append(measure(arguments))
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, median of {rounds} interleaved rounds")
    for name, rows in times.items():
        cpu, wall = (statistics.median(row[i] for row in rows[1:]) for i in (0, 1))
        print(f"{name:<38} {cpu:6.3f} CPU-s {wall:6.3f} s wall")


if __name__ == "__main__":
    main()
