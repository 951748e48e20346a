"""Documents are ordinary text, long ones are encoded in pieces without changing a token, and bad tokenizers are named."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers

from mcore_longctx.data import tokenizers
from mcore_longctx.data.tokenizers import check_vocabulary, load_tokenizer
from mcore_longctx.errors import DataError
from tests.data.conftest import VOCABULARY, WORDS, make_tokenizer, words


def whole(folder: Path, text: str) -> list[int]:
    """The library's own encoding of the whole text as ordinary characters."""
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_special_token_text_in_a_document_is_ordinary_text(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    text = "a<|end_of_text|>b"
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == whole(tokenizer_folder, text)
    assert len(tokens) > 5
    assert tokenizer.control_id("<|end_of_text|>") not in tokens
    control, ends = tokenizer.encode_chat(text)
    assert control.tolist() == [*tokenizer.encode("a"), tokenizer.control_id("<|end_of_text|>"), *tokenizer.encode("b")]
    assert ends.tolist() == [1, 16, 17]


def test_no_bos_or_eos_is_added_and_saved_limits_are_lifted(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = words(1, 40)
    expected = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    expected.no_truncation()
    expected.no_padding()
    assert load_tokenizer(folder).encode(text).tolist() == expected.encode(text, add_special_tokens=False).ids


def nasty_text(seed: int) -> str:
    """Words, code, runs of white space and long stretches without any place to cut."""
    rng = random.Random(seed)
    kinds = [
        lambda: words(rng.random(), 60),
        lambda: " " * rng.randrange(40) + "\n" * rng.randrange(5),
        lambda: "".join(rng.choice("海鯨語、。\n") for _ in range(150)),
        lambda: "x" * rng.randrange(300),
        lambda: "don't  stop, it's\tI'll\r\n\r\n3.14159 <|eot_id|> e\u0301\u0301 \U0001f40b",
        lambda: rng.choice(WORDS),
    ]
    return "".join(rng.choice(kinds)() for _ in range(40))


@pytest.mark.parametrize("split", ["llama3", "gpt2"])
def test_pieces_give_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer_folder: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tokenizer_folder if split == "llama3" else make_tokenizer(tmp_path, split=None)
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(tokenizers, "_PIECE", 600)
    monkeypatch.setattr(tokenizers, "_MARGIN", 100)
    pieces = 0
    for seed in range(30):
        text = nasty_text(seed)
        pieces += len(list(tokenizer._pieces(text)))
        assert tokenizer.encode(text).tolist() == whole(folder, text)
    assert pieces > 100


def test_a_tokenizer_that_depends_on_the_start_of_a_text_gets_it_whole(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = HFTokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Prepend("\u2581")  # as Llama 2's
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(tokenizers, "_PIECE", 600)
    text = words(3, 1000)
    ours = load_tokenizer(tmp_path)
    assert list(ours._pieces(text)) == [text]
    assert ours.encode(text).tolist() == whole(tmp_path, text)


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder / "tokenizer.json")
    assert tokenizer.vocab_size == VOCABULARY
    check_vocabulary(tokenizer, VOCABULARY)
    message = (
        rf"vocabulary of the tokenizer \({VOCABULARY}\) is larger than the model's \({VOCABULARY - 1}\); use the model's own"
    )
    with pytest.raises(DataError, match=message):
        check_vocabulary(tokenizer, VOCABULARY - 1)


def test_ids_with_a_gap_count_to_the_largest(tmp_path: Path, tokenizer_folder: Path) -> None:
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] = spec["model"]["vocab"]["<|pad|>"] = 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).vocab_size == 701


def test_the_chat_template_is_found_in_either_file(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, template="from config")
    assert load_tokenizer(folder).chat_template == "from config"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "named"}, {"name": "rag", "template": "other"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).chat_template == "named"
    (folder / "chat_template.jinja").write_text("from file")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "from file"
    assert tokenizer.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file; give a folder with tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer \("):
        load_tokenizer(tmp_path)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(tmp_path)
