"""Every preset says what it would do, before a model is at hand."""

from __future__ import annotations

import pytest

from mcore_longctx.recipe.load import open_recipe, preset_names
from mcore_longctx.run import print_plan


@pytest.mark.parametrize("name", preset_names())
def test_a_dry_run_names_every_step_and_what_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = open_recipe(name)
    print_plan(file)
    said = capsys.readouterr().out
    assert all(f"] train-{stage.name}\n" in said for stage in file.recipe.stages)
    assert "does not fit" not in said
    if file.recipe.cluster.gpu != "none":
        assert said.count(", fits") == len(file.recipe.stages)
