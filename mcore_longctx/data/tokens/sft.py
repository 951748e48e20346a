"""Chats through the chat template: tokens, and which of them are answers.

The template is the tokenizer's own Jinja source, rendered in a sandbox with the helpers that transformers gives it. What is an
answer follows from rendering alone: the conversation up to an answer, with the prompt that asks for it, must be the beginning of
the conversation up to and with the answer, and that the beginning of the whole. A template for which this does not hold (it
rewrites earlier turns) is refused, because a mask guessed from the text would be wrong silently.
"""

from __future__ import annotations

import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
import numpy.typing as npt
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mcore_longctx.data.documents.readers import Chat
from mcore_longctx.data.tokenizers import Tokenizer
from mcore_longctx.errors import DataError

__all__ = ["ChatEncoder"]

Segment = tuple[npt.NDArray[np.int32], bool]


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks answers for transformers; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (declared so in jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEncoder:
    """Chats to tokens with a loss flag, through the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        prompt_loss_from: prompts of at least so many tokens are learned too (Llama 2 Long, arXiv 2309.16039, section 4.2: with a long
            prompt the answer alone is too little to learn from). A prompt is what stands before an answer, from the answer before
            it on, the template's own text included. None: no prompt is learned; 1: all are.

    Raises:
        DataError: the tokenizer has no chat template, or it is no Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_loss_from: int | None = None) -> None:
        self._tokenizer, self._prompt_loss_from = tokenizer, prompt_loss_from
        self._control_ids = np.array(sorted(tokenizer.control_ids()), np.int32)
        self._name = f"chat template of {tokenizer.path.parent}"
        if tokenizer.chat_template is None:
            raise DataError(
                "no chat template", where=tokenizer.path.parent, fix="it belongs in chat_template.jinja or tokenizer_config.json"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        # strftime_now is left out on purpose: with the date of the day in it, no two builds would be equal. Templates that use
        # it have a fixed date for readers that do not offer it.
        try:
            self._template = environment.from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise DataError(f"not a Jinja template ({error})", where=self._name) from None

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, where: object) -> str:
        """The conversation as text.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens,
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise DataError(f"the {self._name} fails on this conversation: {error}", where=where) from None

    def encode(self, chat: Chat) -> list[Segment]:
        """Token ids in stretches of equal loss flag: True for answers with their end-of-turn token, and for prompts that are learned.

        A token counts as answer when it ends inside one. White space that a template puts behind the end-of-turn token is not
        learned: the model stops before it. Nor is the first token of a conversation, before which nothing of it stands, and what comes
        behind the last answer, which is no prompt.

        Raises:
            DataError: no answer in the conversation, or a template that does not append.
        """
        text, answers = self._answers(chat)
        tokens, ends = self._tokenizer.encode_chat(text)
        loss = np.zeros(len(tokens), np.bool_)
        is_control = np.isin(tokens, self._control_ids)
        for start, stop in answers:
            inside = (ends > start) & (ends <= stop)
            stops = ends[inside & is_control]
            if len(stops) and not text[int(stops[-1]) : stop].strip():
                inside &= ends <= stops[-1]
            loss |= inside
        if self._prompt_loss_from is not None:
            _learn_prompts(loss, self._prompt_loss_from)
        borders = np.flatnonzero(np.diff(loss)) + 1
        return [(part, bool(flag[0])) for part, flag in zip(np.split(tokens, borders), np.split(loss, borders), strict=True)]

    def _answers(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where in it the answers stand, in characters."""
        messages, answers = chat.messages, []
        text = self.render(messages, add_generation_prompt=False, where=chat.place)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True, where=chat.place)
            answered = self.render(messages[: index + 1], add_generation_prompt=False, where=chat.place)
            if not answered.startswith(prompt) or not text.startswith(answered):
                raise DataError(
                    f"the {self._name} does not keep earlier text when messages[{index}] is added, so where the answer begins is unknown",
                    where=chat.place,
                    fix="use a template that only appends",
                )
            answers.append((len(prompt), len(answered)))
        if not answers:
            raise DataError("no message of role 'assistant': nothing to learn", where=chat.place, fix="remove the conversation")
        return text, answers


def _learn_prompts(loss: npt.NDArray[np.bool_], at_least: int) -> None:
    """Set the flags of the stretches of at least so many tokens that stand before an answer, but for the very first token."""
    borders = np.flatnonzero(np.diff(loss)) + 1
    for start, stop in zip([0, *borders.tolist()], borders.tolist(), strict=False):
        if not loss[start] and stop - start >= at_least:
            loss[max(start, 1) : stop] = True


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
