"""Files of rows: of one text, and what is said of rows of another number of windows."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcore_longctx.errors import ConfigError, StorageError
from mcore_longctx.evaluate import EvaluateJob, evaluate_column, job, prepare
from mcore_longctx.evaluate.prompts import PromptCache
from mcore_longctx.evaluate.rows import RowFile, on_first_rank
from mcore_longctx.recipe.schema import (
    EvaluateSection,
    LossByPositionSection,
    NeedleSection,
    RulerSection,
    ShortSuiteSection,
    TokenCount,
)
from mcore_longctx.tasks import RulerSample

from ..multiproc import run_processes
from . import tiny_checkpoint as tiny


def job_of(folder: Path, name: str, section: EvaluateSection) -> EvaluateJob:
    return EvaluateJob(
        evaluate=section,
        shape=tiny.SHAPE,
        rope=tiny.SCALED,
        checkpoint=folder / "base",
        checkpoint_rope=tiny.OWN,
        tokenizer=folder / "hf",
        out=folder / "evaluate" / name,
    )


def section_of(folder: Path) -> EvaluateSection:
    """One sample of everything, two windows, two questions of a file."""
    text = folder / "held-out.txt"
    return EvaluateSection(
        needle=NeedleSection(haystack=text, lengths=(TokenCount(128),), depths=1, samples=1, digits=3),
        ruler=RulerSection(haystack=text, lengths=(TokenCount(768),), tasks=("niah_single_1",), samples=1),
        loss_by_position=LossByPositionSection(
            path=text, seq_length=TokenCount(256), short_length=TokenCount(128), windows=2, short_windows=2
        ),
        short_suite=ShortSuiteSection(choices=folder / "choices.jsonl", questions=2),
        precision="fp32",
    )


def only(section: EvaluateSection, part: str, **changes: object) -> EvaluateSection:
    """One part of a section, changed."""
    return EvaluateSection(**{part: replace(getattr(section, part), **changes)}, precision="fp32")


def write_choices(path: Path, last: str) -> Path:
    rows = [{"question": "Which is heavier?", "choices": ["a feather", end], "answer": 1} for end in ("a brick", last)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A column of a file of questions, and one of made ones."""
    folder = tiny.make(tmp_path_factory.mktemp("rows"))
    write_choices(folder / "choices.jsonl", "an anvil")
    evaluate_column(job_of(folder, "column", section_of(folder)))
    evaluate_column(job_of(folder, "made", only(section_of(folder), "short_suite", choices=None)))
    return folder


@pytest.fixture
def no_model(monkeypatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise ConfigError("got as far as the model")

    monkeypatch.setattr(job, "build_gpt_model", stop)


@pytest.mark.usefixtures("no_model")
def test_rows_of_another_text_are_refused_before_a_model_is_built(folder, tmp_path):
    other, section = tmp_path / "other.txt", section_of(folder)
    other.write_text(tiny.held_out_text(160))
    changed = {
        "needle": only(section, "needle", haystack=other),
        "ruler": only(section, "ruler", haystack=other),
        "loss_by_position": only(section, "loss_by_position", path=other),
        "short_suite": only(section, "short_suite", choices=write_choices(tmp_path / "choices.jsonl", "a boat")),
    }
    changes = [
        *changed.items(),
        ("ruler", only(section, "ruler", code=other)),
        ("short_suite", only(section, "short_suite", choices=None)),
    ]
    for task, one in changes:
        with pytest.raises(
            ConfigError, match=rf"{task}.jsonl:1: text is '[0-9a-f]{{16}}', this .*; remove or move the file"
        ) as raised:
            evaluate_column(job_of(folder, "column", one))
        assert raised.value.exit_code == 2
    with pytest.raises(ConfigError, match="got as far as the model"):
        evaluate_column(job_of(folder, "column", section))


@pytest.mark.usefixtures("no_model")
def test_questions_of_another_maker_are_refused_and_more_of_the_same_are_not(folder, monkeypatch):
    section = only(section_of(folder), "short_suite", choices=None, questions=30)
    with pytest.raises(ConfigError, match="got as far as the model"):
        evaluate_column(job_of(folder, "made", section))
    make = prepare.make_choice_question
    monkeypatch.setattr(prepare, "make_choice_question", lambda *, seed, index: make(seed=seed, index=index + 8))
    with pytest.raises(ConfigError, match=r"short_suite.jsonl:1: text is"):
        evaluate_column(job_of(folder, "made", section))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("task", ["needle", "ruler", "loss_by_position", "short_context", "short_suite"])
def test_rows_that_do_not_say_their_text_are_refused(folder, tmp_path, task):
    rows = [json.loads(line) for line in (folder / "evaluate" / "column" / f"{task}.jsonl").read_text().splitlines()]
    assert len({row.pop("text") for row in rows}) == 1
    (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ConfigError, match=rf"{task}.jsonl:1: text is not stated \(rows of an earlier version\), this .*; remove or move"
    ):
        evaluate_column(replace(job_of(folder, "column", section_of(folder)), out=tmp_path))


def test_the_mean_that_is_said_is_of_the_windows_that_are_asked_for(folder):
    def said(windows: int) -> list[list[str]]:
        lines: list[str] = []
        section = only(section_of(folder), "loss_by_position", windows=windows, short_windows=windows)
        evaluate_column(job_of(folder, "windows", section), say=lines.append)
        return [line.rsplit(maxsplit=2)[0].split(maxsplit=1)[1] for line in lines]

    two, three = said(2), said(3)
    file = folder / "evaluate" / "windows" / "loss_by_position.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["index"], row["start"] > 0) for row in rows] == [(0, False), (1, True), (1, True), (2, True)]
    mean = sum(row["score"] for row in (rows[0], rows[2], rows[3])) / 3
    assert three[0].split() == ["loss", "by", "position", "3", "windows", "of", "256", f"{mean:.4f}", "nats", "per", "token"]
    assert said(2) == two


def sample() -> RulerSample:
    """A prompt of three tokens."""
    facts = {
        "match": "all",
        "expected": (),
        "reserve": 1,
        "depths": (),
        "needle_starts": (),
        "haystack_start": 0,
        "unique_share": 1.0,
    }
    return RulerSample(task="vt", tokens=np.arange(3), answer=np.arange(1), **facts)


def fill_the_disk(folder: Path) -> list[str]:
    """Every rank: what it is told when rows cannot be read, when they have no place, and when a line fits in half."""
    import torch.distributed as dist

    told = []
    for path in (folder, folder / "file" / "rows.jsonl"):
        with pytest.raises(StorageError) as raised, RowFile(path, ("index",), {}):
            pass
        told.append(str(raised.value))
    prompts = PromptCache(folder / "file", {}, dear_seconds=-1)
    for action in (lambda: prompts.get({}, sample), lambda: on_first_rank((folder / "nowhere").read_bytes)):
        with pytest.raises(StorageError) as raised:
            action()
        told.append(str(raised.value))
    with RowFile(folder / "rows.jsonl", ("index",), {}) as rows:
        rows.add({"index": 0, "text": "x" * 40})
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
        with pytest.raises(StorageError) as raised:
            rows.add({"index": 1, "text": "x" * 40})
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)  # ranks meet through a file
        told.append(str(raised.value))
        assert (1,) not in rows
    size = (folder / "rows.jsonl").stat().st_size
    dist.barrier()
    again = RowFile(folder / "rows.jsonl", ("index",), {})
    return [*told, f"{size} bytes, {len(again.rows)} row"]


@pytest.mark.multiproc
def test_a_full_disk_is_one_line_on_every_rank_and_the_rows_go_on(tmp_path):
    (tmp_path / "file").write_text("")
    one, two = run_processes(fill_the_disk, 2, tmp_path, timeout=60)
    assert one == two
    prompts = PromptCache(tmp_path / "file", {})
    again = "mend that and run it again: it goes on from what is there"
    assert one == [
        f"{tmp_path}: cannot be read (Is a directory); {again}",
        f"{tmp_path}/file/rows.jsonl: cannot be written (File exists); {again}",
        f"{prompts.path({})}: cannot be written (File exists)",
        f"{tmp_path}/nowhere: No such file or directory",
        f"{tmp_path}/rows.jsonl: cannot be written (File too large); {again}",
        "100 bytes, 1 row",
    ]
