"""`docs/recipe.md` names every key of the recipe."""

import dataclasses
import re
from pathlib import Path

import pytest

from mcore_longctx.recipe import cluster, data, evaluation, model, parallel, schema, stage
from mcore_longctx.recipe.load import load_recipe
from tests.recipe.test_load import GOOD

MEMORY = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
DOCS = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
SECTIONS = [
    kind
    for module in (cluster, data, evaluation, model, parallel, schema, stage)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_key_is_explained(section: type) -> None:
    assert not [field.name for field in dataclasses.fields(section) if not re.search(rf"`{field.name}`", DOCS)]


def test_the_settings_of_the_memory_page_are_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", MEMORY, re.DOTALL)
    rest = GOOD[GOOD.index("    kind: pretrain") :]
    (tmp_path / "run.yaml").write_text(GOOD[: GOOD.index("stages:")] + block + rest)
    (stage,) = load_recipe(tmp_path / "run.yaml").stages
    assert stage.activations == schema.Activations(
        recompute="attention_kept",
        offload_fraction=0.5,
        mlp_tile=schema.TokenCount(8192),
        loss_chunk=schema.TokenCount(2048),
    )
