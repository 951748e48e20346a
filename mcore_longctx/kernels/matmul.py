"""Matrix products whose result is wider than their operands: bf16 in, float32 out.

    operands        result      device                 how
    same dtype      same        any                    one GEMM into the result
    bf16, fp16      float32     CUDA, torch >= 2.8     tensor-core GEMM that sums and writes float32 (`out_dtype`)
    bf16, fp16      float32     CUDA, older torch      tensor-core GEMM, its result rounded once to the operands' dtype
    bf16, fp16      float32     CPU                    operands widened, one float32 GEMM (products of bf16 are exact in float32)

A float32 GEMM of widened operands would be right on CUDA too, and six times slower: it leaves the tensor cores. The CUDA rows follow
torch's sources (aten/src/ATen/native/cuda/Blas.cpp, `_mm_dtype_out_cuda` and `_addmm_dtype_out_cuda`); their test is marked `gpu`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["matmul_into"]

_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
_BLOCK_BYTES = 64 * 2**20


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> Tensor:
    """Put left @ right into `out`, or add it with `add`; sums are in the dtype of `out`, which is returned.

    Args:
        out: [m, n], of the operands' dtype or float32. Without `add` its old content is never read (it may be NaN).
        left: [m, k].
        right: [k, n], of the dtype of `left`.
        add: keep what is in `out`.
    """
    beta = 1 if add else 0
    if left.dtype is out.dtype:
        return torch.addmm(out, left, right, beta=beta, out=out)
    if out.device.type != "cuda":
        return torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)
    if not add:
        return _tensor_core_product(left, right, out)
    if _adds_to_float32(left.dtype):
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    block = max(1, _BLOCK_BYTES // (out.element_size() * out.size(1)))
    for part, rows in zip(out.split(block), left.split(block), strict=True):
        part.add_(_tensor_core_product(rows, right, torch.empty_like(part)))
    return out


def _tensor_core_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if _HAS_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(left, right))


@lru_cache
def _adds_to_float32(dtype: torch.dtype) -> bool:
    """Does this torch add a product of `dtype` to a float32 matrix? The first versions with `out_dtype` refuse that."""
    one = torch.ones(16, 16, dtype=dtype, device="cuda")
    total = torch.zeros(16, 16, device="cuda")
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
