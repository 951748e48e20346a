"""What a sample of an evaluation task costs: CPU-seconds and growth of the process's resident memory, by task and length.

python tools/bench/tasks.py [--tokenizer FOLDER] [--text FOLDER] [--lengths 1M,4M]

The haystack is the source code of Python's standard library (or the .py, .md and .txt files of --text), tokenized once into a cache
file; every sample is made in a process of its own that maps the file. The tokenizer is one of --tokenizer's, else a byte-level BPE
with Llama 3's split rule that is trained here on a part of the text: 8,192 entries, so about 3 characters a token.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from harness import Case, command_line, compare, lengths, machine, print_table, short
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.tasks import (
    RULER_TASKS,
    Haystack,
    RulerTexts,
    cached_haystack,
    make_needle_sample,
    make_ruler_sample,
    make_shared_needles,
    needle_depths,
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEEDLES = ("needle passkey", "needle sentence", "needles shared, 20 depths")
ANY_VOCABULARY = 10**9


def read_texts(folder: Path) -> list[str]:
    """Sources of a folder, in the order of their names."""
    paths = sorted(path for kind in ("*.py", "*.md", "*.txt") for path in folder.rglob(kind) if "site-packages" not in path.parts)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text.strip() and "\ufffd" not in text]


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """A tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[::20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def open_cached(texts: Path, tokenizer: EvaluationTokenizer, cache: Path) -> Haystack:
    """The haystack of a folder of texts."""
    return cached_haystack(read_texts(texts), tokenizer, tokenizer_sha256=tokenizer.sha256, folder=cache)


def setup(task: str, length: int, tokenizer_folder: str, path: str) -> SimpleNamespace:
    """One sample of a task in this process."""
    from mcore_longctx.tasks import open_haystack

    tokenizer = EvaluationTokenizer(Path(tokenizer_folder), ANY_VOCABULARY)
    haystack = open_haystack(Path(path))
    facts: dict[str, object] = {}
    common = {"seed": 1, "length": length, "index": 0, "prefix": tokenizer.prefix}

    def step() -> None:
        if task in RULER_TASKS:
            sample = make_ruler_sample(task, RulerTexts(haystack), tokenizer, **common)
            facts["fill"] = f"{(len(sample.tokens) + sample.reserve) / length:.4f}"
            facts["unique"] = f"{sample.unique_share:.3g}"
        elif task == NEEDLES[2]:
            shared = make_shared_needles(haystack, tokenizer, depths=needle_depths(20), digits=7, **common)
            longest = max(len(needle.suffix) for needle in shared.needles)
            facts["fill"], facts["unique"] = f"{(len(shared.tokens) + longest) / length:.4f}", f"{shared.unique_share:.3g}"
        else:
            needle = make_needle_sample(haystack, tokenizer, depth=0.5, digits=7, kind=task.split()[1], **common)
            facts["fill"], facts["unique"] = f"{len(needle.tokens) / length:.4f}", f"{needle.unique_share:.3g}"

    return SimpleNamespace(step=step, facts=lambda: facts)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--lengths", type=lengths, default=lengths("1M,4M"))
    parser.add_argument("--tasks", nargs="*", default=[*NEEDLES, *RULER_TASKS])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.tokenizer
        if folder is None:
            folder = Path(scratch)
            train_tokenizer(read_texts(options.text), folder)
        tokenizer = EvaluationTokenizer(folder, ANY_VOCABULARY)
        began = time.process_time()
        haystack = open_cached(options.text, tokenizer, Path(scratch))
        made = time.process_time() - began
        (path,) = Path(scratch).glob("haystack-*.tokens")
        began = time.process_time()
        open_cached(options.text, tokenizer, Path(scratch))
        print(f"`{command_line()}`\n\n{machine()}\n")
        print(
            f"haystack: {len(haystack.tokens):,} tokens, {len(haystack.line_starts):,} starts of lines, "
            f"{len(haystack.sentence_starts):,} of sentences; read, tokenized and written in {made:.1f} CPU-s, "
            f"read, found and checked in {time.process_time() - began:.2f} CPU-s\n"
        )

        def rows() -> object:
            for length in options.lengths:
                cases = {task: Case(setup, (task, length, str(folder), str(path))) for task in options.tasks}
                for task, result in compare(cases, rounds=options.rounds, say=False).items():
                    grown = None if result.resident_bytes is None else f"{result.resident_bytes / 1e6:.0f}"
                    yield [(task, short(length), result.error or str(result.spread), grown, *map(str, result.facts.values()))]

        print_table(("task", "length", "CPU-s", "resident memory grows by MB", "fill", "unique share"), rows())


if __name__ == "__main__":
    main()
