"""Recipes that are another recipe with changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import dump_recipe, load_recipe, open_recipe


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_recipe_that_extends_a_preset_is_that_preset_with_overrides(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "extends: tiny-cpu\nchanges:\n  name: mine\n  stages.extend.cross_document_mask: true\n  rope: {type: abf, rope_theta: 8.0e6}\n",
    )
    words = ["name=mine", "stages.extend.cross_document_mask=true", "rope={type: abf, rope_theta: 8.0e6}"]
    assert load_recipe(path) == load_recipe("tiny-cpu", words)
    assert load_recipe(path, ["name=other"]).name == "other"  # the command line is on top


def test_a_chain_of_files_beside_each_other_and_the_last_change_wins(tmp_path: Path) -> None:
    written(tmp_path, "extends: tiny-cpu\nchanges: {seed: 1, name: first}\n", "first.yaml")
    path = written(tmp_path, "extends: first.yaml\nchanges: {seed: 2}\n", "second.yaml")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed) == ("first", 2)


def test_stages_may_be_replaced_and_data_sets_added(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "extends: tiny-cpu\nchanges:\n"
        "  data.more: {sources: [{name: books, path: examples/documents/books}]}\n"
        "  stages:\n"
        "    - {name: only, kind: pretrain, data: more, seq_length: 512, train_iters: 4, global_batch_size: 1, optimizer: {lr: 1.0e-4}}\n"
        "  stages.only.train_iters: 2\n",
    )
    recipe = load_recipe(path)
    assert [stage.name for stage in recipe.stages] == ["only"]
    assert recipe.stages[0].train_iters == 2
    assert set(recipe.data) == {"long-documents", "chats", "more"}


def test_values_know_the_line_of_the_change_and_the_dump_stands_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "extends: tiny-cpu\nchanges:\n  seed: 7\n")
    read = open_recipe(path)
    assert read.where("seed") == f"{path}:3: seed"
    path = written(tmp_path, "extends: tiny-cpu\nchanges:\n  seed: 7\n  rope: {type: bands, factor: 8}\n", "whole.yaml")
    assert open_recipe(path).where("rope") == f"{path}:4: rope"
    whole = "rope={type: bands, factor: 8}"
    assert open_recipe("tiny-cpu", [whole]).where("rope") == f"override {whole!r}: rope"
    again = written(tmp_path, dump_recipe(read.recipe), "again.yaml")
    assert load_recipe(again) == read.recipe


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("extends: tiny-cpu\nchanges:\n  stages.extend.sed: 1\n", 3, "stages.extend.sed: unknown name"),
        ("extends: tiny-cpu\nchanges:\n  stages.extend: {name: extend, kind: x}\n", 3, "stages.extend.kind: 'x' is not one of"),
        ("extends: tiny-cpu\nchanges:\n  seed: many\n", 3, "seed: 'many' is not a whole number"),
        ("extends: tiny-cpu\nseed: 3\n", 2, "seed: unknown name"),
        ("extends: tiny-cpu\nchanges: [seed]\n", 2, "changes: expected section.name: value"),
        ("extends: {a: b}\n", 1, "extends: expected a preset or a file"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert caught.value.what.startswith(what)
    assert caught.value.where == f"{path}:{line}"


def test_an_unknown_preset_and_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preset of this name"):
        load_recipe(written(tmp_path, "extends: tiny-cpo\n"))
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(written(tmp_path, "extends: a.yaml\n", "b.yaml"))


def test_an_error_inside_a_section_on_the_command_line_names_the_override() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny-cpu", ["rope={type: yarn, facto: 8}"])
    assert caught.value.where == "override 'rope={type: yarn, facto: 8}'"


def test_the_example_of_the_docs_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    (block,) = re.findall(r"```yaml\n(  extends:.*?)```", page, re.DOTALL)
    recipe = load_recipe(written(tmp_path, block))
    assert (recipe.name, recipe.stages[0].cross_document_mask) == ("tiny-masked", True)


def test_what_is_wrong_with_the_whole_stands_in_the_recipe_that_was_opened(tmp_path: Path) -> None:
    path = written(tmp_path, "extends: tiny-utk\nchanges: {stages.extend.cross_document_mask: true}\n")
    with pytest.raises(ConfigError, match="use one of them") as caught:
        load_recipe(path)
    assert caught.value.where == str(path)
