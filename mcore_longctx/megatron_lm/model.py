"""The model that Megatron-LM builds: its GPTModelConfig with our layers and our rotary embedding in it.

This is where the long-context parts are plugged in: `_layers` gives the layer spec (attention, norms, what is recomputed),
`_Surgery` changes each pipeline stage after Megatron has built it and before it is wrapped (rope, loss).
"""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.models.gpt.gpt_model import GPTModel

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import quiet_import
from mcore_longctx.model import LongContextRotary, spec
from mcore_longctx.model.loss_head import chunked_loss_head
from mcore_longctx.model.rotary import PhaseDtype
from mcore_longctx.rope import RopeScaling

__all__ = ["is_our_spec", "load_spec", "model_config"]

_DEFAULT_SPEC = ("mcore_longctx.model.spec", "llama_block")


def model_config(args: Namespace, rope: RopeScaling) -> Any:
    """Megatron-LM's GPTModelConfig for these flags, with our parts.

    The flags themselves stay as the user gave them: they are stored in every checkpoint.
    """
    with quiet_import():
        from megatron.training.argument_utils import gpt_config_from_args

    told = copy.copy(args)
    # Whatever kind of rope it is, the rotary embedding is replaced after construction. For yarn Megatron would also multiply cos and
    # sin by the attention factor a; here a goes into the softmax scale, which no fused kernel can lose.
    told.position_embedding_type = "rope"
    told.use_rope_scaling, told.rotary_seq_len_interpolation_factor = False, None
    told.spec = None
    _, attention_factor = rope.frequencies()
    if attention_factor != 1.0:
        told.softmax_scale = attention_factor**2 * rope.head_dim**-0.5
    config = gpt_config_from_args(told)
    config.transformer_layer_spec = _layers(args)
    config.pre_wrap_hooks.append(_Surgery(rope, args.longctx_phase_dtype, args.longctx_loss_chunk))
    return config


def _layers(args: Namespace) -> Any:
    """The layer spec: what --spec names, else our block of layers with its final norm. Megatron-LM calls it if it is a function."""
    found = load_spec(args.spec)
    if found is not spec.llama_block:
        return found

    def block(config: Any, vp_stage: int | None = None) -> Any:
        return spec.longctx_block_spec(
            config.transformer, vp_stage, recompute=args.longctx_recompute, mlp_tile=args.longctx_mlp_tile
        )

    return block


@dataclass(frozen=True)
class _Surgery:
    """A pre-wrap hook of Megatron-LM: takes the pipeline stages of this rank and gives them back changed."""

    rope: RopeScaling
    phase_dtype: PhaseDtype
    loss_chunk: int | None

    def __call__(self, stages: list[Any]) -> list[Any]:
        for stage in stages:
            stage.rotary_pos_emb = LongContextRotary(self.rope, stage.pg_collection.cp, self.phase_dtype)
            # Megatron's builder names its class literally, and builds and shards it as its own flags say
            stage.__class__ = _WithoutLogits
            stage.loss_chunk = self.loss_chunk
        return stages


class _WithoutLogits(GPTModel):
    """Megatron's model with a loss that never holds the logits of more than `loss_chunk` tokens.

    The padding of the vocabulary takes part in the softmax, as in Megatron.
    """

    loss_chunk: int | None = None

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Losses [b, s/c] of hidden states [s/c, b, h]; anything but losses is Megatron's own business."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **options)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return chunked_loss_head(self.output_layer, hidden_states, labels, weight=weight, chunk=self.loss_chunk)


def load_spec(words: list[str] | None) -> Any:
    """The object that `--spec MODULE NAME` names; without one, our block of layers.

    Megatron-LM 0.19 logs a spec that cannot be imported and trains its own layers.

    Raises:
        ConfigError: it cannot be imported, or is nothing that a model can be built of.
    """
    module, name = _two_words(words)
    where = f"--spec {module} {name}"
    try:
        found = vars(__import__(module, fromlist=[name])).get(name)
    except Exception as error:  # a module of the user's: anything can go wrong in it
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot be imported: {reason}", where=where, fix="Megatron-LM would train its own layers") from None
    if found is None:
        raise ConfigError(f"there is no {name} in {module}", where=where, fix="MODULE NAME: a ModuleSpec, or a function")
    if not callable(found) and not hasattr(found, "layer_specs"):
        kind = type(found).__name__
        raise ConfigError(
            f"is of type {kind}", where=where, fix="it must be a ModuleSpec, TransformerBlockSubmodules or a function"
        )
    return found


def is_our_spec(found: Any) -> bool:
    """Whether a loaded spec is one of ours, of whatever module it was imported from."""
    return found is spec.llama or found is spec.llama_block


def _two_words(words: list[str] | None) -> tuple[str, str]:
    if words is None:
        return _DEFAULT_SPEC
    if len(words) != 2:
        raise ConfigError(
            "takes two words, MODULE NAME", where=f"--spec {' '.join(words)}", fix=f"for example {' '.join(_DEFAULT_SPEC)}"
        )
    return words[0], words[1]
