"""Make the tables of docs/methods.md from docs/methods_comparison.json, what `mcore-longctx compare` wrote for the tiny model.

    python tools/methods_page.py [FOLDER]    FOLDER: of a new comparison, whose comparison.json replaces the one in docs

A test makes the page again and finds no difference (tests/tools/test_methods_page.py).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.manifest import write_atomic

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES = DOCS / "methods.md", DOCS / "methods_comparison.json"
_TABLE = re.compile(r"<!-- made: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
_SHOWN = ("pass key 1,024", "pass key 2,048", "pass key 4,096", "short suite", "loss 2,048-4,096", "short loss")


def rendered(text: str, facts: Mapping[str, Any]) -> str:
    """The page with the tables of a comparison."""
    made = {"figures": figures, "differences": differences}
    return _TABLE.sub(lambda match: "\n".join([f"<!-- made: {match[1]} -->", *made[match[1]](facts), "<!-- end -->"]), text)


def figures(facts: Mapping[str, Any]) -> Iterator[str]:
    """Mean and interval of each measure; a rate in %."""
    yield _head()
    base = {name: {"kind": "rate" if one["all"] is not None else "loss", **one} for name, one in facts["base"].items()}
    for name, measures in [("base, not trained", base), *((method["name"], method["measures"]) for method in facts["methods"])]:
        cells = [_mean(measures[measure]) if measure in measures else "" for measure in _SHOWN]
        yield f"| {name} | {' | '.join(cells)} |"


def differences(facts: Mapping[str, Any]) -> Iterator[str]:
    """Difference of each method to the reference, paired by seed, in points of % or nats; bold where its interval excludes 0."""
    yield _head()
    for method in facts["methods"]:
        if method["name"] != facts["reference"]:
            cells = [_difference(method["measures"][measure]) for measure in _SHOWN]
            yield f"| {method['name']} | {' | '.join(cells)} |"


def _head() -> str:
    return f"| | {' | '.join(_SHOWN)} |\n|{' --- |' * (len(_SHOWN) + 1)}"


def _mean(figure: Mapping[str, Any]) -> str:
    scale, digits = _form(figure)
    mean = f"{scale * figure['mean']:.{digits}f}"
    if len(figure["runs"]) < 2 and figure["all"] is None:
        return mean  # one run of a loss has no interval
    return f"{mean} ({scale * figure['low']:.{digits}f} to {scale * figure['high']:.{digits}f})"


def _difference(figure: Mapping[str, Any]) -> str:
    scale, digits = _form(figure)
    difference, low, high = (figure[f"difference{end}"] for end in ("", "_low", "_high"))
    text = f"{scale * difference:+.{digits}f} ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _form(figure: Mapping[str, Any]) -> tuple[int, int]:
    return (100, 0) if figure["kind"] == "rate" else (1, 3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_atomic(FIGURES, (Path(sys.argv[1]) / "comparison.json").read_text(encoding="utf-8"))
    facts = json.loads(FIGURES.read_text(encoding="utf-8"))
    write_atomic(PAGE, rendered(PAGE.read_text(encoding="utf-8"), facts))
