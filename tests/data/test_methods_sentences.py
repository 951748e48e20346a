"""Sentences of documents, chosen by digits or by the table of a trained model's offsets."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.cli.main import main
from mcore_longctx.data import IndexedReader, read_runs
from mcore_longctx.data import build as build_module
from mcore_longctx.data.methods.sentences import SentenceChoice, make_choice, read_offsets, write_offsets
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.job import open_job
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.data import DataSection, DocumentSource, SentenceSection
from tests.data.conftest import make_tokenizer, words
from tests.data.reference_plan import split_mix

DIGITS = SentenceSection(rule="digits", keep=0.3)
END, WANTED = 1, 2  # ids of the property test


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def slow_choice(tokens: list[int], keep: float, seed: int, key: int) -> list[bool]:
    """Sentence by sentence, in plain Python."""
    sentences: list[list[int]] = [[]]
    for at, token in enumerate(tokens):
        if at and tokens[at - 1] == END and token != END:
            sentences.append([])
        sentences[-1].append(at)
    order = sorted(
        range(len(sentences)),
        key=lambda i: (not any(tokens[at] == WANTED for at in sentences[i]), split_mix(seed, 17, key, i)),
    )
    kept: set[int] = set()
    for i in order:
        if len(kept) >= keep * len(tokens):
            break
        kept.update(sentences[i])
    return [at in kept for at in range(len(tokens))]


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([END, WANTED, 3, 3, 4, 4, 4]), min_size=1, max_size=120),
    keep=st.sampled_from([0.1, 0.3, 0.75, 1.0]),
    seed=st.integers(0, 2**40),
    name=st.text(max_size=5).filter(lambda text: text.isprintable()),
)
def test_the_choice_is_the_slow_one(tokens: list[int], keep: float, seed: int, name: str) -> None:
    wanted = np.arange(5) == WANTED
    choice = SentenceChoice(end_ids=np.array([END]), wanted=wanted, keep=keep, seed=seed)
    mask = choice.mask(name, np.array(tokens, np.int32))
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    assert mask.tolist() == slow_choice(tokens, keep, seed, key)
    assert mask.sum() >= math.ceil(keep * len(tokens) - 1e-9)
    if keep == 1.0:
        assert mask.all()
    # in parts with their own flags: the same tokens, each with its flag
    half = len(tokens) // 2
    parts = [(np.array(tokens[:half], np.int32), False), (np.array(tokens[half:], np.int32), True)]
    chosen = choice.choose(name, parts)
    assert np.concatenate([part for part, _ in chosen]).tolist() == np.array(tokens)[mask].tolist()
    assert [len(part) for part, _ in chosen] == [int(mask[:half].sum()), int(mask[half:].sum())]


def test_sentences_with_digits_come_first(tokenizer: Path) -> None:
    tools = load_tokenizer(tokenizer)
    sentences = [
        "the whale of the sea. ",
        "captain x1 and 42 in the storm. ",
        "night and mast!\n",
        "a ship in 42 to deck? ",
        "a sail. ",
    ]
    text = "".join(sentences)
    tokens = tools.encode(text)
    for seed in range(20):
        choice = make_choice(SentenceSection(rule="digits", keep=0.4), tools, seed=seed)
        kept = tools.decode(tokens[choice.mask("d", tokens)])
        assert "captain x1 and 42 in the storm." in kept
        assert ("a ship in 42 to deck?" in kept) or len(tools.encode(kept)) >= 0.4 * len(tokens)
        if "night" in kept or "whale" in kept:
            assert "ship in 42" in kept
    # fewer than enough qualify: others fill the share; other seeds, other sentences
    choices = {
        tuple(make_choice(SentenceSection(rule="digits", keep=0.7), tools, seed=seed).mask("d", tokens)) for seed in range(20)
    }
    assert len(choices) > 1


def build(corpus: Path, tokenizer: Path, out: Path, how: SentenceSection | None, workers: int = 1, **changes) -> Path:
    section = DataSection(sources=(DocumentSource(name="docs", path=corpus),), sentences=how)
    arguments = {"chats": False, "model_vocab_size": 512, "seq_length": 128, "num_samples": None, "seed": 7} | changes
    return build_module.build(section, "text", tokenizer=tokenizer, out=out, workers=workers, **arguments).prefix


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    rows = [{"id": f"d{i}", "text": words(i, 100 + 5 * i)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_hold_the_chosen_sentences_for_any_number_of_workers(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(corpus, tokenizer, tmp_path / "one", DIGITS)
    monkeypatch.setattr("mcore_longctx.data.tokens.job.RANGE_BYTES", 3000)
    three = build(corpus, tokenizer, tmp_path / "three", DIGITS, workers=3)
    for suffix in ("bin", "idx"):
        assert Path(f"{one}.{suffix}").read_bytes() == Path(f"{three}.{suffix}").read_bytes()
    tools = load_tokenizer(tokenizer)
    choice = make_choice(DIGITS, tools, seed=7)
    chosen = {}
    for line in corpus.read_text().splitlines():
        row = json.loads(line)
        tokens = tools.encode(row["text"])
        chosen[row["id"]] = tokens[choice.mask(row["id"], tokens)]
    total, whole = (
        sum(map(len, chosen.values())),
        sum(len(tools.encode(json.loads(x)["text"])) for x in corpus.read_text().splitlines()),
    )
    assert 0.3 <= total / whole < 0.4
    runs, reader = read_runs(one), IndexedReader(one)
    for i in range(len(runs)):
        at = 0
        for run in runs.sample(i):
            if run.document is not None:
                expected = chosen[run.document][run.start : run.start + run.length]
                assert reader[i][at : at + run.length].tolist() == expected.tolist()
            at += run.length
    assert main(["data", "verify", str(one.parent)]) == 0


def test_another_choice_needs_another_folder(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    build(corpus, tokenizer, tmp_path / "out", DIGITS)
    assert open_job(tmp_path / "out").sentences == DIGITS
    for how, changes in ((None, {}), (SentenceSection(rule="digits", keep=0.5), {}), (DIGITS, {"seed": 8})):
        with pytest.raises(ConfigError, match=r"sentences was \{.*when this folder was begun"):
            build(corpus, tokenizer, tmp_path / "out", how, **changes)
    build(corpus, tokenizer, tmp_path / "plain", None)
    with pytest.raises(ConfigError, match=r"sentences was None when this folder was begun"):
        build(corpus, tokenizer, tmp_path / "plain", DIGITS)


# ------------------------------------------------------------------ the table of offsets
def make_table(path: Path, tokenizer: Path, wanted: str) -> Path:
    """Tokens of a text moved most."""
    tools = load_tokenizer(tokenizer)
    count = np.full(tools.vocab_size, 10)
    total = np.full(tools.vocab_size, 1.0)
    total[tools.encode(wanted)] = 50.0
    share = len(set(tools.encode(wanted).tolist())) / tools.vocab_size
    write_offsets(path, count=count, total=total, share=share, least=1, tokenizer_sha256=tools.sha256, facts={})
    return path


def test_types_are_ranked_by_their_mean_offset(tmp_path: Path) -> None:
    how = {"share": 0.4, "least": 2, "tokenizer_sha256": "x", "facts": {"text": "t"}}
    facts = write_offsets(tmp_path / "t.json", count=np.array([3, 1, 2, 4, 0, 5]), total=np.array([3.0, 9, 4, 2, 0, 2.5]), **how)
    assert [(row["id"], row["offset"]) for row in facts["types"]] == [(2, 2.0), (0, 1.0), (3, 0.5), (5, 0.5)]
    assert facts["impactful"] == [0, 2]  # 0.4 of 4 types
    assert read_offsets(tmp_path / "t.json") == facts
    with pytest.raises(DataError, match="no token was met 9 times"):
        write_offsets(tmp_path / "t.json", count=np.array([3, 8]), total=np.zeros(2), **how | {"least": 9})
    with pytest.raises(ConfigError, match=r"share is 0\.0"):
        write_offsets(tmp_path / "t.json", count=np.array([3]), total=np.zeros(1), **how | {"share": 0.0})


def test_sentences_with_tokens_of_the_table_come_first(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    how = SentenceSection(rule="logit_offset", keep=0.2, offsets=make_table(tmp_path / "t.json", tokenizer, " harpoon"))
    tools = load_tokenizer(tokenizer)
    choice, plain = make_choice(how, tools, seed=7), make_choice(SentenceSection(rule="digits", keep=0.2), tools, seed=7)
    texts = [json.loads(line) for line in corpus.read_text().splitlines()]
    found = []
    for each in (choice, plain):
        kept = "".join(tools.decode((t := tools.encode(row["text"]))[each.mask(row["id"], t)]) for row in texts)
        found.append(kept.count(" harpoon") / len(kept))
    assert found[0] > 1.5 * found[1]
    prefix = build(corpus, tokenizer, tmp_path / "out", how)
    assert prefix.with_suffix(".bin").is_file()
    moved = tmp_path / "moved.json"
    moved.write_bytes((tmp_path / "t.json").read_bytes())
    build(corpus, tokenizer, tmp_path / "out", SentenceSection(rule="logit_offset", keep=0.2, offsets=moved))
    make_table(tmp_path / "t.json", tokenizer, " storm")
    with pytest.raises(ConfigError, match="sentences was"):
        build(corpus, tokenizer, tmp_path / "out", how)


def test_bad_tables_are_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    how = SentenceSection(rule="logit_offset", offsets=path)
    with pytest.raises(DataError, match=r"t.json: no such file; make it with `data token-offsets`"):
        build(corpus, tokenizer, tmp_path / "a", how)
    path.write_text("{}")
    with pytest.raises(DataError, match="damaged, or no table of token offsets"):
        build(corpus, tokenizer, tmp_path / "b", how)
    write_offsets(path, count=np.array([1]), total=np.ones(1), share=1.0, least=1, tokenizer_sha256="other", facts={})
    with pytest.raises(DataError, match="was made with another tokenizer"):
        build(corpus, tokenizer, tmp_path / "c", how)
    assert not (tmp_path / "c" / "tokens" / "settings.json").exists()


def test_the_command_line(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], jsonl: Callable[..., Path]
) -> None:
    out = str(tmp_path / "out")
    start = ["data", "tokenize", out, "--tokenizer", str(tokenizer), "--vocab-size", "512", f"docs={corpus}"]
    for wrong, line in (
        (["--keep-sentences", "0.2"], "--keep-sentences or --offsets, and no --sentences"),
        (["--sentences", "logit_offset"], "offsets names the table of rule logit_offset"),
        (["--sentences", "digits", "--offsets", "x.json"], "offsets names the table of rule logit_offset, and of no other"),
        (["--sentences", "digits", "--keep-sentences", "2"], "keep is 2.0"),
        (["--sentences", "digits", "--chats"], "sentences has no meaning for chats"),
    ):
        assert main([*start, *wrong]) == 2
        assert line in capsys.readouterr().err
    assert main([*start, "--sentences", "digits", "--seed", "7", "--dry-run"]) == 0
    few = int(capsys.readouterr().out.split("about ")[1].split(" ")[0].replace(",", ""))
    assert main([*start, "--dry-run"]) == 0
    assert few == pytest.approx(0.3 * int(capsys.readouterr().out.split("about ")[1].split(" ")[0].replace(",", "")), abs=1)
    for step in (
        [*start, "--sentences", "digits", "--seed", "7"],
        ["data", "plan", out, "--seq-length", "128", "--seed", "7"],
        ["data", "pack", out, "--name", "text"],
    ):
        assert main(step) == 0
    prefix = build(corpus, tokenizer, tmp_path / "other", DIGITS)
    assert (tmp_path / "out" / "text.bin").read_bytes() == prefix.with_suffix(".bin").read_bytes()
