"""Times that follow from the step time: how long a rank may wait, when SLURM must signal, how often to save, what a slot holds.

The unit of waiting u is one micro-batch, after which a signal is answered; under pipeline parallelism it is the step, because the trainer does
not stop while sends are under way.

    distributed timeout   max(30 min, 3 (u + save + 60 s), 2 step), whole minutes. A rank waits for the slowest one of the same unit, which may
                          be the first after a start (kernels are chosen and compiled then: 28 minutes against 12 were seen at 128K,
                          radixark/miles#3273), or one that writes or reads: 60 s. The first data-parallel collective of a step waits for
                          all micro-batches of the other replicas, in the first step at half the speed: twice the step. 30 minutes at
                          least: what gloo and cautious runs take.
    signal lead           1.25 (u + save + 60 s), up to the next whole minute. SLURM signals up to 60 s early or late (`--signal` of
                          sbatch's manual) and takes at most 65,535 s.
    save interval         Young/Daly: sqrt(2 x M) - x seconds between checkpoints, x the seconds that a save stops the training, M the mean
                          time between failures of the job. Every step where x is below 1 % of a step and a save ends before the next begins.
    start-up              180 s for processes, imports, communicators, and the checkpoint is read

Failures go with GPU-hours: 419 unexpected interruptions of Llama 3 405B in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4), one in
50,700 GPU-hours. A time limit or a preemption is no failure here: it is signalled, and what is lost is the unit under way.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.models import parameters
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.plan.terms import Term

__all__ = ["Intervals", "check_time_limit", "intervals", "parse_time_limit", "steps_per_slot"]

GPU_HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
WRITE_BANDWIDTH = 10e9  # bytes/s of the file system for one job, assumed: `tools/bench/save.py` measures a site's
_SHORTEST_TIMEOUT = 30 * 60
_LONGEST_SIGNAL = 65_535  # of `sbatch --signal`
_STALL = 60  # seconds: of data or file system, and of SLURM's clock
_PROCESS_START = 180
_STEPS_OF_A_SLOT = 2  # at least: a slot that ends before its second step moves nothing forward but by luck


@dataclass(frozen=True)
class Intervals:
    """Each with its formula."""

    distributed_timeout: Term  # seconds, whole minutes
    signal_lead: Term  # seconds before the time limit at which SLURM sends USR1
    save_interval: Term  # steps between checkpoints (Young/Daly)
    save_seconds: Term  # to write one checkpoint
    start_up: Term  # seconds from the start of a job to its first step
    checkpoint_bytes: Term


def intervals(setup: Setup, time: StepTime, memory: Memory, *, asynchronous: bool) -> Intervals:
    """Derive them for one setup; `asynchronous`: saves are written while the training goes on."""
    size, save = checkpoint_bytes(setup), _save_seconds(setup)
    unit, unit_name = _unit(setup, time)
    waited = unit + save.value + _STALL
    timeout = max(float(_SHORTEST_TIMEOUT), 60.0 * math.ceil(max(3 * waited, 2 * time.total) / 60))
    lead = 60.0 * math.ceil(1.25 * waited / 60)
    too_early = lead > _LONGEST_SIGNAL
    numbers = f"({unit:,.0f} + {save.value:,.0f} + {_STALL})"
    return Intervals(
        distributed_timeout=Term(
            "distributed timeout",
            timeout,
            f"max({_SHORTEST_TIMEOUT}, 3 ({unit_name} + save + {_STALL}), 2 step), whole minutes",
            f"max({_SHORTEST_TIMEOUT:,}, 3 x {numbers}, 2 x {time.total:,.0f})",
            "of NCCL and gloo; a hang is found much sooner, by heartbeats",
        ),
        signal_lead=Term(
            "signal lead",
            float(min(lead, _LONGEST_SIGNAL)),
            f"1.25 ({unit_name} + save + {_STALL}), whole minutes",
            f"1.25 x {numbers}",
            f"{lead:,.0f} s would be needed, SLURM takes {_LONGEST_SIGNAL:,}"
            if too_early
            else "SLURM sends USR1 so long before the time limit",
        ),
        save_interval=_save_interval(setup, time, save, asynchronous=asynchronous),
        save_seconds=save,
        start_up=Term(
            "start-up",
            _PROCESS_START + size.value / WRITE_BANDWIDTH,
            f"{_PROCESS_START} + checkpoint / file system",
            f"{_PROCESS_START} + {size.value:.3g} / {WRITE_BANDWIDTH:.3g}",
            "processes, imports, communicators; the checkpoint is read",
        ),
        checkpoint_bytes=size,
    )


def checkpoint_bytes(setup: Setup) -> Term:
    """Weights in their dtype, and the optimizer's float32 weights and two moments."""
    count, e = parameters(setup.shape), setup.bytes_per_element
    return Term(
        "checkpoint", (e + 12.0) * count, "(e + 12) P", f"({e} + 12) x {count:,}", "weights, float32 weights, two moments"
    )


def parse_time_limit(text: str) -> int:
    """Seconds of a time limit as sbatch takes it.

    >>> parse_time_limit("30"), parse_time_limit("4:00:00"), parse_time_limit("1-00:00:00"), parse_time_limit("1-12")
    (1800, 14400, 86400, 129600)

    Raises:
        ValueError: not one of SLURM's forms, a minute or second above 59, an hour above 23 beside days, no time at all, or no limit: 0,
            UNLIMITED and INFINITE.
    """
    match = _TIME_LIMIT.fullmatch(text.strip())
    fix = "write minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"
    if match is None:
        unlimited = text.strip().upper() in ("UNLIMITED", "INFINITE")
        reason = "no limit: the job would not be told to stop" if unlimited else "no time limit of SLURM"
        raise ValueError(f"{text!r} is {reason}; {fix}")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        hours, minutes, seconds = first or 0, second or 0, third or 0
        if hours > 23:
            raise ValueError(f"{text!r} has {hours} hours beside days; {fix}")
    elif third is not None:
        hours, minutes, seconds = first or 0, second or 0, third
    else:
        hours, minutes, seconds = 0, first or 0, second or 0
        if minutes > 59:  # MM or MM:SS may have any number of minutes
            hours, minutes = divmod(minutes, 60)
    if minutes > 59 or seconds > 59:
        raise ValueError(f"{text!r} has minutes or seconds above 59; {fix}")
    total = (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{text!r} is no time: SLURM takes 0 as no limit at all; {fix}")
    return total


_TIME_LIMIT = re.compile(r"(?:([0-9]{1,5})-)?([0-9]{1,7})(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?")


def steps_per_slot(time_limit_seconds: float, time: StepTime, derived: Intervals) -> int:
    """Whole steps between the start-up and the signal of a job of this time limit."""
    left = time_limit_seconds - derived.start_up.value - derived.signal_lead.value
    return max(0, math.floor(left / time.total))


def check_time_limit(time_limit: str, time: StepTime, derived: Intervals, *, where: object = None) -> int:
    """Steps that a job of this time limit does, at least two.

    Raises:
        ConfigError: not a time limit, one that holds less than start-up, two steps and the lead, or a unit of work so long that SLURM
            cannot signal early enough.
    """
    try:
        seconds = parse_time_limit(time_limit)
    except ValueError as error:
        raise ConfigError(f"time_limit {error}", where=where) from None
    lead, start, step = derived.signal_lead.value, derived.start_up.value, time.total
    if lead >= _LONGEST_SIGNAL:
        raise ConfigError(
            f"SLURM signals at most {_LONGEST_SIGNAL:,} s before the time limit, and to stop takes longer: {derived.signal_lead.note}",
            where=where,
            fix="use more GPUs, or smaller micro-batches",
        )
    steps = steps_per_slot(seconds, time, derived)
    if steps < _STEPS_OF_A_SLOT:
        needed = start + _STEPS_OF_A_SLOT * step + lead
        raise ConfigError(
            f"time_limit {time_limit} ({seconds:,} s) holds {steps} {'step' if steps == 1 else 'steps'}: start-up {start:,.0f} s + two steps of"
            f" {step:,.0f} s + signal lead {lead:,.0f} s = {needed:,.0f} s",
            where=where,
            fix=f"use {_as_time_limit(needed)} or more, or more GPUs",
        )
    return steps


def _as_time_limit(seconds: float) -> str:
    """Up to the next ten minutes, as sbatch takes it."""
    minutes = 10 * math.ceil(seconds / 600)
    days, hours = divmod(minutes // 60, 24)
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes % 60:02d}:00"


def _unit(setup: Setup, time: StepTime) -> tuple[float, str]:
    """What is finished before a signal is answered."""
    if setup.parallel.pipeline_model_parallel_size > 1:
        return time.total, "step"
    return time.micro_batch, "micro-batch"


def _save_seconds(setup: Setup) -> Term:
    size = checkpoint_bytes(setup).value
    return Term(
        "save",
        size / WRITE_BANDWIDTH,
        "checkpoint / file system",
        f"{size:.3g} / {WRITE_BANDWIDTH:.3g}",
        "10 GB/s for a job are assumed",
    )


def _save_interval(setup: Setup, time: StepTime, save: Term, *, asynchronous: bool) -> Term:
    """Young/Daly over what a save stops: all of it, or the copy to the host."""
    gpus = setup.parallel.world_size
    between = GPU_HOURS_PER_FAILURE * 3600 / gpus
    stops = checkpoint_bytes(setup).value / gpus / setup.gpu.pcie_bandwidth if asynchronous else save.value
    is_free = asynchronous and stops < 0.01 * time.total and save.value < time.total
    seconds = max(0.0, math.sqrt(2 * stops * between) - stops)
    return Term(
        "save interval",
        1.0 if is_free else float(max(1, math.floor(seconds / time.total))),
        "1: x < 1 % of a step" if is_free else "(sqrt(2 x M) - x) / step",
        f"x = {stops:.3g} s, M = {between / 3600:,.0f} h, step = {time.total:,.0f} s",
        f"steps; x is {'the copy to the host' if asynchronous else 'the whole save'}, M {GPU_HOURS_PER_FAILURE:,.0f} GPU-hours over {gpus:,} GPUs",
    )
