"""CPU-seconds and peak memory of planning N made-up documents to samples of 1M tokens.

python tools/bench/plan_scale.py 1e8

The table of documents is made in memory first and counts. Lengths are log-normal with a median of 1,100 tokens, of four
sources of equal size. `peak` is the largest resident memory, mapped files included; `own` is its part that no file backs
(Anonymous of smaps_rollup), sampled ten times a second while the plan is made.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from mcore_longctx.data.files.shards import DocumentTable, hash64
from mcore_longctx.data.planning.layout import Separator
from mcore_longctx.data.planning.plan import make_plan, plan_text
from mcore_longctx.recipe.schema import DataSection, DocumentSource, LengthSampling

SOURCES = ("web", "books", "code", "papers")
BLOCK = 1 << 20


def make_table(documents: int) -> DocumentTable:
    """Documents of made-up lengths, the sources one behind the other."""
    key, length = np.empty(documents, np.uint64), np.empty(documents, np.int64)
    for low in range(0, documents, BLOCK):
        rows = slice(low, min(low + BLOCK, documents))
        rng = np.random.default_rng(low)
        key[rows] = hash64(np.arange(rows.start, rows.stop), 1)
        length[rows] = np.minimum(rng.lognormal(7.0, 1.4, rows.stop - rows.start), 4e6) + 1
    source = np.empty(documents, np.uint16)
    for index in range(len(SOURCES)):
        source[index * documents // len(SOURCES) : (index + 1) * documents // len(SOURCES)] = index
    return DocumentTable(
        sources=SOURCES,
        source=source,
        key=key,
        length=length,
        loss_document=np.zeros(0, np.int64),
        loss_stop=np.zeros(0, np.int64),
        loss_flag=np.zeros(0, np.bool_),
        shard_first=np.array([0, documents]),
    )


class Memory(threading.Thread):
    """Largest memory of this process that no file backs, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own_bytes, self.done = 0, threading.Event()

    def run(self) -> None:
        """Sample until `done`."""
        while not self.done.wait(0.1):
            rows = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
            own = next(int(row.split()[1]) for row in rows if row.startswith("Anonymous:"))
            self.own_bytes = max(self.own_bytes, own * 1024)


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=lambda text: int(float(text)))
    parser.add_argument("--packing", default="concatenate", choices=("concatenate", "single", "best_fit", "intact"))
    parser.add_argument("--seq-length", type=int, default=1 << 20)
    parser.add_argument("--sampling", action="store_true", help="keep 0.3 below 4K, take twice above 8K")
    parser.add_argument("--budget", type=float, help="part of the tokens to draw")
    parser.add_argument("--folder", type=Path, help="for the plan; the default is removed at the end")
    options = parser.parse_args()
    sampling = LengthSampling(keep_probability=0.3, repetition=2.0) if options.sampling else LengthSampling()
    sources = tuple(DocumentSource(name=name, path=Path(name)) for name in SOURCES)
    section = DataSection(sources=sources, packing=options.packing, length_sampling=sampling)
    table = make_table(options.documents)
    budget = None if options.budget is None else int(int(table.length.sum()) * options.budget)
    memory = Memory()
    with tempfile.TemporaryDirectory() as temporary:
        memory.start()
        cpu, wall = time.process_time(), time.perf_counter()
        facts = make_plan(
            options.folder or Path(temporary),
            table,
            section,
            name="scale",
            seed=1,
            seq_length=options.seq_length,
            separator=Separator(after=(27, 82, 29)),
            token_budget=budget,
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        memory.done.set()
        memory.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(plan_text(facts))
    print(
        f"{options.documents:,} documents, {facts['samples']:,} samples, {facts['runs']:,} runs: {cpu:.2f} CPU-s, {wall:.1f} s, "
        f"peak {peak / 1e9:.2f} GB, own {memory.own_bytes / 1e9:.2f} GB (the table is {18 * options.documents / 1e9:.2f} GB)"
    )


if __name__ == "__main__":
    main()
