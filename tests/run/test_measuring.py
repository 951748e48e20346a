"""What is said of an evaluation before it starts, and what does not start."""

from pathlib import Path

import pytest

import mcore_longctx.run as runner
from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.chain import build_chain
from mcore_longctx.plan.models import known_models
from mcore_longctx.recipe.load import load_recipe, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.run.measuring import cost_line, describe_evaluation
from mcore_longctx.run.steps import plan_steps

ROOT = Path(__file__).parents[2]
SHAPE = known_models()["llama-3.1-8b"]


@pytest.fixture(autouse=True)
def _clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_task_has_a_line_at_its_level() -> None:
    lines = describe_evaluation(
        load_recipe("tiny-cpu", ["evaluate.ruler.tasks=[vt, cwe]", "evaluate.needle.kind=sentence"]).evaluate
    )
    assert lines[0] == (
        "needle: 4 lengths (512, 1,024, 2,048, 4,096) x 6 depths x 10 samples, sentences, text from examples/documents/heldout"
    )
    assert (
        lines[1] == "ruler-like: vt, cwe at 1,024, 2,048, 4,096 x 3 samples, teacher forced, text from examples/documents/heldout"
    )
    assert lines[3] == "short suite: 55 questions made from the seed"
    quick = describe_evaluation(load_recipe("tiny-cpu", ["evaluate.level=quick"]).evaluate)
    assert quick[0] == "level quick"
    assert quick[1].startswith("needle: 1 lengths (4,096) x 20 depths x 1 samples, 3-digit keys, all depths in one text, ")
    assert quick[2] == "ruler-like: not at level quick"


def test_what_it_costs_is_said_of_each_model_and_of_all() -> None:
    said = cost_line(load_recipe("ultralong-8b-1m"), SHAPE)
    assert said.startswith("plan: ")
    assert " on 32 GPUs, " in said
    assert "4 models: " in said
    assert "there is no formula for time on CPUs" in cost_line(load_recipe("tiny-cpu"), SHAPE)


def test_every_evaluation_step_says_what_and_how_much_and_names_its_files(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    file = open_recipe("tiny-cpu", [f"output={tmp_path}/run", f"evaluate.short_suite.choices={questions}"])
    steps = [step for step in plan_steps(file, resolve(file)) if step.name.startswith("evaluate-")]
    assert [step.name for step in steps] == ["evaluate-before", "evaluate-scaled", "evaluate-extend", "evaluate-instruct"]
    for step in steps:
        assert any(line.startswith("ruler-like: ") for line in step.about)
        assert step.about[-1].startswith("plan: ")
        assert step.files == (Path("examples/documents/heldout"), questions)


def test_a_recipe_with_one_task_is_measured(tmp_path: Path) -> None:
    parts = ("needle", "ruler", "loss_by_position")
    file = open_recipe("tiny-cpu", [f"output={tmp_path}/run", *(f"evaluate.{part}=null" for part in parts)])
    assert "evaluate-before" in [step.name for step in plan_steps(file, resolve(file))]
    assert any(job.name == "10-evaluate-before" for job in build_chain(file).jobs)


def test_too_dear_an_evaluation_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = open_recipe("tiny-cpu", [f"output={tmp_path}/run", "evaluate.max_budget_share=1e-6"])
    for start in (runner.run_recipe, build_chain, runner.print_plan):
        with pytest.raises(ConfigError, match=r"evaluate.max_budget_share: measuring 4 models takes .* PFLOP .* of the training"):
            start(file)
    assert not (tmp_path / "run").exists()


def test_an_unknown_task_starts_nothing(tmp_path: Path) -> None:
    file = open_recipe("tiny-cpu", [f"output={tmp_path}/run", "evaluate.ruler.tasks=[niah_singel_1]"])
    for start in (runner.run_recipe, build_chain):
        with pytest.raises(
            ConfigError, match=r"override .*: evaluate.ruler.tasks: unknown task 'niah_singel_1'; did you mean 'niah_single_1'"
        ):
            start(file)
    assert not (tmp_path / "run").exists()
