"""The converters beside `cp -r` of the same bytes and beside their peers: wall time, CPU-seconds, peak memory. On the CPU.

python tools/bench/convert.py --work DIR              DIR: 16 GB on the disk to be measured; a folder in it is made and removed
    --peers mbridge=EXE,modelopt=EXE     for each a Python that has it; PEERS of convert_peers.py has the names
    --size 1.5b --rounds 5 --peer-rounds 2 --only import,export,verify,plan

--peers may be set as CONVERT_PEERS. A peer that is not there is printed as not measured, with the reason. Contenders take turns; the
source is in the page cache before each, and what the one before wrote is gone. The first round asks for memory and its time is dropped,
unless it is the only one; peers are asked for both at once. The tensors of every first output are compared with the source, number by
number and without our code; if one differs, the benchmark stops. A target that is missed is said and does not fail the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
from convert_files import difference, make_cached, same_weights
from harness import Spread, print_table
from process_tree import Cost, run
from random_llama import SIZES, tensor_bytes, write_model

PARTS = ("import", "export", "verify", "plan")
PLANNED = ("8b", "70b", "405b")
FOLDER = Path(__file__).parent
OURS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
PEERS = ("mbridge", "modelopt", "megatron-bridge", "mcore-bridge")
CP, CP_SYNC, BARE = "`cp -r`", "`cp -r`, fsync", "a bare interpreter"
ONE, TWO = "1 process, `--no-fsync`", "2 processes, `--no-fsync`"
MB = 1e6
MIB = 2**20
LIMITS = {"import": {ONE: 1.3, TWO: 1.0}, "export": {ONE: 1.5, TWO: 1.2}}  # wall time of `cp -r`
MORE_MEMORY = 32 * MIB  # than a bare interpreter
FASTER = 8.0  # than the fastest peer
PLAN_SECONDS = 1.0

Check = Callable[[Path], str | None]  # what is wrong with an output


@dataclass(frozen=True)
class Contender:
    """One way to do the job. `command(out)` makes the folder `out`; `limit` names the row whose time it is divided by."""

    name: str
    command: Callable[[Path], list[str]]
    reads: tuple[Path, ...]
    limit: str | None = CP
    check: Check | None = None
    peer: bool = False


@dataclass
class Measured:
    """What came of one contender: a cost by round, the run in which memory was asked for, seconds that a peer told itself."""

    costs: dict[int, Cost] = field(default_factory=dict)
    memory: Cost | None = None
    told: list[float] = field(default_factory=list)
    error: str | None = None
    limit: str | None = None

    @property
    def cpu(self) -> Spread | None:
        """CPU-seconds."""
        return Spread.of([cost.cpu for cost in self.costs.values()]) if self.costs else None

    @property
    def wall(self) -> Spread | None:
        """Seconds."""
        return Spread.of([cost.wall for cost in self.costs.values()]) if self.costs else None

    @property
    def peak(self) -> int | None:
        """Bytes: of the tree where there are several processes, of the one process else."""
        return max(self.memory.largest, self.memory.peak) if self.memory else None

    def against(self, limit: Measured | None) -> Spread | None:
        """Wall time over that of `limit` in the same round."""
        if limit is None:
            return None
        shared = [cost.wall / limit.costs[round_].wall for round_, cost in self.costs.items() if round_ in limit.costs]
        return Spread.of(shared) if shared else None


# ------------------------------------------------------------------------------------------------------------------ contenders


def ours(*arguments: object) -> list[str]:
    """`mcore-longctx convert ...` of this tree."""
    return [sys.executable, "-m", "mcore_longctx", "convert", *map(str, arguments)]


def copies(source: Path) -> list[Contender]:
    """The limits."""
    synced = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
    return [
        Contender(CP, lambda out: ["cp", "-r", str(source), str(out)], (source,), None),
        Contender(CP_SYNC, lambda out: ["sh", "-c", synced, "sh", str(source), str(out)], (source,), None),
    ]


def of_ours(verb: str, source: Path, check: Check, *, limit: str | None = None, **flags: str) -> Iterator[Contender]:
    """A row for each keyword's flags. Those without --no-fsync stand against a copy that is synced, too."""
    for flag in flags.values():
        name = _name(flag)
        base = limit or (CP if "--no-fsync" in flag else CP_SYNC)
        yield Contender(name, _ours_with(verb, source, flag), (source,), base, check)


def _ours_with(verb: str, source: Path, flags: str) -> Callable[[Path], list[str]]:
    return lambda out: ours(verb, source, out, *flags.split())


def _name(flags: str) -> str:
    """`--workers 2 --no-fsync` -> 2 processes, `--no-fsync`."""
    words = flags.split()
    at = words.index("--workers")
    count, rest = words[at + 1], " ".join(words[:at] + words[at + 2 :])
    return ", ".join([f"{count} process{'es' * (count != '1')}", *([f"`{rest}`"] if rest else [])])


def of_peers(verb: str, pythons: dict[str, str], source: Path, hf: Path, check: Check) -> Iterator[Contender]:
    """A row a peer."""
    for peer in PEERS:
        script = [pythons.get(peer, ""), "-W", "ignore", str(FOLDER / "convert_peers.py"), peer]
        last = [str(hf)] if verb == "export" else []
        yield Contender(peer, _peer_with([*script, verb, str(source)], last), (source,), CP, check, peer=True)


def _peer_with(script: list[str], last: list[str]) -> Callable[[Path], list[str]]:
    return lambda out: [*script, str(out), *last]


def missing(peer: str, python: str | None) -> str | None:
    """Why a peer cannot take part, and None if it can."""
    if python is None:
        return "no Python with it was given"
    done = subprocess.run(
        [python, "-W", "ignore", str(FOLDER / "convert_peers.py"), peer, "versions"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1][:120]
    told = json.loads(done.stdout.splitlines()[-1])
    if "versions" in told:
        print(f"{peer}: {told['versions']}\n", flush=True)
    return told.get("missing")


# ------------------------------------------------------------------------------------------------------------------ measuring


class Work:
    """A folder of our own, with one output at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "log"

    def clear(self) -> None:
        """Remove the last output. What of it was not on the disk yet is dropped with it."""
        for path in (self.out, *self.folder.glob("out.partial*")):
            shutil.rmtree(path, ignore_errors=True)

    def measure(self, contender: Contender, *, memory: bool) -> Cost:
        """One run, from the page cache. Its output stays."""
        self.clear()
        os.sync()
        for source in contender.reads:
            make_cached(source)
        return run(contender.command(self.out), log=self.log, memory=memory, environment=OURS, folder=self.folder)


def compare(
    contenders: Sequence[Contender], rounds: int, peer_rounds: int, work: Work, pythons: dict[str, str]
) -> dict[str, Measured]:
    """All in turn."""
    results = {
        c.name: Measured(error=missing(c.name, pythons.get(c.name)) if c.peer else None, limit=c.limit) for c in contenders
    }
    for round_ in range(rounds + (rounds > 1)):
        for contender in contenders:
            result = results[contender.name]
            first = round_ == 0
            if result.error is None and not (contender.peer and round_ >= peer_rounds):
                keep = not first or rounds == 1 or contender.peer
                _take(result, contender, work, round_, memory=first, keep_time=keep)
    work.clear()
    return results


def _take(result: Measured, contender: Contender, work: Work, round_: int, *, memory: bool, keep_time: bool) -> None:
    try:
        cost = work.measure(contender, memory=memory)
    except RuntimeError as error:
        print(f"  {contender.name}: {error}", file=sys.stderr, flush=True)
        result.error = f"failed: {str(error).strip().splitlines()[-1][:120]}"
        return
    print(f"  round {round_ + 1}, {contender.name}: {cost.wall:.2f} s", file=sys.stderr, flush=True)
    if contender.peer:
        result.told.append(json.loads(work.log.read_text().splitlines()[-1])["wall"])
    if memory:
        result.memory = cost
        wrong = contender.check(work.out) if contender.check else None
        if wrong is not None:
            raise SystemExit(f"{contender.name} made other weights: {wrong}")
    if keep_time:
        result.costs[round_] = cost


def print_results(results: dict[str, Measured], gigabytes: float, bare: int) -> None:
    """The table."""

    def row(name: str, result: Measured) -> list[object]:
        if result.error is not None:
            return [name, result.error, *["-"] * 5]
        wall, cpu, peak, against = result.wall, result.cpu, result.peak, result.against(results.get(result.limit or ""))
        assert wall is not None
        assert cpu is not None
        assert peak is not None
        told = f" ({Spread.of(result.told)} inside)" if result.told else ""
        memory = ["-", "-"] if result.limit is None else [f"{peak / MIB:,.1f}", f"{(peak - bare) / MIB:,.1f}"]
        return [
            name,
            f"{wall.median:.3g}{told}",
            against or "-",
            cpu,
            f"{cpu.median / gigabytes:.3g}",
            *memory,
        ]

    headers = ("contender", "wall s", "/ limit of the same round", "CPU-s", "CPU-s / GB", "peak MiB", "above bare Python")
    print_table(headers, [[row(name, result) for name, result in results.items()]])
    print()


def bare_interpreter(work: Work) -> int:
    """Peak resident bytes of one that does nothing, from itself: what the kernel tells of a child begins with its parent's size."""
    run([sys.executable, "-c", "print(open('/proc/self/status').read())"], log=work.log, memory=False)
    found = re.search(r"^VmHWM:\s+(\d+) kB", work.log.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def targets(verb: str, results: dict[str, Measured], bare: int) -> Iterator[tuple[str, str, str, str]]:
    """(what, measured, target, met or missed by how much)."""
    for name, most in LIMITS[verb].items():
        against = results[name].against(results[CP])
        if against is not None:
            yield _judged(f"{verb}, {name}: wall / `cp -r`", against.median, most, "{:.2f}")
    peak = results[ONE].peak
    if peak is not None:
        yield _judged(f"{verb}, {ONE}: MiB above a bare interpreter", (peak - bare) / MIB, MORE_MEMORY / MIB, "{:.1f}")
    peers = {name: Spread.of(results[name].told).median for name in PEERS if results[name].told}
    mine = results[ONE].wall
    if peers and mine is not None:
        fastest = min(peers, key=lambda name: peers[name])
        times = peers[fastest] / mine.median
        verdict = "met" if times >= FASTER else f"missed: {times / FASTER:.2f} of it"
        yield f"{verb}, {ONE}: times as fast as {fastest} (inside)", f"{times:.1f}", f"at least {FASTER:g}", verdict


def _judged(what: str, found: float, most: float, form: str) -> tuple[str, str, str, str]:
    verdict = "met" if found <= most else f"missed: {found / most:.2f} of it"
    return what, form.format(found), f"at most {form.format(most)}", verdict


# ------------------------------------------------------------------------------------------------------------------ the parts


def measure_import(hf: Path, reference: Path, given: argparse.Namespace, work: Work) -> dict[str, Measured]:
    """HF folder -> torch_dist folder. `reference` is such a one whose weights have been compared with `hf`."""
    rows = [
        *copies(hf),
        *of_ours(
            "import", hf, lambda out: same_weights(reference, out), one="--workers 1 --no-fsync", two="--workers 2 --no-fsync"
        ),
        *of_ours("import", hf, lambda out: same_weights(reference, out), one="--workers 1", two="--workers 2"),
        *of_ours("import", hf, lambda out: same_weights(reference, out), checksum="--workers 1 --no-fsync --checksum"),
        *of_ours("import", hf, _exported(hf, work), tp="--workers 1 --no-fsync --chunks-for-tp 4"),
        *of_ours("import", hf, _exported(hf, work), fp32="--workers 1 --no-fsync --dtype fp32"),
        *of_peers("import", given.peers, hf, hf, _exported(hf, work, "--config", hf)),
    ]
    return compare(rows, given.rounds, given.peer_rounds, work, given.peers)


def _exported(hf: Path, work: Work, *flags: object) -> Check:
    """Exports a torch_dist folder in bf16 and compares its tensors with `hf`."""

    def check(out: Path) -> str | None:
        again = work.folder / "again"
        try:
            run(
                ours("export", out, again, "--no-fsync", "--dtype", "bf16", *flags),
                log=work.log,
                memory=False,
                environment=OURS,
                folder=work.folder,
            )
            return difference(hf, again)
        finally:
            shutil.rmtree(again, ignore_errors=True)

    return check


def measure_export(hf: Path, reference: Path, given: argparse.Namespace, work: Work) -> dict[str, Measured]:
    """Torch_dist folder -> HF folder."""
    split = work.folder / "split"
    run(
        ours("import", hf, split, "--chunks-for-tp", 4, "--no-fsync"),
        log=work.log,
        memory=False,
        environment=OURS,
        folder=work.folder,
    )
    flags = {"one": "--workers 1 --no-fsync", "two": "--workers 2 --no-fsync", "synced": "--workers 1", "both": "--workers 2"}

    def check(out: Path) -> str | None:
        return difference(hf, out)

    from_split = Contender(
        "1 process, `--no-fsync`, of a folder split for TP 4",
        _ours_with("export", split, "--no-fsync"),
        (split,),
        CP,
        check,
    )
    rows = [
        *copies(reference),
        *of_ours("export", reference, check, **flags, checksum="--workers 1 --no-fsync --checksum"),
        from_split,
        *of_ours("export", reference, lambda out: difference(hf, out, fp8=True), fp8="--workers 1 --no-fsync --quantize fp8"),
        *of_ours("export", reference, lambda out: difference(hf, out, fp8=True), fp8="--workers 2 --no-fsync --quantize fp8"),
        *of_peers("export", given.peers, reference, hf, check),
    ]
    results = compare(rows, given.rounds, given.peer_rounds, work, given.peers)
    shutil.rmtree(split)
    return results


def measure_verify(hf: Path, reference: Path, given: argparse.Namespace, work: Work) -> dict[str, Measured]:
    """Both folders compared; the limit reads both."""
    both = (hf, reference)
    read = 'cat "$1"/* "$2"/*.distcp >/dev/null'
    rows = [
        Contender("reading both", lambda _: ["sh", "-c", read, "sh", *map(str, both)], both, None),
        Contender("`convert verify`", lambda _: ours("verify", *both), both, "reading both"),
    ]
    return compare(rows, given.rounds, 0, work, {})


def measure_plan(given: argparse.Namespace, work: Work, bare: int) -> Iterator[tuple[object, ...]]:
    """`--dry-run` of sparse checkpoints with the sizes of Llama-3.1."""
    for size in given.planned:
        folder = write_model(work.folder / "sparse", size, sparse=True)
        command = ours("import", folder, work.out, "--dry-run")
        costs = [run(command, log=work.log, environment=OURS) for _ in range(given.rounds)]
        wall, cpu = (Spread.of([getattr(cost, what) for cost in costs]) for what in ("wall", "cpu"))
        above = (max(cost.largest for cost in costs) - bare) / MIB
        verdict = "met" if wall.median < PLAN_SECONDS else f"missed: {wall.median / PLAN_SECONDS:.2f} of it"
        yield f"{size}, {tensor_bytes(size) / 1e9:,.0f} GB", wall, cpu, f"{above:.1f}", verdict
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------------ all of it


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--peers", default=os.environ.get("CONVERT_PEERS", ""), metavar="NAME=EXE,...")
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--planned", default=",".join(PLANNED), help="sizes of which the plan is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    given = parser.parse_args()
    given.only, given.planned = given.only.split(","), given.planned.split(",")
    given.peers = dict(pair.split("=", 1) for pair in given.peers.split(",") if "=" in pair)
    for told, known in ((given.only, PARTS), (given.planned, SIZES), (given.peers, PEERS)):
        if unknown := set(told) - set(known):
            parser.error(f"there is no {unknown.pop()!r}; there are {', '.join(known)}")
    return given


def main() -> int:
    """Measure and print."""
    given = arguments()
    print(f"## Converters\n\n`{harness.command_line()}`\n\n{harness.machine()}\n")
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=given.work) as folder:
        failed = measure(given, Work(Path(folder)))
    print(f"load {os.getloadavg()[0]:.1f} when it ended")
    return 1 if failed else 0


def measure(given: argparse.Namespace, work: Work) -> list[str]:
    """All parts that were asked for. Who failed."""
    failed: list[str] = []
    judged: list[tuple[str, str, str, str]] = []
    bare = bare_interpreter(work)
    gigabytes = tensor_bytes(given.size) / 1e9
    print(f"A bare interpreter: {bare / MIB:.1f} MiB. The model: {gigabytes:.2f} GB of bf16.\n")
    parts: dict[str, Callable[[Path, Path, argparse.Namespace, Work], dict[str, Measured]]] = {
        "import": measure_import,
        "export": measure_export,
        "verify": measure_verify,
    }
    if set(given.only) & set(parts):
        hf, reference = write_model(work.folder / "hf", given.size), work.folder / "reference"
        run(
            ours("import", hf, reference, "--no-fsync", "--checksum"),
            log=work.log,
            memory=False,
            environment=OURS,
            folder=work.folder,
        )
        if wrong := _exported(hf, work)(reference):
            raise SystemExit(f"import and export changed the weights: {wrong}")
    for verb, part in parts.items():
        if verb in given.only:
            print(f"### {verb.capitalize()}\n", flush=True)
            results = part(hf, reference, given, work)
            print_results(results, gigabytes, bare)
            failed += [name for name, result in results.items() if (result.error or "").startswith("failed")]
            judged += targets(verb, results, bare) if verb in LIMITS else ()
    if "plan" in given.only:
        print("### The plan of large checkpoints: `convert import --dry-run` of sparse files\n", flush=True)
        headers = ("model", "wall s", "CPU-s", "MiB above bare Python", f"target: less than {PLAN_SECONDS:g} s")
        print_table(headers, ([row] for row in measure_plan(given, work, bare)))
        print()
    if judged:
        print("### Targets\n")
        print_table(("what", "measured", "target", ""), [judged])
        print()
    return failed


if __name__ == "__main__":
    sys.exit(main())
