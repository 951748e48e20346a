"""Fit the constants of `mcore_longctx/plan/calibration.py` and of `hardware.yaml` that are marked fitted, on the rows marked fit.

    python tools/fit_plan.py [FILE]

Least squares of log(predicted / measured step time), one constant after the other until nothing moves. Then, for each row, what the
constants are without it: a constant that moves much rests on that row alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mcore_longctx.plan.calibration import CALIBRATION
from mcore_longctx.plan.hardware import Gpu, KernelRate, find_gpu
from mcore_longctx.plan.measurements import Measurement, read_measurements
from mcore_longctx.plan.step_time import step_time

Constants = dict[str, float]

# kernels of older software: a share of a published kernel
KERNELS = {"cudnn24": ("h100", "cudnn"), "cudnn25b": ("b200", "sdpa")}
BOUNDS = {
    "gemm_bf16": (0.3, 0.9),
    "gemm_fp8": (0.4, 1.8),
    "adam_cpu": (2e8, 2e10),
    "sustained_500w": (0.5, 1.0),
    "cudnn24": (0.4, 1.3),
    "cudnn25b": (0.4, 1.3),
}
"""Where each constant is looked for."""


def fitted_now() -> Constants:
    """The constants as they stand in the package."""
    found = {name: getattr(CALIBRATION, name) for name in BOUNDS if hasattr(CALIBRATION, name)}
    found["sustained_500w"] = find_gpu("h100_500w").sustained
    for kernel, (gpu, base) in KERNELS.items():
        kernels = find_gpu(gpu).kernels
        found[kernel] = kernels[kernel].forward / kernels[base].forward
    return found


def log_ratio(measurement: Measurement, constants: Mapping[str, float]) -> float:
    """log(predicted / measured) of the step time with other constants."""
    assert measurement.seconds is not None
    calibration = replace(CALIBRATION, **{name: constants[name] for name in constants if hasattr(CALIBRATION, name)})
    setup = replace(measurement.setup, gpu=_gpu(measurement.setup.gpu, constants))
    return math.log(step_time(setup, calibration).total / measurement.seconds)


def fit(rows: Sequence[Measurement], start: Mapping[str, float]) -> Constants:
    """The constants with the least squares over `rows`; one that no row feels stays at its start."""
    constants = dict(start)

    def loss(name: str, value: float) -> float:
        return sum(log_ratio(row, {**constants, name: value}) ** 2 for row in rows)

    for _ in range(40):
        before = dict(constants)
        for name, (low, high) in BOUNDS.items():
            if loss(name, low) != loss(name, high):
                constants[name] = _golden(lambda value, name=name: loss(name, value), low, high)
        if all(abs(constants[name] / before[name] - 1) < 5e-4 for name in constants):
            break
    return constants


def _golden(function, low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(low), math.log(high)
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(math.exp(left)) <= function(math.exp(right)):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def _gpu(gpu: Gpu, constants: Mapping[str, float]) -> Gpu:
    kernels = dict(gpu.kernels)
    for kernel, (_, base) in KERNELS.items():
        if kernel in kernels:
            share = constants[kernel]
            kernels[kernel] = KernelRate(kernels[base].forward * share, kernels[base].backward * share)
    sustained = constants["sustained_500w"] if gpu.name == find_gpu("h100_500w").name else gpu.sustained
    return replace(gpu, kernels=kernels, sustained=sustained)


def main() -> None:
    """Print the constants, fitted and as they stand, and how they move without each row."""
    measurements, _ = read_measurements(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    rows = [m for m in measurements if m.point.use == "fit" and m.seconds is not None]
    now = fitted_now()
    best = fit(rows, now)
    print(f"{'':16}" + "".join(f"{name:>16}" for name in best))
    print(f"{'in the package':16}" + "".join(f"{now[name]:16.4g}" for name in best))
    print(f"{'fitted':16}" + "".join(f"{value:16.4g}" for value in best.values()))
    for row in rows:
        without = fit([other for other in rows if other is not row], now)
        error = math.exp(log_ratio(row, without)) - 1
        print(
            f"{'- ' + row.point.id:16}" + "".join(f"{without[name]:16.4g}" for name in best) + f"   predicts the row {error:+.1%}"
        )
    for row in rows:
        print(f"{row.point.id:16} {math.exp(log_ratio(row, best)):6.3f}")


if __name__ == "__main__":
    main()
