"""`mcore-longctx evaluate` from a recipe to the files of a column."""

import json

import pytest

from mcore_longctx.cli.main import main

from . import tiny_checkpoint as tiny

RECIPE = """\
name: verb
output: {folder}/run
model: {{path: {folder}/hf}}
rope: {{type: llama3, factor: 8, original_max_position_embeddings: 128}}
data:
  books: {{sources: [{{name: books, path: {folder}/held-out.txt}}]}}
stages:
  - {{name: extend, kind: pretrain, data: books, seq_length: 256, train_iters: 1, global_batch_size: 1, optimizer: {{lr: 1e-4}}}}
evaluate:
  needle: {{haystack: {folder}/held-out.txt, lengths: [128], depths: 2, samples: 1, digits: 3}}
  loss_by_position: {{path: {folder}/held-out.txt, seq_length: 256, short_length: 128, windows: 2, short_windows: 2}}
  precision: fp32
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tiny.make(tmp_path_factory.mktemp("verb"))
    (made / "run" / "checkpoints").mkdir(parents=True)
    (made / "base").rename(made / "run" / "checkpoints" / "base")
    (made / "recipe.yaml").write_text(RECIPE.format(folder=made))
    return made


def evaluate(folder, *arguments):
    return main(["evaluate", str(folder / "recipe.yaml"), *arguments])


def test_a_column_is_measured_and_said(folder, capsys):
    assert evaluate(folder, "--checkpoint", "base", "--rope", "own", "--column", "before") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said] == [["before", f"{word}"] for word in ("plan:", "needle", "loss", "short")]
    assert "GPU-hours; 3 models: " in said[0]
    column = folder / "run" / "evaluate" / "before"
    assert {path.name: len(path.read_text().splitlines()) for path in column.iterdir()} == {
        "needle.jsonl": 2,
        "loss_by_position.jsonl": 2,
        "short_context.jsonl": 2,
    }


def test_own_and_recipe_rope_are_different_measurements(folder):
    assert evaluate(folder, "--checkpoint", "base", "--rope", "own", "--column", "before") == 0
    assert evaluate(folder, "--checkpoint", "base", "--rope", "recipe", "--column", "scaled") == 0
    rows = {
        column: json.loads((folder / "run" / "evaluate" / column / "loss_by_position.jsonl").read_text().splitlines()[0])
        for column in ("before", "scaled")
    }
    assert rows["before"]["rope"] == tiny.OWN.fingerprint()[:16]
    assert rows["scaled"]["rope"] == tiny.SCALED.fingerprint()[:16]
    assert rows["before"]["start"] == rows["scaled"]["start"]
    assert rows["before"]["sums"] != rows["scaled"]["sums"]


def test_a_level_on_the_command_line_is_the_recipes(folder, tmp_path, capsys):
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "base").symlink_to(folder / "run" / "checkpoints" / "base")
    assert (
        evaluate(folder, "--checkpoint", "base", "--rope", "recipe", "--column", "scaled", "--level", "quick", f"output={output}")
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["plan:", "needles,", "loss", "short"]
    rows = [json.loads(line) for line in (output / "evaluate" / "scaled" / "needle.jsonl").read_text().splitlines()]
    assert [(row["task"], row["length"], row["index"]) for row in rows] == [("needles_shared", 128, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--checkpoint", "base", "--rope", "own", "--column", "before", "evaluate.max_budget_share=1e-9"),
            "override 'evaluate.max_budget_share=1e-9': evaluate.max_budget_share: measuring 3 models takes",
        ),
        (
            (
                *("--checkpoint", "base", "--rope", "own", "--column", "before"),
                "evaluate.ruler={haystack: x, lengths: [256], tasks: [cve]}",
            ),
            "evaluate.ruler.tasks: unknown task 'cve'; did you mean 'cwe'?",
        ),
        (
            (*("--checkpoint", "base", "--rope", "own", "--column", "before"), "evaluate.short_suite={choices: /nowhere.jsonl}"),
            "/nowhere.jsonl: not a file of questions",
        ),
        (
            (*("--checkpoint", "base", "--rope", "own", "--column", "before"), "evaluate={precision: fp32}"),
            "nothing to measure: none of needle, ruler, loss_by_position, short_suite is given",
        ),
        (
            ("--checkpoint", "other", "--rope", "own", "--column", "before"),
            "--checkpoint: 'other' is not known here; one of base, extend",
        ),
        (
            ("--checkpoint", "base", "--rope", "own", "--column", "../x"),
            "--column: '../x' is not known here; one of before, scaled, extend",
        ),
        (
            ("--checkpoint", "base", "--rope", "own", "--column", "extend"),
            "--column: 'extend' is the column of another model than --checkpoint base --rope own; use --column before",
        ),
        (
            ("--checkpoint", "base", "--rope", "recipe", "--column", "extend"),
            "--column: 'extend' is the column of another model than --checkpoint base --rope recipe; use --column scaled",
        ),
        (("--checkpoint", "base", "--rope", "recipe", "--column", "before"), "use --column scaled"),
        (("--checkpoint", "extend", "--rope", "recipe", "--column", "scaled"), "use --column extend"),
        (("--checkpoint", "extend", "--rope", "own", "--column", "extend"), "use --rope recipe"),
        (
            ("--checkpoint", "extend", "--rope", "recipe", "--column", "extend"),
            "no finished checkpoint here; run the training stage first",
        ),
        (
            ("--checkpoint", "base", "--rope", "own", "--column", "before", "evaluate.parallel.context_parallel_size=2"),
            "the layout needs TP 1 x PP 1 x CP 2 p2p x DP 1 = 2 ranks, but 1 was started",
        ),
        (
            ("--checkpoint", "base", "--rope", "own", "--column", "before", "evaluate.loss_by_position.windows=99"),
            "99 windows of 256 need",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(folder, capsys, arguments, message):
    assert evaluate(folder, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (folder / "run" / "x").exists()


def test_no_stage_may_take_the_folder_of_the_cache(tmp_path, capsys):
    recipe = tmp_path / "cache.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path).replace("name: extend", "name: cache"))
    assert main(["evaluate", str(recipe), "--checkpoint", "base", "--rope", "own", "--column", "before"]) == 2
    assert "no stage may be called 'cache': the run folder uses this name" in capsys.readouterr().err
