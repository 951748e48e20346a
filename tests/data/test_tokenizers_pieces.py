"""A text in pieces has the tokens of the whole text; what has no place to cut stays whole."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokenizers.pieces import NEVER, Cutter, Encode
from tests.data.conftest import WORDS, words
from tests.data.tokenizer_files import KINDS, edit, long_texts, make_kind

Kinds = dict[str, tuple[Encode, bool, Callable[[str], list[int]]]]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """The encoder of each kind, gigatoken's and Hugging Face's, whether it drops spaces, and the library's own encoding."""
    made: Kinds = {}
    for kind in KINDS:
        folder = make_kind(tmp_path_factory.mktemp(kind), kind)
        whole = HFTokenizer.from_file(str(folder / "tokenizer.json"))
        whole.encode_special_tokens = True
        for fast in (True, False):
            tokenizer = load_tokenizer(folder, fast=fast)
            encoder = tokenizer._fast or tokenizer._reference
            if encoder.cutter.piece < NEVER:
                expected = lambda text, whole=whole: whole.encode(text, add_special_tokens=False).ids  # noqa: E731
                made[f"{kind} {tokenizer.backend}"] = (encoder.encode, encoder.cutter.drops_space, expected)
    return made


@settings(max_examples=30, deadline=None)
@given(long_texts, st.integers(40, 600))
def test_pieces_give_the_tokens_of_the_whole(kinds: Kinds, text: str, piece: int) -> None:
    for kind, (encode, drops_space, expected) in kinds.items():
        assert Cutter(encode, piece, drops_space).encode_long(text).tolist() == expected(text), kind


def test_every_kind_is_cut_and_pieces_are_short(kinds: Kinds) -> None:
    assert {kind.split()[0] for kind in kinds} == set(KINDS)
    text = words(3, 3000)
    for kind, (encode, drops_space, _) in kinds.items():
        pieces = list(Cutter(encode, 1000, drops_space).pieces(text))
        assert max(map(len, pieces)) <= 1000, kind
        assert len(pieces) < 3 * len(text) / 1000
        assert (" " if drops_space else "").join(pieces) == text


def test_chinese_without_spaces_is_cut_at_its_punctuation(kinds: Kinds) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice(["\u6d77", "\u9be8", "\u6d77\u9be8", "\uff0c", "\u3002", "\u300c"]) for _ in range(6000))
    for kind, (encode, drops_space, expected) in kinds.items():
        if not drops_space:
            cutter = Cutter(encode, 1000)
            assert max(map(len, cutter.pieces(text))) <= 1000, kind
            assert cutter.encode_long(text).tolist() == expected(text)


def test_a_run_without_a_place_to_cut_stays_whole_and_the_rest_is_cut(kinds: Kinds) -> None:
    rng = random.Random(0)
    run = "".join(rng.choices("acgt", k=40_000))
    text = words(1, 900) + run + " " + words(2, 900)
    for kind, (encode, drops_space, expected) in kinds.items():
        cutter = Cutter(encode, 1000, drops_space)
        pieces = list(cutter.pieces(text))
        assert sum(run in piece for piece in pieces) == 1, kind
        assert len(pieces) > 10
        assert sorted(map(len, pieces))[-2] <= 1000
        assert max(map(len, pieces)) < len(run) + 2000
        assert cutter.encode_long(text).tolist() == expected(text)


def test_a_tokenizer_that_depends_on_the_start_of_a_text_gets_it_whole(tmp_path: Path) -> None:
    folder = edit(make_kind(tmp_path, "gpt2"), normalizer={"type": "Prepend", "prepend": "\u2581"})
    tokenizer = load_tokenizer(folder, fast=False)
    text = words(3, 3000)
    assert list(Cutter(tokenizer._reference.encode, 600).pieces(text)) == [text]


def test_a_vocabulary_of_pieces_over_several_words_is_never_cut(tmp_path: Path) -> None:
    folder = make_kind(tmp_path, "llama2")
    assert load_tokenizer(folder, fast=False)._reference.cutter.drops_space
    vocabulary = HFTokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=False)
    edit(folder, model={"vocab": {**vocabulary, "the\u2581sea": 600}})
    assert load_tokenizer(folder, fast=False)._reference.cutter.piece == NEVER


def test_a_megabyte_without_a_space_takes_seconds(tmp_path: Path) -> None:
    rng = random.Random(0)
    runs = ["x" * 1_000_000, " " * 1_000_000, "".join(rng.choices("abcdefgh", k=1_000_000)), "\u6d77" * 300_000]
    for kind in ("llama3", "llama2"):
        folder = make_kind(tmp_path / kind, kind)
        for fast in (True, False):
            tokenizer = load_tokenizer(folder, fast=fast)
            for text in runs:
                began = time.process_time()
                tokens = tokenizer.encode(text)
                assert time.process_time() - began < 20
                assert tokenizer.decode(tokens[:50]).strip()[:9] == text.strip()[:9]


def test_small_documents_of_one_word_are_not_searched() -> None:
    encoded: list[str] = []

    def encode(text: str) -> np.ndarray:
        encoded.append(text)
        return np.zeros(len(text), np.int32)

    assert len(Cutter(encode, 10).encode_long(WORDS[0])) == len(WORDS[0])
    assert encoded == [WORDS[0]]
