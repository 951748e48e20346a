"""lm-evaluation-harness through our adapter, on two context-parallel ranks, against its own Hugging Face backend.

The commands are those of docs/lm_eval.md, on a model that is made in seconds: the tiny Llama with the rope of the recipe `tiny-cpu`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mcore_longctx.cli.main import main, parse
from mcore_longctx.convert import Execution, export_hf, import_hf
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.rope import write_hf_rope
from mcore_longctx.tasks import RULER_TASKS, ruler_minimum_length, solve_needle, solve_ruler
from tests.multiproc import run_processes

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
TASKS = ("longctx_needle", "longctx_ruler_fwe", "longctx_choices", "longctx_perplexity")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

# Of one token in float32: unit roundoff 2^-24, logits below 2^6, and 4 layers of 7 sums each (norms, projections, attention) of
# which both sides round differently: 2^-24 * 2^6 * 28 = 1.1e-4 if all errors were the largest possible and of one sign.
PER_TOKEN = 2.0**-24 * 2**6 * 28

pytestmark = pytest.mark.multiproc


def command(start: str) -> list[str]:
    """The words of the documented command that begins so."""
    (found,) = [line for line in COMMANDS if line.startswith(start)]
    return shlex.split(found)


def make_run(folder: Path) -> None:
    """A folder like a clone in which `make demo` has run, but the model was not trained: the tiny Llama with the recipe's rope."""
    for name in ("examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "short.txt").write_text("Nineteen characters\n")
    resolved = resolve(open_recipe("tiny-cpu"))
    hf = folder / "scaled"
    hf.mkdir()
    for path in (ROOT / "examples" / "tiny-llama").iterdir():
        (hf / path.name).write_bytes(path.read_bytes())
    config = json.loads((hf / "config.json").read_text())
    rope = replace(resolved.rope, max_position_embeddings=resolved.rope.resolved_max_position_embeddings)
    config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")} | write_hf_rope(rope)
    (hf / "config.json").write_text(json.dumps(config))
    run = folder / "runs" / "tiny-cpu"
    checkpoint = run / "checkpoints" / "instruct" / "iter_0000012"
    import_hf(hf, checkpoint, how=Execution(checksum=True))
    export_hf(checkpoint, run / "export", how=Execution(checksum=True))


def rank(folder: str, arguments: list[str]) -> int:
    os.chdir(folder)
    if os.environ["RANK"] > "0":
        return main(arguments)
    with (Path(folder) / "said.txt").open("w") as said, redirect_stdout(said):
        return main(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, its export, and the results of both sides."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_run(folder)
        launcher, arguments = (words := command("torchrun"))[:5], words[5:]
        assert launcher == ["torchrun", "--nproc-per-node", "2", "-m", "mcore_longctx"]
        assert run_processes(rank, 2, str(folder), arguments, environment=OFFLINE, init=False) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return by_task(read(folder / "runs/tiny-cpu/harness/instruct.samples.jsonl"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the documented command of lm_eval writes. Only its index of 14,683 tasks of its own, a minute of YAML, is left out."""
    from lm_eval import __main__ as program
    from lm_eval import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", command("lm_eval"))
        patch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
        program.cli_evaluate()
    found = [{"task": path.name, **row} for path in (folder / "hf-results").rglob("samples_*.jsonl") for row in read(path)]
    for row in found:
        row["task"] = re.fullmatch(r"samples_(\w+)_\d{4}-.*", row["task"])[1]
    return by_task(found)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_task(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {task: sorted((row for row in rows if row["task"] == task), key=lambda row: row["doc_id"]) for task in TASKS}


def results_of(folder: Path, pattern: str) -> dict[str, Any]:
    (path,) = folder.glob(pattern)
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def test_both_sides_were_asked_the_same(ours, theirs):
    for task in TASKS:
        assert len(ours[task]) >= 2
        assert [row["doc"] for row in ours[task]] == [row["doc"] for row in theirs[task]]
        assert [row["prompt_hash"] for row in ours[task]] == [row["prompt_hash"] for row in theirs[task]]


def test_both_decode_the_same(ours, theirs):
    for task in ("longctx_needle", "longctx_ruler_fwe"):
        assert [row["resps"] for row in ours[task]] == [row["resps"] for row in theirs[task]]
        assert all(row["resps"][0][0] for row in ours[task])  # not nothing


def test_options_have_the_same_log_probabilities(ours, theirs):
    for here, there in zip(ours["longctx_choices"], theirs["longctx_choices"], strict=True):
        for option, (mine,), (other,) in zip(here["doc"]["options"], here["resps"], there["resps"], strict=True):
            tokens = len(option.encode())  # of the tiny tokenizer
            assert float(mine[0]) == pytest.approx(float(other[0]), abs=tokens * PER_TOKEN)
            assert float(mine[0]) < 0
            assert str(mine[1]) == str(other[1])
        assert here["acc"] == there["acc"]
        assert here["acc_norm"] == there["acc_norm"]


def test_whole_texts_have_the_same_log_probability(ours, theirs):
    for here, there in zip(ours["longctx_perplexity"], theirs["longctx_perplexity"], strict=True):
        tokens = len(here["doc"]["text"].encode())
        assert tokens == here["doc"]["length"] - 1
        mine, other = (float(row["resps"][0][0]) for row in (here, there))
        assert mine == pytest.approx(other, abs=tokens * PER_TOKEN)
        assert mine < -tokens  # nats: the tiny model does not know the text


def test_both_report_the_same_scores(folder, ours, theirs):
    mine, other = results_of(folder, "runs/tiny-cpu/harness/instruct.json"), results_of(folder, "hf-results/**/results_*.json")
    assert set(mine) == set(other) == set(TASKS)
    for task in TASKS:
        assert mine[task].keys() == other[task].keys()
        for key, value in mine[task].items():
            assert value == (pytest.approx(other[task][key], rel=1e-4) if isinstance(value, float) else other[task][key]), key
    assert {"recall,none", "1024,none", "2048,none"} <= mine["longctx_needle"].keys()


def test_the_commands_of_the_examples_are_understood(folder, monkeypatch):
    from lm_eval._cli import HarnessCLI

    text = (ROOT / "examples" / "lm_eval_tasks" / "README.md").read_text(encoding="utf-8")
    found = [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert [words[0] for words in found] == ["lm_eval", "lm_eval", "torchrun"]
    for words in found[:2]:
        monkeypatch.setattr(sys, "argv", words)
        understood = HarnessCLI().parse_args()
        assert understood.include_path == "examples/lm_eval_tasks"
        assert understood.metadata["max_seq_lengths"]
    assert parse(found[2][5:]).tasks == "longctx_needle,longctx_ruler"


GOOD = ["--include-path", "examples/lm_eval_tasks", "--tasks", "longctx_needle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GOOD, "--checkpoint", "other"], "--checkpoint: 'other' is not known here; one of base, extend, instruct"),
        ([*GOOD, "--tasks", "longctx_nedle"], "unknown task 'longctx_nedle'; did you mean 'longctx_needle'?"),
        ([*GOOD, "--tasks", ","], "--tasks: no task is named"),
        ([*GOOD, "--include-path", "nowhere"], "--include-path: nowhere: no such folder"),
        ([*GOOD, "--out", "runs"], "--out: runs: is a folder"),
        ([*GOOD, "--metadata", "{512}"], "--metadata: is no JSON"),
        ([*GOOD, "--metadata", "[512]"], "--metadata: is no JSON object"),
        (
            [*GOOD, "--metadata", '{"max_seq_lengths": "4096"}'],
            "--metadata: max_seq_lengths is '4096', expected a list of numbers",
        ),
        ([*GOOD, "--metadata", '{"max_seq_lengths": [16]}'], "a needle sample of 7 digits needs more than"),
        (
            [*GOOD, "--metadata", '{"haystack": "short.txt"}'],
            "haystack: short.txt: 20 tokens of text: a sample of 4,096 would hold",
        ),
        ([*GOOD, "--limit", "0"], "--limit: 0 is too small"),
        ([*GOOD, "model.backend=te"], "model.backend: te: options and decoding keep keys and values"),
        (
            [*GOOD, "--metadata", '{"max_seq_lengths": [8192], "samples": 1, "depths": 1}'],
            "but the model is made for 4,096; use shorter",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    before = (folder / "runs/tiny-cpu/harness/instruct.json").read_bytes()
    one_rank = "evaluate.parallel.context_parallel_size=1"
    assert main(["harness", "tiny-cpu", one_rank, "--checkpoint", "instruct", *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mcore-longctx:")]
    assert len(said) == 1
    assert message in said[0]
    assert (folder / "runs/tiny-cpu/harness/instruct.json").read_bytes() == before


@pytest.mark.parametrize("found", [None, "0.3.0"])
def test_without_lm_eval_the_line_says_how_to_install_it(folder, capsys, monkeypatch, found):
    from mcore_longctx.evaluate import harness

    monkeypatch.chdir(folder)
    if found is None:
        monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(harness.metadata, "version", lambda name: found)
    assert main(["harness", "tiny-cpu", "--checkpoint", "instruct", *GOOD]) == 2
    said = capsys.readouterr().err
    assert "pip install 'mcore-longctx[harness]'" in said
    assert said.count("\n") == 1


def test_the_verb_says_a_line_for_each_score(folder):
    said = (folder / "said.txt").read_text().splitlines()
    assert len([line for line in said if line.startswith(TASKS)]) == 3 + 3 + 2 + 3
    assert re.fullmatch(
        r"longctx_choices +acc +0\.\d{4} \+- 0\.\d{4}  \(6 samples\)", next(line for line in said if "acc " in line)
    )
    assert said[-1] == "results: runs/tiny-cpu/harness/instruct.json"


def test_every_task_of_the_folder_makes_samples_that_leave_room_for_the_answer(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(folder)
    settings = {
        "tokenizer": "examples/tiny-llama",
        "max_seq_lengths": [2048, 4096],
        "samples": 1,
        "depths": 1,
        "questions": 1,
        "windows": 1,
    }
    manager = TaskManager(include_path="examples/lm_eval_tasks", include_defaults=False, metadata=settings)
    loaded = manager.load(["longctx_needle", "longctx_ruler"])["tasks"]
    assert set(loaded) == {"longctx_needle", *(f"longctx_ruler_{name}" for name in RULER_TASKS)}
    for name, task in loaded.items():
        kept = task.config.generation_kwargs["max_gen_toks"]
        for doc in task.dataset["test"]:
            tokens = 1 + len(doc["prompt"].encode())  # of the tiny tokenizer, with a begin token
            assert 0.8 * doc["length"] < tokens + kept <= doc["length"]
            answer = solve_needle(doc["prompt"]) if name == "longctx_needle" else solve_ruler(name[14:], doc["prompt"])
            assert doc["expected"] == ([answer] if isinstance(answer, str) else list(answer))
            wanted = doc["expected"] if doc["match"] == "all" else [max(doc["expected"], key=len)]
            assert len((" " + ", ".join(wanted)).encode()) <= kept  # decoded whole


@pytest.fixture
def makers(monkeypatch):
    """The functions that the YAML files name."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "lm_eval_tasks")
    return importlib.import_module("longctx_tasks")


MADE = {"tokenizer": ROOT / "examples" / "tiny-llama", "max_seq_lengths": [2048], "samples": 1, "depths": 1}


def test_an_answer_longer_than_max_gen_toks_is_refused(makers):
    # the tiny tokenizer takes a token for each byte: a space and seven digits; a space and five names of five with ", " between
    assert len(makers.needle(8, **MADE)["test"]) == len(makers.ruler("vt", 34, **MADE)["test"]) == 1
    with pytest.raises(DataError, match="longctx_needle: an answer takes 8 tokens with this tokenizer, max_gen_toks is 7; raise"):
        makers.needle(7, **MADE)
    with pytest.raises(DataError, match="longctx_ruler_vt: an answer takes 34 tokens with this tokenizer, max_gen_toks is 30; "):
        makers.ruler("vt", 30, **MADE)


def test_a_text_that_a_sample_would_repeat_is_refused_by_those_who_read_it(makers, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A line of forty characters, no one more.\n" * 24)  # 984 tokens
    settings = {**MADE, "haystack": short, "max_seq_lengths": [1024, 1_000_000]}
    repeated = (
        "haystack: .*short.txt: 984 tokens of text: a sample of 1,000,000 would hold them 1016.3 times, 100% of it repeated; "
    )
    with pytest.raises(DataError, match=repeated):
        makers.needle(16, **settings)
    readers = []
    for task in RULER_TASKS:
        least = ruler_minimum_length(task, makers._tokenizer(settings), makers.BEGIN)
        try:
            makers.ruler(task, 120, **settings | {"max_seq_lengths": [max(985, 2 * least)]})
        except DataError as error:
            if "of it repeated" not in str(error):
                raise
            readers.append(task)
    said = (ROOT / "examples" / "lm_eval_tasks" / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in said.splitlines() if "make their whole context" in line]
    assert set(re.findall(r"`(\w+)`", line)) == set(RULER_TASKS) - set(readers)
    exact = {**settings, "max_seq_lengths": [984]}
    assert len(makers.needle(16, **exact)["test"]) == 1


def test_answers_end_where_generation_config_says(tmp_path):
    from mcore_longctx.evaluate.harness import _end_ids

    job, tokenizer = SimpleNamespace(hf=tmp_path), SimpleNamespace(eos_token_id=1)
    assert _end_ids(job, tokenizer) == {1}
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert _end_ids(job, tokenizer) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert _end_ids(job, tokenizer) == {3, 4}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match="eos_token_id is 'x', expected token ids"):
        _end_ids(job, tokenizer)
