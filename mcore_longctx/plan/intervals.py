"""Times that follow from the step time: how long a rank may wait, when SLURM must signal, how often to save.

Sources: the interval of Young (1974), sqrt(2 x save time x MTBF); one unexpected failure in 1 / 1.97e-5 GPU-hours from the 419
interruptions of 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783, section 3.3.4).
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

_FAILURES_PER_GPU_HOUR = 419 / (54 * 24 * 16_384)
_BYTES_PER_PARAMETER = 14  # bf16 weights, and fp32 copies of them and of both moments
_NODE_BANDWIDTH, _FILE_SYSTEM_BANDWIDTH = 2e9, 10e9  # bytes/s that a node writes, and that a shared file system takes [assumed]
_START_UP = 300.0  # s: container, imports, communicators, kernels that are chosen or compiled in the first step [assumed]
_DATA_STALL = 60.0  # s that a read of the next batch may take beyond the usual [assumed]
_LEAST_TIMEOUT = 30 * 60.0
_MOST_LOST = 30 * 60.0  # s of work that a preemption without warning may cost
_SIGNAL_MOST = 65_535  # of sbatch --signal
_MARGIN = 60.0  # s: SLURM looks at time limits about every 30 s


@dataclass(frozen=True)
class Intervals:
    """Each with its formula."""

    distributed_timeout: Term  # seconds, whole minutes
    signal_lead: Term  # seconds before the time limit at which SLURM sends USR1, whole minutes
    save_interval: Term  # steps between checkpoints
    save_seconds: Term  # to write one checkpoint
    start_up: Term  # seconds from the start of a job to the end of its start: its first step costs the usual time after it
    checkpoint_bytes: Term


def intervals(setup: Setup, time: StepTime, memory: Memory, *, asynchronous: bool) -> Intervals:
    """Derive them for one setup.

    Args:
        setup: the way a step is run.
        time: its step time.
        memory: its memory; reserved for policies whose checkpoint is larger than weights and Adam.
        asynchronous: checkpoints are written beside the training, which then waits for a copy to the host only.
    """
    del memory
    gpus = setup.parallel.world_size
    nodes = -(-gpus // setup.gpu.gpus_per_node)
    count = parameters(setup.shape)
    size = _BYTES_PER_PARAMETER * count
    bandwidth = min(nodes * _NODE_BANDWIDTH, _FILE_SYSTEM_BANDWIDTH)
    save = size / bandwidth
    unit = time.micro_batch if setup.parallel.pipeline_model_parallel_size == 1 else time.total
    unit_name = "micro-batch" if setup.parallel.pipeline_model_parallel_size == 1 else "step (a pipeline is not left inside one)"
    timeout = _whole_minutes(max(_LEAST_TIMEOUT, 3 * (unit + save + _DATA_STALL)))
    lead = _whole_minutes(1.25 * (unit + save + _MARGIN))
    return Intervals(
        distributed_timeout=Term(
            "distributed timeout",
            timeout,
            "max(30 min, 3 (micro-batch + save + data stall)), whole minutes",
            f"max(1,800, 3 ({unit:,.0f} + {save:,.0f} + {_DATA_STALL:.0f})) s",
            f"a collective waits for the slowest rank of one {unit_name}",
        ),
        signal_lead=Term(
            "signal lead",
            lead,
            "1.25 (micro-batch + save + 60 s), whole minutes",
            f"1.25 ({unit:,.0f} + {save:,.0f} + 60) s",
            f"a signal is answered after the running {unit_name}"
            + ("; beyond the 65,535 s of sbatch --signal: save every step" if lead > _SIGNAL_MOST else ""),
        ),
        save_interval=_save_interval(setup, time, size, save, asynchronous=asynchronous),
        save_seconds=Term(
            "time to write a checkpoint",
            save,
            "checkpoint / min(2 GB/s x nodes, 10 GB/s)",
            f"{size / 1e9:,.1f} GB / {bandwidth / 1e9:g} GB/s",
            "bandwidths are assumed: measure your file system",
        ),
        start_up=Term(
            "start of a job",
            _START_UP + 2 * save,
            "300 s + 2 x checkpoint read",
            f"300 + 2 x {save:,.0f} s",
            "container, imports, communicators, choice of kernels [assumed]; the checkpoint is hashed, then loaded",
        ),
        checkpoint_bytes=Term(
            "checkpoint",
            size,
            "14 P",
            f"14 x {count / 1e9:.3f}e9 bytes",
            "bf16 weights, fp32 copies of weights and of both moments",
        ),
    )


def _save_interval(setup: Setup, time: StepTime, size: float, save: float, *, asynchronous: bool) -> Term:
    gpus = setup.parallel.world_size
    mtbf = 3600 / (_FAILURES_PER_GPU_HOUR * gpus)
    blocked = size / gpus / setup.gpu.pcie_bandwidth if asynchronous else save
    young = math.sqrt(2 * blocked * mtbf)
    seconds = min(young, _MOST_LOST)
    steps = max(1, math.floor(seconds / time.total))
    if asynchronous:  # the next save begins when the last one is on the disk
        steps = max(steps, math.ceil(save / time.total))
    return Term(
        "save interval",
        steps,
        "min(sqrt(2 x blocked x MTBF), 30 min) / step, at least 1",
        f"min(sqrt(2 x {blocked:,.2f} s x {mtbf / 3600:,.0f} h) = {young / 60:,.0f} min, 30 min) / {time.total:,.0f} s",
        "Young's interval; a preemption without warning loses at most 30 minutes or one step",
    )


def _whole_minutes(seconds: float) -> float:
    return 60.0 * math.ceil(seconds / 60 - 1e-9)


def steps_per_slot(time_limit: float, times: Intervals, step_seconds: float) -> int:
    """Steps that one job of `time_limit` seconds finishes before it is asked to stop."""
    return max(0, math.floor((time_limit - times.start_up.value - times.signal_lead.value) / step_seconds))


def check_time_limit(time_limit: float, times: Intervals, step_seconds: float, *, where: object = None) -> int:
    """Steps per slot; a slot that holds less than two is refused.

    Raises:
        ConfigError: the time limit is below start-up + 2 steps + lead, or the lead is beyond what sbatch takes.
    """
    lead, start_up = times.signal_lead.value, times.start_up.value
    if lead > _SIGNAL_MOST:
        raise ConfigError(
            f"a signal would have to come {lead:,.0f} s before the time limit, sbatch --signal takes at most {_SIGNAL_MOST:,}",
            where=where,
            fix="use more GPUs: a micro-batch takes too long to be stopped in time",
        )
    needed = start_up + 2 * step_seconds + lead
    if time_limit < needed:
        raise ConfigError(
            f"{time_limit / 60:,.0f} min hold less than two steps: start {start_up / 60:,.0f} min + 2 steps of {step_seconds / 60:,.1f} min"
            f" + signal lead {lead / 60:,.0f} min = {needed / 60:,.0f} min",
            where=where,
            fix=f"give at least {format_time_limit(needed)}, or use more GPUs",
        )
    return steps_per_slot(time_limit, times, step_seconds)


_DAYS = re.compile(r"(\d+)-(\d{1,2})(?::(\d{1,2})(?::(\d{1,2}))?)?")
_CLOCK = re.compile(r"(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")


def parse_time_limit(text: str, *, where: object = None) -> int:
    """Seconds of a SLURM time limit: `30` and `30:00` are minutes, `4:00:00` hours, `1-12`, `1-12:30` and `1-12:30:00` days and hours.

    Raises:
        ConfigError: nothing of the kind, or 0, which SLURM takes for no limit.
    """
    text = text.strip()
    days, clock = _DAYS.fullmatch(text), _CLOCK.fullmatch(text)
    seconds = 0
    if days is not None:
        day, hour, minute, second = (int(part or 0) for part in days.groups())
        seconds = ((day * 24 + hour) * 60 + minute) * 60 + second
    elif clock is not None:
        parts = [int(part) for part in clock.groups() if part is not None]
        seconds = (
            parts[0] * 3600 + parts[1] * 60 + parts[2] if len(parts) == 3 else parts[0] * 60 + (parts[1] if parts[1:] else 0)
        )
    if seconds == 0:
        raise ConfigError(
            f"{text!r} is no time limit", where=where, fix="write it as SLURM does: minutes, 4:00:00 (quoted), or 1-12:00:00"
        )
    return seconds


def format_time_limit(seconds: float) -> str:
    """As sbatch takes it, rounded up to a minute: `04:00:00`, `1-12:00:00`."""
    minutes = math.ceil(seconds / 60)
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock
