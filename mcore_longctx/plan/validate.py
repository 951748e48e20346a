"""The formulas held against published measurements: `validation.yaml`, or any file of the same form (docs/plan.md, Validation)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mcore_longctx.errors import LayoutError
from mcore_longctx.plan.calibration import CALIBRATION, Calibration
from mcore_longctx.plan.measurements import Conf, Measurement, Use, read_measurements
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.models import step_flops
from mcore_longctx.plan.parts import PartRow, part_rows
from mcore_longctx.plan.step_time import step_time

__all__ = ["Comparison", "ErrorSummary", "ValidationReport", "ValidationRow", "compare", "render", "summary", "validate"]

_LONG = 512 << 10  # tokens
_OUTLIER = 1.25  # predicted over measured, or the other way round
_USES: tuple[tuple[Use, str], ...] = (("fit", "fitted"), ("held", "held out"), ("show", "shown"))


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured, seconds of a step or bytes of a GPU."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def is_outlier(self) -> bool:
        """More than a quarter off, either way."""
        return not 1 / _OUTLIER <= self.ratio <= _OUTLIER


@dataclass(frozen=True)
class ValidationRow:
    """One published training step."""

    id: str
    use: Use
    conf: Conf
    source: str
    time: Comparison | None
    memory: Comparison | None
    tflops: float | None  # measured, causal, no recompute counted, per GPU
    mfu: float | None
    seq_length: int = 0
    doubt: str = ""  # why it is in no mean


@dataclass(frozen=True)
class ErrorSummary:
    """Of the rows of one use: mean and worst absolute error and the mean error with its sign, as fractions."""

    rows: int
    mean: float
    bias: float
    worst: float
    worst_id: str


@dataclass(frozen=True)
class ValidationReport:
    """All rows of a file. `time` and `memory` are by use: fit, held, show; a use without rows is not there."""

    file: str
    rows: tuple[ValidationRow, ...]
    parts: tuple[PartRow, ...]
    time: dict[Use, ErrorSummary]
    memory: dict[Use, ErrorSummary]
    long_time: ErrorSummary | None = None  # held-out times at 512K tokens and more


def validate(path: Path | None = None, calibration: Calibration = CALIBRATION) -> ValidationReport:
    """Hold the formulas against a file of measurements, ours if none is named.

    Raises:
        ConfigError: as `read_measurements`.
    """
    measurements, file = read_measurements(path)
    rows = [_compared(measurement, calibration) for measurement in measurements]
    parts = part_rows(file.kernel_points, file.loss_points, file.source_keys, calibration)
    return ValidationReport(
        file="validation.yaml" if path is None else str(path),
        rows=tuple(rows),
        parts=parts,
        time=_by_use(rows, lambda row: row.time),
        memory=_by_use(rows, lambda row: row.memory),
        long_time=_by_use([row for row in rows if row.seq_length >= _LONG], lambda row: row.time).get("held"),
    )


def _compared(measurement: Measurement, calibration: Calibration) -> ValidationRow:
    try:
        return compare(measurement, calibration)
    except LayoutError as error:  # heads that an exchange cannot divide: no formula
        point = measurement.point
        doubt = measurement.doubt or error.what
        return ValidationRow(
            point.id, point.use, point.conf, measurement.source, None, None, None, None, measurement.setup.seq_length, doubt
        )


def compare(measurement: Measurement, calibration: Calibration = CALIBRATION) -> ValidationRow:
    """One measurement against the formulas."""
    point, setup = measurement.point, measurement.setup
    time = memory_ = tflops = None
    if measurement.seconds is not None:
        time = Comparison(step_time(setup, calibration).total, measurement.seconds)
        flops = point.gbs * sum(step_flops(setup.shape, setup.seq_length))
        tflops = flops / point.gpus / measurement.seconds / 1e12
    if measurement.bytes is not None:
        memory_ = Comparison(memory(setup, calibration).total, measurement.bytes)
    mfu = None if tflops is None else tflops * 1e12 / setup.gpu.peak_flops
    return ValidationRow(
        point.id,
        point.use,
        point.conf,
        measurement.source,
        time,
        memory_,
        tflops,
        mfu,
        setup.seq_length,
        measurement.doubt,
    )


def summary(rows: Sequence[tuple[str, Comparison]]) -> ErrorSummary:
    """Errors of some rows with their ids; at least one."""
    errors = [(comparison.ratio - 1, name) for name, comparison in rows]
    worst, worst_id = max(errors, key=lambda error: abs(error[0]))
    count = len(errors)
    return ErrorSummary(
        rows=count,
        mean=math.fsum(abs(error) for error, _ in errors) / count,
        bias=math.fsum(error for error, _ in errors) / count,
        worst=abs(worst),
        worst_id=worst_id,
    )


def _by_use(rows: Sequence[ValidationRow], quantity: Callable[[ValidationRow], Comparison | None]) -> dict[Use, ErrorSummary]:
    found: dict[Use, ErrorSummary] = {}
    for use, _ in _USES:
        some = [
            (row.id, comparison) for row in rows if row.use == use and not row.doubt and (comparison := quantity(row)) is not None
        ]
        if some:
            found[use] = summary(some)
    return found


def render(report: ValidationReport) -> str:
    """The report as text of at most 100 columns: fitted, held-out and shown rows apart, then the errors."""
    width = max((len(row.id) for row in report.rows), default=2)
    lines = [f"{report.file}: predicted against published", "* more than a quarter off, ~ a layout that was inferred"]
    head = f"{'':{width}}    step, s             causal         memory, GB"
    names = f"{'':{width}}  measured predicted ratio   TFLOP/s  MFU  measured predicted ratio"
    for use, title in _USES:
        rows = [row for row in report.rows if row.use == use]
        if rows:
            lines += ["", f"{title} ({use})", head, names, *(_line(row, width) for row in rows)]
    if report.parts:
        width = max(len(part.id) for part in report.parts)
        lines += ["", "attention kernels and losses by themselves", f"{'':{width}}  {'':34} measured predicted ratio"]
        lines += [_part_line(part, width) for part in report.parts]
    doubts = [f"! {row.id}: {row.doubt}" for row in report.rows if row.doubt]
    if doubts:
        lines += ["", "! shown, counted in no mean:"]
        lines += [part for doubt in doubts for part in textwrap.wrap(doubt, 100, subsequent_indent="    ")]
    lines += ["", "mean absolute error (mean with its sign; worst)"]
    for name, errors in (("time", report.time), ("memory", report.memory)):
        lines += [_error_line(name, title, errors[use]) for use, title in _USES if use in errors]
    if report.long_time is not None:
        lines.append(_error_line("time", "512K up", report.long_time))
    return "\n".join(line.rstrip() for line in lines)


def _line(row: ValidationRow, width: int) -> str:
    time, memory_ = row.time, row.memory
    seconds = partial(_numbers, time, 1.0)
    speed = f"{row.tflops:9.0f} {row.mfu:4.0%}" if row.tflops is not None and row.mfu is not None else " " * 14
    guess = "!" if row.doubt else "~" if row.conf == "inferred" else " "
    return f"{row.id:{width}}{guess} {seconds()} {speed}  {_numbers(memory_, 1e9)}"


def _numbers(comparison: Comparison | None, unit: float) -> str:
    if comparison is None:
        return " " * 25
    mark = "*" if comparison.is_outlier else " "
    return f"{comparison.measured / unit:8.1f} {comparison.predicted / unit:9.1f} {comparison.ratio:5.2f}{mark}"


def _part_line(part: PartRow, width: int) -> str:
    if part.predicted is None:
        return f"{part.id:{width}}  {part.what:34} {part.measured:8.4g}         -"
    ratio = part.predicted / part.measured
    mark = "" if 1 / _OUTLIER <= ratio <= _OUTLIER else "*"
    return f"{part.id:{width}}  {part.what:34} {part.measured:8.4g} {part.predicted:9.4g} {ratio:5.2f}{mark}"


def _error_line(name: str, title: str, error: ErrorSummary) -> str:
    return f"  {name:6} {title:8} {error.mean:6.1%} over {error.rows} rows  ({error.bias:+.1%}; {error.worst:.0%} in {error.worst_id})"
