"""Which tokens a long training moved most: two models on one text (LongRecipe, arXiv 2409.00509, section 4.1).

With H the model before and H' after long training, the offset of a place of the text is the difference of the log-probabilities of
the token that stands there (logits, up to a constant of the place that says nothing about the token). Token types are ranked by the
mean of its absolute value; the first 20 % are impactful. The paper then found that numerals dominate them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_longctx.data.methods.sentences import write_offsets
from mcore_longctx.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from mcore_longctx.errors import CheckpointError, ConfigError, DataError
from mcore_longctx.evaluate.held_out import read_documents
from mcore_longctx.evaluate.logits import check_memory
from mcore_longctx.evaluate.model_sources import ModelSource, RunningModel, read_source, running

__all__ = ["measure_token_offsets"]

Ids = npt.NDArray[np.int64]

_LEAST_WINDOW = 2
_ROWS = 256  # whose probabilities are summed at once


def measure_token_offsets(
    before: Path,
    after: Path,
    text: Path,
    out: Path,
    *,
    window: int = 2048,
    most_tokens: int = 1 << 20,
    share: float = 0.2,
    least: int = 5,
    config: Path | None = None,
) -> dict[str, Any]:
    """Write the table of token types by offset to `out`; its contents.

    Both models run in float32, in one process, one after the other.

    Args:
        before: torch_dist checkpoint with its card, or Hugging Face folder of safetensors; with the tokenizer.
        after: as `before`, the same model after long training.
        text: file or folder of documents; they are cut in windows, of which neither model sees more at once.
        out: JSON file to write.
        window: tokens.
        most_tokens: of the text that are used.
        share: of the ranked types that are impactful.
        least: places that a type needs to be ranked.
        config: config.json of the model, or its folder, for a torch_dist checkpoint without a card.

    Raises:
        ConfigError: a window that no model takes, a share that is none, or a model that does not fit into memory.
        CheckpointError: a folder cannot be read, or the two have different vocabularies, or tokenizers that cut the text differently.
        DataError: the text or the tokenizer cannot be read, or the text is too short.
    """
    if not 0.0 < share <= 1.0:  # not for nan either; seen before the models run
        raise ConfigError(f"share is {share}, expected more than 0, at most 1", where="token-offsets")
    sources = read_source(before, config), read_source(after, config)
    if sources[0].shape.vocab_size != sources[1].shape.vocab_size:
        raise CheckpointError(
            f"vocabulary has {sources[1].shape.vocab_size:,} entries, that of {before} {sources[0].shape.vocab_size:,}",
            where=after,
        )
    longest = min(source.rope.resolved_max_position_embeddings or window for source in sources)
    if not _LEAST_WINDOW <= window <= longest:
        raise ConfigError(f"window is {window:,}, expected {_LEAST_WINDOW} to {longest:,}", where="token-offsets")
    tokenizer = load_tokenizer(sources[0].tokenizer_folder)
    check_vocabulary(tokenizer, sources[0].shape.vocab_size)
    for source in sources:
        check_memory(source)
    documents = _documents(tokenizer.encode, text, most_tokens)
    _check_same_tokens(tokenizer, sources[1], documents)
    windows = _windows([ids for _, ids in documents], text, window)
    found = [_scores(source, windows, window) for source in sources]
    tokens = np.concatenate([ids[1:] for ids in windows])
    offset = (found[1] - found[0]).abs().numpy()
    if not np.isfinite(offset).all():
        raise CheckpointError("its log-probabilities are not finite", where=after, fix="check the checkpoint")
    vocabulary = sources[0].shape.vocab_size
    return write_offsets(
        out,
        count=np.bincount(tokens, minlength=vocabulary),
        total=np.bincount(tokens, offset, vocabulary).astype(np.float64),
        share=share,
        least=least,
        tokenizer_sha256=tokenizer.sha256,
        facts={
            "before": str(before),
            "after": str(after),
            "text": str(text),
            "window": window,
            "tokens": len(tokens),
            "mean_offset": float(offset.mean()),
        },
    )


def _documents(encode: Any, text: Path, most: int) -> list[tuple[str, Ids]]:
    """The documents and their ids, `most` ids in all; the last document may have more text than ids."""
    documents, left = [], most
    for document in read_documents(text):
        ids = encode(document)[:left].astype(np.int64)
        left -= len(ids)
        documents.append((document, ids))
        if not left:
            break
    return documents


def _check_same_tokens(tokenizer: Tokenizer, after: ModelSource, documents: list[tuple[str, Ids]]) -> None:
    """Refuse a model with a tokenizer that gives other ids for this text. One without a tokenizer is taken to have the same."""
    folder = after.tokenizer_folder
    if not any(path for name in ("tokenizer.json", "*.model", "*.tiktoken") for path in folder.glob(name)):
        return
    other = load_tokenizer(folder)
    if other.sha256 == tokenizer.sha256:
        return
    for number, (document, ids) in enumerate(documents):
        theirs = other.encode(document)
        if not np.array_equal(theirs[: len(ids)], ids) or (number + 1 < len(documents) and len(theirs) != len(ids)):
            raise CheckpointError(
                f"its tokenizer gives other tokens for document {number + 1:,} of the text than {tokenizer.path}",
                where=other.path,
                fix="compare a model with itself after training, with one tokenizer",
            )


def _windows(documents: list[Ids], text: Path, window: int) -> list[Ids]:
    """Ids of the documents in windows, each of one document; one of a single token predicts nothing and is left out."""
    windows = [
        part for ids in documents for at in range(0, len(ids), window) if len(part := ids[at : at + window]) >= _LEAST_WINDOW
    ]
    if not windows:
        raise DataError("holds fewer than two tokens", where=text, fix="give a longer text")
    return windows


def _scores(source: ModelSource, windows: list[Ids], window: int) -> Tensor:
    """Log-probability of each token of the windows but their first ones, float64."""
    with running(source, window) as model:
        return torch.cat([_window_scores(model, torch.from_numpy(ids)) for ids in windows])


def _window_scores(model: RunningModel, ids: Tensor) -> Tensor:
    logits = model.logits(ids, torch.arange(len(ids)))[:-1]
    rows = zip(logits.split(_ROWS), ids[1:].split(_ROWS), strict=True)
    return torch.cat([part.double().log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1) for part, label in rows])
