"""Losses of a Megatron model without its logits: for the `_postprocess` of any GPTModel.

    class MyModel(GPTModel):
        def _postprocess(self, hidden_states, *args, labels=None, **options):
            if labels is None or not self.post_process:
                return super()._postprocess(hidden_states, *args, labels=labels, **options)
            tied = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if tied else None
            return chunked_loss_head(self.output_layer, hidden_states, labels, weight=weight)

Megatron calls `_postprocess` with keywords, in 0.16.1 and in 0.19.2 alike. Multi-token prediction is done there too: a model that has
it must leave `_postprocess` alone.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Any, NamedTuple, overload

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.model.weight_hooks import run_forward_pre_hooks
from mcore_longctx.parallel.chunked_loss import chunked_linear_cross_entropy, default_chunk

__all__ = ["LossKernel", "choose_loss_kernel", "chunked_loss_head"]

logger = logging.getLogger(__name__)


class LossKernel(NamedTuple):
    """What computes the loss, and why; worth a line in a log."""

    name: str
    reason: str


def choose_loss_kernel() -> LossKernel:
    """Which implementation `chunked_loss_head` uses.

    1. Liger's fused linear cross entropy, where it is installed, the vocabulary is on one rank, and `tools/bench/loss.py` has measured
       it faster on the device at hand. No device is on that list: there is no measurement.
    2. Else the chunked loss of `mcore_longctx.parallel.chunked_loss`.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return LossKernel("chunked (own)", "liger-kernel is not installed")
    return LossKernel("chunked (own)", "liger-kernel is installed, but has not been measured faster on any device")


@overload
def chunked_loss_head(
    output_layer: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    loss_weights: None = None,
    real_vocab_size: int | None = None,
    chunk: int | None = None,
) -> Tensor: ...


@overload
def chunked_loss_head(
    output_layer: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    loss_weights: Tensor,
    real_vocab_size: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def chunked_loss_head(
    output_layer: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    loss_weights: Tensor | None = None,
    real_vocab_size: int | None = None,
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of every token, in place of the output layer and `compute_language_model_loss`.

    Args:
        output_layer: the model's ColumnParallelLinear. Its group and its sequence parallelism decide what is exchanged.
        hidden: [s, b, h] after the final norm; s is divided by the tensor-parallel size under sequence parallelism.
        labels: int64 [b, s]. One that is no token is fine where its loss counts nothing.
        weight: the embedding's weight where it is shared (`shared_embedding_or_output_weight()`); None: the output layer's own.
        loss_weights: float [b, s], the final factor of each token's loss (a loss mask): then both gradients are made in forward,
            which saves one GEMM of four and the backward's exchanges.
        real_vocab_size: tokens of the vocabulary; the rows behind them are padding and outside the softmax. None: all rows count, as
            in Megatron.
        chunk: rows of logits held at once; None: `default_chunk`, 256 MiB of them.

    Returns:
        Losses, float32 (float64 for float64) [b, s]; with `loss_weights` (sum of weight * loss, losses without gradient).

    Raises:
        ConfigError: a bias, MuP, deferred weight gradients, multi-token prediction, or another output layer.
        LayoutError: shapes that do not fit together.
    """
    _check(output_layer, weight)
    if weight is None:
        weight = output_layer.weight
    run_forward_pre_hooks(output_layer, hidden)
    group = output_layer.tp_group
    _announce(weight.size(0), chunk or default_chunk(weight.size(0), hidden.dtype))
    batch, length = labels.shape
    rows = hidden.size(0) * (group.size() if output_layer.sequence_parallel else 1)
    if hidden.size(1) != batch or rows != length:
        raise LayoutError(
            f"labels are {list(labels.shape)}, hidden states {[rows, *hidden.shape[1:]]}: expected [b, s] and [s, b, h]"
        )
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise LayoutError(f"loss_weights are {list(loss_weights.shape)}, labels {list(labels.shape)}: every token has one")
    options: dict[str, Any] = {
        "group": group,
        "sequence_parallel": output_layer.sequence_parallel,
        "real_vocab_size": real_vocab_size,
        "chunk": chunk,
    }
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.t().reshape(-1)
    if loss_weights is None:
        losses = chunked_linear_cross_entropy(flat_hidden, weight, flat_labels, **options)
        return losses.view(length, batch).t().contiguous()
    flat_weights = loss_weights.t().reshape(-1)
    total, losses = chunked_linear_cross_entropy(flat_hidden, weight, flat_labels, loss_weights=flat_weights, **options)
    return total, losses.view(length, batch).t().contiguous()


def _check(output_layer: Any, weight: Tensor | None) -> None:
    if not isinstance(output_layer, ColumnParallelLinear):
        raise ConfigError(
            f"the chunked loss needs Megatron's ColumnParallelLinear as output layer, not {type(output_layer).__name__}"
        )
    if weight is None and output_layer.weight is None:
        raise ConfigError(
            "the output layer has no weight of its own: the embedding's is shared",
            fix="pass weight=model.shared_embedding_or_output_weight()",
        )
    if output_layer.bias is not None:
        raise ConfigError("the output layer has a bias, which the chunked loss does not add")
    # the last: its own use of the output layer would return a gradient that DDP leaves alone once ours is in main_grad
    for field in ("defer_embedding_wgrad_compute", "use_mup", "mtp_num_layers"):
        if getattr(output_layer.config, field, False):
            raise ConfigError(f"{field} is set, which the chunked loss does not do", fix="leave it unset, or use Megatron's loss")


@lru_cache
def _announce(columns: int, chunk: int) -> None:
    """Once for each size."""
    kernel = choose_loss_kernel()
    logger.info(
        "loss: %s, at most %s rows of %s logits at a time on a rank; %s",
        *(kernel.name, f"{chunk:,}", f"{columns:,}", kernel.reason),
    )
