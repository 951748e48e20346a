"""Element types as torch, safetensors and numpy name them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_SAFETENSORS", "BY_TORCH", "WEIGHT_DTYPES", "DType"]


@dataclass(frozen=True)
class DType:
    """One element type: `bfloat16` in torch, `BF16` in safetensors, `BFloat16Storage` in a torch.save archive."""

    name: str
    safetensors: str
    storage: str | None  # None: torch has no storage class of this type
    itemsize: int


_ALL = (
    DType("float64", "F64", "DoubleStorage", 8),
    DType("float32", "F32", "FloatStorage", 4),
    DType("float16", "F16", "HalfStorage", 2),
    DType("bfloat16", "BF16", "BFloat16Storage", 2),
    DType("int64", "I64", "LongStorage", 8),
    DType("int32", "I32", "IntStorage", 4),
    DType("int16", "I16", "ShortStorage", 2),
    DType("int8", "I8", "CharStorage", 1),
    DType("uint8", "U8", "ByteStorage", 1),
    DType("bool", "BOOL", "BoolStorage", 1),
    DType("float8_e4m3fn", "F8_E4M3", None, 1),
    DType("float8_e5m2", "F8_E5M2", None, 1),
)
BY_TORCH = {dtype.name: dtype for dtype in _ALL}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _ALL}
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")  # what a dense, unquantised model may hold
