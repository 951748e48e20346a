"""What the formulas take from measurements: few numbers, each a physical efficiency, fitted only on rows of `validation.yaml` marked fit.

`tools/fit_plan.py` finds the fitted ones again from those rows, and says how far each moves when one row is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CALIBRATION", "Calibration"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Shares are of the figure in `hardware.yaml`."""

    gemm_bf16: float = 0.623  # matrix products of linear layers over the bf16 peak (fitted)
    gemm_fp8: float = 0.982  # the same in FP8, still over the bf16 peak (fitted)
    memory: float = 0.80  # of the memory bandwidth, in elementwise work (assumed)
    ring_tokens: float = (
        900.0  # of a rank, at which the pieces of a ring cost twice their kernels: 0.90 at 8,192 (kernel points RFA)
    )
    nvlink: float = 0.80  # of large NCCL messages (assumed)
    network: float = 0.80  # of large NCCL messages (assumed)
    ring_traffic: float = 1.4  # transfer time of a ring step over that of its bytes alone (assumed)
    adam_cpu: float = 0.892e9  # parameters a second and node for Adam on the host (fitted)
    fixed_seconds: float = 0.15  # of a step: launches, clipping, logging (assumed)
    overlap: float = 0.5  # of the time beside it behind which the data-parallel exchange hides (assumed)
    hf_logit_bytes: float = (
        12.0  # of an entry of materialised logits in Hugging Face's loss: bf16, fp32, its gradient, and in bf16
    )
    context_bytes: float = 3.0e9  # CUDA context, cuBLAS, NCCL (assumed)
    fragmentation: float = 0.04  # of what is allocated, with expandable segments (assumed)


CALIBRATION = Calibration()
