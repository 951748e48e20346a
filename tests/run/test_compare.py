"""`compare`: what can be compared, which runs follow, and two methods for real."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import open_recipe, preset_names
from mcore_longctx.run.compare import compare_methods, launch_lines, plan_comparison

SMALL = [
    "stages.extend.seq_length=512",
    "stages.extend.train_iters=2",
    "stages.extend.optimizer.lr_warmup_iters=0",
    "stages.extend.parallel={}",
    "stages.instruct.train_iters=1",
    "stages.instruct.parallel={}",
    "evaluate={loss_by_position: {path: examples/documents/heldout, seq_length: 512, short_length: 128, windows: 2, short_windows: 2}, precision: fp32}",
]


def method(folder: Path, name: str, changes: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"extends: tiny-cpu\nchanges:\n  name: {name}\n{changes}")
    return str(path)


def test_runs_go_seed_by_seed_with_one_evaluation_seed(tmp_path: Path) -> None:
    masked = method(tmp_path, "masked", "  about: documents do not see each other\n  stages.extend.cross_document_mask: true\n")
    plan = plan_comparison("tiny-cpu", [masked], seeds=2, folder=tmp_path / "out")
    assert plan.methods == ("tiny-cpu", "masked")
    assert [(name, seed) for name, seed, _ in plan.runs] == [
        ("tiny-cpu", 1234),
        ("masked", 1234),
        ("tiny-cpu", 1235),
        ("masked", 1235),
    ]
    assert {file.recipe.evaluation_seed for _, _, file in plan.runs} == {1234}
    assert [file.recipe.seed for _, _, file in plan.runs] == [1234, 1234, 1235, 1235]
    assert plan.runs[-1][2].recipe.run_folder == tmp_path / "out" / "masked" / "seed1235"
    assert plan.of("masked").stages[0].cross_document_mask


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ("  stages.extend.train_iters: 60\n", "trains on 270,336 tokens, tiny-cpu on 221,184: not the same budget"),
        ("  evaluate.needle.samples: 3\n", "evaluate is not that of tiny-cpu"),
        ("  model.path: examples/other\n", "model is not that of tiny-cpu"),
        ("  name: tiny-cpu\n", "two methods are called 'tiny-cpu'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path, changes: str, what: str) -> None:
    path = tmp_path / "other.yaml"
    named = changes if "name:" in changes else f"  name: other\n{changes}"
    path.write_text(f"extends: tiny-cpu\nchanges:\n{named}")
    with pytest.raises(ConfigError) as caught:
        plan_comparison("tiny-cpu", [str(path)], seeds=1, folder=tmp_path / "out")
    assert what in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_method_on_the_tiny_model_starts_where_tiny_cpu_starts() -> None:
    methods = [name for name in preset_names() if name.startswith("tiny-") and name != "tiny-cpu"]
    plan = plan_comparison("tiny-cpu", methods, seeds=1)
    assert len(plan.methods) == len(methods) + 1 >= 11
    assert all(plan.of(method).about for method in plan.methods[1:])


def test_the_page_of_methods_names_every_preset() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    missing = [name for name in preset_names() if f"`{name}`" not in page and not name.startswith("ultralong-8b")]
    assert not missing


def test_no_seeds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 seeds"):
        plan_comparison("tiny-cpu", ["tiny-masked"], seeds=0, folder=tmp_path)


def test_a_folder_is_taken_as_it_is_written_and_launch_is_told_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "x #1: y"
    plan = plan_comparison("tiny-cpu", ["tiny-masked"], seeds=1, overrides=["evaluate.needle.samples=3"], folder=folder)
    assert plan.runs[1][2].recipe.run_folder == folder / "tiny-masked" / "seed1234"
    for (_, _, file), line in zip(plan.runs, launch_lines(plan, ["evaluate.needle.samples=3"]), strict=True):
        program, verb, source, *overrides = shlex.split(line)
        assert (program, verb) == ("mcore-longctx", "launch")
        assert open_recipe(source, overrides).recipe == file.recipe


def test_no_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no method"):
        plan_comparison("tiny-cpu", [], seeds=1, folder=tmp_path)


def test_an_evaluation_seed_of_0_is_a_seed(tmp_path: Path) -> None:
    plan = plan_comparison("tiny-cpu", ["tiny-masked"], seeds=1, overrides=["evaluate.seed=0"], folder=tmp_path)
    assert {file.recipe.evaluation_seed for _, _, file in plan.runs} == {0}


@pytest.mark.long
@pytest.mark.multiproc
def test_two_methods_are_trained_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked = method(tmp_path, "masked", "  stages.extend.cross_document_mask: true\n")
    plan = plan_comparison("tiny-cpu", [masked], seeds=1, overrides=SMALL, folder=tmp_path / "out")
    found = compare_methods(plan)
    assert {name for name, _ in found.figures} == {"tiny-cpu", "masked"}
    facts = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [one["tokens"] for one in facts["methods"]] == [3072, 3072]
    assert (tmp_path / "out" / "tiny-cpu" / "seed1234" / "evaluate" / "before").is_dir()
    assert not (tmp_path / "out" / "masked" / "seed1234" / "evaluate" / "before").exists()
    assert "short loss" in capsys.readouterr().out
    again = compare_methods(plan)
    assert again.as_dict() == found.as_dict()
    assert "done before, skipped" in capsys.readouterr().out
