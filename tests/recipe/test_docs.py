"""`docs/recipe.md` names every key of the recipe."""

import dataclasses
import re
from pathlib import Path

import pytest

from mcore_longctx.recipe import schema

DOCS = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
SECTIONS = [kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind) and kind.__module__ == schema.__name__]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_key_is_explained(section: type) -> None:
    assert not [field.name for field in dataclasses.fields(section) if not re.search(rf"`{field.name}`", DOCS)]
