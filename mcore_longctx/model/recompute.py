"""`LongContextLayer`: Megatron's transformer layer with a recompute policy that never computes attention twice.

    policy            kept per token and layer (bytes, bf16)     run again in the backward pass
    none              everything that autograd saves             nothing
    full              2 h             the layer input            the whole layer, attention included
    attention_kept    2 h + 2 q d + 4 q   + output and lse       norms, QKV (and norms of their heads), rope, output projection,
                                                                 gate and up projection

(h hidden size, q query heads, d head dimension; divided by TP, h only under sequence parallelism.) At a million tokens attention is
nearly all of a step, so `attention_kept` runs at the speed of `none` with a fraction of its memory.

How: the stock layer is run twice. In the first run, without autograd, the core attention records its output and log-sum-exp. In the
second, inside the backward pass, it returns the recorded output without computing anything, and its own backward is called with it
(exchange over context-parallel ranks included). Nothing of Megatron's layer is copied. The down projection of the MLP is not run again
under either policy: no gradient needs its output.

Sources: LoongTrain, arXiv 2406.18485 ("Selective Checkpoint++"); MEMO, arXiv 2407.12117; DistFlashAttention, arXiv 2310.03294.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.model.offload import ActivationOffload

__all__ = ["LongContextLayer", "RecomputePolicy"]

RecomputePolicy = Literal["none", "full", "attention_kept"]


class LongContextLayer(TransformerLayer):
    """TransformerLayer with `recompute` and, for what that keeps, offload to the host. Given through `ModuleSpec.params`.

    Args:
        config: TransformerConfig; its own `recompute_granularity` must be None.
        submodules: as for TransformerLayer; `attention_kept` needs `LongContextAttention` as core attention.
        recompute: see the module.
        offload: where kept tensors go; None: they stay on the device.
        *args: as for TransformerLayer.
        **kwargs: as for TransformerLayer.

    Raises:
        ConfigError: an unknown policy; Megatron's own recompute is on as well; dropout, whose random numbers are not replayed;
            `qk_layernorm` in the config and no such norms in the spec.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *args: Any,
        recompute: RecomputePolicy = "none",
        offload: ActivationOffload | None = None,
        **kwargs: Any,
    ) -> None:
        if recompute not in get_args(RecomputePolicy):
            raise ConfigError(f"recompute is {recompute!r}", fix=f"use one of {', '.join(get_args(RecomputePolicy))}")
        if recompute != "none" and config.recompute_granularity is not None:
            raise ConfigError(
                f"recompute is {recompute} and Megatron's recompute_granularity is {config.recompute_granularity}",
                fix="leave recompute_granularity unset: a layer is recomputed by one of them",
            )
        if recompute != "none" and config.hidden_dropout:
            raise ConfigError(
                f"hidden_dropout is {config.hidden_dropout} with recompute {recompute}: its random numbers are not replayed",
                fix="set hidden_dropout to 0 (UltraLong trains without dropout)",
            )
        super().__init__(config, submodules, *args, **kwargs)
        if config.qk_layernorm and isinstance(self.self_attention.q_layernorm, IdentityOp | None):
            raise ConfigError(
                "the config has qk_layernorm, and the layer spec has no norms of queries and keys: they would be left out",
                fix="use longctx_block_spec (--spec mcore_longctx.model.spec llama_block), or longctx_layer_spec(qk_layernorm=True)",
            )
        self.recompute, self.offload = recompute, offload
        if recompute == "attention_kept" and not hasattr(self.self_attention.core_attention, "recording"):
            raise ConfigError(
                f"recompute attention_kept needs LongContextAttention, the core attention is"
                f" {type(self.self_attention.core_attention).__name__}",
                fix="use longctx_layer_spec, or recompute full",
            )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As TransformerLayer: hidden_states [s/c (/tp), b, h] -> (the same shape, None)."""
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, *args, **kwargs)
        stock_forward = super().forward

        def run(layer_input: Tensor) -> Tensor:
            output: Tensor = stock_forward(layer_input, *args, **kwargs)[0]
            return output

        if not hidden_states.requires_grad:  # frozen embeddings: autograd would skip the layer and its weights
            hidden_states = hidden_states.detach().requires_grad_()
        return _Recomputed.apply(hidden_states, self, run), None


class _Recomputed(torch.autograd.Function):
    """Run a layer without saving its inside, and once more in the backward pass: apply(hidden_states, layer, run) -> output."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, layer: LongContextLayer, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Keep the layer input and, under `attention_kept`, the attention's output and lse."""
        kept = [hidden_states]
        with ExitStack() as stack:
            if layer.recompute == "attention_kept":
                recorded = stack.enter_context(layer.self_attention.core_attention.recording())
            output = run(hidden_states)
        if layer.recompute == "attention_kept":
            kept.extend(recorded)
        ctx.layer, ctx.run = layer, run
        ctx.offloaded = layer.offload.put(layer.layer_number, kept) if layer.offload is not None else None
        if ctx.offloaded is None:
            ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Gradient of hidden_states; those of the weights are accumulated by the inner backward pass, where DDP's hooks see them."""
        layer: LongContextLayer = ctx.layer
        kept = ctx.saved_tensors if ctx.offloaded is None else layer.offload.get(ctx.offloaded)  # type: ignore[union-attr]
        layer_input = kept[0].detach().requires_grad_()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if layer.recompute == "attention_kept":
                stack.enter_context(layer.self_attention.core_attention.replaying(*kept[1:]))
            if hasattr(layer.mlp, "skipping_forward"):  # the value of the layer's output is not needed again
                stack.enter_context(layer.mlp.skipping_forward())
            output = ctx.run(layer_input)
        del kept
        torch.autograd.backward(output, grad_outputs[0])
        return layer_input.grad, None, None
