"""Carries out a plan in the plainest way: one process, whole tensors in memory, ml_dtypes for numbers. The oracle of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mcore_longctx.convert.copying.execute import Execution, Written
from mcore_longctx.convert.plans.plan import Blend, Fill, Plan
from mcore_longctx.convert.views import TensorRows

NUMPY = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


def reference_execute(plan: Plan, out: Path, finish: Callable[[Path, Written], None], how: Execution) -> bool:
    """As `execute`, without journal, checks or speed. Every byte is written once: a second write of one fails."""
    out.mkdir(parents=True)
    for number, (file, data) in enumerate(zip(plan.files, contents(plan), strict=True)):
        assert file == plan.files[number]
        (out / file.name).write_bytes(data)
    finish(out, Written((), {}))
    return True


def contents(plan: Plan) -> list[bytes]:
    """The bytes of each file of the plan."""
    files = [bytearray(file.bytes) for file in plan.files]
    taken = [np.zeros(file.bytes, bool) for file in plan.files]

    def put(file: int, offset: int, data: bytes) -> None:
        region = slice(offset, offset + len(data))
        assert offset >= 0
        assert region.stop <= len(files[file])
        assert not taken[file][region].any(), "written twice"
        taken[file][region] = True
        files[file][region] = data

    for file, offset, data in plan.small():
        put(file, offset, data)
    for fill in plan.fills:
        numbers = box(fill)
        if fill.scales is not None:
            wide = numbers.astype(np.float32)
            scales = np.maximum(np.abs(wide).max(axis=1) / np.float32(448), np.float32(2.0**-126))
            numbers = wide / scales[:, None]
            put(fill.scales.file, fill.scales.offset, scales.tobytes())
        put(fill.file, fill.offset, numbers.astype(NUMPY[fill.dtype.name]).tobytes())
    return [bytes(data) for data in files]


def box(fill: Fill) -> np.ndarray[Any, Any]:
    """The numbers of a fill [rows, columns], as its source has them; a blend is float32."""
    rows, columns = slice(fill.row, fill.row + fill.rows), slice(fill.column, fill.column + fill.columns)
    if isinstance(fill.source, Blend):
        total = np.zeros((fill.rows, fill.columns), np.float32)
        for tensor, weight in fill.source.parts:
            total += np.float32(weight) * matrix(tensor)[rows, columns].astype(np.float32)
        return total
    return matrix(fill.source)[rows, columns]


def matrix(tensor: TensorRows) -> np.ndarray[Any, Any]:
    """A whole tensor [rows, columns]."""
    return np.frombuffer(tensor.read(0, tensor.rows), NUMPY[tensor.dtype.name]).reshape(tensor.rows, tensor.columns)
