"""A rope for each stage: who trains, measures, exports and is asked with which, and what a journal of an older version says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mcore_longctx.run as runner
from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.args import our_command, stage_run
from mcore_longctx.launch.doctor import rope as doctor_rope
from mcore_longctx.recipe.load import RecipeFile, dump_recipe, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.run.journal import Journal
from mcore_longctx.run.steps import Step, plan_steps
from mcore_longctx.run.training import train_job
from tests.run.recipes import HEAD

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 264, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
RECIPE = (
    "name: prolong\n"
    + HEAD
    + """\
  - {{name: first, kind: pretrain, data: long, seq_length: 1k, train_iters: 2, global_batch_size: 1, optimizer: {{lr: 1e-4}}}}
  - name: second
    kind: pretrain
    data: long
    seq_length: 8k
    train_iters: 2
    global_batch_size: 1
    optimizer: {{lr: 1e-4}}
    rope: {{type: abf, rope_theta: 128000000, max_position_embeddings: 8k, phase_dtype: float64}}
evaluate:
  loss_by_position: {{path: {folder}/books.txt, seq_length: 8k, short_length: 512}}
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(ROOT / "examples" / "tiny-llama" / "tokenizer.json", tmp_path / "model")
    (tmp_path / "books.txt").write_text("text")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def recipe_of(folder: Path, *overrides: str) -> RecipeFile:
    return open_recipe(folder / "recipe.yaml", overrides)


def bases(folder: Path, *overrides: str) -> dict[str, float]:
    resolved = resolve(recipe_of(folder, *overrides))
    return {name: resolved.rope_of(name).rope_theta for name in ("base", "first", "second")} | {"": resolved.rope.rope_theta}


def test_a_stage_has_its_own_rope_or_the_recipes_and_the_run_ends_with_the_last_ones(folder: Path) -> None:
    assert bases(folder) == {"base": 1e4, "first": 8e6, "second": 1.28e8, "": 1.28e8}
    early = "stages.first.rope={type: abf, rope_theta: 5e5, max_position_embeddings: 1k}"
    assert bases(folder, early)["first"] == 5e5
    file = recipe_of(folder)
    again = open_recipe(_written(folder, dump_recipe(file.recipe)))
    assert again.recipe == file.recipe  # RUN/recipe.yaml keeps it
    first, second = file.recipe.stages
    assert (first.rope, second.rope.rope_theta) == (None, 1.28e8)


def _written(folder: Path, text: str) -> Path:
    (folder / "again.yaml").write_text(text)
    return folder / "again.yaml"


def test_every_stage_is_held_within_its_own_rope(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages.first.seq_length: 4,096 tokens, but the rope reaches 2,048"):
        resolve(recipe_of(folder, "stages.first.seq_length=4k"))
    with pytest.raises(ConfigError, match=r"stages.second.seq_length: 16,384 tokens, .* 8,192; raise stages.second.rope.factor"):
        resolve(recipe_of(folder, "stages.second.seq_length=16k"))
    target = "stages.first.positions={type: rpes, target: 4k}"
    with pytest.raises(ConfigError, match=r"stages.first.positions.target: 4,096 tokens, but the rope reaches 2,048"):
        resolve(recipe_of(folder, target))
    with pytest.raises(ConfigError, match=r"stages.second.rope.rope_theta: missing; type abf is a changed base"):
        resolve(recipe_of(folder, "stages.second.rope={type: abf, max_position_embeddings: 8k}"))


def test_a_stage_starts_from_the_rope_of_the_one_before(folder: Path) -> None:
    file = recipe_of(folder)
    first = train_job(file, resolve(file), "first")
    assert (first.start_rope.rope_theta, first.rope.rope_theta, first.phase_dtype) == (1e4, 8e6, "float32")
    done = folder / "run" / "checkpoints" / "first" / "iter_0000002"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text("{}")
    second = train_job(file, resolve(file), "second")
    assert (second.start_rope.rope_theta, second.rope.rope_theta, second.phase_dtype) == (8e6, 1.28e8, "float64")


def test_a_column_is_measured_with_the_rope_of_its_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mcore_longctx.cli.main as main
    import mcore_longctx.evaluate as evaluate
    from mcore_longctx.run import checkpoints

    jobs: list[Any] = []
    monkeypatch.setattr(evaluate, "evaluate_column", lambda job, **_: jobs.append(job))
    monkeypatch.setattr(checkpoints, "newest_checkpoint", lambda path: path)
    columns = [
        ("base", "own", "before"),
        ("base", "recipe", "scaled"),
        ("first", "recipe", "first"),
        ("second", "recipe", "second"),
    ]
    for checkpoint, rope, column in columns:
        words = ["evaluate", str(folder / "recipe.yaml"), "--checkpoint", checkpoint, "--rope", rope, "--column", column]
        assert main.main(words) == 0
    assert [(job.checkpoint_rope.rope_theta, job.rope.rope_theta) for job in jobs] == [
        (1e4, 1e4),
        (1e4, 1.28e8),  # before any training, with what the run ends with
        (8e6, 8e6),
        (1.28e8, 1.28e8),
    ]
    assert [job.phase_dtype for job in jobs] == ["float64", "float64", "float32", "float64"]


def test_steps_are_made_of_the_rope_of_their_stage_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "plan_steps", lambda *args: [_touching(step) for step in plan_steps(*args)])
    assert runner.run_recipe(recipe_of(folder)) == 0
    with pytest.raises(
        ConfigError, match=r"stages.second.rope.rope_theta was 128000000.0 when step evaluate-scaled ran, it is 64000000"
    ):
        runner.run_recipe(recipe_of(folder, "stages.second.rope.rope_theta=64000000"))
    with pytest.raises(ConfigError, match=r"rope.rope_theta was 8000000.0 when step train-first ran, it is 4000000.0 now"):
        runner.run_recipe(recipe_of(folder, "rope.rope_theta=4000000"))
    with pytest.raises(ConfigError, match=r"stages.second.rope.rope_theta was 128000000.0 when step train-second ran"):
        runner.run_recipe(recipe_of(folder, "stages.second.rope.rope_theta=64000000"), only=["train-second"])


def _touching(step: Step) -> Step:
    def action() -> dict[str, Any]:
        for path in step.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return {}

    return replace(step, action=action)


def test_a_journal_of_a_version_without_a_key_goes_on_with_its_default_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "plan_steps", lambda *args: [_touching(step) for step in plan_steps(*args)])
    runner.run_recipe(recipe_of(folder))
    path = folder / "run" / "run.json"
    journal = json.loads(path.read_text())
    new = ("optimizer_from", "loss_reduction", "balance")
    for row in journal["steps"]:
        row["inputs"]["recipe"] = {
            key: value for key, value in row["inputs"]["recipe"].items() if key.rpartition(".")[2] not in new
        }
    path.write_text(json.dumps(journal))
    assert runner.run_recipe(recipe_of(folder)) == 0
    with pytest.raises(ConfigError, match=r"stages.first.balance was None when step train-first ran, it is 'sum_sq' now"):
        runner.run_recipe(recipe_of(folder, "stages.first.cross_document_mask=true", "stages.first.balance=sum_sq"))


def test_a_section_that_was_not_there_is_a_change_though_it_holds_defaults(folder: Path) -> None:
    file = recipe_of(folder)
    (folder / "run").mkdir()
    journal = Journal(folder / "run")
    step = next(step for step in plan_steps(file, resolve(file)) if step.name == "train-second")
    stamp = journal.stamp(step, file.recipe)
    past = {key: value for key, value in stamp["recipe"].items() if ".rope." not in key}
    journal.begin(step, stamp | {"recipe": past})
    with pytest.raises(ConfigError, match=r"stages.second.rope.\w+ was None when step train-second ran"):
        journal.refuse_changed_values(step, file.recipe)


def test_other_programs_and_doctor_are_told_the_rope_of_the_stage(folder: Path) -> None:
    file = recipe_of(folder, "cluster.gpu=none", "cluster.nproc_per_node=1")
    resolved = resolve(file)
    told = {}
    for name in ("first", "second"):
        run = stage_run(file, resolved, name)
        told[name] = {flag.name: flag.values for flag in our_command(run).flags}
    assert [told[name]["--rotary-base"] for name in told] == [("8000000",), ("128000000",)]
    assert [told[name]["--longctx-phase-dtype"] for name in told] == [("float32",), ("float64",)]
    assert [told[name]["--max-position-embeddings"] for name in told] == [("2048",), ("8192",)]
    assert stage_run(file, resolved, "second").where("rope.factor").endswith("stages.second.rope.factor")
    assert stage_run(file, resolved, "first").where("rope.factor").endswith(": rope.factor")
    assert doctor_rope.stages_to_build(file.recipe, resolved) == ["first", "second"]
    asked = [doctor_rope.question(file.recipe, resolved, name) for name in ("first", "second")]
    assert [one["rope"]["rope_theta"] for one in asked] == [8e6, 1.28e8]
    same = recipe_of(folder, "stages.second.rope=null", "rope.max_position_embeddings=8k")
    assert doctor_rope.stages_to_build(same.recipe, resolve(same)) == ["second"]


def test_doctor_holds_each_checkpoint_against_the_rope_of_its_stage(folder: Path) -> None:
    from mcore_longctx.manifest import write_manifest
    from mcore_longctx.recipe import CheckpointCard, write_card

    file = recipe_of(folder)
    resolved = resolve(file)
    for name in ("first", "second"):
        path = folder / "run" / "checkpoints" / name / "iter_0000002"
        path.mkdir(parents=True)
        write_card(path, CheckpointCard(shape=resolved.shape, rope=resolved.rope_of("first"), stage=name, iteration=2))
        write_manifest(path, "checkpoint")
    found = {finding.text.split("/")[-2]: finding.level for finding in doctor_rope.of_checkpoints(file.recipe, resolved)}
    assert found == {"first": "ok", "second": "wrong"}
