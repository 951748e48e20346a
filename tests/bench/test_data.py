"""The benchmark of the data builder: what it counts, that it compares equal work only, and that it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import data
import numpy as np
import process_tree
import pytest
from data_contenders import Contender, datatrove, megatron_fast
from data_documents import fingerprint, of_indexed

from mcore_longctx.data.files.indexed import IndexedWriter
from tests.bench.test_benchmarks import number, output, rows

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-llama" / "tokenizer.json"

TREE = """
import os, time
def hold(megabytes):
    held = bytearray(megabytes << 20)
    held[::4096] = bytes(len(held[::4096])).replace(b"\\0", b"x")
    return held
def burn(seconds):
    while time.process_time() < seconds: pass
first = hold(60)
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        second = hold(40)
        burn(0.4)
        time.sleep(0.4)
        os._exit(0)
    children.append(child)
for child in children: os.waitpid(child, 0)
"""


def test_the_cost_of_a_command_is_that_of_its_tree(tmp_path: Path) -> None:
    ballast = np.ones(200 << 17)  # 200 MiB of whoever measures are not the command's
    cost = process_tree.run([sys.executable, "-c", TREE], log=tmp_path / "log")
    assert ballast[-1] == 1
    assert 0.8 <= cost.cpu < 1.6
    assert 0.8 <= cost.wall < 5
    mib = 2**20
    assert 140 * mib < cost.peak_anonymous <= cost.peak < 180 * mib  # the first 60 MiB are shared: counted once
    assert 100 * mib < cost.largest < 130 * mib
    again = process_tree.run([sys.executable, "-c", TREE], log=tmp_path / "log", memory=False)
    assert again.peak == 0
    assert again.cpu == pytest.approx(cost.cpu, rel=0.5)


def test_a_command_that_fails_or_hangs_is_told_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^exit code 3 after 0 s\n.*\nalas\n$"):
        process_tree.run(["sh", "-c", "pwd > where; echo alas; exit 3"], log=tmp_path / "log", folder=tmp_path)
    assert (tmp_path / "where").read_text().strip() == str(tmp_path)
    with pytest.raises(RuntimeError, match=r"^exit code -9 after 1 s"):
        process_tree.run(["sh", "-c", "sleep 60; echo no"], log=tmp_path / "log", deadline=1)


def test_a_fingerprint_knows_ids_and_borders_and_no_order() -> None:
    documents = [np.array([1, 2, 3]), np.array([70_000]), np.array([], np.int64)]
    whole = fingerprint(documents)
    assert whole[:2] == (2, 4)
    assert fingerprint([array.astype(np.int32) for array in reversed(documents)]) == whole
    assert fingerprint([np.array([1, 2, 4]), np.array([70_000])]) != whole
    assert fingerprint([np.array([1, 2]), np.array([3, 70_000])]) != whole
    assert fingerprint([np.array([70_000, 1]), np.array([2, 3])])[:2] == whole[:2]
    assert fingerprint([np.array([3, 2, 1]), np.array([70_000])]) != whole


def test_a_document_of_several_sequences_is_one(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "it", np.int32) as writer:
        for tokens in ([1, 2], [3], [4, 5]):
            writer.add(np.array(tokens))
    assert of_indexed(tmp_path / "it") == fingerprint([[1, 2], [3], [4, 5]])
    index = (tmp_path / "it.idx").read_bytes()
    borders = np.array([0, 2, 3], "<i8")  # as Megatron writes sentences
    (tmp_path / "it.idx").write_bytes(index[:26] + np.uint64(3).tobytes() + index[34 : 34 + 12 * 3] + borders.tobytes())
    assert of_indexed(tmp_path / "it") == fingerprint([[4, 5], [1, 2, 3]])


def writing(name: str, folder: Path, *documents: list[int]) -> Contender:
    """A contender that writes these documents."""
    folder.mkdir()
    with IndexedWriter(folder / "it", np.int32) as writer:
        for tokens in documents:
            writer.add(np.array(tokens))
    return Contender(name, lambda out: ["sh", "-c", f"sleep 0.1; cp {folder}/* {out}"], lambda out: of_indexed(out / "it"))


def test_contenders_take_turns_and_must_have_done_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = data.Work(tmp_path)
    first = writing("ours, 1 worker", tmp_path / "first", [1, 2], [3])
    second = writing("peer", tmp_path / "second", [3], [1, 2])
    absent = Contender("absent", missing="it is not there")
    broken = Contender("broken", lambda _: ["sh", "-c", "exit 7"])
    results = data.tokenize([first, second, absent, broken], 2, work)
    told = [line.split(": ")[0].strip() for line in capsys.readouterr().err.splitlines() if "CPU-s" in line]
    assert told == [f"round {n}, {name}" for n in (1, 2, 3) for name in ("ours, 1 worker", "peer")]
    assert not work.out.exists()
    measured = results["peer"]
    assert len(measured.costs) == 2  # the round that asks for memory is not timed
    assert measured.memory is not None
    assert measured.memory.peak > 0
    assert all(cost.peak == 0 for cost in measured.costs)
    assert not data.print_tokenized(results)  # one has failed
    text = capsys.readouterr().out
    table = {row[0]: row[1:] for row in rows(text)}
    assert table["absent"][0] == "not measured: it is not there"
    assert table["broken"][0] == "failed: exit code 7 after 0 s"
    assert table["ours, 1 worker"][4] == "1.00"
    assert float(table["peer"][4]) > 0
    assert "All 2 wrote the same 2 documents of 3 tokens" in text
    for name, other in {"id": ([1, 2], [4]), "border": ([1], [2, 3]), "lost": ([1, 2],)}.items():
        with pytest.raises(SystemExit, match=r"peer made .*, ours, 1 worker made .*: these are not the same work"):
            data.tokenize([first, writing("peer", tmp_path / name, *other)], 1, work)


def test_peers_that_are_not_there_say_what_is_missing(tmp_path: Path) -> None:
    corpus = data.Corpus("it", {}, tmp_path / "whole.jsonl", TOKENIZER)
    assert "--megatron-lm and --python312" in megatron_fast(corpus, None, None, tmp_path).missing
    assert "no tools/preprocess_data_fast.py" in megatron_fast(corpus, tmp_path, sys.executable, tmp_path).missing
    assert "--datatrove-python" in datatrove(corpus, None).missing
    assert "does not run" in datatrove(corpus, str(tmp_path / "python")).missing


def test_without_a_corpus_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("LONGCTX_CORPUS", "LONGCTX_TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    assert "not measured: needs --corpus" in output("data", [], monkeypatch, capsys)


def test_all_parts_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, count in (("books", 5), ("code", 30)):
        texts = (f"{name} {number}: " + "the rain in Spain stays mainly in the plain\n" * (number + 1) for number in range(count))
        lines = (json.dumps({"id": f"{name}-{number}", "text": text}) for number, text in enumerate(texts))
        (corpus / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(data, "SEQ_LENGTHS", {"build": "1K", "read": "2K"})
    monkeypatch.setattr(data, "MIX", ("--keep", "0.9"))
    monkeypatch.setattr(data, "STEP_SECONDS", 0.01)
    arguments = ["--corpus", str(corpus), "--tokenizer", str(TOKENIZER), "--rounds", "1", "--work", str(tmp_path)]
    text = output("data", arguments, monkeypatch, capsys)
    table = rows(text)
    assert [row[0] for row in table if row[0].startswith("ours, ")] == [
        "ours, 1 worker",
        "ours, 2 workers",
        *["ours, 1 worker"] * 2,
    ]
    assert all(number(row[1]) > 0 and number(row[3]) > 5 for row in table if row[0].startswith("ours, "))
    assert sum("not measured: --" in row[1] for row in table) == 1 + 3 + 3  # peers: all documents, slice, start
    assert "wrote the same 35 documents" in text
    assert "wrote the same 5 documents" in text
    assert "wrote the same 1 documents" in text
    steps = [row for row in table if row[0] in ("plan", "pack, 1 worker", "verify", "plan + pack")]
    assert [row[0] for row in steps] == ["plan", "pack, 1 worker", "verify", "plan + pack"]
    assert number(steps[3][1]) == pytest.approx(number(steps[0][1]) + number(steps[1][1]), abs=0.02)
    warm = [row for row in table if len(row) == 8 and row[0] in ("4", "16")]
    assert [row[0] for row in warm] == ["4", "16"]
    assert all(number(cell) >= 0 for row in warm for cell in row)
    assert [row[:2] for row in table if "read" in row[1]] == [
        [cp, kind] for cp in ("4", "16") for kind in ("read when asked for", "read one step ahead")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]  # nothing is left
