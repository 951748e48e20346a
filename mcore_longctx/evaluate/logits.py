"""Logits of two checkpoints, each built from its own files, compared up to the end of the context.

A torch_dist folder is built by Megatron from its tensors and its card, a Hugging Face folder by transformers from its config.json; the
two may be of either format, and the report says who read what. Rope is relative, so a shifted text proves nothing: two blocks of tokens
far apart, positions 0..31 and P..P+31 in one sequence, make the angles at P count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mcore_longctx.data.tokenizers import check_vocabulary, load_tokenizer
from mcore_longctx.errors import CheckpointError, ConfigError, DataError
from mcore_longctx.evaluate.model_sources import ModelSource, RunningModel, read_source, running

__all__ = [
    "BLOCK",
    "TEXT_TOLERANCE",
    "TOLERANCE",
    "LogitsReport",
    "PositionDifference",
    "TextDifference",
    "check_memory",
    "compare_logits",
]

BLOCK = 32
CONTIGUOUS = 256
TOLERANCE = 1e-5  # of the largest logit: float32 rounding of two programs; 0 to 4e-6 was measured
TEXT_TOLERANCE = 1e-5  # between mean log-probabilities, nats
_WINDOW, _WINDOWS = 512, 8  # of a text: tokens that are scored at once, and how many of these


@dataclass(frozen=True)
class PositionDifference:
    """How far the logits are apart on one sequence. `positions` in words; `scale` is the largest logit."""

    positions: str
    max_abs: float
    scale: float
    argmax_equal: float  # share of rows

    @property
    def relative(self) -> float:
        """Largest difference as a share of the largest logit."""
        return self.max_abs / self.scale if self.scale else inf


@dataclass(frozen=True)
class TextDifference:
    """Log-probabilities of the tokens of a text, nats: their means on either side, and the largest difference of a token."""

    tokens: int
    means: tuple[float, float]
    max_abs: float

    @property
    def close(self) -> bool:
        """Whether the means are within `TEXT_TOLERANCE`; NaN is not."""
        return abs(self.means[0] - self.means[1]) <= TEXT_TOLERANCE


@dataclass(frozen=True)
class LogitsReport:
    """What `compare_logits` found.

    `equal`: inverse frequencies bit for bit, attention factor and logits within `TOLERANCE`, and a text within `TEXT_TOLERANCE`.
    """

    first: Path
    second: Path
    readers: tuple[str, str]  # program and files
    ropes: tuple[str, str]
    inverse_frequencies_equal: bool
    attention_factors: tuple[float, float]
    differences: tuple[PositionDifference, ...]
    text_difference: TextDifference | None

    @property
    def equal(self) -> bool:
        """The verdict."""
        ours, theirs = self.attention_factors
        close = all(difference.relative <= TOLERANCE for difference in self.differences)  # NaN is not close
        factors = abs(ours - theirs) <= 1e-6 * abs(ours)
        return (
            self.inverse_frequencies_equal and factors and close and (self.text_difference is None or self.text_difference.close)
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form; what is not finite is null."""
        rows = [{**asdict(difference), "relative": difference.relative} for difference in self.differences]
        whole = {**asdict(self), "first": str(self.first), "second": str(self.second), "differences": rows}
        return {"equal": self.equal, **_finite(whole), "tolerance": TOLERANCE, "text_tolerance": TEXT_TOLERANCE}

    def text(self) -> str:
        """For people: who read what, the findings, the verdict last."""
        folders = zip((self.first, self.second), self.readers, self.ropes, strict=True)
        lines = [f"{folder}: built by {reader}; rope {rope}" for folder, reader, rope in folders]
        frequencies = "equal bit for bit" if self.inverse_frequencies_equal else "DIFFERENT"
        ours, theirs = self.attention_factors
        lines += [f"inverse frequencies in float32: {frequencies}", f"attention factor: {ours:.9g} and {theirs:.9g}"]
        lines += [
            f"logits at {difference.positions}: max difference {difference.max_abs:.2e} of {difference.scale:.3g} "
            f"({difference.relative:.1e}), same most probable token in {100 * difference.argmax_equal:.1f} % of the rows"
            for difference in self.differences
        ]
        if self.text_difference is not None:
            found = self.text_difference
            lines.append(
                f"log-probabilities of {found.tokens:,} tokens of text: means {found.means[0]:.6f} and {found.means[1]:.6f}, "
                f"largest difference {found.max_abs:.2e}"
            )
        within = f"within {TOLERANCE:g}" if self.equal else f"NOT within {TOLERANCE:g}"
        lines.append(f"{'equal' if self.equal else 'DIFFERENT'}: logits {within}")
        return "\n".join(lines)


def compare_logits(
    first: Path, second: Path, *, tokens: Sequence[int] | None = None, text: Path | None = None, config: Path | None = None
) -> LogitsReport:
    """Compare the logits of two checkpoints of either format in float32, in one process, one model in memory at a time.

    Args:
        first: torch_dist folder with its card, or Hugging Face folder of safetensors.
        second: as `first`.
        tokens: ids to feed, at least 256; None: pseudo-random ids, the same each time.
        text: UTF-8 file whose log-probabilities are compared, its first 4,096 tokens in windows of 512; tokenized by the tokenizer of
            `first`, or of `second` where it has none.
        config: config.json of the model, or its folder, for a torch_dist checkpoint without a card.

    Raises:
        ConfigError: transformers is not installed, ids outside the vocabulary, or a model that does not fit into memory.
        CheckpointError: one of the folders cannot be read, or they have different vocabularies.
        DataError: the text cannot be read, or there is no tokenizer for it.
    """
    sources = read_source(first, config), read_source(second, config)
    if sources[0].shape.vocab_size != sources[1].shape.vocab_size:
        raise CheckpointError(
            f"vocabulary has {sources[1].shape.vocab_size:,} entries, that of {first} {sources[0].shape.vocab_size:,}",
            where=second,
        )
    sequences = _sequences(sources, tokens)
    windows = [] if text is None else _windows(sources, text)
    for source in sources:
        check_memory(source)
    logits, log_probabilities, ropes = [], [], []
    for source in sources:
        with running(source, max(len(ids) for ids in [*(ids for ids, _, _ in sequences), *windows])) as model:
            logits.append([model.logits(ids, positions) for ids, positions, _ in sequences])
            log_probabilities.append([_log_probabilities(model, ids) for ids in windows])
            ropes.append((model.inverse_frequencies, model.attention_factor))
    return LogitsReport(
        first=first,
        second=second,
        readers=(sources[0].reader, sources[1].reader),
        ropes=(sources[0].rope.describe(), sources[1].rope.describe()),
        inverse_frequencies_equal=torch.equal(ropes[0][0], ropes[1][0]),
        attention_factors=(ropes[0][1], ropes[1][1]),
        differences=tuple(_difference(words, a, b) for (_, _, words), a, b in zip(sequences, *logits, strict=True)),
        text_difference=None if text is None else _text_difference(*(torch.cat(side) for side in log_probabilities)),
    )


def _difference(words: str, ours: Tensor, reference: Tensor) -> PositionDifference:
    return PositionDifference(
        words,
        (ours - reference).abs().max().item(),
        reference.abs().max().item(),
        (ours.argmax(-1) == reference.argmax(-1)).double().mean().item(),
    )


def _text_difference(ours: Tensor, theirs: Tensor) -> TextDifference:
    return TextDifference(len(ours), (ours.mean().item(), theirs.mean().item()), (ours - theirs).abs().max().item())


def _log_probabilities(model: RunningModel, ids: Tensor) -> Tensor:
    """Of each token but the first, float64 [s - 1]."""
    logits = model.logits(ids, torch.arange(len(ids)))[:-1]
    labels = ids[1:].unsqueeze(-1)
    # one row at a time in float64 would be slow, all rows at once large: the sum is what needs it
    return logits.gather(-1, labels).squeeze(-1).double() - torch.logsumexp(logits, -1).double()


def _sequences(sources: tuple[ModelSource, ModelSource], tokens: Sequence[int] | None) -> list[tuple[Tensor, Tensor, str]]:
    """(ids, positions, words) of each comparison: the beginning, and pairs of blocks up to the end of the context."""
    vocabulary = sources[0].shape.vocab_size
    if tokens is None:
        ids = torch.randint(vocabulary, (CONTIGUOUS,), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.tensor(list(tokens)[:CONTIGUOUS], dtype=torch.int64)
        if len(ids) < CONTIGUOUS or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ConfigError(f"logits are compared on at least {CONTIGUOUS} ids of 0 to {vocabulary - 1:,}", where="tokens")
    longest = max(source.rope.resolved_max_position_embeddings or CONTIGUOUS for source in sources)
    originals = {source.rope.original_max_position_embeddings or longest for source in sources}
    reach = min(CONTIGUOUS, longest)
    found = [(ids[:reach], torch.arange(reach), f"0..{reach - 1:,}")]
    starts = {longest // 2, longest * 9 // 10, longest - BLOCK} | {original - BLOCK // 2 for original in originals}
    first = torch.arange(BLOCK)
    for start in sorted(start for start in starts if BLOCK <= start <= longest - BLOCK):
        positions = torch.cat([first, first + start])
        found.append((ids[: 2 * BLOCK], positions, f"0..{BLOCK - 1} and {start:,}..{start + BLOCK - 1:,}"))
    return found


def _windows(sources: tuple[ModelSource, ModelSource], text: Path) -> list[Tensor]:
    """The ids of a text, a window at a time."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as UTF-8 text: {error}", where=text) from None
    tokenizer = None
    for source in sources:
        if tokenizer is None and any(
            (source.tokenizer_folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
        ):
            tokenizer = load_tokenizer(source.tokenizer_folder)
    if tokenizer is None:
        raise DataError(
            "no tokenizer.json and no tokenizer.model for the text",
            where=sources[0].tokenizer_folder,
            fix="put the tokenizer there",
        )
    check_vocabulary(tokenizer, sources[0].shape.vocab_size)
    ids = torch.from_numpy(tokenizer.encode(content[: 64 * _WINDOW * _WINDOWS]).astype("int64"))[: _WINDOW * _WINDOWS]
    longest = min(_WINDOW, *(source.rope.resolved_max_position_embeddings or _WINDOW for source in sources))
    windows = [window for window in ids.split(longest) if len(window) > 1]
    if not windows:
        raise DataError(f"holds {len(ids)} tokens, expected at least two", where=text)
    return windows


def check_memory(source: ModelSource) -> None:
    """Refuse what would be killed half way. Weights alone are counted."""
    needed, available = source.float32_bytes, int(psutil.virtual_memory().available)
    if needed > available:
        raise ConfigError(
            f"its logits need {needed / 1e9:,.1f} GB for the weights in float32, {available / 1e9:,.1f} GB of memory are available",
            where=source.folder,
            fix="compare on a larger machine, or the tensors alone, without --logits",
        )


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
