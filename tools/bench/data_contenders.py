"""Who tokenizes the corpus in `data.py`: the command of each, and where its documents are afterwards.

Every contender is handed the same bytes and writes token ids without anything at the end of a document. What it needs beside the
corpus (one file instead of five, a folder that transformers can read) is made before the clock starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_documents import Fingerprint, of_indexed, of_shards

__all__ = ["Contender", "Corpus", "datatrove", "megatron_fast", "megatron_slow", "ours", "raw"]

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer

corpus, tokenizer, out, logs = sys.argv[1:]
folder, _, name = corpus.rpartition("/")
LocalPipelineExecutor(
    pipeline=[
        JsonlReader(folder, glob_pattern=name),
        MegatronDocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token=None, batch_size=1000),
    ],
    tasks=1,
    logging_dir=logs,
).run()
"""


@dataclass(frozen=True)
class Corpus:
    """Documents as JSONL with "id" and "text": `parts` by source, and `whole`, the same lines in one file."""

    name: str
    parts: dict[str, Path]
    whole: Path
    tokenizer: Path  # tokenizer.json


@dataclass(frozen=True)
class Contender:
    """One way to tokenize a corpus.

    `command(out)` writes below `out`, a new empty folder; `documents(out)` reads what it wrote. `missing` says why there is no
    command. `told` is True for a command whose last line tells its cost and its documents itself.
    """

    name: str
    command: Callable[[Path], list[str]] = field(default=lambda _: [])
    documents: Callable[[Path], Fingerprint] = of_indexed
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    told: bool = False


def ours(corpus: Corpus, workers: int) -> Contender:
    """`mcore-longctx data tokenize`."""

    def command(out: Path) -> list[str]:
        sources = [f"{name}={path}" for name, path in corpus.parts.items()]
        flags = ["--tokenizer", str(corpus.tokenizer), "--workers", str(workers)]
        return [sys.executable, "-m", "mcore_longctx", "data", "tokenize", str(out / "run"), *flags, *sources]

    name = f"ours, {workers} worker{'s' if workers > 1 else ''}"
    return Contender(name, command, lambda out: of_shards(out / "run" / "tokens"), {"PYTHONPATH": str(ROOT)})


def raw(corpus: Corpus, kind: str) -> Contender:
    """The library alone: the limit."""

    def command(out: Path) -> list[str]:
        parts = [str(path) for path in corpus.parts.values()]
        return [sys.executable, str(FOLDER / "raw_tokenizer.py"), kind, str(corpus.tokenizer), *parts]

    return Contender(
        f"gigatoken alone, {kind} in memory", command, told=True, missing=_cannot_import(sys.executable, ["gigatoken"])
    )


def megatron_fast(corpus: Corpus, folder: Path | None, python: str | None, hf: Path) -> Contender:
    """Megatron-LM's `tools/preprocess_data_fast.py` (gigatoken)."""
    return _megatron(corpus, folder, python, hf, "preprocess_data_fast.py", ["--use-gigatoken"])


def megatron_slow(corpus: Corpus, folder: Path | None, python: str | None, hf: Path) -> Contender:
    """Megatron-LM's `tools/preprocess_data.py` (transformers) with one worker."""
    return _megatron(corpus, folder, python, hf, "preprocess_data.py", ["--workers", "1"])


def _megatron(corpus: Corpus, folder: Path | None, python: str | None, hf: Path, script: str, flags: list[str]) -> Contender:
    name = f"Megatron-LM, {script}"
    if folder is None or python is None:
        return Contender(name, missing="--megatron-lm and --python312 were not given")
    if not (folder / "tools" / script).is_file():
        return Contender(name, missing=f"no tools/{script} in {folder}")
    where = ["--input", str(corpus.whole), "--output-prefix"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf)]
    start = [python, str(folder / "tools" / script)]
    # its own megatron.core, not an installed one, which the script would prefer
    environment = {"PYTHONPATH": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    return Contender(
        name,
        lambda out: [*start, *where, str(out / "it"), *tokenizer, *flags],
        lambda out: of_indexed(out / "it_text_document"),
        environment,
        missing=_cannot_import(python, ["torch", "transformers", *(["gigatoken", "awkward"] if "fast" in script else [])]),
    )


def datatrove(corpus: Corpus, python: str | None) -> Contender:
    """Hugging Face's datatrove: `MegatronDocumentTokenizer`, one task, batches of 1,000 documents (its default of 10,000 takes more memory)."""
    name = "datatrove, MegatronDocumentTokenizer"
    if python is None:
        return Contender(name, missing="--datatrove-python was not given")

    def command(out: Path) -> list[str]:
        return [python, "-c", DATATROVE, str(corpus.whole), str(corpus.tokenizer), str(out / "it"), str(out / "logs")]

    def documents(out: Path) -> Fingerprint:
        (index,) = (out / "it").glob("*.idx")
        return of_indexed(index.with_suffix(""))

    return Contender(name, command, documents, missing=_cannot_import(python, ["datatrove", "tokenizers", "orjson"]))


def _cannot_import(python: str, packages: list[str]) -> str:
    """Why a Python will not do; empty if it will."""
    look = f"import importlib.util as u; print(*(name for name in {packages!r} if u.find_spec(name) is None))"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{python} does not run ({error})"
    lacking = found.stdout.split()
    return f"{python} has no {', '.join(lacking)}" if lacking else ""


def hf_folder(tokenizer: Path, folder: Path) -> Path:
    """A folder that `AutoTokenizer` reads as `tokenizer`, without the special tokens that it may put around a text."""
    spec = json.loads(tokenizer.read_bytes())
    spec["post_processor"] = None
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
