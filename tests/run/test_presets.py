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


def test_the_preset_of_sparse_to_dense_turns_dense_within_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    file = open_recipe("s2d-8b-128k")
    (extend, instruct) = file.recipe.stages
    assert extend.sparsity is not None
    assert 0.75 <= extend.sparsity.sparsity <= 0.875  # the levels of arXiv 2304.05511
    assert 1 < extend.sparsity.dense_from < extend.iterations
    assert instruct.sparsity is None
    assert file.recipe.data[extend.data].augment is None  # of the preset that it extends
    print_plan(file)
    assert "the smallest 75% of the weights of linear layers are 0 until iteration 2,385" in capsys.readouterr().out
