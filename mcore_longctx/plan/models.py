"""Published model sizes by name, for plans without a checkpoint at hand."""

from __future__ import annotations

from mcore_longctx.families import ModelShape

__all__ = ["known_models", "parameters", "parameters_per_layer", "step_flops"]


def known_models() -> dict[str, ModelShape]:
    """`llama-3.1-8b`, `llama-3.1-70b`, ... (`models.yaml`), and the short names of the validation file (`llama8b`)."""
    raise NotImplementedError


def parameters(shape: ModelShape) -> int:
    """All parameters: P of the formulas."""
    raise NotImplementedError


def parameters_per_layer(shape: ModelShape) -> int:
    """Weights of the linear layers of one layer: P_layer of the formulas."""
    raise NotImplementedError


def step_flops(shape: ModelShape, seq_length: int) -> tuple[float, float, float]:
    """FLOPs of training on one sequence without recompute: (linear layers, head, causal attention)."""
    raise NotImplementedError
