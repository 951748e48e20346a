"""What is said of an evaluation before it starts, and what does not start."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mcore_longctx.run as runner
from mcore_longctx.errors import ConfigError, LongctxError
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
        load_recipe(
            "tiny-cpu", ["evaluate.ruler.tasks=[vt, cwe]", "evaluate.needle.kind=sentence", "evaluate.needle.digits=null"]
        ).evaluate
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


def refused(tmp_path: Path, source: str, *overrides: str) -> str:
    """What `run`, `run --dry-run` and `launch` say to a recipe, all the same, before anything is written or printed."""
    file, said = open_recipe(source, [f"output={tmp_path}/run", *overrides]), set()
    for start in (runner.print_plan, build_chain, runner.run_recipe):  # a fault that is missed ends before a run begins
        with pytest.raises(LongctxError) as raised:
            start(file)
        assert raised.value.exit_code == 2
        said.add(str(raised.value))
    assert not (tmp_path / "run").exists()
    (line,) = said
    assert "\n" not in line
    return line


FAULTS = {
    "evaluate.needle.lengths=[510]": "seq_length 510 is not a multiple of 2 x context_parallel_size (4); nearest: 508 or 512",
    "evaluate.loss_by_position.seq_length=1022": "seq_length 1,022 is not a multiple of 2 x context_parallel_size (4)",
    "evaluate.loss_by_position.short_length=510": "seq_length 510 is not a multiple of 2 x context_parallel_size (4)",
    "evaluate.needle.lengths=[512, 60]": "a needle sample of 3 digits needs more than 62 tokens, the length is 60; use longer",
    "evaluate.ruler.lengths=[1024, 700]": (
        "700 tokens are too few with this tokenizer for niah_multikey_3 886, niah_multiquery 730; use longer lengths"
    ),
    "evaluate.ruler.tasks=[vt, cve]": "unknown task 'cve'; did you mean 'cwe'?",
}


@pytest.mark.parametrize("override", FAULTS)
def test_a_length_or_task_that_cannot_be_measured_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    line = refused(tmp_path, "tiny-cpu", "evaluate.parallel.context_parallel_size=2", override)
    assert line.startswith(f"override {override!r}: {override.partition('=')[0]}: {FAULTS[override]}")
    assert not capsys.readouterr().out


def test_the_place_is_the_line_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: tiny-cpu\nchanges:\n  name: mine\n  evaluate.needle.lengths: [60]\n")
    assert refused(tmp_path, str(recipe)).startswith(
        f"{recipe}:4: evaluate.needle.lengths: a needle sample of 3 digits needs more"
    )


def test_shared_needles_are_counted_together(tmp_path: Path) -> None:
    shared = ("evaluate.needle.shared=true", "evaluate.needle.depths=20")
    line = refused(tmp_path, "tiny-cpu", "evaluate.needle.lengths=[512]", *shared)
    assert "evaluate.needle.lengths: one text with 20 needles of 3 digits needs more than 6" in line
    line = refused(tmp_path, "tiny-cpu", "evaluate.needle.digits=1", *shared)
    assert "evaluate.needle.digits: 1 digits are too few for 20 needles with different values; use more digits" in line


def test_a_window_that_predicts_nothing_starts_nothing(tmp_path: Path) -> None:
    override = "evaluate.loss_by_position.short_length=1"
    line = refused(tmp_path, "tiny-cpu", "evaluate.parallel.context_parallel_size=1", override)
    assert line == f"override {override!r}: {override[:-2]}: a window of 1 tokens predicts none; give at least 2"


@pytest.mark.parametrize(
    ("key", "name", "text", "message"),
    [
        ("ruler.code", "code.py", "x = 1\n", "unknown suffix '.py'; expected .jsonl,"),
        ("ruler.code", "code.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "code.jsonl:2: no field 'text'"),
        ("ruler.code", "code.jsonl", "", "code.jsonl: empty file"),
        ("needle.haystack", "text.jsonl", "{", "text.jsonl:1: "),
        ("loss_by_position.path", "text.jsonl", "[]", "text.jsonl:1: "),
        (
            "short_suite.choices",
            "choices.jsonl",
            '{"question": "a"}',
            'choices.jsonl:1: not an object with "question", "choices"',
        ),
        ("short_suite.choices", "choices.jsonl", "", "choices.jsonl: holds no questions"),
    ],
)
def test_a_text_or_questions_that_cannot_be_read_start_nothing(
    tmp_path: Path, key: str, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    override = f"evaluate.{key}={tmp_path / name}"
    line = refused(tmp_path, "tiny-cpu", override)
    assert line.startswith(f"override {override!r}: evaluate.{key}: {tmp_path / name}")
    assert message in line


def test_options_that_the_tokenizer_joins_with_the_question_start_nothing(tmp_path: Path) -> None:
    letters = [chr(code) for code in (*range(33, 127), ord("Ġ"), ord("Ċ"))]
    vocabulary = {letter: number for number, letter in enumerate([*letters, ":Ġ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tmp_path / "tokens").mkdir()
    tokenizer.save(str(tmp_path / "tokens" / "tokenizer.json"))
    override = f"tokenizer={tmp_path}/tokens"
    line = refused(tmp_path, "tiny-cpu", "evaluate.needle=null", "evaluate.ruler=null", override)
    assert line.startswith(f"override {override!r}: tokenizer: the tokenizer joins the end of ")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["evaluate.ruler=null"], "short_suite"),
        (["evaluate.short_suite=null", "evaluate.ruler.scoring=greedy"], "ruler.scoring"),
        (["evaluate.short_suite=null", "evaluate.needle.shared=true"], "needle.shared"),
        (["evaluate.short_suite=null", "evaluate.level=quick"], "needle.shared"),
    ],
)
def test_what_needs_a_cache_is_not_started_with_layers_that_keep_none(tmp_path: Path, overrides: list[str], key: str) -> None:
    line = refused(tmp_path, "tiny-cpu", "model.backend=te", *overrides)
    assert (
        f": evaluate.{key}: keeps keys and values of a prompt, which layers of TransformerEngine do not do for us; measure"
        in line
    )
    print_plan_of = open_recipe("tiny-cpu", ["model.backend=te", "evaluate.short_suite=null", f"output={tmp_path}/run"])
    runner.print_plan(print_plan_of)


def test_a_dry_run_comes_before_texts_questions_and_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away = ("needle.haystack", "ruler.haystack", "ruler.code", "loss_by_position.path", "short_suite.choices")
    overrides = [f"output={tmp_path}/run", *(f"evaluate.{key}={tmp_path}/{key}" for key in away)]
    runner.print_plan(open_recipe("tiny-cpu", [*overrides, f"tokenizer={tmp_path}/tokens"]))
    assert "evaluate-before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"needle.haystack: step evaluate-before needs it, but there is no such file or folder"):
        runner.run_recipe(open_recipe("tiny-cpu", overrides))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_measures_nothing_is_asked_for_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    build_chain(open_recipe("tiny-cpu", ["evaluate={}", f"tokenizer={tmp_path}", f"output={tmp_path}/run"]))
