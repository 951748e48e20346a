"""The tables of docs/methods.md are those of the comparison that is stored beside it, and say what `compare` would say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mcore_longctx.recipe.load import open_recipe

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("methods_page", ROOT / "tools" / "methods_page.py")
assert SPEC is not None
assert SPEC.loader is not None
methods_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(methods_page)
FACTS = json.loads((ROOT / "docs" / "methods_comparison.json").read_text())
PAGE = (ROOT / "docs" / "methods.md").read_text()


def test_the_tables_are_those_of_the_stored_comparison() -> None:
    """After a new comparison: `python tools/methods_page.py FOLDER`, and read the difference."""
    assert methods_page.rendered(PAGE, FACTS) == PAGE


def test_a_changed_figure_changes_the_page() -> None:
    changed = json.loads(json.dumps(FACTS))
    changed["methods"][1]["measures"]["short loss"]["difference"] += 0.5
    assert methods_page.rendered(PAGE, changed) != PAGE


def test_every_method_has_three_seeds_the_budget_of_the_reference_and_a_preset() -> None:
    assert len(FACTS["methods"]) > 6
    for method in FACTS["methods"]:
        assert len(method["seeds"]) >= 3
        assert method["tokens"] == pytest.approx(FACTS["methods"][0]["tokens"], rel=0.02)
        recipe = open_recipe(method["name"], []).recipe
        assert recipe.about == method["about"]
        assert sum(stage.iterations * stage.global_batch_size * stage.seq_length for stage in recipe.stages) == method["tokens"]


@pytest.mark.parametrize(
    ("figure", "mean", "difference"),
    [
        (
            {"kind": "rate", "mean": 0.5, "low": 0.25, "high": 0.75, "all": 60, "runs": {"1": 0.5, "2": 0.5}}
            | {"difference": -0.5, "difference_low": -0.7, "difference_high": -0.3},
            "50 (25 to 75)",
            "**-50 (-70 to -30)**",
        ),
        (
            {"kind": "loss", "mean": 1.5, "low": 1.4, "high": 1.6, "all": None, "runs": {"1": 1.5, "2": 1.5}}
            | {"difference": 0.01, "difference_low": -0.01, "difference_high": 0.03},
            "1.500 (1.400 to 1.600)",
            "+0.010 (-0.010 to +0.030)",
        ),
    ],
)
def test_a_figure_in_words(figure: dict, mean: str, difference: str) -> None:
    shown = list(methods_page.figures({"base": {}, "methods": [{"name": "a", "measures": {"short loss": figure}}]}))
    assert shown[-1] == f"| a |{'  |' * (len(methods_page._SHOWN) - 1)} {mean} |"
    measures = dict.fromkeys(methods_page._SHOWN, figure)
    rows = list(methods_page.differences({"reference": "r", "methods": [{"name": "a", "measures": measures}]}))
    assert rows[-1] == f"| a |{f' {difference} |' * len(methods_page._SHOWN)}"
