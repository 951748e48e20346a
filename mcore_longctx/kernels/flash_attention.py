"""Adapters of Dao-AILab's flash-attention 3 (Hopper) and 4 (Blackwell), used where they are installed.

Their differentiable functions hide the log-sum-exp's gradient rule, so the functions under them are called. Both take and give
[b, s, n, d]. Written from their sources at commit 0251105a (hopper/flash_attn_interface.py and flash_attn/cute/interface.py) and,
where they differ, so that the signatures since 2025-08 fit as well; they have not run here. `choose_kernel` therefore checks them
against matrix products on the device before it uses them: released versions of flash-attention 4 gave zeros on some devices.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mcore_longctx.kernels.interface import Gradients, OutAndLse

__all__ = ["Flash3Kernel", "Flash4Kernel", "PackageKernel"]


class PackageKernel:
    """A kernel of a package that is not required."""

    module: str
    install: str

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the module can be found; it is not imported, which would start CUDA."""
        try:
            return importlib.util.find_spec(cls.module) is not None
        except (ImportError, ValueError):  # a parent package that is missing or broken
            return False

    @classmethod
    def functions(cls) -> Any:
        """The module."""
        return importlib.import_module(cls.module)


class Flash3Kernel(PackageKernel):
    """flash-attention 3 (`flash_attn_interface`, built from hopper/ of its repository)."""

    name = "flash3"
    module = "flash_attn_interface"
    install = "build it from the folder hopper/ of Dao-AILab/flash-attention"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        out, lse, *_ = self.functions()._flash_attn_forward(
            _rows_first(query), _rows_first(key), _rows_first(value), softmax_scale=scale, causal=causal
        )
        return out.transpose(1, 2), lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        tensors = [_rows_first(tensor) for tensor in (grad_out, query, key, value, out)]
        gradients = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors[1:4]]
        # by position: the last two names changed (causal, then is_causal); no packing: cu_seqlens, seqused and max_seqlen are None
        self.functions()._flash_attn_backward(*tensors, lse.contiguous(), *(None,) * 6, *gradients, scale, causal)
        grad_query, grad_key, grad_value = (gradient.transpose(1, 2) for gradient in gradients)
        return grad_query, grad_key, grad_value


class Flash4Kernel(PackageKernel):
    """flash-attention 4 (`flash_attn.cute`, package flash-attn-4)."""

    name = "flash4"
    module = "flash_attn.cute.interface"
    install = "pip install flash-attn-4"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> OutAndLse:
        """See `AttentionKernel`."""
        out, lse, *_ = self.functions()._flash_attn_fwd(
            _rows_first(query), _rows_first(key), _rows_first(value), softmax_scale=scale, causal=causal, return_lse=True
        )
        return out.transpose(1, 2), lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """See `AttentionKernel`."""
        gradients = self.functions()._flash_attn_bwd(
            *(_rows_first(tensor) for tensor in (query, key, value, out, grad_out)),
            lse.contiguous(),
            softmax_scale=scale,
            causal=causal,
        )
        grad_query, grad_key, grad_value = (gradient.transpose(1, 2) for gradient in gradients[:3])
        return grad_query, grad_key, grad_value


def _rows_first(tensor: Tensor) -> Tensor:
    """[b, n, s, d] -> [b, s, n, d] with dense heads, as both want it; a view where it is dense already."""
    rows_first = tensor.transpose(1, 2)
    return rows_first if rows_first.stride(-1) == 1 else rows_first.contiguous()
