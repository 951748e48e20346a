"""Chats: the same ids as transformers, and loss on answers with their end of turn, on nothing else."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mcore_longctx.data.documents.readers import Chat, Place
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.sft import ChatEncoder
from mcore_longctx.errors import DataError
from tests.data.conftest import LLAMA3_TEMPLATE, make_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\\n' + message['content'] + '<|eot_id|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ 'Q: ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
HELPERS = (
    "{{ bos_token }}{% if tools %}{{ raise_exception('no tools') }}{% endif %}{% for message in messages %}{% if loop.index > 90 %}"
    "{% break %}{% endif %}{{ message | tojson }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
)
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello <b> & über 海"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " the whale? <|eot_id|>"},
        {"role": "assistant", "content": "\n the ship \n"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "sail"},
        {"role": "user", "content": "last word is mine"},
    ],
]


def chat(messages: list[dict]) -> Chat:
    return Chat("id", messages, Place("chats.jsonl", line=7))


@pytest.mark.parametrize(
    "template", [LLAMA3_TEMPLATE, CHATML, GENERATION, HELPERS], ids=["llama3", "chatml", "generation", "helpers"]
)
def test_ids_are_those_of_transformers(tmp_path: Path, template: str) -> None:
    folder = make_tokenizer(tmp_path, template=template)
    encoder, theirs = ChatEncoder(load_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        ours = np.concatenate([tokens for tokens, _ in encoder.encode(chat(messages))])
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert ours.tolist() == list(expected)


def learned(folder: Path, messages: list[dict]) -> list[str]:
    """Text of the stretches that carry loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(tokens) for tokens, loss in ChatEncoder(load_tokenizer(folder)).encode(chat(messages)) if loss]


def test_loss_is_on_answers_and_their_end_of_turn_only(tmp_path: Path) -> None:
    llama3 = make_tokenizer(tmp_path / "a", template=LLAMA3_TEMPLATE)
    assert learned(llama3, CONVERSATIONS[0]) == ["hello <b> & über 海<|eot_id|>"]
    assert learned(llama3, CONVERSATIONS[1]) == ["the ship<|eot_id|>", "sail<|eot_id|>"]
    # the line end behind the end of turn is the template's, not the answer's
    chatml = make_tokenizer(tmp_path / "b", template=CHATML)
    # "\n\n" is one token: the last line end of the prompt and the first of the answer
    assert learned(chatml, CONVERSATIONS[1]) == ["\n\n the ship \n<|eot_id|>", "sail<|eot_id|>"]


def test_flags_agree_with_the_generation_marks_of_transformers(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, template=GENERATION)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), ChatEncoder(load_tokenizer(folder))
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
        flags = np.concatenate([np.full(len(tokens), loss) for tokens, loss in encoder.encode(chat(messages))])
        assert flags.astype(int).tolist() == list(expected)


def test_a_template_without_control_tokens_learns_the_whole_answer(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    folder = make_tokenizer(tmp_path, template=plain)
    assert learned(folder, CONVERSATIONS[0]) == ["hello <b> & über 海\n"]


FAULTS = [
    ("{% for m in messages %}", r"not a Jinja template \("),
    (
        "{{ raise_exception('roles must alternate') }}",
        r"chats\.jsonl:7: the chat template of .* fails on this conversation: roles must",
    ),
    ("{{ messages.append(1) }}", "fails on this conversation: .*append"),
    ("{{ ().__class__.__bases__ }}", "fails on this conversation: access to attribute '__class__'"),
    ("{{ messages[0].content.format_map(messages) ~ nowhere.name }}", "fails on this conversation"),
    (
        "{% for m in messages %}{% if loop.last %}{{ 'thought ' }}{% endif %}{{ m.content + eos_token }}{% endfor %}",
        r"chats\.jsonl:7: the chat template of .* does not keep earlier text when messages\[2\] is added, .*; use a template that only",
    ),
]


@pytest.mark.parametrize(("template", "message"), FAULTS)
def test_a_template_that_cannot_be_used_is_refused(tmp_path: Path, template: str, message: str) -> None:
    folder = make_tokenizer(tmp_path, template=template)
    with pytest.raises(DataError, match=message):
        ChatEncoder(load_tokenizer(folder)).encode(chat(CONVERSATIONS[1]))


def test_a_tokenizer_without_template_and_a_chat_without_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template; it belongs in chat_template\.jinja or tokenizer_config\.json"):
        ChatEncoder(load_tokenizer(make_tokenizer(tmp_path / "a", template=None)))
    with pytest.raises(DataError, match=r"chats\.jsonl:7: no message of role 'assistant': nothing to learn"):
        ChatEncoder(load_tokenizer(make_tokenizer(tmp_path / "b"))).encode(chat(CONVERSATIONS[0][:1]))


def test_the_date_of_the_day_is_not_in_the_samples(tmp_path: Path) -> None:
    dated = (
        "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{{ day + bos_token }}"
        + LLAMA3_TEMPLATE
    )
    encoder = ChatEncoder(load_tokenizer(make_tokenizer(tmp_path, template=dated)))
    text = encoder.render(CONVERSATIONS[0], add_generation_prompt=False, where="here")
    assert text.startswith("26 Jul 2024")
