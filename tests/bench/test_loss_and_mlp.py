"""Every contender of B1 and B2 that runs here computes the same thing, at sizes of a test."""

from __future__ import annotations

from typing import Any

import loss
import pytest
import tiled_mlp
from harness import Result

from mcore_longctx.model import destroy_process_groups


@pytest.mark.parametrize("name", ["ours", "ours, per token", "torch", "megatron-core"])
def test_losses_and_gradients_of_the_contenders_are_right(name: str) -> None:
    step = loss.Step(name, 16, 96, 600, 100)
    step.step()
    facts = step.facts()
    destroy_process_groups()
    assert facts.pop("gradient bytes") == 600 * 16 * 4
    assert max(facts.values()) < 1e-5, facts
    assert step.main_grad.any()


@pytest.mark.parametrize(
    ("name", "tile"), [("ours, whole", None), ("ours, tiles of 100", 100), ("full recompute", None), ("tape", None)]
)
def test_results_and_gradients_of_the_contenders_are_right(name: str, tile: int | None) -> None:
    step = tiled_mlp.Step(name, tile, 16, 40, 600)
    step.step()
    facts = step.facts()
    assert facts.pop("bytes of result and gradient") == 2 * 600 * 16 * 4
    assert max(facts.values()) < 1e-5, facts


def test_the_floors_run_and_the_tables_tell_ratios_and_failures() -> None:
    loss.Floor(16, 96, 600, 100).step()
    tiled_mlp.Floor(16, 40, 600, 100).step()
    errors: dict[str, Any] = {"loss": 1e-7, "dX": 2e-7, "dW": 3e-7, "out": 4e-7}
    found = {
        "floor": Result(seconds=[1.0], peak_bytes=0),
        "ours": Result(seconds=[2.0], peak_bytes=3 * 2**20, facts={"gradient bytes": 2**20, **errors}),
        "torch": Result(seconds=[4.0], peak_bytes=2**20, facts={"gradient bytes": 2**20, **errors}),
        "Liger": Result(error="out of memory"),
    }
    rows = loss.rows(found, 16, 96, 1024)
    assert rows[1] == ("96", "1K", "ours", "2", "0.50", "2.00", "2.0", "1.0e-07", "2.0e-07", "3.0e-07", "4.72e-06")
    assert rows[3] == ("96", "1K", "Liger", "out of memory")
    facts = {"bytes of result and gradient": 2**20, **errors}
    renamed = {
        "floor": found["floor"],
        "ours, whole": Result(seconds=[2.0], peak_bytes=3 * 2**20, facts=facts),
        "full recompute": Result(seconds=[4.0], peak_bytes=2**20, facts=facts),
    }
    rows = tiled_mlp.rows(renamed, 16, 40, 1024)
    assert rows[1][2:7] == ("2", "1.00", "0.50", "2.00", "2.0")
