"""Chats: the same ids as transformers, and loss on answers with their end of turn, on nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mcore_longctx.cli.main import main
from mcore_longctx.data.documents.readers import Chat, Place
from mcore_longctx.data.planning.plan import make_chat_plan
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.job import open_job, prepare_job, read_documents_table
from mcore_longctx.data.tokens.sft import ChatEncoder
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.schema import DocumentSource
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


# ------------------------------------------------------------------ prompts that are learned
def flags(folder: Path, messages: list[dict], prompt_loss_from: int | None) -> list[tuple[int, bool]]:
    """Length and loss flag of each stretch."""
    encoder = ChatEncoder(load_tokenizer(folder), prompt_loss_from=prompt_loss_from)
    return [(len(tokens), loss) for tokens, loss in encoder.encode(chat(messages))]


def test_prompts_are_learned_all_or_from_a_length_on(tokenizer_folder: Path) -> None:
    plain = flags(tokenizer_folder, CONVERSATIONS[1], None)
    assert [loss for _, loss in plain] == [False, True, False, True, False]  # the last message has no answer
    first, answer, second, other, last = (length for length, _ in plain)
    assert first > second
    # all but the first token, before which nothing stands, and what is no prompt
    everything = [(1, False), (first - 1 + answer + second + other, True), (last, False)]
    assert flags(tokenizer_folder, CONVERSATIONS[1], 1) == flags(tokenizer_folder, CONVERSATIONS[1], second) == everything
    long_only = [(1, False), (first - 1 + answer, True), (second, False), (other, True), (last, False)]
    assert flags(tokenizer_folder, CONVERSATIONS[1], second + 1) == flags(tokenizer_folder, CONVERSATIONS[1], first) == long_only
    assert flags(tokenizer_folder, CONVERSATIONS[1], first + 1) == plain


def test_learned_prompts_change_no_token(tokenizer_folder: Path) -> None:
    found = [
        np.concatenate(
            [tokens for tokens, _ in ChatEncoder(load_tokenizer(tokenizer_folder), prompt_loss_from=n).encode(chat(c))]
        )
        for c in CONVERSATIONS
        for n in (None, 1)
    ]
    assert found[0].tolist() == found[1].tolist()
    assert found[2].tolist() == found[3].tolist()


def test_another_prompt_loss_is_another_data_set(tokenizer_folder: Path, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = jsonl("chats.jsonl", [{"messages": messages} for messages in CONVERSATIONS])
    tools, source = load_tokenizer(tokenizer_folder), DocumentSource(name="chats", path=path)
    learned = {}
    for name, prompt_loss_from in (("none", None), ("all", 1)):
        job = prepare_job(tmp_path / name, [source], tools, chats=True, prompt_loss_from=prompt_loss_from)
        run_job(job, tools)
        assert open_job(tmp_path / name).prompt_loss_from == prompt_loss_from
        table = read_documents_table(job)
        plan = make_chat_plan(tmp_path / name / "plan", table, name="x", seed=1, seq_length=int(table.length.sum()))
        learned[name] = (plan["tokens_with_loss"], plan["plan_sha256"])
    assert learned["all"][0] > learned["none"][0]
    assert learned["all"][1] != learned["none"][1]
    with pytest.raises(ConfigError, match="prompt_loss_from was None when this folder was begun, it is 1 now"):
        prepare_job(tmp_path / "none", [source], tools, chats=True, prompt_loss_from=1)
    with pytest.raises(ConfigError, match="prompt_loss_from was 1 when this folder was begun, it is None now"):
        prepare_job(tmp_path / "all", [source], tools, chats=True)


def test_documents_have_no_prompts_and_lengths_belong_to_long_only(
    tokenizer_folder: Path, jsonl: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl("d.jsonl", [{"text": "a"}])
    common = ["data", "tokenize", str(tmp_path / "o"), "--tokenizer", str(tokenizer_folder), f"d={path}"]
    for more, message in (
        (["--prompt-loss", "all"], "prompt_loss has no meaning for documents, which have no prompts; leave it out"),
        (["--chats", "--prompt-loss-from", "9"], "prompt_loss_from belongs to prompt_loss long_only, it is none"),
        (
            ["--chats", "--prompt-loss", "long_only", "--prompt-loss-from", "0"],
            "prompt_loss_from is 0, expected 1 or more tokens",
        ),
    ):
        assert main([*common, *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o" / "tokens").exists()
