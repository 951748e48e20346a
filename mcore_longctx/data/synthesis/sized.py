"""Chats of a length in tokens: counted whole and exactly, with few countings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.data.documents.records import Chat, Place
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.sft import ChatEncoder
from mcore_longctx.errors import DataError

__all__ = ["Fitted", "Messages", "TokenCounter", "fit"]

Messages = list[dict[str, Any]]

_PROBE = 24  # rows more, from which the first guess is made
_MOST = 10  # countings of one chat
_FULL = 0.995  # of the length: not worth another counting


class TokenCounter:
    """Counts the tokens of chats as `data build` does: through the chat template of a tokenizer.

    Args:
        path: model folder or tokenizer.json.

    Raises:
        DataError: no tokenizer, no chat template, or one that cannot be learned from.
    """

    def __init__(self, path: Path) -> None:
        self.tokenizer = load_tokenizer(path, fast=False)
        self.encoder = ChatEncoder(self.tokenizer)
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
        self.encoder.encode(Chat("probe", turns, Place(str(path))))  # what would be refused later is refused now

    def render(self, messages: Messages) -> str:
        """The chat as text."""
        return self.encoder.render(messages, add_generation_prompt=False, where="chat")

    def __call__(self, messages: Messages) -> int:
        """Tokens of a whole chat."""
        return len(self.tokenizer.encode_chat(self.render(messages))[0])


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A chat of a size such that it has at most the wanted tokens."""

    messages: Messages
    tokens: int
    size: int
    countings: int


def fit(
    make: Callable[[int], Messages], count: Callable[[Messages], int], length: int, *, smallest: int, where: object
) -> Fitted:
    """The chat of the largest size found that has at most `length` tokens.

    Sizes are guessed from the tokens that a row costs, so a long chat is counted two or three times. Because questions change with
    the size, the last row or two may stay free.

    Args:
        make: chat of a size (rows, dictionaries); larger ones have more tokens, by and large.
        count: tokens of a chat.
        length: tokens at most.
        smallest: size.
        where: for messages.

    Raises:
        DataError: even the smallest is too long; the message says how long it is.
    """
    messages = make(smallest)
    best = Fitted(messages=messages, tokens=count(messages), size=smallest, countings=1)
    if best.tokens > length:
        raise DataError(
            f"a length of {length:,} tokens is too small, the smallest chat has {best.tokens:,}",
            where=where,
            fix="raise --length",
        )
    too_large: int | None = None
    size, a_row, countings = smallest + _PROBE, 0.0, 1
    while countings < _MOST:
        messages = make(size)
        tokens = count(messages)
        countings += 1
        a_row = max(1.0, (tokens - best.tokens) / (size - best.size))
        if tokens <= length:
            best = Fitted(messages=messages, tokens=tokens, size=size, countings=countings)
        else:
            too_large = size
        size = best.size + int((length - best.tokens) / a_row)
        if too_large is not None:
            size = min(size, too_large - 1)
        if size <= best.size or best.tokens >= _FULL * length:
            break
    return Fitted(messages=best.messages, tokens=best.tokens, size=best.size, countings=countings)
