"""One way to run a training step: what every formula of the plan takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mcore_longctx.families import ModelShape
from mcore_longctx.plan.hardware import Gpu
from mcore_longctx.recipe.schema import Parallel, Stage

__all__ = ["Setup", "stage_setup"]

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, GPU, lengths, layout, what is kept, and which software computes it.

    The defaults are our own stack. The other values exist to hold the formulas against what others have published.
    """

    shape: ModelShape
    gpu: Gpu
    seq_length: int
    global_batch_size: int
    parallel: Parallel = field(default_factory=Parallel)  # with TP above 1 sequence parallelism is taken to be on
    micro_batch_size: int = 1
    virtual_pipeline_chunks: int = 1
    recompute: Literal["none", "full", "attention_kept", "selective"] = "attention_kept"  # selective: Megatron's `layernorm mlp`
    offload_fraction: float = 0.0
    mlp_tile: int | None = 8192
    loss: Literal["chunked", "unfused", "native", "hf"] = "chunked"
    loss_chunk: int | None = None
    bytes_per_element: int = 2
    gemm: Literal["bf16", "fp8"] = "bf16"
    kernel: str = ""  # a kernel of `gpu.kernels`; empty: its default
    sharding: Literal["distributed_optimizer", "zero3"] = "distributed_optimizer"
    optimizer: Literal["adam", "adam_bf16", "adam_cpu"] = "adam"
    parameters_on_host: bool = False

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one sequence on one context-parallel rank."""
        return self.seq_length // self.parallel.context_parallel_size

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on one data-parallel replica."""
        return self.global_batch_size // (self.micro_batch_size * self.parallel.data_parallel_size)


def stage_setup(
    stage: Stage, shape: ModelShape, gpu: Gpu, *, kernel: str = "", backend: Literal["local", "te"] = "local"
) -> Setup:
    """The setup of a stage of a recipe, as it is trained.

    `backend: te` maps `attention_kept` to the nearest policy that Megatron has and does not tile the MLP (`model/te.py`). A stage with
    `cross_document_mask` is priced as if there were no documents: that is its upper bound.
    """
    activations = stage.activations
    stock = backend == "te"
    return Setup(
        shape=shape,
        gpu=gpu,
        seq_length=stage.seq_length,
        global_batch_size=stage.global_batch_size,
        parallel=stage.parallel,
        micro_batch_size=stage.micro_batch_size,
        recompute="selective" if stock and activations.recompute == "attention_kept" else activations.recompute,
        offload_fraction=activations.offload_fraction,
        mlp_tile=None if stock else activations.mlp_tile,
        loss_chunk=activations.loss_chunk,
        bytes_per_element=_BYTES[stage.precision],
        kernel=kernel,
    )
