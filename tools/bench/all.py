"""Every benchmark of this machine, one after the other, into one Markdown file.

python tools/bench/all.py                     the GPU's where there is one, else the CPU's
python tools/bench/all.py --out FILE --only layer,longest

A benchmark that fails leaves what it printed in the file, and the exit code is 1; the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
BENCHMARKS = ("loss", "tiled_mlp", "layer", "longest", "context_parallel", "decode", "tasks", "rope", "data", "save", "startup")
GPU_TESTS = "gpu_tests"


def run(name: str, arguments: list[str], out: IO[str]) -> bool:
    """Let a benchmark print into the file. Whether it came to its end; its progress goes to stderr."""
    began = time.monotonic()
    is_text = name in (GPU_TESTS, "startup")  # no Markdown
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    if name == GPU_TESTS:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--tb=short", str(ROOT / "tests")]
    out.write(f"## `{' '.join(['python', *command[1:]]).replace(f'{ROOT}/', '')}`\n\n```\n" if is_text else "")
    out.flush()
    code = subprocess.run(command, stdout=out, check=False, cwd=ROOT).returncode
    minutes = (time.monotonic() - began) / 60
    out.write("```\n" if is_text else "")
    out.write(f"\n**{name} ended with exit code {code}.**\n" if code else "")
    out.write(f"\n({minutes:.1f} minutes)\n\n")
    print(f"{name}: {'done' if code == 0 else f'exit code {code}'} in {minutes:.1f} min", file=sys.stderr, flush=True)
    return code == 0


def main() -> int:
    """Run, write, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*BENCHMARKS, GPU_TESTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks.md"))
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(names), help=f"some of {','.join(names)}")
    parser.add_argument("arguments", nargs="*", help="for each of them, behind --")
    given = parser.parse_args()
    unknown = set(given.only) - set(names)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    all_done = True
    with given.out.open("w") as out:  # written as it comes: hours of measuring are not lost to the last minute
        out.write("# Benchmarks of one machine\n\n")
        for name in given.only:
            all_done &= run(name, given.arguments, out)
    print(f"written: {given.out}")
    return 0 if all_done else 1


if __name__ == "__main__":
    sys.exit(main())
