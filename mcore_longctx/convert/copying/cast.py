"""Numbers of one element type as another."""

from __future__ import annotations

from typing import Any

import numpy as np

from mcore_longctx.formats.dtypes import DType

__all__ = ["widen"]


def widen(data: bytes | bytearray, dtype: DType) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers in `data` (little-endian elements of one of WEIGHT_DTYPES) as float64, exactly."""
    if dtype.name == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, f"<f{dtype.itemsize}").astype(np.float64)
