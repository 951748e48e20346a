"""Timeouts, leads and save intervals against worked numbers, and SLURM's time limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.intervals import Intervals, check_time_limit, intervals, parse_time_limit, steps_per_slot
from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.models import known_models
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.recipe.schema import Parallel

NOTHING = Memory((), 0.0, (), 0.0)


def setup(gpus: int = 256, **parallel: int) -> Setup:
    layout = Parallel(tensor_model_parallel_size=8, sequence_parallel=True, context_parallel_size=gpus // 8, **parallel)
    return Setup(
        shape=known_models()["llama-3.1-8b"], gpu=find_gpu("h100"), seq_length=2**22, global_batch_size=2, parallel=layout
    )


def times(micro_batch: float, total: float | None = None) -> StepTime:
    return StepTime((), micro_batch if total is None else total, micro_batch, 0.0, 0.0, True, 0.0, 0.0)


def derived(
    gpus: int, micro_batch: float, total: float | None = None, *, asynchronous: bool = False, **parallel: int
) -> Intervals:
    return intervals(setup(gpus, **parallel), times(micro_batch, total), NOTHING, asynchronous=asynchronous)


def test_4m_tokens_on_256_gpus() -> None:
    """Worked by hand: a micro-batch of 340 s; 8.03e9 parameters x 14 B at 10 GB/s are 11 s: 1.25 (340 + 11 + 60) = 514 s."""
    found = derived(256, 340.0)
    assert found.checkpoint_bytes.value == pytest.approx(112.4e9, rel=0.001)
    assert found.save_seconds.value == pytest.approx(11.2, rel=0.01)
    assert found.signal_lead.value == 540  # 514 s, and SLURM counts minutes
    assert 1200 <= found.distributed_timeout.value <= 1800


def test_4m_tokens_on_16_gpus() -> None:
    """A micro-batch of 2,550 s: 1.25 (2550 + 11 + 60) = 3276 s; three times the sum is 131.1 minutes."""
    found = derived(16, 2550.0)
    assert found.signal_lead.value == 3300
    assert found.distributed_timeout.value == 132 * 60


def test_1m_tokens_on_8_gpus_wait_for_two_steps_of_eight_micro_batches() -> None:
    """A replica that has done its eight micro-batches of 266 s waits in the data-parallel collective: 2 x 2,129 s are 71 minutes."""
    assert derived(8, 266.0, 2129.0).distributed_timeout.value == 71 * 60


@given(micro_batch=st.floats(0.01, 1e4), micro_batches=st.integers(1, 64))
def test_no_rank_times_out_within_two_steps(micro_batch: float, micro_batches: int) -> None:
    found = derived(64, micro_batch, micro_batch * micro_batches)
    assert found.distributed_timeout.value >= 2 * micro_batch * micro_batches
    assert found.distributed_timeout.value % 60 == 0


def test_a_pipeline_answers_a_signal_at_the_end_of_the_step() -> None:
    assert derived(256, 100.0, 900.0).signal_lead.value == 240
    assert derived(256, 100.0, 900.0, pipeline_model_parallel_size=2).signal_lead.value > 1.25 * 900


def test_failures_of_256_gpus_are_198_hours_apart_and_the_interval_is_the_root() -> None:
    """Llama 3: 54 days of 16,384 GPUs and 419 failures. A save of 11.24 s: sqrt(2 x 11.24 x 712,700) - 11.24 = 3,992 s."""
    found = derived(256, 260.0)
    assert "M = 198 h" in found.save_interval.numbers
    hours = 54 * 24 * 16384 / 419 / 256
    by_hand = math.sqrt(2 * found.save_seconds.value * hours * 3600) - found.save_seconds.value
    assert found.save_interval.value == math.floor(by_hand / 260) == 15


def test_an_asynchronous_save_is_free_at_every_step_of_minutes() -> None:
    assert derived(256, 342.0, asynchronous=True).save_interval.value == 1
    assert derived(256, 342.0).save_interval.value > 1
    # 8 s to write, 3 s a step: the next save would come before the last one is written
    assert derived(256, 3.0, asynchronous=True).save_interval.value > 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("90", 5400),
        ("30:15", 1815),
        ("120:00", 7200),
        ("4:00:00", 14400),
        ("04:00:00", 14400),
        ("36:00:00", 129600),
        ("1-00:00:00", 86400),
        ("1-12", 129600),
        ("2-06:30", 196200),
        ("0-00:10", 600),
    ],
)
def test_slurm_s_forms_of_a_time_limit(text: str, seconds: int) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "00:00:00",
        "0-0",
        "4h",
        "4 h",
        "-1",
        "1.5",
        "4:60:00",
        "4:00:60",
        "10:61",
        "1-24",
        "1-00:60",
        "1:2:3:4",
        "1-1-1",
        "٣٠",
        "UNLIMITED",
        "INFINITE",
        "a",
        "1-",
        "4:",
        ":30",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"time limit|no limit|no time|above 59|beside days"):
        parse_time_limit(text)


@given(st.integers(1, 10**7))
def test_days_hours_minutes_and_seconds_of_any_time_come_back(seconds: int) -> None:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    assert parse_time_limit(f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}") == seconds
    assert parse_time_limit(f"{24 * days + hours}:{minutes:02d}:{rest:02d}") == seconds
    assert parse_time_limit(f"{(24 * days + hours) * 60 + minutes}:{rest:02d}") == seconds


def slot(step: float, lead: float, start: float) -> tuple[StepTime, Intervals]:
    found = derived(256, step)
    return times(step), replace(
        found, signal_lead=replace(found.signal_lead, value=lead), start_up=replace(found.start_up, value=start)
    )


def test_steps_of_a_slot_are_those_between_start_up_and_signal() -> None:
    arguments: Any = slot(340.0, 540.0, 200.0)
    assert steps_per_slot(14400, *arguments) == (14400 - 540 - 200) // 340 == 40
    assert steps_per_slot(100, *arguments) == 0
    assert check_time_limit("4:00:00", *arguments) == 40


def test_a_time_limit_of_less_than_two_steps_and_the_lead_is_refused_with_the_sum() -> None:
    arguments: Any = slot(1200.0, 1620.0, 200.0)
    assert check_time_limit("1:10:20", *arguments) == 2  # 200 + 2 x 1200 + 1620 = 4220 s exactly
    with pytest.raises(ConfigError) as error:
        check_time_limit("1:10:19", *arguments, where="recipe.yaml:7")
    assert str(error.value) == (
        "recipe.yaml:7: time_limit 1:10:19 (4,219 s) holds 1 step: start-up 200 s + two steps of 1,200 s + signal lead 1,620 s = 4,220 s;"
        " use 01:20:00 or more, or more GPUs"
    )
    with pytest.raises(ConfigError, match="'4h' is no time limit of SLURM"):
        check_time_limit("4h", *arguments)


def test_work_that_slurm_cannot_signal_for_is_refused() -> None:
    found = derived(8, 60_000.0)
    assert found.signal_lead.value == 65_535
    assert "SLURM takes 65,535" in found.signal_lead.note
    with pytest.raises(ConfigError, match="65,535"):
        check_time_limit("30-00:00:00", times(60_000.0), found)
