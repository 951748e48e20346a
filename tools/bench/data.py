"""The data builder beside its peers: tokenizing, planning and packing, reading. On the CPU.

python tools/bench/data.py --corpus DIR --tokenizer tokenizer.json                 DIR as tools/corpus.py makes it
    --megatron-lm DIR --python312 EXE         a checkout of NVIDIA/Megatron-LM; a Python >= 3.12 with torch, transformers, gigatoken, awkward
    --datatrove-python EXE                    a Python with datatrove and tokenizers
    --rounds 3 --only tokenize,slice,start,build,read

The flags may be set as LONGCTX_CORPUS, LONGCTX_TOKENIZER, MEGATRON_LM, PYTHON312, DATATROVE_PYTHON. A peer that is not there is printed
as not measured. Contenders take turns. The first round asks for memory and its time is dropped, unless it is the only one. After every
run the ids of all documents are compared, in whatever order they come; if one differs, the benchmark stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data_contenders as contenders
import harness
from data_contenders import Contender, Corpus
from data_documents import Fingerprint
from harness import Spread, print_table, ratio
from process_tree import Cost, run

PARTS = ("tokenize", "slice", "start", "build", "read")
EVERY = 6  # line of the corpus that the slice has, for contenders that take minutes for all
SEQ_LENGTHS = {"build": "1M", "read": "4M"}
CP_SIZES = (4, 16)
STEP_SECONDS = 0.25  # what a training step does beside reading; a real one at 4M tokens takes many seconds
MB = 1e6
FAILED = "failed"


@dataclass
class Measured:
    """What came of one contender."""

    costs: list[Cost] = field(default_factory=list)
    memory: Cost | None = None  # the run in which memory was asked for
    found: Fingerprint | None = None
    error: str | None = None

    @property
    def cpu(self) -> Spread | None:
        """CPU-seconds."""
        return Spread.of([cost.cpu for cost in self.costs]) if self.costs else None

    def add(self, cost: Cost, *, keep_time: bool, memory: bool) -> None:
        """Take the numbers of one run."""
        if keep_time:
            self.costs.append(cost)
        if memory:
            self.memory = cost


class Work:
    """A folder of our own, with one sub-folder for the run at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out, self.log = folder / "out", folder / "log"

    def measure(self, command: list[str], *, memory: bool, environment: dict[str, str]) -> Cost:
        """Run in a fresh `out`."""
        self.clear()
        self.out.mkdir()
        return run(command, log=self.log, memory=memory, environment={"OMP_NUM_THREADS": "1", **environment}, folder=self.folder)

    def clear(self) -> None:
        """Remove what the last run left."""
        shutil.rmtree(self.out, ignore_errors=True)


def tokenize(candidates: Sequence[Contender], rounds: int, work: Work) -> dict[str, Measured]:
    """Run all in turn, compare what they wrote, and stop if it is not the same.

    `rounds` are timed; one more comes before them, for memory, unless it is one.
    """
    results = {
        candidate.name: Measured(error=f"not measured: {candidate.missing}" if candidate.missing else None)
        for candidate in candidates
    }
    agreed: tuple[str, Fingerprint] | None = None
    for round_ in range(rounds + (rounds > 1)):
        for candidate in candidates:
            result = results[candidate.name]
            if result.error is not None:
                continue
            memory = round_ == 0
            try:
                cost = work.measure(candidate.command(work.out), memory=memory, environment=candidate.environment)
            except RuntimeError as error:
                print(f"  {candidate.name}: {error}", file=sys.stderr, flush=True)
                result.error = f"{FAILED}: {str(error).splitlines()[0]}"
                continue
            if candidate.told:  # it measured itself: without its start, and its memory is full of texts
                told = json.loads(work.log.read_text().splitlines()[-1])
                found, memory = Fingerprint(*told["fingerprint"]), False
                cost = Cost(told["cpu"], told["wall"], 0, 0, 0, 0)
            else:
                found = candidate.documents(work.out)
            print(f"  round {round_ + 1}, {candidate.name}: {cost.cpu:.2f} CPU-s", file=sys.stderr, flush=True)
            agreed = agreed or (candidate.name, found)
            if found != agreed[1]:
                raise SystemExit(f"{candidate.name} made {found}, {agreed[0]} made {agreed[1]}: these are not the same work")
            result.found = found
            result.add(cost, keep_time=round_ > 0 or rounds == 1, memory=memory)
    work.clear()
    return results


def print_tokenized(results: dict[str, Measured], *, start_only: bool = False) -> bool:
    """The table, and what all of them wrote. Whether nobody failed. `start_only`: there is so little text that rates mean nothing."""
    found = next((result.found for result in results.values() if result.found), None)
    if found is None:
        print("nothing was measured: " + "; ".join(f"{name}: {result.error}" for name, result in results.items()) + "\n")
        return False
    ours, *limits = (
        next((result.cpu.median for name, result in results.items() if kind in name and result.cpu), None)
        for kind in ("ours, 1", "alone, str", "alone, bytes")
    )
    headers = ["contender", "CPU-s", "wall s", "peak MB", "anonymous", "CPU-s / ours"]
    if not start_only:
        headers += ["Mtok / CPU-s", "CPU-s / limit, str", "/ limit, bytes"]

    def row(name: str, result: Measured) -> list[object]:
        cpu = result.cpu
        if cpu is None:
            return [name, result.error, *["-"] * (len(headers) - 2)]
        wall, memory = Spread.of([cost.wall for cost in result.costs]), result.memory
        bytes_ = (f"{memory.peak / MB:,.0f}", f"{memory.peak_anonymous / MB:,.0f}") if memory else ("-", "-")
        cells = [name, cpu, f"{wall.median:.3g}", *bytes_, ratio(cpu.median, ours) or "-"]
        rates = [f"{found.tokens / 1e6 / cpu.median:.3g}", *(ratio(cpu.median, limit) or "-" for limit in limits)]
        return cells if start_only else cells + rates

    print_table(headers, [[row(name, result) for name, result in results.items()]])
    same = sum(result.found is not None for result in results.values())
    print(
        f"\nAll {same} wrote the same {found.documents:,} documents of {found.tokens:,} tokens, compared id by id"
        f" (SHA-256 of the sorted hashes of the documents: {found.digest[:16]}).\n"
    )
    return not any(result.error and result.error.startswith(FAILED) for result in results.values())


# ------------------------------------------------------------------------------------------------------------------ building


def our_command(*arguments: object) -> list[str]:
    """`mcore-longctx data ...` of this tree."""
    return [sys.executable, "-m", "mcore_longctx", "data", *map(str, arguments)]


def with_tokens(tokens: Path, out: Path) -> Path:
    """A run folder `out` with the shards of another one, as links."""
    shutil.copytree(tokens, out / "tokens", copy_function=os.link)
    return out


def build(tokens: Path, rounds: int, work: Work) -> Iterator[list[tuple[object, ...]]]:
    """Rows of planning, packing and verifying."""
    results: dict[str, Measured] = {}
    packed = 0
    for round_ in range(rounds + (rounds > 1)):
        work.clear()
        out = with_tokens(tokens, work.out)
        steps = {
            "plan": our_command("plan", out, "--seq-length", SEQ_LENGTHS["build"], *MIX),
            "pack, 1 worker": our_command("pack", out, "--workers", 1),
            "verify": our_command("verify", out),
        }
        for name, command in steps.items():
            cost = run(command, log=work.log, memory=round_ == 0, environment=OURS, folder=work.folder)
            print(f"  round {round_ + 1}, {name}: {cost.cpu:.2f} CPU-s", file=sys.stderr, flush=True)
            results.setdefault(name, Measured()).add(cost, keep_time=round_ > 0 or rounds == 1, memory=round_ == 0)
        packed = (out / "samples.bin").stat().st_size
    work.clear()
    yield [_build_row(name, result) for name, result in results.items()]
    both = [result.cpu.median for name, result in results.items() if name != "verify" and result.cpu]
    yield [("plan + pack", f"{sum(both):.3g}", "-", "-", "-"), (f"{packed / MB:,.0f} MB packed", "-", "-", "-", "-")]


OURS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(contenders.ROOT)}
MIX = ("--keep", "0.3", "--repeat", "1.3", "--tokens", "100000000")


def _build_row(name: str, result: Measured) -> tuple[object, ...]:
    assert result.memory is not None
    wall = Spread.of([cost.wall for cost in result.costs])
    return name, result.cpu, f"{wall.median:.3g}", f"{result.memory.peak / MB:,.0f}", f"{result.memory.peak_anonymous / MB:,.0f}"


# ------------------------------------------------------------------------------------------------------------------ reading


def read(tokens: Path, work: Work) -> list[tuple[int, dict[str, Any]]]:
    """What `data_reading.py` says about samples of 4M tokens, by CP size."""
    work.clear()
    out = with_tokens(tokens, work.out)
    for command in (our_command("plan", out, "--seq-length", SEQ_LENGTHS["read"]), our_command("pack", out)):
        run(command, log=work.log, environment=OURS, folder=work.folder)
    os.sync()  # pages that are not on disk yet cannot be dropped
    script = [sys.executable, str(contenders.FOLDER / "data_reading.py"), str(out / "samples")]
    rows = []
    for cp_size in CP_SIZES:
        done = subprocess.run(
            [*script, str(cp_size), str(STEP_SECONDS)], capture_output=True, text=True, check=True, env={**os.environ, **OURS}
        )
        rows.append((cp_size, json.loads(done.stdout)))
    work.clear()
    return rows


def print_read(rows: list[tuple[int, dict[str, Any]]]) -> None:
    """Two tables: from the page cache, and from a cold one."""
    headers = ("CP", "CPU-ms", "MB delivered", "copy of these, ms", "ratio", "MB stored", "copy of these, ms", "ratio")
    print_table(headers, [[_warm_row(cp_size, facts["warm"]) for cp_size, facts in rows]])
    print(f"\nFrom a cold page cache, steps of {STEP_SECONDS} s:\n")
    headers = ("CP", "part is", "wait of a step, ms", "longest", "copy of what is delivered, ms", "MB from disk / stored")
    print_table(headers, [[row for cp_size, facts in rows for row in _cold_rows(cp_size, facts)]])
    print()


def _warm_row(cp_size: int, warm: dict[str, float]) -> tuple[object, ...]:
    row: list[object] = [cp_size, f"{warm['slice']:.3g}"]
    for kind, copy in (("delivered", "copy of what it delivers"), ("stored", "copy of what is stored")):
        row += [f"{warm[f'bytes {kind}'] / MB:.1f}", f"{warm[copy]:.3g}", ratio(warm["slice"], warm[copy])]
    return tuple(row)


def _cold_rows(cp_size: int, facts: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    warm = facts["warm"]
    for name, cold in facts["cold"].items():
        stored = warm["bytes stored"] * cold["steps"]
        read_ = f"{cold['from disk'] / MB:.0f} / {stored / MB:.0f}"
        waits = (f"{cold['median']:.3g}", f"{cold['longest']:.3g}")
        yield cp_size, name, *waits, f"{warm['copy of what it delivers']:.3g}", read_


# ------------------------------------------------------------------------------------------------------------------ all of it


def whole(folder: Path, tokenizer: Path, work: Path) -> Corpus:
    """The corpus of `tools/corpus.py`."""
    parts = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not parts:
        raise SystemExit(f"{folder} holds no .jsonl file: make it with python tools/corpus.py {folder}")
    joined = work / "whole.jsonl"
    with joined.open("wb") as out:
        for path in parts.values():
            with path.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
    return Corpus("whole", parts, joined, tokenizer)


def some_lines(corpus: Corpus, name: str, every: int) -> Corpus:
    """Every n-th line of the corpus; 0: the shortest line alone."""
    path = corpus.whole.with_name(f"{name}.jsonl")
    with corpus.whole.open("rb") as file, path.open("wb") as out:
        lines = (line for number, line in enumerate(file, start=1) if every and number % every == 0)
        out.writelines(lines if every else [min(file, key=len)])
    return Corpus(name, {name: path}, path, corpus.tokenizer)


def versions(given: argparse.Namespace) -> str:
    """Of us and of the peers."""
    told = [_packages(sys.executable, "numpy", "tokenizers", "gigatoken", "orjson", "msgspec")]
    if given.megatron_lm is not None:
        told.append(f"Megatron-LM {_told(['git', '-C', str(given.megatron_lm), 'log', '-1', '--format=%h of %cs'])}")
    if given.python312 is not None:
        told.append(f"with {_packages(given.python312, 'torch', 'transformers', 'tokenizers', 'gigatoken', 'awkward')}")
    if given.datatrove_python is not None:
        told.append(_packages(given.datatrove_python, "datatrove", "tokenizers"))
    return "; ".join(told)


def _packages(python: str, *names: str) -> str:
    script = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:] if [*m.distributions(name=n)]))"
    return f"{_told([python, '--version'])}, {_told([python, '-c', script, *names])}"


def _told(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "version unknown"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = os.environ.get
    parser.add_argument("--corpus", type=Path, default=there("LONGCTX_CORPUS"), metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, default=there("LONGCTX_TOKENIZER"), metavar="FILE")
    parser.add_argument("--megatron-lm", type=Path, default=there("MEGATRON_LM"), metavar="DIR")
    parser.add_argument("--python312", default=there("PYTHON312"), metavar="EXE")
    parser.add_argument("--datatrove-python", default=there("DATATROVE_PYTHON"), metavar="EXE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--work", type=Path, help="where a folder for temporary files is made (default: beside the corpus)")
    given = parser.parse_args()
    given.only = given.only.split(",")
    unknown = set(given.only) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    return given


def main() -> int:
    """Measure and print."""
    given = arguments()
    print(f"## The data builder\n\n`{harness.command_line()}`\n")
    if given.corpus is None or given.tokenizer is None:
        print("not measured: needs --corpus (python tools/corpus.py DIR) and --tokenizer\n")
        return 0
    print(f"{harness.machine()}\n\n{versions(given)}\n")
    root = given.work if given.work is not None else given.corpus.parent
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=root) as folder:
        nobody_failed = measure(given, Path(folder))
    print(f"load {os.getloadavg()[0]:.1f} when it ended")
    return 0 if nobody_failed else 1


def measure(given: argparse.Namespace, folder: Path) -> bool:
    """All parts that were asked for. Whether nobody failed."""
    work, good = Work(folder), True
    corpus = whole(given.corpus.resolve(), given.tokenizer.resolve(), folder)
    hf = contenders.hf_folder(corpus.tokenizer, folder / "hf")

    def fast(of: Corpus) -> Contender:
        return contenders.megatron_fast(of, given.megatron_lm, given.python312, hf)

    def slow(of: Corpus) -> list[Contender]:
        return [
            contenders.megatron_slow(of, given.megatron_lm, given.python312, hf),
            contenders.datatrove(of, given.datatrove_python),
        ]

    limits = [contenders.raw(corpus, kind) for kind in ("str", "bytes")]
    if "tokenize" in given.only:
        print(f"### Documents to token ids: {corpus.whole.stat().st_size / MB:.0f} MB of JSONL\n")
        good &= print_tokenized(
            tokenize([*limits, contenders.ours(corpus, 1), contenders.ours(corpus, 2), fast(corpus)], given.rounds, work)
        )
    if "slice" in given.only:
        part = some_lines(corpus, "slice", EVERY)
        print(f"### The slow ones: every {EVERY}th document, {part.whole.stat().st_size / MB:.0f} MB of JSONL, one round\n")
        limits = [contenders.raw(part, kind) for kind in ("str", "bytes")]
        good &= print_tokenized(tokenize([*limits, contenders.ours(part, 1), fast(part), *slow(part)], 1, work))
    if "start" in given.only:
        one = some_lines(corpus, "one", 0)
        print("### One document: what it costs to start\n")
        good &= print_tokenized(tokenize([contenders.ours(one, 1), fast(one), *slow(one)], given.rounds, work), start_only=True)
    if "build" in given.only or "read" in given.only:
        tokenized = contenders.ours(corpus, 1)
        work.measure(tokenized.command(work.out), memory=False, environment=tokenized.environment)
        tokens = folder / "tokens"
        (work.out / "run" / "tokens").rename(tokens)
    if "build" in given.only:
        print(f"### Plan, pack and verify: `data plan OUT --seq-length {SEQ_LENGTHS['build']} {' '.join(MIX)}`\n")
        print_table(("step", "CPU-s", "wall s", "peak MB", "anonymous"), build(tokens, given.rounds, work))
        print()
    if "read" in given.only:
        print(f"### One context-parallel rank's part of a sample of {SEQ_LENGTHS['read']} tokens\n")
        print_read(read(tokens, work))
    return good


if __name__ == "__main__":
    sys.exit(main())
