"""`data token-offsets`: log-probabilities of two models on a text, against transformers, token by token."""

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mcore_longctx.cli.main import main
from mcore_longctx.data.methods.sentences import read_offsets

from . import tiny_checkpoint as tiny

WINDOW = 48


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/base is a torch_dist checkpoint, FOLDER/trained a Hugging Face folder whose head knows digits better."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make(folder)
    trained = tiny.hf_model(tiny.OWN)
    with torch.no_grad():
        trained.lm_head.weight[ord("0") : ord("9") + 1] *= 3.0
    trained.save_pretrained(folder / "trained", safe_serialization=True)
    tiny.write_tokenizer(folder / "trained")
    text = "".join(f"ab {i} cde {7 * i}. fgh\n" for i in range(40))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in (text, text[:101], "x")))
    return folder


def scores(model, documents: list[str], window: int) -> list[tuple[int, float]]:
    """Each token but the first of a window, and its log-probability in float64, by transformers."""
    found = []
    for document in documents:
        ids = list(document.encode())
        for at in range(0, len(ids), window):
            part = ids[at : at + window]
            with torch.no_grad():
                logits = model(torch.tensor([part])).logits[0].double()
            for row, token in zip(logits[:-1], part[1:], strict=True):
                found.append((token, float(row[token]) - math.log(float(torch.exp(row).sum()))))
    return found


def test_the_table_is_what_transformers_says(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaForCausalLM

    out = tmp_path / "offsets.json"
    words = ["data", "token-offsets", str(models / "base"), str(models / "trained"), "--text", str(models / "text.jsonl")]
    assert main([*words, "--out", str(out), "--window", str(WINDOW), "--share", "0.25", "--least", "20"]) == 0
    printed = capsys.readouterr().out
    documents = [json.loads(line)["text"] for line in (models / "text.jsonl").read_text().splitlines()]
    folders = (models / "hf", models / "trained")
    before, after = (scores(LlamaForCausalLM.from_pretrained(f).eval(), documents, WINDOW) for f in folders)
    moved = defaultdict(list)
    for (token, a), (_, b) in zip(before, after, strict=True):
        moved[token].append(abs(b - a))
    expected = {token: sum(each) / len(each) for token, each in moved.items() if len(each) >= 20}
    table = read_offsets(out)
    assert table["tokens"] == len(before)
    assert {row["id"]: row["count"] for row in table["types"]} == {token: len(moved[token]) for token in expected}
    # float32 logits of two programs: 1e-4 of a logit
    assert {row["id"]: row["offset"] for row in table["types"]} == pytest.approx(expected, abs=2e-4)
    best = sorted(expected, key=lambda token: -expected[token])[: math.ceil(0.25 * len(expected))]
    assert table["impactful"] == sorted(best)
    assert {token for token in expected if chr(token).isdigit()} <= set(best)  # whose rows of the head were changed
    assert printed.startswith(f"{len(best)} of {len(expected)} token types moved most, on {len(before):,} tokens: {out}\n")
    for wrong, line in (
        (["--window", "1"], "--window is 1, expected 2 or more"),
        (["--window", "1K"], "window is 1,024, expected 2 to 128"),
        (["--least", "9999"], "no token was met 9,999 times"),
        (["--share", "2"], "share is 2.0"),
        (["--out", str(tmp_path / "no" / "t.json")], "no such folder"),
    ):
        assert main([*words, "--out", str(tmp_path / "t.json"), "--window", str(WINDOW), *wrong]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("share", "other", "line"),
    [
        ("nan", False, "token-offsets: share is nan, expected more than 0, at most 1"),
        ("0", False, "token-offsets: share is 0.0, expected more than 0, at most 1"),
        ("0.2", True, "tokenizer.json: its tokenizer gives other tokens for document 1 of the text than "),
    ],
)
def test_what_cannot_be_compared_is_seen_before_a_model_runs(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    share: str,
    other: bool,
    line: str,
) -> None:
    def no_model(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mcore_longctx.evaluate.token_offsets.running", no_model)
    after = models / "trained"
    if other:
        after = tmp_path / "after"
        shutil.copytree(models / "trained", after)
        change_tokenizer(after, swap=("a", "b"))
    words = ["data", "token-offsets", str(models / "base"), str(after), "--text", str(models / "text.jsonl")]
    assert main([*words, "--out", str(tmp_path / "t.json"), "--window", str(WINDOW), "--share", share]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_a_tokenizer_that_is_another_file_and_gives_the_same_tokens_is_taken(models: Path, tmp_path: Path) -> None:
    """Z stands nowhere in the text; with 100 tokens of it the first document is not read whole."""
    after = tmp_path / "after"
    shutil.copytree(models / "trained", after)
    change_tokenizer(after, swap=("Y", "Z"))
    words = ["data", "token-offsets", str(models / "base"), str(after), "--text", str(models / "text.jsonl")]
    for more in ([], ["--tokens", "100"]):
        out = tmp_path / f"t{len(more)}.json"
        assert main([*words, "--out", str(out), "--window", str(WINDOW), *more]) == 0
    (after / "tokenizer.json").unlink()
    assert main([*words, "--out", str(tmp_path / "none.json"), "--window", str(WINDOW)]) == 0
    assert read_offsets(tmp_path / "none.json")["types"] == read_offsets(tmp_path / "t0.json")["types"]


def change_tokenizer(folder: Path, swap: tuple[str, str]) -> None:
    """Two letters get each other's id."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary[swap[0]], vocabulary[swap[1]] = vocabulary[swap[1]], vocabulary[swap[0]]
    path.write_text(json.dumps(spec))
