"""docs/plan.md shows what the program prints."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from mcore_longctx.cli.main import build_parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
SPEC = importlib.util.spec_from_file_location("plan_page", ROOT / "tools" / "plan_page.py")
assert SPEC is not None
assert SPEC.loader is not None
plan_page = importlib.util.module_from_spec(SPEC)
sys.modules["plan_page"] = plan_page  # its dataclass looks itself up
SPEC.loader.exec_module(plan_page)


def test_the_page_shows_what_is_printed_now() -> None:
    """After a change of formulas or constants: `python tools/plan_page.py`, and read the difference."""
    assert plan_page.rendered(PAGE) == PAGE


def test_each_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["plan", "--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(options) > 12
    assert not {option for option in options if f"`{option}" not in PAGE and f" {option} " not in PAGE}


def test_nothing_of_the_examples_is_wider_than_100_columns() -> None:
    blocks = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 2
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 100
