import json

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.errors import ConfigError
from mcore_longctx.report import write_report
from mcore_longctx.report.style import figure_in_style, svg

from . import made_up_rows as rows_of
from . import made_up_run as made_up

RULER = rows_of.ruler_rows("before", [4096], 4096, samples=2, tasks=["vt", "qa_1"])
NEEDLE = rows_of.needle_rows("before", [4096], 4096, depths=2, samples=1)
LOSS = rows_of.loss_rows("before", 4096, 4096, windows=2)
SHORT = rows_of.short_rows("before", 512, 1.0, windows=2)
SUITE = rows_of.suite_rows("before", {"other": 0.5}, questions=4)
FILES = {"ruler": RULER, "needle": NEEDLE, "loss_by_position": LOSS, "short_context": SHORT, "short_suite": SUITE}


def broken(part, change):
    rows = [dict(row) for row in FILES[part]]
    rows[1] |= change
    return part, [{key: value for key, value in row.items() if value is not ...} for row in rows]


DAMAGE = [
    (broken("ruler", {"score": 1.5}), "'score' is 1.5, expected 0 to 1"),
    (broken("ruler", {"score": "0.5"}), "'score' is '0.5', expected a number"),
    (broken("ruler", {"score": True, "correct": True}), "'score' is 'true', expected a number"),
    (broken("ruler", {"score": ...}), "no number 'score'"),
    (broken("ruler", {"score": 0.25, "correct": True}), "'correct' is true at a score of 0.25"),
    (broken("ruler", {"protocol": "ruler"}), "protocol 'ruler', expected 'ruler-like'"),
    (broken("ruler", {"protocol": ...}), "expected 'ruler-like'"),
    (broken("ruler", {"depths": [2]}), "'depths' is 2, expected 0 to 1"),
    (broken("ruler", {"length": 0}), "'length' is 0, expected 1 to inf"),
    (broken("ruler", {"index": 0.5}), "'index' is 0.5, expected a whole number"),
    (broken("ruler", {"task": 7}), "'task' is '7', expected a text"),
    (broken("ruler", {"model": "another"}), "model 'another', but 'model of before' in the first line"),
    (broken("needle", {"task": "short_context"}), "a row of task 'short_context' among those of needle"),
    (broken("needle", {"depth": -0.1}), "'depth' is -0.1, expected 0 to 1"),
    (broken("needle", {"kind": "haystack"}), "kind 'haystack'"),
    (broken("needle", {"shared": 1}), "'shared' is '1', expected true or false"),
    (broken("needle", {"correct": 1}), "'correct' is '1', expected true or false"),
    (broken("needle", {"seed": 99}), "seed '99', but '1234' in the first line"),
    (broken("loss_by_position", {"sums": [1.0]}), "edges, counts and sums do not belong together"),
    (broken("loss_by_position", {"edges": "0 to 9"}), "'edges' is '0 to 9', expected a list"),
    (broken("short_context", {"count": 0}), "'count' is 0, expected 1 to inf"),
    (broken("short_suite", {"correct": None}), "no 'correct'"),
    (broken("short_suite", {"options": 4}), "'options' is '4', expected a list"),
    (broken("short_suite", {"length": "long"}), "'length' is 'long', expected a number"),
    (broken("short_suite", {"depths": 5}), "'depths' is '5', expected a list"),
    (broken("short_suite", {"task": "$\\frac$"}), "expected a name of letters, digits"),
    (broken("ruler", {"task": "$\\frac$"}), "expected a name of letters, digits"),
    (broken("ruler", {"task": ""}), "expected a name of letters, digits"),
    (broken("ruler", {"unique_share": "x"}), "'unique_share' is 'x', expected a number"),
    (broken("ruler", {"scoring": "greedy"}), "scoring 'greedy', but 'teacher_forced' in the first line"),
    (broken("ruler", {"text": 5}), "'text' is '5', expected the digits of a hash"),
    (broken("ruler", {"index": 1 << 64}), "'index' is beyond 64 bits"),
    (broken("ruler", {"index": 10**400}), "damaged line"),
    (broken("needle", {"unique_share": "q"}), "'unique_share' is 'q', expected a number"),
    (broken("needle", {"depths": 7}), "'depths' is '7', expected a list"),
    (broken("loss_by_position", {"counts": [-1] * len(LOSS[1]["counts"])}), "'counts' is -1, expected 0 to inf"),
    (broken("loss_by_position", {"start": ...}), "no number 'start'"),
    (broken("short_context", {"start": "here"}), "'start' is 'here', expected a number"),
]


@pytest.mark.parametrize(("file", "words"), DAMAGE)
def test_a_damaged_or_foreign_line_is_one_clear_line(tmp_path, capsys, file, words):
    part, rows = file
    made_up.write_lines(tmp_path / "evaluate" / "before" / f"{part}.jsonl", rows)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert words in said
    assert f"evaluate/before/{part}.jsonl:2: damaged line: " in said
    assert said.endswith("remove the file and measure again")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("line", [b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000, b"nothing"])
def test_what_is_no_object_is_one_clear_line(tmp_path, line):
    file = tmp_path / "evaluate" / "before" / "ruler.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(line + b"\n")
    with pytest.raises(ConfigError, match=r"ruler\.jsonl:1: damaged line: ") as error:
        write_report(tmp_path)
    assert len(str(error.value)) < 400


def test_files_of_a_column_are_of_one_model(tmp_path):
    folder = tmp_path / "evaluate" / "before"
    made_up.write_lines(folder / "ruler.jsonl", RULER)
    made_up.write_lines(folder / "short_suite.jsonl", [row | {"rope": "another"} for row in SUITE])
    with pytest.raises(ConfigError, match=r"short_suite\.jsonl: rope 'another', but 'rope of before' in ruler\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize("part", FILES)
def test_every_kind_of_file_is_read_and_text_may_hold_any_line_separator(tmp_path, part):
    file = tmp_path / "evaluate" / "before" / f"{part}.jsonl"
    file.parent.mkdir(parents=True)
    odd = [row | {"got": "one\u2028two\x85three\x0cfour"} for row in FILES[part]]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in odd), encoding="utf-8")
    assert write_report(tmp_path).is_file()


def test_half_a_surrogate_pair_in_an_answer_ends_no_page(tmp_path):
    rows = [row | {"got": "half \ud800 a pair", "correct": False, "score": 0.0} for row in RULER]
    made_up.write_lines(tmp_path / "evaluate" / "before" / "ruler.jsonl", rows)
    assert "half ? a pair" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_name_from_a_file_is_no_formula_in_a_picture():
    with figure_in_style() as figure:
        figure.suptitle("after $\\frac$")
        assert svg(figure).startswith("data:image/svg+xml")


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "tokens_per_second"])
def test_a_damaged_step_is_one_clear_line(tmp_path, name):
    made_up.write_metrics(tmp_path / "metrics" / "extend.jsonl", 3.0, 2.0, 3)
    file = tmp_path / "metrics" / "extend.jsonl"
    made_up.write_lines(file, [json.loads(line) | {name: "much"} for line in file.read_text().splitlines()])
    with pytest.raises(ConfigError, match=rf"extend\.jsonl:1: damaged line: '{name}' is 'much', expected a number"):
        write_report(tmp_path)
