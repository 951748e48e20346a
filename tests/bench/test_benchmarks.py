"""Every benchmark runs at toy size, and its tables have the rows that docs/benchmarks.md promises."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with CUDA the benchmarks measure the GPU, at sizes of their own"
)


def output(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python tools/bench/NAME.py ARGUMENTS` prints."""
    monkeypatch.setattr(sys, "argv", [f"tools/bench/{name}.py", *arguments])
    importlib.import_module(name).main()
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows, headers included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def number(cell: str) -> float:
    found = re.match(r"[+-]?[\d.,e+-]+", cell)
    assert found, cell
    return float(found[0].replace(",", ""))


def test_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = output("layer", ["--tokens", "512", "--rounds", "1"], monkeypatch, capsys)
    table = {(row[0], row[1]): row for row in rows(text) if row[0] == "512" and len(row) == 10}
    names = ["stock, s x s scores", "stock, our kernel", "none", "full", "attention_kept"]
    assert [name for _, name in table] == names
    calls = {name: table["512", name][7] for name in names}
    assert calls["stock, our kernel"] == calls["full"] == "2 + 1"
    assert calls["none"] == calls["attention_kept"] == "1 + 1"
    assert all(number(table["512", name][i]) > 0 for name in names for i in (2, 3, 5, 8, 9))
    # bytes kept for the backward pass are those of the formulas, to the byte
    kept = {row[0]: row[1:] for row in rows(text) if row[-1] == "exact"}
    assert kept == {"full": ["1,024", "1,024", "exact"], "attention_kept": ["2,056", "2,056", "exact"]}
    assert len([row for row in rows(text) if len(row) == 6 and row[0] == "512"]) == 3
    assert "MFU = (6 L P s + 6 V h s + 6 s^2 q d L)" in text
    assert "not measured: no CUDA device" in text


def test_longest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = output("longest", ["--tokens", "4K", "--layers", "3"], monkeypatch, capsys)
    compared = [row for row in rows(text) if len(row) == 6 and row[2] == "4K"]
    assert [(row[0], row[1]) for row in compared] == [("full", "3"), ("attention_kept", "3")]
    assert all(abs(number(row[5])) <= 2 for row in compared), compared
    assert "not measured: no CUDA device" in text


def test_rope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = output("rope", ["--tokens", "8K", "--rounds", "1"], monkeypatch, capsys)
    table = {row[1]: row for row in rows(text) if row[0] == "8K"}
    assert list(table) == ["ours, float64", "ours, float32", "megatron-core", "transformers"]
    assert number(table["ours, float64"][2]) < 1e-6
    assert number(table["ours, float32"][2]) == number(table["transformers"][2]) > 1e-5
    # one of 16 ranks: ours makes its own positions, Megatron's class all of them
    assert number(table["ours, float32"][4]) < number(table["megatron-core"][4])


def test_context_parallel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokens", "64", "--cp", "2,4", "--rounds", "1", "--equality-tokens", "64", "--gloo-tokens", "256"]
    text = output("context_parallel", arguments, monkeypatch, capsys)
    equality = [row for row in rows(text) if row[0] in ("32/8", "4/1")]
    assert len(equality) == 2 * 4 * 2  # heads, types, ranks
    assert all(number(row[3]) < 1e-12 and row[4:] == ["1.000", "1.000"] for row in equality), equality
    assert all(len(row) == 9 for row in rows(text) if row[0] in ("8/2", "q/kv heads") and row[1] != "type")
    timed = [row for row in rows(text) if row[0] == "8/2"]
    assert [row[3] for row in timed] == ["one call", "p2p", "all_gather", "a2a", "a2a+p2p"] * 2
    gloo = [row[:2] for row in rows(text) if len(row) == 4 and row[1].isdigit()]
    assert gloo == [["one process", "1"], *([kind, n] for kind in ("p2p", "all_gather") for n in "24")]


def test_all_writes_one_file_and_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("all")
    script = "import sys; print('## B', *sys.argv[1:]); sys.exit(len(sys.argv) > 1)"
    (tmp_path / "rope.py").write_text(script)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    for more, code in ((["--", "--tokens=1K"], 1), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path / "found.md"), "--only", "rope", *more])
        assert module.main() == code
        written = (tmp_path / "found.md").read_text()
        assert written.startswith("# Benchmarks of one machine\n\n## B")
        assert ("**rope ended with exit code 1.**" in written) == bool(code)
    assert "rope: done" in capsys.readouterr().err


def test_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = output("decode", ["--lengths", "1K"], monkeypatch, capsys)
    ours, theirs = [row for row in rows(text) if row[0] == "1K"]
    assert [ours[1], theirs[1]] == ["ours", "transformers"]
    assert theirs[6] == "1.00"
    assert all(number(cell) > 0 for row in (ours, theirs) for cell in row[2:])
    assert number(ours[9]) < number(theirs[9])  # a token copies no cache of ours


def test_contenders_whose_logits_differ_stop_the_benchmark() -> None:
    decode, harness = importlib.import_module("decode"), importlib.import_module("harness")
    results = {
        name: harness.Result(facts={"logits": logits}) for name, logits in (("a", np.ones(3)), ("b", np.array([1, 1, 1.1])))
    }
    with pytest.raises(SystemExit, match=r"1K tokens: the contenders' logits differ by 0.1 of the largest one, bound 0.0001"):
        decode.check_logits(results, 1024, 1e-4)
    results["b"].facts["logits"] = np.array([1, 1, np.nan])
    with pytest.raises(SystemExit, match="differ by nan"):
        decode.check_logits(results, 1024, 1e-4)
