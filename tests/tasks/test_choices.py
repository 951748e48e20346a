"""Multiple-choice questions: answerable from their text, one right option, the same for every process."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import DataError
from mcore_longctx.tasks.choices import CHOICE_KINDS, make_choice_question, read_choice_questions, solve_choice


@given(st.integers(0, 10**9), st.integers(0, 10**6))
def test_the_solver_finds_the_right_option_and_no_option_begins_another(seed: int, index: int) -> None:
    question = make_choice_question(seed=seed, index=index)
    assert question.options[question.answer] == f" {solve_choice(question.prompt)}"
    assert len(question.options) == 4
    assert not any(a is not b and b.startswith(a) for a in question.options for b in question.options)
    assert question.prompt.endswith("\nAnswer:")


@given(st.integers(0, 10**9), st.integers(0, 10**6))
def test_the_solved_questions_in_front_are_of_the_same_kind_and_solved_right(seed: int, index: int) -> None:
    parts = make_choice_question(seed=seed, index=index).prompt.split("\n\n")
    assert len(parts) == 4
    for part in parts[:3]:
        asked, answer = part.split("\nAnswer: ")
        assert answer == solve_choice(asked + "\nAnswer:") + "."


def test_every_kind_takes_its_turn_and_right_options_stand_in_every_place() -> None:
    made = [make_choice_question(seed=3, index=index) for index in range(220)]
    assert {question.kind for question in made} == set(CHOICE_KINDS)
    assert len({question.prompt for question in made}) == 220
    places = [sum(question.answer == place for question in made) for place in range(4)]
    assert min(places) > 30  # 55 expected, 6.4 the standard deviation
    assert made == [make_choice_question(seed=3, index=index) for index in range(220)]
    assert made[0] != make_choice_question(seed=4, index=0)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_a_file_of_questions_is_read_and_a_part_of_it_is_the_same_for_a_seed(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "choices": [f"{n + 1}", f"{n + 2}"], "answer": n % 2} for n in range(30)]
    path = write(tmp_path / "questions.jsonl", *rows)
    every = read_choice_questions(path, count=100, seed=1)
    assert [question.index for question in every] == list(range(30))
    assert (every[3].prompt, every[3].options, every[3].answer, every[3].question) == (
        "Question: 3 + 1?\nAnswer:", (" 4", " 5"), 1, "3 + 1?"
    )  # fmt: skip
    some = read_choice_questions(path, count=7, seed=1)
    assert len(some) == 7
    assert some == read_choice_questions(path, count=7, seed=1)
    assert set(some) < set(read_choice_questions(path, count=8, seed=1))
    assert some != read_choice_questions(path, count=7, seed=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{]", r'questions.jsonl:2: not an object with "question", "choices" and "answer"'),
        ("[1]", r"questions.jsonl:2: not an object"),
        ({"question": "a", "choices": ["b", "c"]}, r"questions.jsonl:2: not an object"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "a list of at least two texts"),
        ({"question": "a", "choices": "bc", "answer": 0}, "a list of at least two texts"),
        ({"question": "a", "choices": ["b", 3], "answer": 0}, "a list of at least two texts"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2, expected the index of a choice, 0 to 1"),
        ({"question": "a", "choices": ["b", "c"], "answer": True}, "answer is True"),
        ({"question": "a", "choices": ["b", "b"], "answer": 0}, "two choices are the same"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "questions.jsonl", {"question": "a", "choices": ["b", "c"], "answer": 0}, row)
    with pytest.raises(DataError, match=message):
        read_choice_questions(path, count=9, seed=1)


def test_no_file_and_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a file of questions"):
        read_choice_questions(tmp_path / "none.jsonl", count=9, seed=1)
    with pytest.raises(DataError, match="holds no questions"):
        read_choice_questions(write(tmp_path / "empty.jsonl", ""), count=9, seed=1)
