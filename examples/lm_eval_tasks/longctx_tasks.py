"""Samples for lm-evaluation-harness, made offline by `mcore_longctx.tasks`: needles, RULER-like tasks, choices, perplexity.

The YAML files beside this one name the functions below as `custom_dataset`. lm-eval calls them with what stands in `--metadata`, in
`dataset_kwargs` of the YAML file, and in `--model_args` (where `pretrained` is the folder of the model). Meaning of the keys: README.md.
Needs mcore-longctx and datasets; no torch, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from mcore_longctx.data.documents.readers import read_texts
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.tasks import Haystack, RulerTexts, make_needle_sample, make_ruler_sample, needle_depths, score_ruler
from mcore_longctx.tasks.choices import make_choice_question

HELD_OUT = Path(__file__).resolve().parents[1] / "documents" / "heldout"
BEGIN = (0,)  # room for the begin token that a backend may put before the prompt; it is cut off again

Made = tuple[Sequence[int], int, dict[str, Any]]  # tokens of a prompt, how many its answer takes, the rest of its row


class TextTokenizer:
    """A tokenizer.json (or tokenizer.model) as the tasks want it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end tokens."""
        return self._tokenizer.encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids))


def needle(max_gen_toks: int, **settings: Any) -> dict[str, datasets.Dataset]:
    """A pass key at every depth of held-out text. `max_gen_toks`: tokens that the backend decodes."""
    tokenizer, seed, haystack = _tokenizer(settings), _seed(settings), _haystack(settings)
    _check_unique(haystack, settings)
    rows = []
    for length in _lengths(settings):
        for depth in needle_depths(_count(settings, "depths", 5)):
            for index in range(_count(settings, "samples", 5)):

                def made(room: int, depth: float = depth, index: int = index) -> Made:
                    sample = make_needle_sample(
                        haystack, tokenizer, seed=seed, length=room, depth=depth, index=index, digits=7, prefix=BEGIN
                    )
                    row = {"expected": [sample.value], "match": "all", "depth": sample.depth, "index": index}
                    return sample.tokens[: sample.answer_start], len(sample.tokens) - sample.answer_start, row

                rows.append(_fitting(made, length, max_gen_toks, tokenizer, task="needle"))
    return {"test": datasets.Dataset.from_list(rows)}


def ruler(task: str, max_gen_toks: int, **settings: Any) -> dict[str, datasets.Dataset]:
    """One of the 13 RULER-like tasks. `max_gen_toks`: tokens that the backend decodes."""
    tokenizer, seed, texts = _tokenizer(settings), _seed(settings), _checked_texts(settings)
    rows = []
    for length in _lengths(settings):
        for index in range(_count(settings, "samples", 25)):

            def made(room: int, index: int = index) -> Made:
                sample = make_ruler_sample(task, texts, tokenizer, seed=seed, length=room, index=index, prefix=BEGIN)
                row = {"expected": list(sample.expected), "match": sample.match, "index": index}
                return sample.tokens, len(sample.answer), row

            rows.append(_fitting(made, length, max_gen_toks, tokenizer, task=f"ruler_{task}"))
    return {"test": datasets.Dataset.from_list(rows)}


def choices(**settings: Any) -> dict[str, datasets.Dataset]:
    """Short questions with four options: skills that a longer context must not cost."""
    rows = []
    for index in range(_count(settings, "questions", 200)):
        question = make_choice_question(seed=_seed(settings), index=index)
        rows.append(
            {"prompt": question.prompt, "options": list(question.options), "answer": question.answer, "kind": question.kind}
        )
    return {"test": datasets.Dataset.from_list(rows)}


def perplexity(**settings: Any) -> dict[str, datasets.Dataset]:
    """Held-out text in windows of each length, one after the other."""
    tokenizer, count = _tokenizer(settings), _count(settings, "windows", 8)
    tokens = [token for text in _texts(settings) for token in tokenizer.encode(text)]
    rows = []
    for length in _lengths(settings):
        body = length - len(BEGIN)
        if len(tokens) < count * body:
            raise DataError(
                f"{len(tokens):,} tokens of held-out text; {count} windows of {length:,} need {count * body:,}",
                where="haystack",
                fix="give more text (--metadata haystack) or fewer windows",
            )
        rows += [{"text": tokenizer.decode(tokens[at : at + body]), "length": length} for at in range(0, count * body, body)]
    return {"test": datasets.Dataset.from_list(rows)}


def recall(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Share of the expected strings that the answer holds: over all lengths, and by length."""
    score = score_ruler(doc["expected"], doc["match"], results[0])
    return {"recall": score, str(doc["length"]): score}


def _fitting(
    make: Callable[[int], Made], length: int, max_gen_toks: int, tokenizer: TextTokenizer, *, task: str
) -> dict[str, Any]:
    """The row of a sample whose prompt as text, tokenised again by whoever is asked, leaves `max_gen_toks` tokens free.

    Raises:
        DataError: the answer takes more than these: a right one would be cut off.
    """
    room = length
    for _ in range(8):
        tokens, answer, row = make(room)
        if answer > max_gen_toks:
            raise DataError(
                f"an answer takes {answer} tokens with this tokenizer, max_gen_toks is {max_gen_toks}",
                where=f"longctx_{task}",
                fix="raise max_gen_toks in the task's YAML file",
            )
        prompt = tokenizer.decode(tokens[len(BEGIN) :])
        excess = len(BEGIN) + len(tokenizer.encode(prompt)) + max_gen_toks - length
        if excess <= 0:
            return {"prompt": prompt, "length": length, **row}
        room -= excess
    raise DataError(f"a prompt of {length:,} tokens becomes longer as text, however short it is made", where="tokenizer")


def _tokenizer(settings: dict[str, Any]) -> TextTokenizer:
    folder = next((settings[key] for key in ("tokenizer", "pretrained", "model") if settings.get(key)), None)
    if folder is None or not Path(folder).exists():
        raise ConfigError(
            f"no folder with a tokenizer: {folder}" if folder else "no tokenizer is named",
            where="lm-eval",
            fix="""pass --model_args pretrained=FOLDER, or --metadata '{"tokenizer": "FOLDER"}'""",
        )
    return TextTokenizer(Path(folder))


def _texts(settings: dict[str, Any]) -> list[str]:
    return list(read_texts(Path(settings.get("haystack") or HELD_OUT)))


def _haystack(settings: dict[str, Any]) -> Haystack:
    return Haystack.from_documents(_texts(settings), _tokenizer(settings), where=settings.get("haystack") or HELD_OUT)


def _checked_texts(settings: dict[str, Any]) -> RulerTexts:
    """Texts that refuse to be read when they are short. Tasks that make their whole context do not read them."""

    class Checked(RulerTexts):
        def of(self, index: int) -> Haystack:
            haystack = super().of(index)
            _check_unique(haystack, settings)
            return haystack

    return Checked(_haystack(settings))


def _check_unique(haystack: Haystack, settings: dict[str, Any]) -> None:
    """Refuse a text that samples of the longest length would repeat: a model ignores what it has seen before, and finds the rest."""
    there, longest = len(haystack.tokens), _lengths(settings)[-1]
    if there < longest:
        raise DataError(
            f"{there:,} tokens of text: a sample of {longest:,} would hold them {longest / there:.1f} times, "
            f"{1 - there / longest:.0%} of it repeated",
            where=f"haystack: {settings.get('haystack') or HELD_OUT}",
            fix="give more text (--metadata haystack), or ask for shorter lengths",
        )


def _lengths(settings: dict[str, Any]) -> list[int]:
    lengths = settings.get("max_seq_lengths", [4096])
    _require(
        isinstance(lengths, list) and bool(lengths) and all(type(length) is int and length > 0 for length in lengths),
        "max_seq_lengths",
        lengths,
        "a list of numbers of tokens, such as [4096, 131072]",
    )
    return sorted(set(lengths))


def _count(settings: dict[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    _require(type(value) is int and value > 0, name, value, "a number of at least 1")
    return int(value)


def _seed(settings: dict[str, Any]) -> int:
    value = settings.get("seed", 1234)
    _require(type(value) is int, "seed", value, "a whole number")
    return int(value)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, expected {wanted}", where="--metadata")
