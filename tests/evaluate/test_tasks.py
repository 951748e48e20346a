"""Shared needles, RULER-like tasks and the short suite in a column: against transformers, over ranks, after a kill, with bad input."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.errors import ConfigError, DataError, LongctxError
from mcore_longctx.evaluate import EvaluateJob, evaluate_column, job
from mcore_longctx.evaluate import ruler as ruler_module
from mcore_longctx.evaluate.held_out import read_documents
from mcore_longctx.evaluate.prompts import PromptCache
from mcore_longctx.evaluate.rows import RowFile
from mcore_longctx.evaluate.scoring import AnswerScore
from mcore_longctx.recipe.schema import (
    EvaluateSection,
    LossByPositionSection,
    NeedleSection,
    Parallel,
    RulerSection,
    ShortSuiteSection,
    TokenCount,
)
from mcore_longctx.tasks import (
    RULER_TASKS,
    Haystack,
    RulerSample,
    RulerTexts,
    make_ruler_sample,
    make_shared_needles,
    needle_depths,
    score_ruler,
)
from mcore_longctx.tasks.choices import encode_choices, make_choice_question

from ..multiproc import ProcessFailed, run_processes
from . import tiny_checkpoint as tiny

LENGTH = TokenCount(768)
TASKS = ("niah_single_1", "niah_multivalue", "fwe")
DECODED = ("niah_single_2",)
CP2 = Parallel(context_parallel_size=2)
LOG_PROBABILITY = 2e-5  # float32 through two layers, other order of sums; a sum over n tokens is off by n times as much


def section_of(folder: Path, parallel: Parallel) -> EvaluateSection:
    text = folder / "held-out.txt"
    return EvaluateSection(
        needle=NeedleSection(haystack=text, lengths=(TokenCount(512), LENGTH), depths=3, samples=2, kind="sentence", shared=True),
        ruler=RulerSection(haystack=text, lengths=(LENGTH,), tasks=TASKS, samples=2),
        short_suite=ShortSuiteSection(questions=12),
        parallel=parallel,
        precision="fp32",
    )


def decoded(folder: Path, parallel: Parallel) -> EvaluateSection:
    ruler = RulerSection(haystack=folder / "held-out.txt", lengths=(LENGTH,), tasks=DECODED, samples=2, scoring="greedy")
    return EvaluateSection(ruler=ruler, parallel=parallel, precision="fp32")


def job_of(folder: Path, name: str, evaluate: EvaluateSection, **changes: object) -> EvaluateJob:
    settings = {
        "evaluate": evaluate,
        "shape": tiny.SHAPE,
        "rope": tiny.SCALED,
        "checkpoint": folder / "base",
        "checkpoint_rope": tiny.OWN,
        "tokenizer": folder / "hf",
        "out": folder / "evaluate" / name,
    }
    return EvaluateJob(**(settings | changes))


def rows_of(folder: Path, column: str, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluate" / column / f"{task}.jsonl").read_text().splitlines()]


def measure_both(folder: Path, name: str, parallel: Parallel) -> None:
    """Every rank: one column of everything by teacher forcing, one decoded."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    evaluate_column(job_of(folder, name, section_of(folder, parallel)))
    store = dist.FileStore(str(folder / f"store-{name}"), parallel.world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=parallel.world_size)
    evaluate_column(job_of(folder, f"{name}-greedy", decoded(folder, parallel)))


def measure_until_killed(folder: Path, name: str, lines: int) -> None:
    """Rank 0 kills itself after so many lines of all files."""
    import torch.distributed as dist

    rank, left, add = dist.get_rank(), lines, RowFile.add

    def counted(self: RowFile, row: dict) -> None:
        nonlocal left
        add(self, row)
        left -= 1
        if rank == 0 and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    RowFile.add = counted
    evaluate_column(job_of(folder, name, section_of(folder, CP2)))


@pytest.fixture(scope="module")
def hf():
    """The oracle: the same weights with the scaled rope, in transformers."""
    return tiny.hf_model(tiny.SCALED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A column of one process, and one of two with context parallelism."""
    folder = tiny.make(tmp_path_factory.mktemp("tasks"))
    measure_both(folder, "single", Parallel())
    run_processes(measure_both, 2, folder, "cp2", CP2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return EvaluationTokenizer(folder / "hf", tiny.SHAPE.vocab_size)


@pytest.fixture(scope="module")
def haystack(folder, tokenizer):
    return Haystack.from_documents(read_documents(folder / "held-out.txt"), tokenizer)


def hf_log_probabilities(hf, prompt, answer) -> tuple[list[int], np.ndarray]:
    """Most probable token and log-probability of the right one, at each place of an answer."""
    tokens = torch.from_numpy(np.concatenate([prompt, answer]))
    with torch.no_grad():
        logits = hf(tokens[None]).logits[0, len(prompt) - 1 : -1].double()
    right = logits.log_softmax(-1).gather(1, torch.from_numpy(answer)[:, None])[:, 0]
    return logits.argmax(-1).tolist(), right.numpy()


@pytest.mark.multiproc
def test_ruler_rows_say_what_transformers_says(folder, hf, tokenizer, haystack):
    rows = rows_of(folder, "single", "ruler")
    assert [(row["task"], row["length"], row["index"]) for row in rows] == [(task, LENGTH, i) for task in TASKS for i in (0, 1)]
    for row in rows:
        sample = make_ruler_sample(
            row["task"], RulerTexts(haystack), tokenizer, seed=1234, length=LENGTH, index=row["index"], prefix=(tiny.BOS,)
        )
        got, right = hf_log_probabilities(hf, sample.tokens, sample.answer)
        assert row["got"] == tokenizer.decode(got)
        assert row["log_probability"] == pytest.approx(right.mean(), abs=LOG_PROBABILITY)
        hits = np.array(got) == sample.answer
        assert (row["tokens_right"], row["tokens_of_answer"]) == (hits.sum(), len(hits))
        certain = got if hits.all() else got[: int(np.argmin(hits)) + 1]
        assert row["score"] == score_ruler(sample.expected, sample.match, tokenizer.decode(certain))
        assert row["correct"] == (row["score"] == 1)
        assert row["expected"] == list(sample.expected)
        assert (row["scoring"], row["protocol"], row["seed"]) == ("teacher_forced", "ruler-like", 1234)
        assert tokenizer.decode(sample.tokens.tolist()).endswith(row["prompt_tail"])
        assert len(row["prompt_tail"]) == 200
        assert row["tokens"] <= LENGTH


@pytest.mark.multiproc
def test_decoded_rows_say_what_transformers_generates(folder, hf, tokenizer, haystack):
    row = rows_of(folder, "single-greedy", "ruler")[0]
    sample = make_ruler_sample(DECODED[0], RulerTexts(haystack), tokenizer, seed=1234, length=LENGTH, index=0, prefix=(tiny.BOS,))
    with torch.no_grad():
        ids = hf.generate(
            torch.from_numpy(sample.tokens)[None],
            max_new_tokens=sample.reserve,
            do_sample=False,
            eos_token_id=tiny.BOS + 1,
            pad_token_id=tiny.BOS + 1,
            attention_mask=torch.ones(1, len(sample.tokens), dtype=torch.int64),
        )[0, len(sample.tokens) :].tolist()
    text = tokenizer.decode([token for token in ids if token != tiny.BOS + 1])
    assert len(ids) > 8
    assert row["got"] == text
    assert row["score"] == score_ruler(sample.expected, sample.match, text)
    _, right = hf_log_probabilities(hf, sample.tokens, sample.answer)
    assert row["log_probability"] == pytest.approx(right.mean(), abs=LOG_PROBABILITY)


@pytest.mark.multiproc
def test_shared_needles_say_what_transformers_says(folder, hf, tokenizer, haystack):
    rows = rows_of(folder, "single", "needle")
    assert len(rows) == 2 * 3 * 2
    assert {(row["task"], row["kind"], row["digits"]) for row in rows} == {("needles_shared", "sentence", None)}
    by_key = {(row["length"], row["depth"], row["index"]): row for row in rows}
    for length in (512, LENGTH):
        made = make_shared_needles(
            haystack, tokenizer, seed=1234, length=length, depths=needle_depths(3), index=1, digits=7, kind="sentence", prefix=(tiny.BOS,)
        )  # fmt: skip
        for depth, needle in zip(needle_depths(3), made.needles, strict=True):
            row = by_key[length, depth, 1]
            prompt = np.concatenate([made.tokens, needle.suffix[: needle.answer_start]])
            got, right = hf_log_probabilities(hf, prompt, needle.answer)
            assert row["score"] == pytest.approx(right.mean(), abs=LOG_PROBABILITY)
            assert row["got"] == tokenizer.decode(got)
            assert row["expected"] == f" {needle.value}"
            assert tokenizer.decode(prompt.tolist()).endswith(row["prompt_tail"])


@pytest.mark.multiproc
def test_the_short_suite_says_what_transformers_says(folder, hf, tokenizer):
    rows = rows_of(folder, "single", "short_suite")
    assert len(rows) == 12
    for row in rows:
        question = make_choice_question(seed=1234, index=row["index"])
        prompt, options = encode_choices(question, tokenizer, tokenizer.prefix)
        assert prompt[0] == tiny.BOS
        sums, exact = [], []
        for option in options:
            got, right = hf_log_probabilities(hf, prompt, option)
            sums.append(right.sum())
            exact.append(got == option.tolist())
        longest = max(map(len, options))
        for shown, total, option in zip(row["options"], sums, options, strict=True):
            assert shown["log_probability"] == pytest.approx(total, abs=longest * LOG_PROBABILITY)
            assert shown["tokens"] == len(option)
        others = [total for place, total in enumerate(sums) if place != question.answer]
        assert row["score"] == pytest.approx(sums[question.answer] - max(others), abs=2 * longest * LOG_PROBABILITY)
        assert row["correct"] == (int(np.argmax(sums)) == question.answer)
        per_character = [total / len(text) for total, text in zip(sums, question.options, strict=True)]
        assert row["correct_norm"] == (int(np.argmax(per_character)) == question.answer)
        assert row["exact"] == exact[question.answer]
        assert row["question"] == question.question


@pytest.mark.multiproc
def test_two_ranks_write_what_one_process_writes(folder):
    pairs = [("single", "cp2", task) for task in ("needle", "ruler", "short_suite")] + [("single-greedy", "cp2-greedy", "ruler")]
    for alone, together, task in pairs:
        rows = rows_of(folder, alone, task)
        assert rows
        for one, two in zip(rows, rows_of(folder, together, task), strict=True):
            assert one.keys() == two.keys()
            for name in set(one) - {"seconds"}:
                if name == "options":
                    assert [option["text"] for option in one[name]] == [option["text"] for option in two[name]]
                elif isinstance(one[name], float):
                    assert one[name] == pytest.approx(two[name], abs=60 * LOG_PROBABILITY), name
                else:
                    assert one[name] == two[name], name


@pytest.mark.multiproc
@pytest.mark.parametrize("lines", [2, 15, 20])
def test_a_killed_column_goes_on_and_ends_with_the_same_rows(folder, lines):
    """In the middle of a shared text, of the RULER-like tasks, of the short suite."""
    name = f"killed-{lines}"
    with pytest.raises(ProcessFailed):
        run_processes(measure_until_killed, 2, folder, name, lines)
    files = [folder / "evaluate" / name / f"{task}.jsonl" for task in ("needle", "ruler", "short_suite")]
    before = {file: file.read_bytes() for file in files if file.exists()}
    assert sum(len(raw.splitlines()) for raw in before.values()) == lines
    run_processes(measure_until_killed, 2, folder, name, 10**6)
    for file in files:
        assert file.read_bytes().startswith(before.get(file, b""))  # measured once
        rows = [{**row, "seconds": 0} for row in rows_of(folder, name, file.stem)]
        assert rows == [{**row, "seconds": 0} for row in rows_of(folder, "cp2", file.stem)]


@pytest.mark.parametrize(
    ("got", "score", "right"),
    [
        (" 4071, 5562", 1.0, 11),
        (" 4071, 9999", 0.5, 7),  # what greedy decoding would say is known up to here: the first is found
        (" 9071, 5562", 0.0, 10),  # and here it is not: what follows was told
    ],
)
def test_teacher_forcing_counts_what_greedy_decoding_is_known_to_say(monkeypatch, tokenizer, got, score, right):
    answer = np.array(tokenizer.encode(" 4071, 5562"))
    sample = RulerSample(
        task="niah_multivalue", tokens=np.arange(9), answer=answer, expected=("4071", "5562"), match="all", reserve=20, depths=(),
        needle_starts=(), haystack_start=0, unique_share=1.0,
    )  # fmt: skip
    found = AnswerScore(np.array(tokenizer.encode(got)), np.zeros(len(answer)))
    monkeypatch.setattr(ruler_module, "score_answer", lambda model, tokens, start: found)
    shown, certain, scored = ruler_module._teacher_forced(None, sample, tokenizer)
    row = ruler_module._row(sample, ("niah_multivalue", 64, 0), shown, certain, scored, tokenizer)
    assert (row["got"], row["score"], row["correct"], row["tokens_right"]) == (got, score, score == 1, right)


def test_how_it_was_asked_is_part_of_a_row(folder, monkeypatch):
    """Rows of another kind of needle, or by another scoring, are refused before a model is built."""
    monkeypatch.setattr(job, "build_gpt_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    section = section_of(folder, Parallel())
    assert section.needle is not None
    single = replace(section, needle=replace(section.needle, shared=False), ruler=None, short_suite=None)
    with pytest.raises(ConfigError, match=r"needle.jsonl:1: task is 'needles_shared', this evaluation has 'needle'"):
        evaluate_column(job_of(folder, "single", single))
    with pytest.raises(ConfigError, match=r"ruler.jsonl:1: scoring is 'teacher_forced', this evaluation has 'greedy'"):
        evaluate_column(job_of(folder, "single", decoded(folder, Parallel())))
    both = replace(section, ruler=decoded(folder, Parallel()).ruler)  # the needles go on, and would take hours first
    with pytest.raises(ConfigError, match=r"ruler.jsonl:1: scoring .*; remove or move the file to measure again$"):
        evaluate_column(job_of(folder, "single", both))


def ruler(folder: Path, **changes: object) -> EvaluateSection:
    settings = {"haystack": folder / "held-out.txt", "lengths": (LENGTH,), "tasks": TASKS, "samples": 1}
    return EvaluateSection(ruler=RulerSection(**(settings | changes)), precision="fp32")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ("niah_multiquerry",)}, ConfigError, "unknown task 'niah_multiquerry'; did you mean 'niah_multiquery'"),
        (
            {"lengths": (TokenCount(128),)},
            ConfigError,
            r"128 tokens are too few with this tokenizer for niah_single_1 \d+, .*fwe [\d,]+;",
        ),
        (
            {"lengths": (TokenCount(16384),)},
            DataError,
            r"held-out.txt: [\d,]+ tokens of text: a sample of 16,384 would hold them \d\.\d times, \d\d% of it repeated; give more text",
        ),
        ({"haystack": Path("/nowhere")}, LongctxError, "/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_model_is_built(folder, monkeypatch, changes, error, message):
    monkeypatch.setattr(job, "build_gpt_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    with pytest.raises(error, match=message) as raised:
        evaluate_column(job_of(folder, "wrong", ruler(folder, **changes)))
    assert raised.value.exit_code == 2
    assert not (folder / "evaluate" / "wrong").exists()


def test_a_small_text_is_no_matter_for_tasks_that_read_none(folder, monkeypatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise ConfigError("got as far as the model")

    monkeypatch.setattr(job, "build_gpt_model", stop)
    with pytest.raises(ConfigError, match="got as far as the model"):
        evaluate_column(job_of(folder, "wrong", ruler(folder, lengths=(TokenCount(16384),), tasks=("fwe",))))


def test_a_needle_text_that_would_repeat_is_refused(folder):
    needle = NeedleSection(haystack=folder / "held-out.txt", lengths=(TokenCount(65536),), depths=1, samples=1)
    with pytest.raises(
        DataError, match=r"evaluate.needle.haystack: .*held-out.txt: [\d,]+ tokens of text: a sample of 65,536 would"
    ):
        evaluate_column(job_of(folder, "wrong", EvaluateSection(needle=needle, precision="fp32")))


def test_answers_that_drift_with_the_prompt_are_refused(tmp_path, monkeypatch):
    """A tokenizer that joins a colon with the space after it: the answer has no tokens of its own."""
    folder = tiny.make(tmp_path)
    path = folder / "hf" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    space = "\u0120"
    words = tokenizer["model"]["vocab"]
    words[f":{space}"], words[f"s{space}"] = words.pop("\x00\x00") if "\x00\x00" in words else 1, 2
    taken = [word for word, number in words.items() if number in (1, 2) and word not in (f":{space}", f"s{space}")]
    for word in taken:
        del words[word]
    tokenizer["model"]["merges"] = [[":", space], ["s", space]]
    path.write_text(json.dumps(tokenizer))
    from mcore_longctx.convert import Execution, import_hf

    shutil.rmtree(folder / "base")
    import_hf(folder / "hf", folder / "base", how=Execution(checksum=True))
    monkeypatch.setattr(job, "build_gpt_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    for section in (
        EvaluateSection(short_suite=ShortSuiteSection(questions=3), precision="fp32"),
        ruler(folder, tasks=("niah_single_1",)),
    ):
        with pytest.raises(DataError, match="tokenizer"):
            evaluate_column(job_of(folder, "wrong", section))


@pytest.mark.parametrize("task", ["needle", "ruler", "short_suite"])
def test_backend_te_is_told_what_needs_a_cache(folder, task):
    whole = section_of(folder, Parallel())
    part = decoded(folder, Parallel()).ruler if task == "ruler" else getattr(whole, task)
    with pytest.raises(ConfigError, match=f"evaluate.{task}.*: keeps keys and values .* model.backend=local"):
        evaluate_column(job_of(folder, "wrong", EvaluateSection(**{task: part}, precision="fp32"), backend="te"))


def test_a_prompt_that_was_dear_is_read_and_a_damaged_one_made_again(tmp_path, haystack, tokenizer):
    import torch.distributed as dist

    from mcore_longctx.model import destroy_process_groups, init_process_groups

    def make() -> RulerSample:
        made.append(1)
        return make_ruler_sample("niah_multivalue", RulerTexts(haystack), tokenizer, seed=1, length=700, index=0)

    def equal(one: RulerSample, two: RulerSample) -> bool:
        return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in one.__dataclass_fields__)

    made: list[int] = []
    init_process_groups(Parallel(), seed=1)
    try:
        assert dist.get_world_size() == 1
        cheap = PromptCache(tmp_path / "cheap", {"seed": 1}, dear_seconds=1e9)
        first = cheap.get({"index": 0}, make)
        assert not (tmp_path / "cheap").exists()
        dear = PromptCache(tmp_path / "dear", {"seed": 1}, dear_seconds=-1)
        assert equal(dear.get({"index": 0}, make), first)
        assert len(made) == 2
        again = dear.get({"index": 0}, make)
        assert len(made) == 2
        assert equal(again, first)
        assert (type(again.expected), again.tokens.dtype) == (tuple, np.int64)
        assert dear.path({"index": 0}) != PromptCache(tmp_path / "dear", {"seed": 2}).path({"index": 0})
        path = dear.path({"index": 0})
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        assert equal(dear.get({"index": 0}, make), first)
        assert len(made) == 3
        path.write_bytes(raw[:100])
        assert equal(dear.get({"index": 0}, make), first)
        assert len(made) == 4
    finally:
        destroy_process_groups()


def test_a_quick_look_asks_one_text_and_few_windows(folder):
    text = folder / "held-out.txt"
    section = EvaluateSection(
        needle=NeedleSection(haystack=text, lengths=(TokenCount(256), TokenCount(512)), depths=2, samples=3, digits=3),
        ruler=RulerSection(haystack=text, lengths=(LENGTH,)),
        loss_by_position=LossByPositionSection(path=text, seq_length=TokenCount(256), short_length=TokenCount(128), windows=3),
        short_suite=ShortSuiteSection(questions=50),
        level="quick",
        precision="fp32",
    )
    section = replace(section, loss_by_position=replace(section.loss_by_position, short_windows=18))
    evaluate_column(job_of(folder, "quick", section))
    assert not (folder / "evaluate" / "quick" / "ruler.jsonl").exists()
    needles = rows_of(folder, "quick", "needle")
    assert [(row["length"], row["index"], row["shared"]) for row in needles] == [(512, 0, True)] * 4
    assert [row["depth"] for row in needles] == needle_depths(4)
    assert len({row["haystack_start"] for row in needles}) == 1
    counts = {task: len(rows_of(folder, "quick", task)) for task in ("loss_by_position", "short_context", "short_suite")}
    assert counts == {"loss_by_position": 2, "short_context": 16, "short_suite": 20}


def test_every_task_of_the_section_is_one_that_exists():
    assert set(TASKS + DECODED) <= set(RULER_TASKS)
