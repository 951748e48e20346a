"""What the numbers rest on: bytes against cases counted by hand, the order of the rounds, and failures that are told."""

from __future__ import annotations

import os
import time

import harness
import pytest
import torch
from harness import Case, Result, Spread, compare, lengths, table
from live_bytes import LiveBytes


def test_live_bytes_counts_storages_while_something_holds_them() -> None:
    with LiveBytes() as live:
        first = torch.ones(1000)  # 4,000
        view = first[10:]
        second = first + 1  # 8,000
        del first
        third = second.double()  # 16,000: the view holds the first
        del second, view
        assert (live.now, live.peak) == (8000, 16000)
        third.add_(1)
        del third
    assert (live.now, live.peak_above_start) == (0, 16000)


def test_live_bytes_sees_what_autograd_keeps_and_frees() -> None:
    x, w = (torch.randn(100, 100, requires_grad=True) for _ in range(2))
    with LiveBytes([x, w, x.view(-1)]) as live:
        assert live.at_start == 80_000
        y = (x @ w).relu().sum()
        # relu keeps its result, and the product is freed
        assert live.now - live.at_start == 40_000 + 4
        y.backward()
        del y
        assert live.now - live.at_start == 80_000  # two gradients
        # result and gradient of relu, then the gradients of x and w while that of the product lives
        assert live.peak_above_start == 120_000 + 8


def test_live_bytes_does_not_count_weights_twice_through_their_views() -> None:
    weight = torch.randn(50, 50)
    with LiveBytes([weight]) as live:
        out = weight.t() @ weight
    assert live.peak_above_start == out.numel() * 4


class Sleeper:
    """Holds `megabytes` during a step and burns CPU for `seconds`."""

    def __init__(self, megabytes: int, seconds: float, log: str) -> None:
        self.megabytes, self.seconds, self.log = megabytes, seconds, log

    def step(self) -> None:
        held = torch.ones(self.megabytes * 2**18)
        ends = time.process_time() + self.seconds
        while time.process_time() < ends:
            held[0] += 1
        with open(self.log, "a") as file:  # noqa: PTH123
            file.write(f"{self.megabytes}\n")

    def facts(self) -> dict[str, object]:
        return {"process": os.getpid()}


def failing(reason: str) -> Sleeper:
    if reason == "dies":
        os._exit(3)
    raise ValueError("no such thing")


def test_cases_take_turns_in_processes_of_their_own(tmp_path) -> None:  # type: ignore[no-untyped-def]
    log = str(tmp_path / "order")
    cases = {"small": Case(Sleeper, (40, 0.05, log)), "large": Case(Sleeper, (80, 0.2, log))}
    cases |= {"dies": Case(failing, ("dies",)), "raises": Case(failing, ("raises",))}
    results = compare(cases, rounds=3, say=False)
    assert (tmp_path / "order").read_text().split() == ["40", "80"] * 3
    small, large = results["small"], results["large"]
    assert (small.peak_bytes, large.peak_bytes) == (40 * 2**20, 80 * 2**20)
    assert large.resident_bytes - small.resident_bytes == pytest.approx(40 * 2**20, rel=0.1)  # type: ignore[operator]
    assert len(small.seconds) == 2  # the round that counted bytes is not timed
    assert 0.04 < small.spread.median < large.spread.median < 1  # type: ignore[union-attr]
    assert small.facts["process"] != large.facts["process"] != os.getpid()
    assert results["dies"].error == "the process died (exit code 3)"
    assert results["raises"].error == "ValueError: no such thing"


def test_a_case_that_takes_too_long_is_ended() -> None:
    result = harness.measure(Case(Sleeper, (1, 60.0, "/dev/null")), count_bytes=False, deadline=2)
    assert result.error == "no result after 2 s"


def test_spread_is_the_middle_of_the_samples() -> None:
    assert Spread.of([3, 1, 2]) == Spread(1, 2, 3, 3)
    assert Spread.of(list(range(20))) == Spread(2, 9.5, 17, 20)
    assert str(Spread.of([1.23456])) == "1.23"


def test_lengths_are_binary() -> None:
    assert lengths("4K, 1m,300") == [4096, 2**20, 300]
    assert harness.short(65536) == "64K"
    with pytest.raises(SystemExit, match="no list of lengths"):
        lengths("4KB")


def test_tables_say_what_is_missing() -> None:
    assert table(("a", "b"), [(1, None), (2,)]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | not measured |",
        "| 2 | not measured |",
    ]


def test_an_empty_result_has_no_spread() -> None:
    assert Result().spread is None
