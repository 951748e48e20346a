"""A kill between the end of a step and its line in the journal: the next start knows its own output again, and nobody else's."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mcore_longctx.run as runner
from mcore_longctx.convert import Execution, export_hf, import_hf, merge
from mcore_longctx.convert.copying.partial import Partial
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.manifest import sha256_file
from mcore_longctx.recipe.load import RecipeFile, open_recipe
from mcore_longctx.run.journal import Journal
from mcore_longctx.run.steps import Step, plan_steps
from tests.convert.hf_folders import llama_config, random_weights, write_folder
from tests.run.recipes import HEAD, MERGED_STAGE

RECIPE = "name: killed\n" + HEAD + MERGED_STAGE
PLAIN = llama_config(rope_theta=10000.0)
RAISED = llama_config(rope_theta=8000000.0, max_position_embeddings=2048)
OUTPUTS = {"import": "checkpoints/base", "merge-first": "checkpoints/first-merged", "export": "export"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    """A recipe whose import, merge and export work; training leaves other weights, and no data is made."""
    write_folder(tmp_path / "model", PLAIN, random_weights(PLAIN, "float32", seed=1))
    write_folder(tmp_path / "trained", RAISED, random_weights(PLAIN, "float32", seed=2))
    (tmp_path / "books.txt").write_text("text")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))

    def train() -> None:
        import_hf(tmp_path / "trained", tmp_path / "run" / "checkpoints" / "first" / "iter_0000002", how=Execution(checksum=True))

    def small(step: Step) -> Step:
        if step.name == "data-first":
            return replace(step, action=dict, outputs=())
        return replace(step, action=train) if step.name == "train-first" else step

    monkeypatch.setattr(runner, "plan_steps", lambda *args: [small(step) for step in plan_steps(*args)])
    return open_recipe(tmp_path / "recipe.yaml", ())


def killed_at(file: RecipeFile, step: str, call: str) -> None:
    """Run until a kill -9 of this process: when `step` is to be noted as done, or when the journal beside its output is to go."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    noted, renamed, patch = Journal.end, Partial.rename, pytest.MonkeyPatch()  # of the process that is killed

    def end(self: Journal, done: Step, *rest: Any) -> None:
        if done.name == step:
            kill()
        noted(self, done, *rest)

    def rename(self: Partial) -> None:
        if self.out == file.recipe.run_folder / OUTPUTS[step]:
            patch.setattr(Path, "unlink", kill)
        renamed(self)

    def work() -> None:
        if call == "note":
            patch.setattr(Journal, "end", end)
        else:
            patch.setattr(Partial, "rename", rename)
        runner.run_recipe(file, until="export")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def states(file: RecipeFile) -> dict[str, str]:
    return {row["name"]: row["state"] for row in json.loads((file.recipe.run_folder / "run.json").read_text())["steps"]}


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Inode and hash of each file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_ino, sha256_file(path)) for path in files}


@pytest.mark.parametrize("call", ["note", "unlink"])
@pytest.mark.parametrize("step", OUTPUTS)
def test_what_a_killed_start_had_finished_is_taken_as_it_is(
    recipe: RecipeFile, step: str, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at(recipe, step, call)
    folder = recipe.recipe.run_folder
    out = folder / OUTPUTS[step]
    assert states(recipe)[step] == "running"
    before = contents(out)
    assert "manifest.json" in before
    assert [path.name for path in folder.rglob("*.partial*")] == ([f"{out.name}.partial-journal"] if call == "unlink" else [])
    assert runner.run_recipe(recipe, until="export") == 0
    assert (
        f"{out}: whole, and made from these inputs by a start that was killed before it could note it" in capsys.readouterr().out
    )
    assert contents(out) == before
    assert set(states(recipe).values()) == {"done"}
    assert not list(folder.rglob("*.partial*"))


def test_the_import_of_other_weights_is_refused_and_stays(recipe: RecipeFile, tmp_path: Path) -> None:
    """Of the same model by its shape and its names, whole and with a manifest."""
    killed_at(recipe, "import", "note")
    write_folder(tmp_path / "other", PLAIN, random_weights(PLAIN, "float32", seed=3))
    replaced_is_refused(recipe, "import", lambda out: import_hf(tmp_path / "other", out, how=Execution(checksum=True)))


def test_the_import_with_another_tokenizer_is_refused_and_stays(recipe: RecipeFile, tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    killed_at(recipe, "import", "note")
    write_folder(tmp_path / "other", PLAIN, random_weights(PLAIN, "float32", seed=1))
    (tmp_path / "other" / "tokenizer.json").write_text('{"model": 1}')
    replaced_is_refused(recipe, "import", lambda out: import_hf(tmp_path / "other", out, how=Execution(checksum=True)))


def test_a_merge_by_other_weights_is_refused_and_stays(recipe: RecipeFile) -> None:
    killed_at(recipe, "merge-first", "note")
    checkpoints = recipe.recipe.run_folder / "checkpoints"
    both = checkpoints / "first" / "iter_0000002", checkpoints / "base"
    replaced_is_refused(recipe, "merge-first", lambda out: merge(*both, out, weights=(0.6, 0.4), any_rope=True))


def test_an_export_in_another_type_is_refused_and_stays(recipe: RecipeFile) -> None:
    killed_at(recipe, "export", "note")
    merged = recipe.recipe.run_folder / "checkpoints" / "first-merged"
    replaced_is_refused(recipe, "export", lambda out: export_hf(merged, out, dtype="bfloat16"))


def replaced_is_refused(file: RecipeFile, step: str, make: Callable[[Path], object]) -> None:
    out = file.recipe.run_folder / OUTPUTS[step]
    out.rename(file.recipe.run_folder / "own")
    make(out)
    before = contents(out)
    for _ in range(2):  # the first refusal leaves nothing that lets the second start take it
        with pytest.raises(ConfigError, match=r"output is already there; choose another name or remove it") as caught:
            runner.run_recipe(file, until="export")
        assert caught.value.where == out
        assert states(file)[step] == "failed"
    assert contents(out) == before


def test_an_own_output_that_was_damaged_since_is_refused_by_its_file(recipe: RecipeFile) -> None:
    killed_at(recipe, "import", "note")
    base = recipe.recipe.run_folder / "checkpoints" / "base"
    weights = max((path for path in base.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{weights.name}: contents differ .*; move base away: the step makes it again"):
        runner.run_recipe(recipe, until="export")
    assert weights.read_bytes() == data


def test_a_journal_of_something_else_beside_the_output_stays(recipe: RecipeFile) -> None:
    killed_at(recipe, "export", "note")
    foreign = recipe.recipe.run_folder / "export.partial-journal"
    foreign.write_text("notes of mine\n")
    assert runner.run_recipe(recipe, until="export") == 0
    assert foreign.read_text() == "notes of mine\n"
