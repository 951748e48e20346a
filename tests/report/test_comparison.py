"""Figures of a comparison against plain arithmetic, and its page."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.report.comparison import Arm, Comparison, compare_arms, comparison_lines
from mcore_longctx.report.comparison_page import write_comparison
from mcore_longctx.report.run_folder import Column, NeedleKind

T_OF_2 = 4.302652729696142  # Student's t, 97.5 %, two degrees of freedom (tables)


def column(right: int, every: int = 60, loss: float = 2.0, short: float = 1.5, length: int = 4096) -> Column:
    rows: dict[Any, dict[str, Any]] = {}
    for index in range(every):
        rows[length, 0.5, index] = {
            "task": "needle", "length": length, "depth": 0.5, "index": index, "correct": index < right, "seed": 1, "expected": str(index),
        }  # fmt: skip
    bins = {"edges": [0, 2048, 4096], "counts": [10, 10], "sums": [30.0, 10 * loss]}
    return Column(
        "extend",
        "extend",
        needles={NeedleKind("passkey", False): rows},
        loss_by_position={0: bins, 1: bins},
        short_context={0: {"sum": 10 * short, "count": 10}},
    )


@pytest.fixture
def comparison() -> Comparison:
    plain = Arm("plain", "as it is", 1000, {1: column(50, loss=2.0), 2: column(40, loss=2.2), 3: column(45, loss=2.1)})
    other = Arm("other", "<b>better</b>", 1000, {1: column(60, loss=1.9), 2: column(60, loss=1.8), 3: column(60, loss=1.9)})
    few = Arm("few", "one run", 1000, {1: column(30)})
    return compare_arms([plain, other, few])


def test_a_rate_over_runs_has_students_interval_or_wilsons_where_that_is_wider(comparison: Comparison) -> None:
    figure = comparison.figures["plain", "pass key 4,096"]
    rates = [50 / 60, 40 / 60, 45 / 60]
    half = T_OF_2 * statistics.stdev(rates) / math.sqrt(3)
    assert figure.mean == pytest.approx(0.75)
    assert (figure.low, figure.high) == pytest.approx((0.75 - half, 0.75 + half))
    assert (figure.right, figure.all) == (135, 180)
    sure = comparison.figures["other", "pass key 4,096"]
    z = statistics.NormalDist().inv_cdf(0.975)
    assert (sure.low, sure.high) == pytest.approx((60 / (60 + z * z), 1.0))  # the same 60 samples, however many runs
    one = comparison.figures["few", "pass key 4,096"]
    assert one.low < 0.5 < one.high
    assert one.high - one.low > 0.2


def test_a_difference_is_paired_by_seed(comparison: Comparison) -> None:
    figure = comparison.figures["other", "loss 2,048-4,096"]
    changes = [1.9 - 2.0, 1.8 - 2.2, 1.9 - 2.1]
    half = T_OF_2 * statistics.stdev(changes) / math.sqrt(3)
    assert figure.difference == pytest.approx(statistics.fmean(changes))
    assert figure.difference_low == pytest.approx(statistics.fmean(changes) - half)
    assert not figure.differs  # three runs, far apart
    rate = comparison.figures["other", "pass key 4,096"]
    assert rate.difference == pytest.approx(0.25)
    assert comparison.figures["few", "pass key 4,096"].difference == pytest.approx(-20 / 60)  # with seed 1 alone
    assert comparison.figures["few", "pass key 4,096"].differs  # the samples say so: 30 of 60 against 50 of 60
    assert comparison.figures["plain", "short loss"].difference is None


def test_needles_of_one_haystack_are_one_sample() -> None:
    single = column(20, 20).needles[NeedleKind("passkey", False)]
    rows = {key: {**row, "shared": True, "index": 0} for key, row in single.items()}
    of_run = Column("extend", "extend", needles={NeedleKind("passkey", True): rows})
    found = compare_arms([Arm("a", "", 1, {1: of_run, 2: of_run, 3: of_run})])
    figure = found.figures["a", "pass key (shared) 4,096"]
    assert (figure.right, figure.all) == (60, 60)
    assert figure.low < 0.25  # one haystack


def test_the_same_runs_do_not_differ() -> None:
    runs = {seed: column(60) for seed in (1, 2, 3)}
    same = compare_arms([Arm("a", "", 1, runs), Arm("b", "", 1, runs)])
    figure = same.figures["b", "pass key 4,096"]
    assert figure.difference == 0
    assert figure.difference_low is not None
    assert figure.difference_low < 0 < (figure.difference_high or 0)
    assert not figure.differs


def test_the_table_and_the_page_hold_what_was_counted(comparison: Comparison, tmp_path: Path) -> None:
    lines = comparison_lines(comparison)
    assert lines[0] == "pass key 4,096"
    assert "135/180" in lines[1]
    assert "runs 83 67 75" in lines[1]
    assert "180/180" in lines[2]
    assert "difference +25.0" in lines[2]
    assert "[one run]" in next(line for line in lines[4:] if "few" in line)
    page = write_comparison(comparison, tmp_path, title="Methods", evaluation="needles").read_text()
    assert "135/180" in page
    assert "&lt;b&gt;better&lt;/b&gt;" in page
    assert "<b>better" not in page
    facts = json.loads((tmp_path / "comparison.json").read_text())
    assert facts["reference"] == "plain"
    assert facts["methods"][1]["measures"]["pass key 4,096"]["right"] == 180
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.html", "comparison.json"]


def test_a_method_that_was_measured_at_another_length_has_no_figure_here() -> None:
    found = compare_arms([Arm("a", "", 1, {1: column(5)}), Arm("b", "", 1, {1: column(5, length=2048)})])
    assert ("b", "pass key 4,096") not in found.figures
    assert any("not measured" in line for line in comparison_lines(found))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_arms([Arm("a", "", 1, {})])


def test_one_run_and_a_loss_that_is_no_number_are_valid_json_and_say_so(tmp_path: Path) -> None:
    found = compare_arms(
        [Arm("a", "", 1, {1: column(50)}), Arm("b", "", 1, {1: column(60, loss=math.nan)})], base=column(0, loss=3.0)
    )
    page = write_comparison(found, tmp_path, title="t", evaluation="e").read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert "one run" in cells
    assert not [cell for cell in cells if "inf" in cell]
    assert "base, not trained" in page
    facts = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert facts["methods"][0]["measures"]["short loss"]["low"] is None
    assert facts["base"]["pass key 4,096"]["right"] == 0
    lines = comparison_lines(found)
    assert lines[1].split()[:2] == ["base", "0/60"]
