"""Tables and dictionaries: every answer recomputed from the rendered text alone, by rules that share nothing with the generator."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.data.synthesis.draws import Draws, new_names
from mcore_longctx.data.synthesis.key_value import make_key_value_chat
from mcore_longctx.data.synthesis.sized import TokenCounter, fit
from mcore_longctx.data.synthesis.tables import make_tables_chat
from mcore_longctx.errors import DataError
from tests.data.conftest import make_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def count() -> TokenCounter:
    return TokenCounter(TINY)


# ------------------------------------------------------------------ an oracle that reads
def tables_in(text: str) -> dict[str, list[dict[str, str]]]:
    """Rows of `Table A` and `Table B` of a first message, by column, in order."""
    found = {}
    for name, head, body in re.findall(r"^Table (A|B)(.*)\n((?:.+\n?)*)", text, re.MULTILINE):
        lines = body.strip("\n").split("\n")
        if head:
            key = head.removeprefix(", each line a ")
            rows = []
            for line in lines:
                entity, rest = line.removesuffix(".").split(": ", 1)
                rows.append({key: entity} | dict(part.split(" ", 1) for part in rest.split(", ")))
        else:
            if lines[0].startswith("|"):
                cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
            else:
                cells = [line.split(",") for line in lines]
            rows = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
        found[name] = rows
    return found


def answer_of(question: str, tables: dict[str, list[dict[str, str]]]) -> tuple[str, list[str]]:
    """The value, and the keys of the rows of table A that it follows from."""
    rows = tables["A"]
    key = next(iter(rows[0]))
    if m := re.fullmatch(r"In table A, what is the (?!sum)(\w+) of (.+)\?", question):
        (row,) = (row for row in rows if row[key] == m[2])
        return row[m[1]], [m[2]]
    if m := re.fullmatch(r"In table A, which (\w+) has (\w+) (\d+)\?", question):
        (row,) = (row for row in rows if row[m[2]] == m[3])
        return row[m[1]], [row[key]]
    if m := re.fullmatch(r"In table A, how many rows have (\w+) (\w+) and (\w+) above (\d+)\?", question):
        hits = [row for row in rows if row[m[1]] == m[2] and int(row[m[3]]) > int(m[4])]
        return str(len(hits)), [row[key] for row in hits]
    if m := re.fullmatch(r"In table A, which (\w+) has the (highest|lowest) (\w+) among the rows with (\w+) (\w+)\?", question):
        group = [row for row in rows if row[m[4]] == m[5]]
        numbers = [int(row[m[3]]) for row in group]
        wanted = max(numbers) if m[2] == "highest" else min(numbers)
        (row,) = (row for row in group if int(row[m[3]]) == wanted)
        return row[m[1]], [row[key] for row in group]
    if m := re.fullmatch(r"In table A, what is the sum of (\w+) over the rows with (\w+) (\w+)\?", question):
        group = [row for row in rows if row[m[2]] == m[3]]
        return str(sum(int(row[m[1]]) for row in group)), [row[key] for row in group]
    if m := re.fullmatch(r"Which (\w+) does table B give for the (\w+) that table A gives for (.+)\?", question):
        (row,) = (row for row in rows if row[key] == m[3])
        (other,) = (other for other in tables["B"] if other[m[2]] == row[m[2]])
        return other[m[1]], [m[3]]
    m = re.fullmatch(r"In table A, which (\w+) stands in the row directly after (.+)\?", question)
    assert m is not None, question
    names = [row[key] for row in rows]
    at = names.index(m[2])
    return names[at + 1], names[at : at + 2]


def check_tables(record: dict[str, Any]) -> None:
    messages = record["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    text, _, first = messages[0]["content"].rpartition("\n\n")
    tables = tables_in(text)
    names = [next(iter(row.values())) for row in tables["A"]]
    assert len(set(names)) == len(names) == record["rows"]
    questions = [first, *(m["content"] for m in messages[2::2])]
    assert len(set(questions)) == len(questions) == len(record["questions"])
    lines = text.split("\n")
    for question, answer in zip(questions, (m["content"] for m in messages[1::2]), strict=True):
        value, used = answer_of(question, tables)
        head, *recited, last = answer.split("\n")
        assert (head, last) == ("Rows used:", f"Answer: {value}"), question
        of_a = [line for line in recited if line in lines and any(re.search(rf"(?<!\w){name}(?!\w)", line) for name in used)]
        assert len(of_a) == len(used), (question, recited)
        others = [line for line in recited if line not in of_a]
        assert others == ([] if used else ["none"]) or "table B" in question
        assert all(line in lines for line in others if line != "none")


def test_every_answer_about_tables_follows_from_the_text(count: TokenCounter) -> None:
    kinds: dict[str, int] = {}
    for index in range(120):
        record = make_tables_chat(count, seed=5, index=index, length=(512, 1024, 4096)[index % 3], turns=6)
        check_tables(record)
        for kind in record["questions"]:
            kinds[kind] = kinds.get(kind, 0) + 1
    assert {*kinds} == {"look-up", "reverse look-up", "filter and count", "highest", "lowest", "sum", "join", "next row"}
    assert min(kinds.values()) >= 5


def test_a_wrong_answer_is_found(count: TokenCounter) -> None:
    """The oracle is no rubber stamp."""
    record = make_tables_chat(count, seed=5, index=2, length=2048)
    record["messages"][-1]["content"] += "1"
    with pytest.raises(AssertionError):
        check_tables(record)


def test_every_answer_about_dictionaries_follows_from_the_text(count: TokenCounter) -> None:
    kinds = set()
    for index in range(60):
        record = make_key_value_chat(count, seed=5, index=index, length=(512, 1024, 4096)[index % 3])
        kinds |= set(record["questions"])
        messages = record["messages"]
        lines = messages[0]["content"].split("\n")
        entries: dict[tuple[int, ...], tuple[int, int]] = {}  # the numbers of a key, sorted: value, dictionary
        for line in lines[1:-1]:
            (number,) = map(int, re.findall(r"^Dictionary \[(\d+)\] \{", line))
            for key, value in re.findall(r"(\(.*?\)|\d+): (\d+)", line.split("]", 1)[1]):
                name = tuple(sorted(map(int, re.findall(r"\d+", key))))
                assert name not in entries
                entries[name] = int(value), number
        for question, answer in zip([lines[-1], *(m["content"] for m in messages[2::2])], messages[1::2], strict=True):
            numbers = tuple(sorted(map(int, re.findall(r"\d+", question))))
            if question.startswith("What is the sum"):
                values = [entries[number,][0] for number in numbers]
                assert answer["content"].endswith(f"The sum is {sum(values)}.")
            else:
                value, where = entries[numbers]
                assert re.search(rf"is {value} and it is in Dictionary \[{where}\]\.$", answer["content"])
    assert kinds == {"value", "composed", "sum"}


# ------------------------------------------------------------------ lengths
@pytest.mark.parametrize("make", [make_tables_chat, make_key_value_chat])
@pytest.mark.parametrize(("length", "least"), [(512, 0.6), (4096, 0.75), (100_000, 0.99)])
def test_chats_are_as_long_as_asked_by_an_exact_count(count: TokenCounter, make: Any, length: int, least: float) -> None:
    for index in range(2 if length > 10_000 else 20):
        record = make(count, seed=1, index=index, length=length)
        assert record["tokens"] == count(record["messages"])
        assert least * length <= record["tokens"] <= length


def test_a_long_chat_is_counted_a_few_times_only(count: TokenCounter) -> None:
    calls: list[int] = []

    class Counting(TokenCounter):
        def __call__(self, messages: Any) -> int:
            calls.append(super().__call__(messages))
            return calls[-1]

    make_tables_chat(Counting(TINY), seed=1, index=0, length=200_000)
    assert sum(tokens > 20_000 for tokens in calls) <= 4


def test_a_chat_is_a_function_of_seed_and_index(count: TokenCounter) -> None:
    for make in (make_tables_chat, make_key_value_chat):
        chats = {
            (seed, index): json.dumps(make(count, seed=seed, index=index, length=900)["messages"])
            for seed in (1, 2)
            for index in (0, 1)
        }
        assert len(set(chats.values())) == 4
        assert json.dumps(make(TokenCounter(TINY), seed=2, index=1, length=900)["messages"]) == chats[2, 1]


def test_a_size_that_never_fits_says_how_long_the_smallest_is() -> None:
    with pytest.raises(DataError, match="here: a length of 9 tokens is too small, the smallest chat has 12; raise --length"):
        fit(lambda size: [{"n": size}], lambda messages: 4 * messages[0]["n"], 9, smallest=3, where="here")


@pytest.mark.parametrize("a_row", [1, 7, 1000])
@pytest.mark.parametrize("jump", [0, 50])
def test_the_size_found_is_the_largest_or_nearly(a_row: int, jump: int) -> None:
    """Costs that are linear, and that jump as questions do."""

    def tokens(messages: Any) -> int:
        return 30 + a_row * messages[0]["n"] + jump * (messages[0]["n"] % 2)

    found = fit(lambda size: [{"n": size}], tokens, 100_000, smallest=3, where="")
    assert 100_000 - tokens([{"n": found.size}]) >= 0
    assert tokens([{"n": found.size}]) >= 0.995 * 100_000 - a_row - jump
    assert found.countings <= 10


def test_one_token_too_many_is_too_many() -> None:
    """Rows that cost 10 tokens, and 13 from the fifty-first on: the guesses come down to 76 rows, one token beyond the length."""

    def tokens(messages: Any) -> int:
        size = messages[0]["n"]
        return 30 + (10 if size <= 50 else 13) * size

    found = fit(lambda size: [{"n": size}], tokens, 1017, smallest=3, where="")
    assert (found.size, found.tokens) == (75, 1005)


def test_draws_are_those_of_the_published_bit_generator() -> None:
    """Frozen: another number here would change every chat that anybody made."""
    draws = Draws(1234, "rows")
    assert [draws.below(1000) for _ in range(6)] == [533, 215, 25, 642, 975, 621]
    names = [*islice(new_names(Draws(0), 1), 20_000)]  # of 350,000
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------ the command
def synth(*arguments: object) -> int:
    return main(["data", "synth", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["tables", "keyvalue"])
def test_files_are_the_same_for_any_number_of_workers_and_data_build_reads_them(tmp_path: Path, kind: str) -> None:
    common = ["--tokenizer", TINY, "--length", "600:5", "--length", "1K:4"]
    for workers in (1, 3):
        assert synth(kind, tmp_path / f"{workers}.jsonl", *common, "--workers", workers) == 0
    for length in ("600", "1K"):
        assert (tmp_path / f"1-{length}.jsonl").read_bytes() == (tmp_path / f"3-{length}.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-1K.jsonl", "1-600.jsonl", "3-1K.jsonl", "3-600.jsonl"]
    records = [json.loads(line) for line in (tmp_path / "1-1K.jsonl").read_text().splitlines()]
    assert len({json.dumps(record["messages"]) for record in records}) == 4
    assert (
        main(["data", "tokenize", str(tmp_path / "out"), "--chats", "--tokenizer", str(TINY), f"x={tmp_path / '1-1K.jsonl'}"])
        == 0
    )
    manifest = json.loads((tmp_path / "out" / "tokens" / "manifest.json").read_text())
    assert manifest["sources"]["x"]["documents"] == 4
    assert manifest["sources"]["x"]["tokens"] == sum(record["tokens"] for record in records)  # the count is that of data build


REFUSED = [
    (["tables", "OUT.jsonl", "--length", "100:2"], "a length of 100 tokens is too small, the smallest chat has"),
    (["keyvalue", "OUT.jsonl", "--length", "100:2"], "a length of 100 tokens is too small, the smallest chat has"),
    (["tables", "OUT.jsonl", "--length", "1K"], "--length 1K: expected LENGTH:CHATS, for example 32K:1000"),
    (["tables", "OUT.jsonl", "--length", "1K:0"], "--length 1K:0: expected 1 or more tokens and chats"),
    (["tables", "OUT.jsonl", "--length", "x:1"], "--length: "),
    (["tables", "OUT.json", "--length", "1K:1"], "OUT.json: the chats are JSON lines; let the name end in .jsonl"),
    (["tables", "OUT.jsonl", "--length", "1K:1", "--turns", "0"], "--turns 0: expected 1 or more"),
    (["tables", "OUT.jsonl", "--length", "1K:1", "--workers", "0"], "--workers 0: expected 1 or more"),
    (["tables", "OUT.jsonl", "--length", "1K:1", "--length", "1024:1"], "--length gives the same length twice"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert synth(*arguments, "--tokenizer", TINY) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_template_and_a_file_that_is_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tokenizer(tmp_path / "plain", template=None)
    assert synth("tables", tmp_path / "o.jsonl", "--tokenizer", folder, "--length", "1K:1") == 2
    assert "no chat template; it belongs in chat_template.jinja or tokenizer_config.json" in capsys.readouterr().err
    (tmp_path / "o.jsonl").write_text("mine")
    assert synth("tables", tmp_path / "o.jsonl", "--tokenizer", TINY, "--length", "1K:1") == 2
    assert "o.jsonl: is already there; choose another name or remove it" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_text() == "mine"
