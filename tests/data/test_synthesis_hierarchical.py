"""Chats about documents: structure, right answers from the built-in writer, writers that fail, kills, the closed-book filter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.cli.main import main
from mcore_longctx.data.synthesis.assemble import assemble
from mcore_longctx.data.synthesis.closed_book import answerable_without, same_answer
from mcore_longctx.data.synthesis.documents import ChunkedDocument, read_documents
from mcore_longctx.data.synthesis.question_plan import QuestionCounts, plan_chat
from mcore_longctx.data.synthesis.sized import TokenCounter
from mcore_longctx.data.synthesis.writer import Answers, Writer
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.errors import DataError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
WRITER = """\
import json, os, sys, time
pause, log, mode = float(sys.argv[1]), sys.argv[2], sys.argv[3]
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    with open(log, "a") as file:
        file.write(json.dumps(request) + "\\n")
    time.sleep(pause)
    answer = {"id": request["id"]}
    if request["kind"] == "summary":
        answer["summary"] = "about " + request["text"][:20]
    elif request["kind"] == "closed_book":
        answer["answer"] = "One of " + ", ".join(map(str, range(3000))) + "!" if "gap" in request["question"] else "no idea"
    else:
        text = (request.get("chunks") or [request["chunk"]])[0]
        answer |= {"question": f"What is in {request['name']}?", "answer": text[:30]}
    bad = number % 20 == 7
    if mode == "junk" and bad:
        print('{"id": "' + request["id"] + '", "quest')
    elif mode == "list" and bad:
        print("[1, 2]")
    elif mode == "empty" and bad:
        print(json.dumps(answer | {"answer": "  ", "summary": ""}))
    elif mode == "error" and bad:
        print(json.dumps({"id": request["id"], "error": "too hard"}))
    elif mode == "twice" and bad:
        print(json.dumps(answer) + "\\n" + json.dumps(answer))
    elif mode == "deep" and bad:
        print("[" * 100_000)
    elif mode == "deep error" and bad:
        print('{"id": "' + request["id"] + '", "error": ' + "[" * 900 + "]" * 900 + "}")
    elif mode == "half" and bad:
        print('{"id": "' + request["id"] + '", "error": "\\\\ud800 is half"}')
    elif mode.startswith("control ") and bad:
        name = mode.split()[1]
        print(json.dumps(answer | {name: answer[name] + "<|eot_id|>"} if name in answer else answer))
    elif mode == "nonsense":
        print("no idea")
    elif mode == "silent" and bad:
        pass
    elif mode == "dies" and number == 5:
        sys.exit("out of memory")
    elif mode == "hangs" and number == 5:
        time.sleep(60)
    elif mode != "mute":
        print(json.dumps(answer))
    sys.stdout.flush()
"""


def sentences(seed: int, count: int) -> str:
    """Sentences that differ, in paragraphs; every third has a number."""
    lines = []
    for at in range(count):
        rest = f"with {37 * at + seed} barrels" if at % 3 == 0 else f"by the mast of ship {chr(97 + at % 26)}{at}{seed}"
        lines.append(f"On day {at} of voyage {seed} the crew sat down {rest}." + ("\n\n" if at % 6 == 5 else " "))
    return "".join(lines)


CONTROL = "<|eot_id|>"


@pytest.fixture
def books(tmp_path: Path) -> Path:
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"id": f"book-{n}", "text": sentences(n, 30 + 20 * n)}) + "\n" for n in range(4)))
    return path


def synth(out: Path, *arguments: object, length: str = "6K:3", chunk: int = 400) -> int:
    common = ["--tokenizer", TINY, "--length", length, "--chunk", chunk, "--workers", 1]
    return main(["data", "synth", "hierarchical", str(out), *map(str, [*arguments, *common])])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------ the plan
def document(name: str, chunks: int) -> ChunkedDocument:
    return ChunkedDocument(name, "x" * 10 * chunks, tuple(range(10, 10 * chunks + 1, 10)), tuple(range(10, 10 * chunks + 1, 10)))


@given(
    count=st.integers(1, 8),
    chunks=st.integers(1, 9),
    length=st.integers(1200, 6000),
    seed=st.integers(0, 50),
    hierarchical=st.integers(0, 6),
    revisit=st.integers(0, 9),
)
def test_the_plan_has_the_papers_counts(count: int, chunks: int, length: int, seed: int, hierarchical: int, revisit: int) -> None:
    documents = [document(str(number), chunks) for number in range(count)]
    counts = QuestionCounts(hierarchical=hierarchical, revisit=revisit)
    plan = plan_chat(documents, counts, seed=seed, index=3, length=length, question_tokens=20)
    assert len({number for number, _ in plan.documents}) == len(plan.documents)
    names = []
    for place, slots in enumerate(plan.slots):
        kinds = Counter((slot.when, slot.kind) for slot in slots)
        assert kinds["after", "hierarchical"] == hierarchical
        assert sum(n for (when, _), n in kinds.items() if when == "after") == hierarchical + 5
        revisited = [slot.document for slot in slots if slot.when == "revisit"]
        assert len(revisited) == (revisit if place else 0)
        assert all(earlier < place for earlier in revisited)
        followed = Counter(slot.document for slot in slots if slot.when == "follow_up")
        assert set(followed.values()) <= {3}
        assert all(earlier < place for earlier in followed)
        for slot in slots:
            taken = plan.documents[slot.document][1]
            assert len(slot.chunks) == (min(3, taken) if slot.kind == "multi_hop" else 1)
            assert all(chunk < taken for chunk in slot.chunks)
            names.append(slot.name)
    assert len(set(names)) == len(names)
    asked = sum(map(len, plan.slots))
    assert sum(10 * chunks for _, chunks in plan.documents) + asked * 20 <= length


def test_four_documents_have_78_questions_on_average() -> None:
    """40 behind their documents, 3 x 9 about earlier ones, 6 earlier documents x 0.6 x 3 follow-ups: 77.8."""
    documents = [document(str(number), 1) for number in range(4)]
    sizes = [
        sum(map(len, plan_chat(documents, QuestionCounts(), seed=1, index=i, length=99999, question_tokens=20).slots))
        for i in range(300)
    ]
    # a chat's follow-ups vary by 3 x sqrt(6 x 0.24) = 3.6; the mean of 300 by 0.21: five of these
    assert abs(sum(sizes) / len(sizes) - 77.8) < 1.05


@given(st.text(alphabet="ab .\n", max_size=400), st.integers(1, 60))
def test_chunks_are_the_whole_text_in_order(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    path = tmp_path_factory.mktemp("chunks") / "d.txt"
    path.write_text(text + "end.")
    ((found,), left_out) = read_documents([path], load_tokenizer(TINY, fast=False), chunk=size)
    assert "".join(found.chunk(number) for number in range(len(found.stops))) == text + "end."
    assert left_out == 0
    assert all(len(found.chunk(number)) <= size * 5 // 4 + 1 for number in range(len(found.stops)))  # one byte is a token


@pytest.mark.parametrize("less", [*range(12), 150])
def test_a_chat_that_is_too_long_loses_its_last_questions(less: int) -> None:
    documents = [document("a", 2)]
    plan = plan_chat(documents, QuestionCounts(), seed=1, index=0, length=999, question_tokens=20)
    items = {slot: {"question": f"Q {n}?", "answer": f"A {n}."} for n, slot in enumerate(plan.slots[0])}
    count = TokenCounter(TINY)
    whole = assemble(plan, items, documents, count, length=9999)
    assert whole is not None
    assert (len(whole.messages), whole.dropped) == (20, 0)
    cut = assemble(plan, items, documents, count, length=whole.tokens - less)
    assert cut is not None
    assert cut.tokens == count(cut.messages) <= whole.tokens - less
    assert cut.messages == whole.messages[: len(cut.messages)]
    assert cut.dropped == 10 - len(cut.messages) // 2
    assert bool(cut.dropped) == bool(less)
    assert not cut.dropped or count(whole.messages[: len(cut.messages) + 2]) > whole.tokens - less  # no more than must be
    assert assemble(plan, items, documents, count, length=30) is None


# ------------------------------------------------------------------ the built-in writer
def check_answer(question: str, answer: str, text: str) -> str:
    """Recompute an answer from the document; the kind of the question."""

    def after(quote: str, answer: str) -> None:
        assert text.count(quote) == 1
        assert text[text.index(quote) + len(quote) :].lstrip().startswith(answer)

    if m := re.fullmatch(r"Here are (\d) texts of it\. Which text follows directly on each\?\n(.*)", question, re.DOTALL):
        quotes = re.findall(r"^\d\. '(.*)'$", m[2], re.MULTILINE)
        answers = [line.split(". ", 1)[1] for line in answer.split("\n")]
        assert len(quotes) == len(answers) == int(m[1])
        for quote, one in zip(quotes, answers, strict=True):
            after(quote, one)
        return "multi_hop"
    if m := re.fullmatch(r"Which text stands directly before '(.*)'\?", question):
        after(answer, m[1])
        assert text.count(m[1]) == 1
        return "hierarchical"
    if m := re.fullmatch(r"Directly after '(.*)' stands '(.*)'\. What belongs in the gap\?", question):
        assert m[2].count("____") == 1
        after(m[1], m[2].replace("____", answer))
        return "local"
    m = re.fullmatch(r"Which text follows directly on '(.*)'\?", question)
    assert m is not None, question
    after(m[1], answer)
    return "other"


def asked_in(chat: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Question, answer and what the chat shows of the document that the question names."""
    shown: dict[int, str] = {}
    found = []
    for user, answer in zip(chat["messages"][::2], chat["messages"][1::2], strict=True):
        for number, text in re.findall(
            r"Document \[(\d+)\]\n\n(.*?)\n\n(?=Document \[|About document)", user["content"], re.DOTALL
        ):
            shown[int(number)] = text
        m = re.search(r"About document \[(\d+)\]: (.*)\Z", user["content"], re.DOTALL)
        assert m is not None
        found.append((m[2], answer["content"], shown[int(m[1])]))
    return found


def test_the_built_in_writers_answers_follow_from_the_text_and_the_evidence_is_where_it_says(tmp_path: Path, books: Path) -> None:
    counts = ["--hierarchical", 2, "--diverse", 3, "--revisit", 3, "--question-tokens", 350]
    assert synth(tmp_path / "o.jsonl", books, *counts, length="12K:4") == 0
    count, kinds, whens = TokenCounter(TINY), Counter[str](), Counter[str]()
    rows = records(tmp_path / "o.evidence.jsonl")
    texts = {record["id"]: record["text"] for record in records(books)}
    for chat in records(tmp_path / "o.jsonl"):
        mine = [row for row in rows if row["chat"] == chat["id"]]
        rendered = count.render(chat["messages"])
        ids, ends = count.tokenizer.encode_chat(rendered)
        assert len(ids) == chat["tokens"] <= 12 * 1024
        assert len(mine) == len(chat["messages"]) // 2
        for row, (question, answer, text) in zip(mine, asked_in(chat), strict=True):
            assert texts[row["document"]].startswith(text)
            assert check_answer(question, answer, text) == row["kind"]
            kinds[row["kind"]] += 1
            whens[row["when"]] += 1
            # the evidence: a quote of the question begins at the token that the row names
            for token in row["evidence_tokens"]:
                begin = int(ends[token - 1]) if token else 0
                assert any(rendered.startswith(quote, begin) for quote in re.findall(r"'(.*?)'", question)), (token, question)
            assert max(row["evidence_tokens"]) < row["answer_token"] < chat["tokens"]
            assert rendered.startswith(answer, int(ends[row["answer_token"] - 1]))
            assert row["depth"] == pytest.approx(min(row["evidence_tokens"]) / chat["tokens"], abs=1e-4)
    assert set(kinds) == {"hierarchical", "multi_hop", "local", "other"}
    assert set(whens) == {"after", "revisit", "follow_up"}


def test_the_result_is_the_same_again_and_with_any_number_of_workers(tmp_path: Path, books: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        out = tmp_path / name
        assert synth(out / "o.jsonl", books, "--length", "3K:2", "--workers", workers) == 0
    for file in ("o-6K.jsonl", "o-3K.jsonl", "o.evidence.jsonl", "o.rejected.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    chats = records(tmp_path / "a" / "o-6K.jsonl")
    assert len({json.dumps(chat["messages"]) for chat in chats}) == 3


def test_chats_of_512_tokens(tmp_path: Path, books: Path) -> None:
    short = ["--hierarchical", 1, "--diverse", 0, "--question-tokens", 200]
    assert synth(tmp_path / "o.jsonl", books, *short, length="512:6", chunk=128) == 0
    assert all(chat["tokens"] <= 512 for chat in records(tmp_path / "o.jsonl"))


def test_a_document_with_the_text_of_a_control_token_is_left_out(
    tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with books.open("a") as file:
        file.write(json.dumps({"id": "trap", "text": "so <|eot_id|> ends. " * 50}) + "\n")
    assert synth(tmp_path / "o.jsonl", books) == 0
    assert "documents: 4, 1 left out (empty, or with control tokens)" in capsys.readouterr().out
    assert "trap" not in (tmp_path / "o.evidence.jsonl").read_text()


def test_a_question_about_a_text_that_stands_twice_is_dropped(
    tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once in each chunk, so the writer cannot know."""
    once = sentences(1, 12)
    books.write_text(json.dumps({"text": once + sentences(2, 12) + once}) + "\n")
    assert synth(tmp_path / "o.jsonl", books, length="4K:2") == 0
    reasons = [row["reason"] for row in records(tmp_path / "o.rejected.jsonl")]
    ambiguous = [reason for reason in reasons if reason.endswith("stands more than once in the document")]
    assert ambiguous
    assert f"{len(ambiguous)} with an ambiguous quote" in capsys.readouterr().out
    for chat in records(tmp_path / "o.jsonl"):
        for question, answer, text in asked_in(chat):
            check_answer(question, answer, text)  # each quote once in what is shown
    books.write_text(json.dumps({"text": once + once}) + "\n")
    assert synth(tmp_path / "p.jsonl", books, length="4K:2") == 2
    assert "p.work/rejected.jsonl: no chat of 4,096 tokens has a question left; see there why" in capsys.readouterr().err
    assert not list(tmp_path.glob("p*.jsonl"))


# ------------------------------------------------------------------ commands
@pytest.fixture
def command(tmp_path: Path) -> Any:
    """command(mode): a writer's command line; what it is asked goes to asked.jsonl."""
    (tmp_path / "a writer.py").write_text(WRITER)

    def line(mode: str = "good", pause: float = 0.0) -> str:
        return f"{sys.executable} '{tmp_path / 'a writer.py'}' {pause} {tmp_path / 'asked.jsonl'} '{mode}'"

    return line


REASONS = {
    "junk": "not JSON (Unterminated string",
    "list": "not an object with an id",
    "empty": "no text 'summary'",
    "error": "the writer says: too hard",
    "deep": "JSON that is nested too deeply",
    "deep error": "",  # nested too deeply or not, as the Python has it
    "control question": "'question' holds '<|eot_id|>', the text of a control token",
    "control answer": "'answer' holds '<|eot_id|>', the text of a control token",
    "control summary": "'summary' holds '<|eot_id|>', the text of a control token",
    "half": "the writer says: \\ud800 is half",
    "twice": "was not asked, or is answered already",
    "silent": "no answer",
}


@pytest.mark.parametrize("mode", REASONS)
def test_items_without_a_usable_answer_are_kept_aside_and_counted(
    tmp_path: Path, books: Path, command: Any, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    assert synth(tmp_path / "o.jsonl", books, "--writer", command(mode)) == 0
    rejected = records(tmp_path / "o.rejected.jsonl")
    said = capsys.readouterr().out
    assert any(REASONS[mode] in row["reason"] for row in rejected)
    assert f"{sum(row['reason'] != 'answerable without the document' for row in rejected)} without a usable answer" in said
    known = {json.loads(line)["id"] for line in (tmp_path / "o.work" / "answers.jsonl").read_text().splitlines()}
    asked = {row["id"] for row in records(tmp_path / "asked.jsonl")}
    if mode != "twice":
        assert 0 < len(asked - known) < len(asked) / 5
    assert not known - asked
    assert len(records(tmp_path / "o.jsonl")) == 3


def test_control_tokens_in_answers_are_never_learned(tmp_path: Path, books: Path, command: Any) -> None:
    """Those of an earlier start, with another tokenizer, are asked for again."""
    assert synth(tmp_path / "o.jsonl", books, "--writer", command()) == 0
    answers = tmp_path / "o.work" / "answers.jsonl"
    rows = records(answers)
    for row in rows:
        name = "answer" if "answer" in row else "summary"
        row[name] += CONTROL
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in tmp_path.glob("o*.jsonl"):
        path.unlink()
    (tmp_path / "asked.jsonl").unlink()
    assert synth(tmp_path / "o.jsonl", books, "--writer", command()) == 0
    assert {row["id"] for row in records(tmp_path / "asked.jsonl")} == {row["id"] for row in rows}
    assert not any(CONTROL in message["content"] for chat in records(tmp_path / "o.jsonl") for message in chat["messages"])
    (tmp_path / "asked.jsonl").unlink()
    for path in tmp_path.glob("o*.jsonl"):
        path.unlink()
    assert synth(tmp_path / "o.jsonl", books, "--writer", command()) == 0  # what was answered anew is known
    assert not (tmp_path / "asked.jsonl").exists()


def test_a_closed_book_answer_may_hold_a_control_token(tmp_path: Path) -> None:
    """It is compared and never learned; many a model ends so."""
    (tmp_path / "w.py").write_text('print(\'{"id": "a", "answer": "a mast<|eot_id|>"}\')')
    answers = Answers(tmp_path / "answers.jsonl", forbidden=re.compile(re.escape(CONTROL)))
    writer = Writer(command=(sys.executable, str(tmp_path / "w.py")))
    answers.ask([{"id": "a", "kind": "closed_book", "question": "What?"}], writer, max_rejected=0)
    assert answers.known["a"]["answer"] == "a mast<|eot_id|>"
    assert not answers.rejected


FAILURES = [
    (
        "dies",
        [],
        "have no usable answer of the command {python}, the first: the command ended with exit code 1: out of memory; repair it",
    ),
    ("hangs", ["--timeout", "1"], "the first: no line of the command for 1 s"),
    ("mute", [], "items have no usable answer of the command {python}, the first: no answer"),
]


@pytest.mark.parametrize(("mode", "more", "message"), FAILURES, ids=[mode for mode, _, _ in FAILURES])
def test_a_writer_that_fails_stops_with_one_line_and_keeps_what_it_said(
    tmp_path: Path, books: Path, command: Any, capsys: pytest.CaptureFixture[str], mode: str, more: list[str], message: str
) -> None:
    assert synth(tmp_path / "o.jsonl", books, "--writer", command(mode), *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(python=sys.executable) in line
    assert "o.work/rejected.jsonl: " in line
    assert (tmp_path / "o.work" / "rejected.jsonl").read_text().count("\n") >= 1
    assert not list(tmp_path.glob("o*.jsonl"))
    kept = (tmp_path / "o.work" / "answers.jsonl").read_text().count("\n")
    assert kept == (0 if mode == "mute" else 5)


KEEPS_ON = """\
import json, os, subprocess, sys, time
mode, noted = sys.argv[1:]
out = subprocess.DEVNULL if "closes" in mode else None
child = subprocess.Popen(["sleep", "60"], stdout=out, start_new_session="away" in mode)
with open(noted, "w") as file:
    file.write(f"{child.pid} {os.getpid()}")
if "unread" in mode:
    sys.stdin.buffer.read(1)
    os._exit(0)
for line in sys.stdin:
    print(json.dumps({"id": json.loads(line)["id"], "question": "What?", "answer": "a mast"}), end="\\n", flush=True)
if "closes" in mode:
    os.close(1)
if "stays" in mode:
    time.sleep(60)
print("[" * 200_000, end="", flush=True)  # after the last answer: more than a pipe holds
os._exit(0)
"""
MANY = [{"id": str(number), "kind": "local", "chunk": "x" * 40_000, "name": "n"} for number in range(10)]


@pytest.fixture
def keeps_on(tmp_path: Path) -> Iterator[Any]:
    """keeps_on(mode): a writer that answers and leaves something; whose is_running says what of it runs, and who ends it after."""
    (tmp_path / "w.py").write_text(KEEPS_ON)
    noted = tmp_path / "pids"

    def writer(mode: str) -> tuple[Writer, Callable[[], list[bool]]]:
        command = (sys.executable, str(tmp_path / "w.py"), mode, str(noted))
        return Writer(command=command, timeout=30.0), lambda: [is_running(int(pid)) for pid in noted.read_text().split()]

    yield writer
    for pid in noted.read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("mode", ["near", "away", "near stays", "near closes stays", "away closes stays"])
def test_what_is_answered_is_taken_though_somebody_holds_the_pipes_or_keeps_running(
    tmp_path: Path, keeps_on: Any, mode: str
) -> None:
    """The child holds the pipes of the command. It ends with it, unless it went into a session of its own: then nobody waits."""
    writer, running = keeps_on(mode)
    answers = Answers(tmp_path / "answers.jsonl")
    open_before, begin = len(list(Path("/proc/self/fd").iterdir())), time.monotonic()
    answers.ask(MANY, writer, max_rejected=0.1)
    assert time.monotonic() - begin < 15  # far below the timeout, and than what is left behind runs
    assert len(answers.known) == 10
    assert all("nested" in one.reason or "not JSON" in one.reason for one in answers.rejected)
    assert len(answers.rejected) == ("stays" not in mode)  # the line after the last answer is read to its end
    assert all(len(one.line or "") == 200 for one in answers.rejected)
    deadline = time.monotonic() + 5
    while running() != ["away" in mode, False]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


@pytest.mark.parametrize("mode", ["near unread", "away unread"])
def test_a_command_that_ends_without_an_answer_is_not_waited_for(tmp_path: Path, keeps_on: Any, mode: str) -> None:
    writer, running = keeps_on(mode)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"10 of 10 items have no usable answer .*, the first: no answer"):
        Answers(tmp_path / "answers.jsonl").ask(MANY, writer, max_rejected=0.1)
    assert time.monotonic() - begin < 15
    assert not running()[1]


def is_running(pid: int) -> bool:
    """Not gone, and not ended and waiting for a parent that never asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_writer_of_nonsense_is_ended_soon(
    tmp_path: Path, books: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three bad lines always may be; the fourth ends it, not the last of an expensive night."""
    assert synth(tmp_path / "o.jsonl", books, "--writer", command("nonsense", 0.1), chunk=150) == 2
    m = re.search(r"of (\d+) items have no usable answer of the command", capsys.readouterr().err)
    assert m is not None
    assert len(records(tmp_path / "asked.jsonl")) < int(m[1]) / 2


def test_a_command_that_does_not_exist_is_named(tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synth(tmp_path / "o.jsonl", books, "--writer", "no-such-writer --fast") == 2
    assert capsys.readouterr().err == (
        "mcore-longctx: no-such-writer: cannot be started (No such file or directory); give a program and its arguments\n"
    )


def test_no_shell_sees_the_command(tmp_path: Path, books: Path, command: Any) -> None:
    assert synth(tmp_path / "o.jsonl", books, "--writer", f"{command()} $(touch {tmp_path / 'hacked'}) ; touch x") == 0
    assert not (tmp_path / "hacked").exists()


def test_a_kill_loses_no_answer_and_nothing_is_asked_twice(tmp_path: Path, books: Path, command: Any) -> None:
    line = command(pause=0.03)
    arguments = ["data", "synth", "hierarchical", str(tmp_path / "o.jsonl"), str(books), "--tokenizer", str(TINY)]
    arguments += ["--length", "6K:3", "--chunk", "400", "--writer", line]
    process = subprocess.Popen([sys.executable, "-m", "mcore_longctx", *arguments], stderr=subprocess.DEVNULL)
    answers = tmp_path / "o.work" / "answers.jsonl"
    deadline = time.monotonic() + 60
    while not answers.exists() or answers.read_text().count("\n") < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)  # the writer meets a closed pipe and ends
    with answers.open("a") as file:
        file.write('{"id": "half a li')  # as a kill in a write leaves it
    known = [json.loads(row)["id"] for row in answers.read_text().splitlines()[:-1]]
    assert not list(tmp_path.glob("o*.jsonl"))
    (tmp_path / "asked.jsonl").unlink()
    assert main(arguments) == 0
    assert all(json.loads(row)["id"] for row in answers.read_text().splitlines())  # the cut line is gone
    again = [row["id"] for row in records(tmp_path / "asked.jsonl")]
    assert len(known) >= 20
    assert not set(again) & set(known)
    assert len(set(again)) == len(again)
    whole = tmp_path / "whole"
    assert main([*arguments[:3], str(whole / "o.jsonl"), *arguments[4:]]) == 0
    assert (whole / "o.jsonl").read_bytes() == (tmp_path / "o.jsonl").read_bytes()
    # a third start with another length asks for nothing that is known, and refuses to overwrite
    assert main(arguments) == 2


def test_a_kill_between_the_names_of_the_files_is_mended(tmp_path: Path, books: Path) -> None:
    assert synth(tmp_path / "o.jsonl", books) == 0
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("o*.jsonl")}
    (tmp_path / "o.jsonl").unlink()
    assert synth(tmp_path / "o.jsonl", books) == 2  # somebody else's evidence, for all we know
    (tmp_path / "o.work" / "publishing").touch()
    assert synth(tmp_path / "o.jsonl", books) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("o*.jsonl")} == whole
    assert not (tmp_path / "o.work" / "publishing").exists()


# ------------------------------------------------------------------ questions that need no document
@pytest.mark.parametrize(
    ("question", "answer", "known"),
    [
        ("Is it so?", "Yes.", True),
        ("Which ship, the Pequod, sank?", "the  Pequod!", True),
        ("Which ship sank?", "The Pequod", False),
        ("What follows 1412?", "41", False),  # not a word of the question
        ("What is left?", "...", True),
    ],
)
def test_the_rule_for_questions_that_need_no_document(question: str, answer: str, known: bool) -> None:
    assert answerable_without(question, answer) == known


def test_answers_are_compared_by_words() -> None:
    assert same_answer("I think it is the MAST.", "mast")
    assert not same_answer("a mastiff", "mast")


def test_a_second_command_answers_without_the_documents_and_what_it_knows_is_dropped(
    tmp_path: Path, books: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synth(tmp_path / "plain.jsonl", books) == 0
    assert synth(tmp_path / "o.jsonl", books, "--closed-book", command()) == 0
    asked = records(tmp_path / "asked.jsonl")
    assert {row["kind"] for row in asked} == {"closed_book"}
    assert all(set(row) == {"id", "kind", "question"} for row in asked)  # never the document, never the answer
    dropped = [row for row in records(tmp_path / "o.rejected.jsonl") if row["reason"] == "answerable without the document"]
    numbers = [[answer["content"] for _, answer in pairs(tmp_path / name) if answer["content"].isdigit()] for name in NAMES]
    assert dropped
    assert numbers[0]
    assert not numbers[1]
    assert f"{len(dropped)} answerable without the document" in capsys.readouterr().out


NAMES = ("plain.jsonl", "o.jsonl")


def pairs(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [pair for chat in records(path) for pair in zip(chat["messages"][::2], chat["messages"][1::2], strict=True)]


# ------------------------------------------------------------------ bad input
REFUSED = [
    (["--length", "300:1"], {}, "a length of 300 tokens is too small: one chunk and its questions take about"),
    (["--hierarchical", "0", "--diverse", "0"], {}, "hierarchical and diverse are both 0"),
    (["--revisit", "-1"], {}, "revisit is -1, expected 0 or more"),
    (["--follow-up-probability", "2"], {}, "follow-up-probability is 2.0, expected 0 to 1"),
    (["--max-rejected", "1"], {}, "max-rejected is 1.0, expected 0 or more and less than 1"),
    (["--timeout", "0"], {}, "--timeout 0.0: expected more than 0 seconds"),
    (["--timeout", "inf", "--writer", "cat"], {}, "--timeout inf: expected more than 0 seconds, at most 1,000,000,000"),
    (["--timeout", "nan", "--writer", "cat"], {}, "--timeout nan: expected more than 0 seconds, at most 1,000,000,000"),
    (["--timeout", "1e10", "--writer", "cat"], {}, "--timeout 10000000000.0: expected more than 0 seconds, at most"),
    (["--writer", " "], {}, "--writer is empty; give a program and its arguments"),
    (["--writer", "a 'b"], {}, "cannot be split into words"),
    ([], {"chunk": 0}, "chunk is 0, expected 1 or more tokens"),
]


@pytest.mark.parametrize(("arguments", "more", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], more: dict[str, Any], message: str
) -> None:
    assert synth(tmp_path / "o.jsonl", books, *arguments, **more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["books.jsonl"]


def test_the_longest_timeout_can_be_waited_for(tmp_path: Path, books: Path, command: Any) -> None:
    assert synth(tmp_path / "o.jsonl", books, "--writer", command(), "--timeout", "1e9") == 0


def test_bad_documents_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synth(tmp_path / "o.jsonl", tmp_path / "nothing.jsonl") == 2
    assert "nothing.jsonl" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"tex')
    assert synth(tmp_path / "o.jsonl", tmp_path / "bad.jsonl") == 2
    assert "bad.jsonl:2: not JSON" in capsys.readouterr().err


def test_damaged_answers_are_named_with_their_line(tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o.work").mkdir()
    (tmp_path / "o.work" / "answers.jsonl").write_text('{"id": "a"}\nnonsense\n{"id": "b"}\n')
    assert synth(tmp_path / "o.jsonl", books) == 2
    assert "answers.jsonl:2: damaged; remove the line: its question is asked again" in capsys.readouterr().err
