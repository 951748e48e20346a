"""Solve many random samples of every RULER-like task from their text alone, and count those whose answer is the reference.

python tools/check_tasks.py [--tokenizer FOLDER] [--samples 1000] [--shortest 1K] [--longest 1M] [--text FOLDER]

Lengths are drawn log-uniformly (and never below a task's least), seeds and indices at random. Beside the answer it is checked that
prompt and reserve fit the length, that the answer's tokens read as the references, and that no two samples of a task share needles and
places. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.tasks import (
    RULER_TASKS,
    RulerTexts,
    TextTokenizer,
    cached_haystack,
    make_ruler_sample,
    ruler_minimum_length,
    solve_ruler,
)
from mcore_longctx.units import parse_count

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"


class Ordinary:
    """A tokenizer.json as the tasks need it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self.sha256 = self._tokenizer.sha256
        self._spelled = self._bytes_of_ids()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text."""
        return self._tokenizer.encode(text).tolist()

    def decode(self, ids: list[int]) -> str:
        """Their text."""
        if self._spelled is not None and len(ids) > 1000:
            return self._spelled[np.array(ids)].tobytes().decode(errors="replace")
        return self._tokenizer.decode(ids)

    def _bytes_of_ids(self) -> np.ndarray | None:
        """For a vocabulary of bytes, their values: the library's own decoding takes a microsecond a token."""
        size = self._tokenizer.vocab_size
        ids = [self._tokenizer.encode(chr(byte)).tolist() for byte in range(128)]
        if any(len(each) != 1 for each in ids) or size > 300:
            return None
        table = np.full(size, ord("?"), np.uint8)
        table[[each[0] for each in ids]] = range(128)
        return table


def check_task(task: str, texts: RulerTexts, tokenizer: TextTokenizer, samples: int, span: tuple[int, int]) -> tuple[str, bool]:
    """A line for a task, and whether all is right."""
    rng = random.Random(task)
    least = max(span[0], ruler_minimum_length(task, tokenizer))
    began = time.process_time()
    wrong: list[str] = []
    fills: list[float] = []
    seen: dict[tuple[object, ...], str] = {}
    tokens = longest = 0
    for _ in range(samples):
        length = round(math.exp(rng.uniform(math.log(least), math.log(span[1]))))
        seed, index = rng.randrange(2**31), rng.randrange(500)
        name = f"length {length} seed {seed} index {index}"
        sample = make_ruler_sample(task, texts, tokenizer, seed=seed, length=length, index=index)
        try:
            found: object = solve_ruler(task, tokenizer.decode(sample.tokens.tolist()))
        except ValueError as error:
            found = error
        if found != sample.expected:
            wrong.append(f"{name}: {found!r} instead of {sample.expected}")
        if tokenizer.decode(sample.answer.tolist()).strip() != ", ".join(sample.expected):
            wrong.append(f"{name}: the answer's tokens")
        if len(sample.tokens) + sample.reserve > length:
            wrong.append(f"{name}: too long")
        needles = tuple(sample.tokens[start : start + 40].tobytes() for start in sample.needle_starts)
        same = seen.setdefault((sample.expected, needles, sample.needle_starts, sample.haystack_start), name)
        if same != name:
            wrong.append(f"{name}: needle and place of {same}")
        if length >= 16 * least:
            fills.append((len(sample.tokens) + sample.reserve) / length)
        tokens, longest = tokens + len(sample.tokens), max(longest, length)
    fill = f"{min(fills):.4f}" if fills else "-"
    seconds = time.process_time() - began
    line = f"{task:<16} {samples - len(wrong):>5}/{samples}  {least:>6,} to {longest:>9,} tokens  least fill {fill}  "
    return "\n    ".join([line + f"{tokens / 1e6:.0f}M tokens in {seconds:.0f} CPU-s", *wrong[:3]]), not wrong


def main() -> int:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=TINY)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--shortest", type=parse_count, default=1024)
    parser.add_argument("--longest", type=parse_count, default=2**20)
    parser.add_argument("--tasks", nargs="*", default=RULER_TASKS)
    options = parser.parse_args()
    tokenizer = Ordinary(options.tokenizer)
    paths = [path for path in sorted(options.text.rglob("*.py")) if "site-packages" not in path.parts]
    documents = [
        text for path in paths if (text := path.read_text(encoding="utf-8", errors="replace")).isascii() and text.strip()
    ]
    right = True
    with tempfile.TemporaryDirectory() as cache:
        haystack = cached_haystack(documents, tokenizer, tokenizer_sha256=tokenizer.sha256, folder=Path(cache))
        for task in options.tasks:
            span = options.shortest, options.longest
            line, fine = check_task(task, RulerTexts(haystack), tokenizer, options.samples, span)
            print(line, flush=True)
            right = right and fine
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
