"""Questions that can be answered without their document teach nobody to read it: they are dropped; the paper does not check."""

from __future__ import annotations

import re

__all__ = ["answerable_without", "same_answer"]

_GUESSED = {"yes", "no", "true", "false", "none"}


def answerable_without(question: str, answer: str) -> bool:
    """The rule that needs no model: the answer stands in the question, is guessed easily, or says nothing."""
    words = _words(answer)
    return not words or words in _GUESSED or f" {words} " in f" {_words(question)} "


def same_answer(given: str, expected: str) -> bool:
    """Whether an answer that was given without the document holds the expected one, but for case, spaces and punctuation."""
    return f" {_words(expected)} " in f" {_words(given)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
