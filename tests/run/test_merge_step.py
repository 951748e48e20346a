"""The merge after a stage: exact sums under the rope of the stage, and everybody who goes on takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from mcore_longctx.convert import Execution, export_hf, import_hf
from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.chain import build_chain
from mcore_longctx.recipe.card import read_card
from mcore_longctx.recipe.load import RecipeFile, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.run.checkpoints import final_checkpoint
from mcore_longctx.run.journal import Journal
from mcore_longctx.run.steps import Step, plan_steps
from mcore_longctx.run.training import train_job
from tests.convert.hf_folders import llama_config, random_weights, write_folder
from tests.run.recipes import HEAD, MERGED_STAGE

RECIPE = (
    "name: longrecipe\n"
    + HEAD
    + MERGED_STAGE
    + """\
  - {{name: second, kind: pretrain, data: long, seq_length: 1k, train_iters: 2, global_batch_size: 1, optimizer: {{lr: 1e-4}}}}
evaluate:
  loss_by_position: {{path: {folder}/books.txt, seq_length: 2k, short_length: 512}}
"""
)
PLAIN = llama_config(rope_theta=10000.0)
RAISED = llama_config(rope_theta=8000000.0, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    write_folder(folder / "model", PLAIN, random_weights(PLAIN, "float32", seed=1))
    write_folder(folder / "trained", RAISED, random_weights(PLAIN, "float32", seed=2))
    (folder / "books.txt").write_text("text")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    checkpoints = folder / "run" / "checkpoints"
    import_hf(folder / "model", checkpoints / "base", how=Execution(checksum=True))
    import_hf(folder / "trained", checkpoints / "first" / "iter_0000002", how=Execution(checksum=True))
    return folder


def recipe_of(folder: Path, *overrides: str) -> RecipeFile:
    return open_recipe(folder / "recipe.yaml", overrides)


def steps_of(file: RecipeFile) -> dict[str, Step]:
    return {step.name: step for step in plan_steps(file, resolve(file))}


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_merged_checkpoint_is_the_exact_sum_under_the_rope_of_the_stage(folder: Path, tmp_path: Path) -> None:
    from mcore_longctx.train.checkpoint import verify_checkpoint

    file = recipe_of(folder)
    resolved = resolve(file)
    with pytest.raises(ConfigError, match=r"first-merged: not merged yet; mcore-longctx run RECIPE --steps merge-first"):
        train_job(file, resolved, "second")
    step = steps_of(file)["merge-first"]
    assert step.about[0].startswith("0.7 x first + 0.3 x base -> ")
    step.action()
    merged = folder / "run" / "checkpoints" / "first-merged"
    assert final_checkpoint(file.recipe, "first") == merged
    card = read_card(merged)
    assert card.rope.fingerprint() == resolved.rope_of("first").fingerprint() != resolved.own_rope.fingerprint()

    export_hf(merged, tmp_path / "export")
    trained, base, found = (weights_of(path) for path in (folder / "trained", folder / "model", tmp_path / "export"))
    assert found.keys() == trained.keys() == base.keys()
    for name, tensor in found.items():  # float32; a machine may fuse a product with the sum
        assert tensor.dtype == np.float32
        wanted = np.float32(0.7) * trained[name] + np.float32(0.3) * base[name]
        np.testing.assert_allclose(tensor, wanted, rtol=2**-22, atol=2**-22 * np.abs(trained[name]).max(), err_msg=name)

    # it is a checkpoint that the next stage starts from
    verify_checkpoint(merged, shape=resolved.shape, rope=resolved.rope_of("first"))
    job = train_job(file, resolved, "second")
    assert (job.start_checkpoint, job.start_rope) == (merged, resolved.rope_of("first"))


def test_halves_are_added_to_the_bit(folder: Path, tmp_path: Path) -> None:
    import_hf(folder / "trained", folder / "run" / "checkpoints" / "second" / "iter_0000002", how=Execution(checksum=True))
    file = recipe_of(folder, "stages.second.merge={other: base}")
    steps_of(file)["merge-second"].action()
    export_hf(final_checkpoint(file.recipe, "second"), tmp_path / "export")
    trained, base, found = (weights_of(path) for path in (folder / "trained", folder / "model", tmp_path / "export"))
    for name, tensor in found.items():  # products with 0.5 are exact: one rounding, fused or not
        wanted = np.float32(0.5) * trained[name] + np.float32(0.5) * base[name]
        np.testing.assert_array_equal(tensor.view(np.uint32), wanted.view(np.uint32), err_msg=name)


def test_who_goes_on_takes_the_merged_checkpoint(folder: Path) -> None:
    steps = steps_of(recipe_of(folder))
    assert list(steps) == [
        *("import", "evaluate-before", "evaluate-scaled", "data-first", "train-first", "merge-first", "evaluate-first"),
        *("data-second", "train-second", "evaluate-second", "export", "verify", "report"),
    ]
    assert steps["merge-first"].needs == ("train-first", "import")
    assert steps["evaluate-first"].needs == ("merge-first",)
    assert steps["train-second"].needs == ("data-second", "merge-first")
    both = steps_of(recipe_of(folder, "stages.second.merge={other: first}"))
    assert both["merge-second"].needs == ("train-second", "merge-first")
    assert both["export"].needs == ("merge-second",)
    assert both["export"].about[0].startswith("checkpoints/second-merged -> ")


def test_the_export_is_made_of_the_merged_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mcore_longctx.convert as convert

    taken: list[Path] = []
    monkeypatch.setattr(convert, "export_hf", lambda source, out, **_: taken.append(source))
    merged = folder / "run" / "checkpoints" / "second-merged"
    merged.mkdir(exist_ok=True)
    (merged / "manifest.json").write_text("{}")
    steps_of(recipe_of(folder, "stages.second.merge={other: first}"))["export"].action()
    assert taken == [merged]


def test_a_changed_weight_is_refused_by_those_who_took_the_sum_and_not_by_the_training(folder: Path, tmp_path: Path) -> None:
    now, changed = recipe_of(folder), recipe_of(folder, "stages.first.merge.other_weight=0.4")
    none = recipe_of(folder, "stages.first.merge=null")
    refusing: dict[str, set[str]] = {"changed": set(), "none": set()}
    for step in steps_of(now).values():
        journal = Journal(_empty(tmp_path / step.name))
        journal.begin(step, journal.stamp(replace(step, files=()), now.recipe))
        for label, other in (("changed", changed), ("none", none)):
            if refuses(journal, step, other):
                refusing[label].add(step.name)
    assert refusing["changed"] == refusing["none"] == {"merge-first", "evaluate-first", "train-second"}


def refuses(journal: Journal, step: Step, file: RecipeFile) -> bool:
    try:
        journal.refuse_changed_values(step, file.recipe)
    except ConfigError:
        return True
    return False


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_chain_merges_between_training_and_measuring(folder: Path) -> None:
    chain = build_chain(recipe_of(folder, "cluster.gpu=none", "cluster.cpu_partition=small"))
    names = [job.name for job in chain.jobs]
    assert names == sorted(names)
    assert names[2:6] == ["20-first", "21-merge-first", "22-evaluate-first", "30-second"]
    script = chain.scripts["21-merge-first.sbatch"]
    assert "--steps merge-first" in script
    assert "#SBATCH --partition=small" in script


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["stages.first.merge={other: second}"], r"stage first: merge.other is 'second', expected base or an earlier stage"),
        (["stages.first.merge={other: base, other_weight: 1.0}"], r"other_weight is 1.0, expected more than 0 and less than 1"),
        (
            ["stages.second.optimizer_from=previous"],
            r"stage second: .* the stage before it is merged, which leaves no optimizer state",
        ),
        (["stages.second.name=first-merged"], r"no stage may be called 'first-merged': the run folder uses this name"),
    ],
)
def test_what_cannot_be_merged_is_refused(folder: Path, overrides: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        recipe_of(folder, *overrides)
