"""Every benchmark of this machine, one after the other, into one Markdown file.

python tools/bench/all.py                     the GPU's where there is one, else the CPU's
python tools/bench/all.py --out FILE --only layer,longest

A benchmark that fails leaves its last lines in the file, and the exit code is 1; the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
BENCHMARKS = ("loss", "tiled_mlp", "layer", "longest", "context_parallel", "rope", "startup")
GPU_TESTS = "gpu_tests"


def run(name: str, arguments: list[str]) -> tuple[str, bool]:
    """The Markdown that a benchmark printed, and whether it came to its end. Its progress goes to stderr."""
    began = time.monotonic()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    if name == GPU_TESTS:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--tb=short", str(ROOT / "tests")]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    text, minutes = ran.stdout.strip(), (time.monotonic() - began) / 60
    if name in (GPU_TESTS, "startup"):
        title = "Tests on a GPU: `pytest -m gpu`" if name == GPU_TESTS else "Start-up: `python tools/bench/startup.py`"
        text = f"## {title}\n\n```\n{chr(10).join(text.splitlines()[-40:])}\n```"
    print(
        f"{name}: {'done' if ran.returncode == 0 else f'exit code {ran.returncode}'} in {minutes:.1f} min",
        file=sys.stderr,
        flush=True,
    )
    if ran.returncode:
        text += f"\n\n**{name} ended with exit code {ran.returncode}.**"
    return f"{text}\n\n({minutes:.1f} minutes)", ran.returncode == 0


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
    all_done, parts = True, ["# Benchmarks of one machine\n"]
    for name in given.only:
        text, done = run(name, given.arguments)
        all_done &= done
        parts.append(text)
        given.out.write_text("\n\n".join(parts) + "\n")  # after each: hours of measuring are not lost to the last one
    print(f"written: {given.out}")
    return 0 if all_done else 1


if __name__ == "__main__":
    sys.exit(main())
