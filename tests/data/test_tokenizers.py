"""Documents are ordinary text, long ones are encoded in pieces without changing a token, and bad tokenizers are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer

from mcore_longctx.data.tokenizers import check_against_reference, check_vocabulary, load_tokenizer
from mcore_longctx.errors import DataError, DifferenceFound
from tests.data.conftest import VOCABULARY, make_tokenizer, words
from tests.data.tokenizer_files import whole


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
    (tmp_path / "notes.txt").write_bytes(b"some text")
    with pytest.raises(
        DataError, match=r"notes\.txt: not a tokenizer; expected a tokenizer\.json of Hugging Face tokenizers, a sent"
    ):
        load_tokenizer(tmp_path / "notes.txt")


@pytest.mark.parametrize("fast", [True, False])
def test_half_a_surrogate_pair_is_named(tokenizer_folder: Path, fast: bool) -> None:
    with pytest.raises(DataError, match=r"character 3 of a text is half of a surrogate pair .*; it is not valid Unicode"):
        load_tokenizer(tokenizer_folder, fast=fast).encode("the\ud83d whale")


def test_a_difference_to_the_reference_is_told_in_words(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    check_against_reference(tokenizer, "the whale <|eot_id|>", "books.jsonl:7")
    right = tokenizer.encode("the whale sea")
    for wrong, what in [
        (np.where(np.arange(len(right)) == 1, right[0], right), f"gives {right[0]} ('the'), the reference {right[1]} (' whale')"),
        (right[:-1], f"gives no token, the reference {right[-1]} (' sea')"),
        (np.append(right, right[0]), f"gives {right[0]} ('the'), the reference no token"),
        (np.append(right[:-1], 9999), f"gives 9999, the reference {right[-1]} (' sea')"),
    ]:
        monkeypatch.setattr(tokenizer, "encode", lambda text, wrong=wrong: wrong)
        with pytest.raises(DifferenceFound) as caught:
            check_against_reference(tokenizer, "the whale sea", "books.jsonl:7")
        assert str(caught.value).startswith("books.jsonl:7: token ")
        assert what in str(caught.value)


def test_ids_are_written_out_as_text(tokenizer_folder: Path) -> None:
    for fast in (True, False):
        tokenizer = load_tokenizer(tokenizer_folder, fast=fast)
        text = "the \u00fcber-whale\n\U0001f40b"
        eot = tokenizer.control_id("<|eot_id|>")
        assert tokenizer.decode(np.append(tokenizer.encode(text), eot)) == text + "<|eot_id|>"
        assert tokenizer.decode([]) == ""
        with pytest.raises(DataError, match=rf"id {VOCABULARY} is not in the vocabulary of {VOCABULARY}"):
            tokenizer.decode([1, VOCABULARY])


def test_a_file_that_changes_in_use_is_not_read_again(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    folder = make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(folder)
    make_tokenizer(tmp_path, split=None)
    with pytest.raises(DataError, match="changed while it was in use"):
        tokenizer.reference_encode("a")


def test_loading_needs_neither_torch_nor_transformers(tokenizer_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mcore_longctx.data.tokenizers import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1])).reference_encode('a')\n"
        "assert not {'torch', 'transformers', 'megatron', 'awkward'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tokenizer_folder)], check=True)
