"""The stage runner: order, skipping, refusing, locking. The steps' own work is tested in their rooms."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mcore_longctx.run as runner
from mcore_longctx.data.workspace import lock_folder
from mcore_longctx.errors import CheckpointError, ConfigError, InUseError, LongctxError, TrainingError
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe.load import RecipeFile, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.run import steps
from mcore_longctx.run.steps import Step, plan_steps
from mcore_longctx.run.training import train_job
from mcore_longctx.train.job import data_fingerprint

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 264, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
RECIPE = """\
name: small
output: {folder}/run
model: {{path: {folder}/model}}
rope: {{type: llama3, factor: 8, original_max_position_embeddings: 512}}
data:
  long:
    sources: [{{name: books, path: {folder}/books.txt}}]
stages:
  - {{name: extend, kind: pretrain, data: long, seq_length: 1k, train_iters: 2, global_batch_size: 1, optimizer: {{lr: 1e-4}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "books.txt").write_text("text")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every step writes its outputs and its name into this list instead of working."""
    names: list[str] = []

    def recorded(step: Step) -> Step:
        def action() -> dict[str, Any]:
            names.append(step.name)
            for path in step.outputs:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            return {}

        return replace(step, action=action)

    monkeypatch.setattr(runner, "plan_steps", lambda *args: [recorded(step) for step in plan_steps(*args)])
    return names


def recipe_of(folder: Path, *overrides: str) -> RecipeFile:
    return open_recipe(folder / "recipe.yaml", overrides)


ALL = ["import", "data-extend", "train-extend", "export", "verify", "report"]


def test_steps_run_in_order_once(folder: Path, done: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.run_recipe(recipe_of(folder), until="extend") == 0
    assert done == ALL[:3]
    assert runner.run_recipe(recipe_of(folder)) == 0
    assert done == ALL
    assert runner.run_recipe(recipe_of(folder)) == 0
    assert done == ALL
    assert capsys.readouterr().out.count("done before, skipped") == 3 + 6
    states = {row["name"]: row["state"] for row in json.loads((folder / "run" / "run.json").read_text())["steps"]}
    assert states == dict.fromkeys(ALL, "done")


def test_a_removed_output_is_made_again(folder: Path, done: list[str]) -> None:
    runner.run_recipe(recipe_of(folder))
    (folder / "run" / "data" / "extend" / "manifest.json").unlink()
    runner.run_recipe(recipe_of(folder))
    assert done == [*ALL, "data-extend"]


def test_changed_inputs_are_refused_by_name(folder: Path, done: list[str]) -> None:
    runner.run_recipe(recipe_of(folder), until="extend")
    with pytest.raises(
        ConfigError, match=r"stages.extend.optimizer.lr was 0.0001 when step train-extend ran, it is 0.0002 now; set it back"
    ):
        runner.run_recipe(recipe_of(folder, "stages.extend.optimizer.lr=2e-4"))
    with pytest.raises(ConfigError, match=r"stages.extend.train_iters was \d+ when step data-extend ran, it is 50 now"):
        runner.run_recipe(recipe_of(folder, "stages.extend.train_iters=50"))
    with pytest.raises(ConfigError, match=r"data.long.separator was '<s>' when step data-extend ran, it is '<doc>' now"):
        runner.run_recipe(recipe_of(folder, "data.long.separator=<doc>"))
    (folder / "books.txt").write_text("other text")
    with pytest.raises(
        ConfigError, match=r"books.txt has changed since step data-extend ran; restore it, or use another output folder"
    ):
        runner.run_recipe(recipe_of(folder))
    (folder / "books.txt").write_text("text")
    runner.run_recipe(recipe_of(folder), until="extend")
    assert done == ALL[:3]


def test_a_failed_step_is_noted_and_tried_again(folder: Path, done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = runner.plan_steps

    def failing(*args: Any) -> list[Step]:
        def action() -> None:
            raise TrainingError("loss is NaN")

        return [replace(step, action=action) if step.name == "train-extend" else step for step in recorded(*args)]

    with monkeypatch.context() as patch:
        patch.setattr(runner, "plan_steps", failing)
        with pytest.raises(TrainingError, match="loss is NaN"):
            runner.run_recipe(recipe_of(folder))
    last = json.loads((folder / "run" / "run.json").read_text())["steps"][-1]
    assert (last["name"], last["state"], last["error"]) == ("train-extend", "failed", "loss is NaN")
    runner.run_recipe(recipe_of(folder))
    assert done == ALL


def test_memory_settings_may_change_between_two_starts(folder: Path, done: list[str]) -> None:
    runner.run_recipe(recipe_of(folder), until="extend")
    before = list(done)
    runner.run_recipe(recipe_of(folder, "stages.extend.activations.recompute=full"), until="extend")
    assert done == before


def test_inputs_that_are_not_there_stop_the_run_before_its_first_step(folder: Path, done: list[str]) -> None:
    (folder / "books.txt").unlink()
    with pytest.raises(ConfigError, match=r"books\.txt: step data-extend needs it, but there is no such file or folder"):
        runner.run_recipe(recipe_of(folder))
    assert done == []
    assert not (folder / "run").exists()


def test_a_folder_that_is_no_run_folder_is_refused(folder: Path, done: list[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"output folder is already there and is not a run folder"):
        runner.run_recipe(recipe_of(folder))
    assert done == []


def _hold(folder: Path, ready: Any, leave: Any) -> None:
    with lock_folder(folder):
        ready.set()
        leave.wait(30)


def test_two_runs_on_one_folder_are_refused(folder: Path, done: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    (folder / "run").mkdir()
    other = context.Process(target=_hold, args=(folder / "run", ready, leave))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(InUseError, match=f"another run works on this folder .process {other.pid} on "):
            runner.run_recipe(recipe_of(folder))
    finally:
        leave.set()
        other.join(30)
    runner.run_recipe(recipe_of(folder))
    assert done == ALL


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.extend.parallel.tensor_model_parallel_size=3",
            "num_attention_heads 4 is not divisible by tensor_model_parallel_size 3; use one of 1, 2, 4",
        ),
        (
            "stages.extend.parallel.tensor_model_parallel_size=4",
            "num_query_groups 2 is not divisible by tensor_model_parallel_size 4; use one of 1, 2",
        ),
        (
            "stages.extend.parallel.pipeline_model_parallel_size=4",
            "num_layers 2 is not divisible by pipeline_model_parallel_size 4",
        ),
        (
            "stages.extend.seq_length=8k",
            "stages.extend.seq_length: 8,192 tokens, but the rope reaches 4,096; raise rope.factor or shorten it",
        ),
        ("model.hidden_size=128", "model.hidden_size: 128 here, 64 in the model's config.json; remove it or correct it"),
        ("model.path=nowhere", "no config.json here: not a Hugging Face model folder"),
        ("rope.factor=0.5", "rope: factor is 0.5, expected 1 or more"),
        ("rope={type: abf}", "rope.rope_theta: missing; type abf is a changed base"),
        (
            "rope={type: abf, rope_theta: 8e6}",
            "rope.max_position_embeddings: missing; the length does not follow from rope type abf",
        ),
        (
            "rope={type: dynamic, factor: 8, max_position_embeddings: 512}",
            "rope type dynamic changes its frequencies with the sequence length",
        ),
        (
            "rope={type: yarn, ramp: rotations, factor: 8, original_max_position_embeddings: 512}",
            "yarn",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_its_model_is_refused_with_its_place(folder: Path, override: str, message: str) -> None:
    with pytest.raises(LongctxError) as caught:
        runner.run_recipe(recipe_of(folder, override))
    assert caught.value.exit_code == 2
    assert message in str(caught.value)
    assert not (folder / "run").exists()


def test_an_unknown_rope_type_in_config_json_is_refused(folder: Path) -> None:
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": {"rope_type": "magic", "factor": 8.0}}))
    with pytest.raises(ConfigError, match=r"config\.json: .*magic"):
        runner.run_recipe(recipe_of(folder))


def test_until_names_what_there_is(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--until extnd: no such step or stage; stages: extend; steps: import, data-extend"):
        runner.print_plan(recipe_of(folder), until="extnd")


def test_the_plan_of_the_4m_preset_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    runner.print_plan(open_recipe("ultralong-8b-4m"))
    plan = capsys.readouterr().out
    for text in (
        "[1/12] import",
        "not found here: sizes from the recipe",
        "150 iterations x 2 sequences x 4,194,304 tokens = 1,258,291,200 tokens",
        "TP 8 (SP) x PP 1 x CP 16 p2p x DP 2 = 256 ranks",
        "recompute attention_kept, MLP 8,192 tokens at a time, loss as many tokens at a time as 256 MiB of logits hold",
        "AdamW lr 3e-05, constant",
        "150 iterations x 128 sequences x 8,192 tokens",
        "factor 512",
        "beta_fast",
    ):
        assert text in plan


def test_a_scaling_that_drops_the_models_own_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": own}))
    runner.print_plan(recipe_of(folder, "rope={type: yarn, factor: 8, original_max_position_embeddings: 512}"))
    assert "WARNING" in capsys.readouterr().out
    runner.print_plan(recipe_of(folder, "rope.original_max_position_embeddings=64", "rope.factor=64"))
    assert "WARNING" not in capsys.readouterr().out


def test_exactly_the_steps_that_are_named_run_in_order(folder: Path, done: list[str]) -> None:
    runner.run_recipe(recipe_of(folder), only=["data-extend", "import"])
    assert done == ["import", "data-extend"]
    runner.run_recipe(recipe_of(folder), only=["train-extend"])
    runner.run_recipe(recipe_of(folder), only=["report", "export", "verify"])
    assert done == ALL


def test_steps_that_stand_on_unfinished_ones_are_refused(folder: Path, done: list[str]) -> None:
    runner.run_recipe(recipe_of(folder), only=["import"])
    with pytest.raises(
        ConfigError, match=r"step train-extend stands on data-extend, which is not done; run it first: --steps data"
    ):
        runner.run_recipe(recipe_of(folder), only=["train-extend"])
    with pytest.raises(ConfigError, match=r"step export stands on train-extend, which is not done"):
        runner.run_recipe(recipe_of(folder), only=["export", "verify"])
    with pytest.raises(ConfigError, match=r"--steps trian: no such step; steps: import, data-extend"):
        runner.run_recipe(recipe_of(folder), only=["trian"])
    runner.run_recipe(recipe_of(folder), only=["data-extend"])
    with pytest.raises(ConfigError, match=r"data.long.separator was '<s>' when step data-extend ran, it is '<doc>' now"):
        runner.run_recipe(recipe_of(folder, "data.long.separator=<doc>"), only=["train-extend"])
    assert done == ["import", "data-extend"]


def test_what_a_job_needs_may_be_gone_from_where_it_was_made(folder: Path, done: list[str]) -> None:
    """The documents may have been on another file system: they are packed."""
    runner.run_recipe(recipe_of(folder), only=["import", "data-extend"])
    (folder / "books.txt").unlink()
    runner.run_recipe(recipe_of(folder), only=["train-extend"])
    assert done == ALL[:3]


def test_scripts_and_logs_of_launch_make_a_run_folder(folder: Path, done: list[str]) -> None:
    (folder / "run" / "slurm").mkdir(parents=True)
    (folder / "run" / "logs").mkdir()
    (folder / "run" / "recipe.yaml").touch()
    runner.run_recipe(recipe_of(folder), only=["import"])
    assert done == ["import"]


def trained(folder: Path, iteration: int, **changes: Any) -> None:
    """What a training job of its own leaves: data, and a checkpoint whose manifest has the settings of the recipe."""
    data, last = folder / "run" / "data" / "extend", folder / "run" / "checkpoints" / "extend" / f"iter_{iteration:07d}"
    if not data.exists():
        data.mkdir(parents=True)
        (data / "long.bin").write_bytes(b"tokens")
        write_manifest(data, "data")
        (folder / "run" / "checkpoints" / "base").mkdir(parents=True)
    last.mkdir(parents=True)
    (last / "__0_0.distcp").write_bytes(b"weights")
    file = recipe_of(folder)
    job = train_job(file, resolve(file), "extend")
    settings = job.settings(data=data_fingerprint(job.data_prefix)) | changes
    write_manifest(last, "checkpoint", stage="extend", settings=settings)


@pytest.fixture
def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose first steps are done; starting ranks is an error."""
    (folder / "model" / "tokenizer.json").write_text("{}")
    trained(folder, 1)
    file = recipe_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "plan_steps", lambda *args: [replace(step, action=dict) for step in plan_steps(*args)])
        (folder / "run" / "run.json").write_text('{"steps": []}')
        runner.run_recipe(file, only=["import", "data-extend"])
    monkeypatch.setattr(steps, "launch_ranks", lambda *words, **more: pytest.fail("ranks were started"))
    return folder


def test_a_stage_that_a_job_has_trained_is_noted_without_starting_ranks(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(prepared, 2)
    logs = prepared / "run" / "logs" / "extend"
    logs.mkdir(parents=True)
    row = {"job": "1", "restart": 0, "nodes": "n0", "began": 0.0, "before": -1, "short_seconds": 1.0, "seconds": 100.25, "after": 1,
           "state": "stopped", "code": 75, "reason": "", "asked": "", "srun_code": 1, "verdict": "requeue"}  # fmt: skip
    (logs / "slices.jsonl").write_text("".join(json.dumps(row | {"seconds": s}) + "\n" for s in (100.25, 50.0)))
    runner.run_recipe(recipe_of(prepared), only=["train-extend"])
    assert "iter_0000002: trained to its end with these settings" in capsys.readouterr().out
    noted = json.loads((prepared / "run" / "run.json").read_text())["steps"][-1]
    assert (noted["name"], noted["state"], noted["checkpoint"]) == ("train-extend", "done", "iter_0000002")
    assert noted["seconds"] == 150.2  # of the slices, not of looking


def test_a_stage_trained_with_other_settings_is_refused_by_name(prepared: Path) -> None:
    trained(prepared, 2, **{"optimizer.lr": 0.5})
    with pytest.raises(CheckpointError, match=r"trained with other settings: optimizer.lr was 0.5, is 0.0001 now"):
        runner.run_recipe(recipe_of(prepared), only=["train-extend"])


def test_a_damaged_last_checkpoint_is_not_noted(prepared: Path) -> None:
    trained(prepared, 2)
    (prepared / "run" / "checkpoints" / "extend" / "iter_0000002" / "__0_0.distcp").write_bytes(b"w")
    with pytest.raises(CheckpointError, match="1 bytes, the manifest says 7"):
        runner.run_recipe(recipe_of(prepared), only=["train-extend"])


def test_a_stage_with_something_left_to_train_starts_its_ranks(prepared: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="ranks were started"):
        runner.run_recipe(recipe_of(prepared), only=["train-extend"])


def test_the_dry_run_prices_each_stage_where_there_is_a_formula(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.print_plan(open_recipe("ultralong-8b-4m"))
    assert (
        len([line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("plan: ") and "fits" in line]) == 2
    )
    runner.print_plan(open_recipe("tiny-cpu"))
    assert " a step, " not in capsys.readouterr().out
