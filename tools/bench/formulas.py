"""What a training step must cost: FLOPs, bytes kept and the time that a kernel's own rate allows. Plain arithmetic, no torch.

Symbols: s tokens of one sequence, h hidden size, f feed-forward size, q attention heads, k key/value heads, d head dimension,
L layers, V vocabulary, e bytes of an element (2 for bf16, 4 for fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.families import ModelShape

__all__ = [
    "GEMM_SHARE",
    "MFU_FORMULA",
    "PEAK_FLOPS",
    "KernelRate",
    "StepFlops",
    "attended_seconds",
    "kept_bytes",
    "peak_bytes",
    "step_flops",
    "working_elements",
]

MFU_FORMULA = (
    "MFU = (6 L P s + 6 V h s + 6 s^2 q d L) / (seconds x peak), P = h d (2 q + 2 k) + 3 h f: "
    "causal half counted, nothing that is recomputed"
)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16, without sparsity, by a word of the device's name."""

GEMM_SHARE = 0.60
"""Share of the peak that linear layers reach with everything between them (fitted on published runs)."""

LSE_BYTES = 4  # float32 for every dtype but float64


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward of one sequence, nothing recomputed."""

    linear: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        """All three."""
        return self.linear + self.head + self.attention


@dataclass(frozen=True)
class KernelRate:
    """An attention kernel measured alone: FLOP/s of its causal forward (2 s^2 q d) and of its backward (2.5 times that)."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """FLOP/s of one forward and one backward, where the backward counts 2.5."""
        return 3.5 / (1 / self.forward + 2.5 / self.backward)


def layer_weights(shape: ModelShape) -> int:
    """Elements of the matrices of one layer."""
    attention = shape.hidden_size * shape.kv_channels * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def step_flops(shape: ModelShape, tokens: int, *, head: bool = True) -> StepFlops:
    """FLOPs of forward and backward over one sequence of `tokens`."""
    width = shape.num_attention_heads * shape.kv_channels
    return StepFlops(
        linear=6.0 * shape.num_layers * layer_weights(shape) * tokens,
        head=6.0 * shape.vocab_size * shape.hidden_size * tokens if head else 0.0,
        attention=6.0 * tokens**2 * width * shape.num_layers,
    )


def kept_bytes(shape: ModelShape, policy: str, element: int) -> int:
    """Bytes that one layer keeps of one token until its backward.

    full             layer input                                                                    h
    attention_kept   and the attention output, and the log-sum-exp                                  h + q d,  + 4 q bytes
    none             input, two norm outputs, residual; q, k, v; output; gate, up and their product 4 h + d (q + 2 k) + q d + 3 f,  + 4 q

    The first two are what the policies are made of; the last is what a layer with fused SwiGLU keeps, a yardstick.
    """
    h, width = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    lse = LSE_BYTES * shape.num_attention_heads
    if policy == "full":
        return h * element
    if policy == "attention_kept":
        return (h + width) * element + lse
    if policy == "none":
        qkv = shape.kv_channels * (shape.num_attention_heads + 2 * shape.num_query_groups)
        return (4 * h + qkv + width + 3 * shape.ffn_hidden_size) * element + lse
    raise ValueError(policy)


def working_elements(shape: ModelShape, policy: str) -> int:
    """Elements of one token at the largest while a layer is run again and differentiated, beside what all layers keep.

    Counted, not derived, under `full` and `attention_kept` with MLP and loss in tiles that are small beside the sequence. Two moments
    compete: the MLP's backward, while all that the layer saved for autograd is there, and that of the attention. In both: cosines, sines
    and angles of all positions (5 d) and the weight of the token's loss.
    """
    h, width, groups = (
        shape.hidden_size,
        shape.num_attention_heads * shape.kv_channels,
        shape.num_query_groups * shape.kv_channels,
    )
    own = width + shape.num_attention_heads if policy == "full" else 0  # output and log-sum-exp, which `full` makes again
    return max(10 * h + 2 * width + 3 * groups, 5 * h + 4 * width + 5 * groups) + own + 5 * shape.kv_channels + 1


def peak_bytes(shape: ModelShape, tokens: int, policy: str, element: int) -> int:
    """Most bytes of a training step beyond weights, gradients and optimizer: what all layers keep and the working set of one."""
    return tokens * (shape.num_layers * kept_bytes(shape, policy, element) + element * working_elements(shape, policy))


def attended_seconds(
    shape: ModelShape, tokens: int, policy: str, kernel: KernelRate, gemm: float, *, head: bool = False
) -> float:
    """Seconds of a step if attention ran at its kernel's own rate and everything else at `gemm` FLOP/s.

    `full` runs the attention forward twice and the linear layers a third time more; `attention_kept` runs them again except the
    down projection.
    """
    flops = step_flops(shape, tokens, head=head)
    again = {
        "full": 1 / 3,
        "attention_kept": (1 - shape.hidden_size * shape.ffn_hidden_size / layer_weights(shape)) / 3,
        "none": 0.0,
    }
    forwards = 2 if policy == "full" else 1
    forward = flops.attention / 3
    attention = forward * (forwards / kernel.forward + 2.5 / kernel.backward)
    return attention + (flops.linear * (1 + again[policy]) + flops.head) / gemm
