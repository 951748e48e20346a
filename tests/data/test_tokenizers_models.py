"""Sentencepiece models and Llama 3's ranks give the ids of their own libraries, and the file's kind is seen from its content."""

import base64
import importlib.metadata
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from mcore_longctx.data.tokenizers import Tokenizer, load_tokenizer
from mcore_longctx.data.tokenizers import fast as tokenizers_fast
from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.data.tokenizers.pieces import NEVER
from mcore_longctx.errors import DataError
from tests.data.conftest import LLAMA3_SPLIT, make_tokenizer, words
from tests.data.tokenizer_files import long_texts, make_ranks, nasty_texts

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")

MODELS = {
    "llama2": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "unigram": {"model_type": "unigram"},
    "over words": {"model_type": "bpe", "split_by_whitespace": False},
}


def make_model(path: Path, kind: str) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(seed, 30).replace("\n", " ") for seed in range(200)),
        model_writer=model,
        vocab_size=110 if kind == "unigram" else 400,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        **MODELS[kind],
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, "sentencepiece.SentencePieceProcessor"]]:
    made = {}
    for kind in MODELS:
        path = make_model(tmp_path_factory.mktemp("models") / "tokenizer.model", kind)
        made[kind] = (load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path)))
    return made


def test_evaluation_refuses_a_model_that_does_not_say_how_a_text_begins(tmp_path: Path) -> None:
    make_model(tmp_path / "tokenizer.model", next(iter(MODELS)))
    with pytest.raises(DataError, match=r"tokenizer.model: evaluation needs a tokenizer.json: .* begins; convert it"):
        EvaluationTokenizer(tmp_path, 1 << 20)


@settings(max_examples=60, deadline=None)
@given(nasty_texts)
def test_sentencepiece_ids_are_the_librarys(models: dict, text: str) -> None:
    for tokenizer, model in models.values():
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == model.encode(text)


@settings(max_examples=40, deadline=None)
@given(long_texts)
def test_long_texts_through_sentencepiece_are_cut_where_it_changes_nothing(models: dict, text: str) -> None:
    text = text.replace("\n", "the sea\n")
    for kind, (tokenizer, model) in models.items():
        cutter = tokenizer._reference.cutter
        if kind == "over words":
            assert cutter.piece == NEVER
            continue
        assert cutter.drops_space
        short = type(cutter)(cutter.encode, 300, drops_space=True)
        assert short.encode_long(text).tolist() == model.encode(text), kind


def test_facts_of_a_sentencepiece_model(models: dict) -> None:
    tokenizer, model = models["llama2"]
    assert tokenizer.backend == f"sentencepiece {importlib.metadata.version('sentencepiece')}"
    assert tokenizer.vocab_size == model.get_piece_size()
    assert tokenizer.control_id("</s>") == model.eos_id() == 2
    assert tokenizer.control_id("\u2581the") == model.piece_to_id("\u2581the") > 2
    assert tokenizer.control_id("no such piece") is None
    assert tokenizer.control_ids() == {model.unk_id(), model.bos_id(), model.eos_id()}
    text = "the sea </s> <tool> x"
    tokens = tokenizer.encode(text)
    assert not {1, 2} & set(tokens.tolist())
    assert tokenizer.control_id("<tool>") in tokens  # a symbol of the user is found by the library itself
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, 2, *tokenizer.encode("the sea")]) == text + "</s>the sea"
    with pytest.raises(DataError, match=r"tokenizer\.model: chats need a tokenizer\.json"):
        tokenizer.encode_chat(text)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ranks(tmp_path_factory.mktemp("ranks") / "tokenizer.model")


@pytest.fixture(scope="module")
def ranked(ranks: Path) -> dict[str, Tokenizer]:
    return {"fast": load_tokenizer(ranks), "reference": load_tokenizer(ranks, fast=False)}


@pytest.fixture(scope="module")
def encoding(ranks: Path) -> "tiktoken.Encoding":
    table = {base64.b64decode(text): int(rank) for text, rank in (line.split() for line in ranks.read_bytes().splitlines())}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=table, special_tokens={"<|begin_of_text|>": 128000})


@settings(max_examples=100, deadline=None)
@given(nasty_texts)
def test_ids_from_ranks_are_tiktokens(ranked: dict[str, Tokenizer], encoding: "tiktoken.Encoding", text: str) -> None:
    expected = encoding.encode_ordinary(text)
    for tokenizer in ranked.values():
        assert tokenizer.encode(text).tolist() == expected


def test_tokens_that_merges_alone_do_not_make_are_found(ranked: dict[str, Tokenizer], encoding: "tiktoken.Encoding") -> None:
    for text, count in [("xyzq", 2), ("qzqz", 1), ("qzqzq", 5)]:
        expected = encoding.encode_ordinary(text)
        assert len(expected) == count
        for tokenizer in ranked.values():
            assert tokenizer.encode(text).tolist() == expected


def test_facts_of_ranks(ranked: dict[str, Tokenizer]) -> None:
    assert ranked["reference"].backend == f"tiktoken {importlib.metadata.version('tiktoken')}"
    for name, tokenizer in ranked.items():
        assert tokenizer.vocab_size == 128_256
        # as in Llama 3's tokenizer_config.json
        published = {
            "<|begin_of_text|>": 128000,
            "<|end_of_text|>": 128001,
            "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007,
        }
        published |= {"<|eot_id|>": 128009, "<|reserved_special_token_5|>": 128010, "<|reserved_special_token_250|>": 128255}
        assert {text: tokenizer.control_id(text) for text in published} == published
        assert tokenizer.control_ids() == frozenset(range(128_000, 128_256))
        assert tokenizer.control_id("a") == 97, name
        tokens = tokenizer.encode("the<|eot_id|>")
        assert tokens.max() < 128_000
        assert tokenizer.decode([*tokens, 128009]) == "the<|eot_id|><|eot_id|>"
        with pytest.raises(DataError, match="chats need a tokenizer"):
            tokenizer.encode_chat("a")


def test_gigatoken_encodes_ranks_where_it_is_installed(ranked: dict[str, Tokenizer]) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    assert ranked["fast"].backend.startswith("gigatoken ")
    reference = ranked["reference"]._reference
    spec = tokenizers_fast._spec_of_ranks(reference.ranks, reference.split)
    assert len(spec["model"]["vocab"]) == 128_000


def test_where_tiktoken_fails_its_error_names_the_way_out(
    ranked: dict[str, Tokenizer], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.model: tiktoken fails on this text .*; install gigatoken"):
        ranked["reference"].encode(" " * 4_000_000)
    capfd.readouterr()  # the panic's trace


def test_ranks_of_an_unknown_model_are_refused(tmp_path: Path) -> None:
    make_ranks(tmp_path / "tokenizer.model", ranks=1000)
    with pytest.raises(
        DataError, match=r"a file of 1,000 ranks does not say how its model splits text; only Llama 3's \(128,000\)"
    ):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\nno rank\n")
    with pytest.raises(DataError, match="not a file of ranks"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_damaged_model_is_refused(tmp_path: Path, models: dict) -> None:
    raw = models["llama2"][0].path.read_bytes()
    (tmp_path / "x.model").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"x\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_a_folder_gives_its_tokenizer_json_else_its_only_model(tmp_path: Path, models: dict, ranks: Path) -> None:
    model = models["unigram"][0].path.read_bytes()
    (tmp_path / "spiece.model").write_bytes(model)
    assert load_tokenizer(tmp_path).path == tmp_path / "spiece.model"
    (tmp_path / "other.tiktoken").write_bytes(ranks.read_bytes())
    with pytest.raises(DataError, match=r"no tokenizer\.json, but other\.tiktoken, spiece\.model; name the file"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "other.tiktoken", fast=False).backend.startswith("tiktoken ")
    make_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"


def test_a_missing_library_is_named(models: dict, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match=r"sentencepiece is needed to read it; pip install 'mcore-longctx\[data\]'"):
        load_tokenizer(models["unigram"][0].path)
    with pytest.raises(DataError, match="tiktoken is needed to read it"):
        load_tokenizer(ranks)
