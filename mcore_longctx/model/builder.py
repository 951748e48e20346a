"""A dense decoder on Megatron-Core from sizes, rope and layout. The only file that names Megatron's model class.

megatron-core 0.19 calls GPTModel deprecated in favour of HybridModel; when it goes, this file changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.kernels.interface import accumulator_dtype
from mcore_longctx.layout import check_seq_length
from mcore_longctx.megatron_compat import NO_CUDA_GRAPHS, device_context, of_layers
from mcore_longctx.model.initial_weights import fill_with_nan, set_initial_weights
from mcore_longctx.model.loss_head import chunked_loss_head
from mcore_longctx.model.rotary import LongContextRotary, PhaseDtype
from mcore_longctx.model.spec import longctx_block_spec
from mcore_longctx.model.te import check_backend, te_config_fields, te_layer_spec
from mcore_longctx.parallel.collectives import all_gather
from mcore_longctx.recipe.schema import Activations

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from mcore_longctx.families import ModelShape
    from mcore_longctx.recipe.schema import Parallel
    from mcore_longctx.rope import RopeScaling

__all__ = ["Backend", "LongContextGPTModel", "Precision", "build_gpt_model", "gpt_model_of_spec", "transformer_config"]

Precision = Literal["fp32", "bf16"]
Backend = Literal["local", "te"]
_WORDS_AT_ONCE = 16_384  # whose rows of the head are widened at a time: memory only
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_gpt_model(
    shape: ModelShape,
    rope: RopeScaling,
    parallel: Parallel,
    *,
    precision: Precision,
    seq_length: int,
    phase_dtype: PhaseDtype = "float32",
    seed: int | None = 0,
    activations: Activations | None = None,
    backend: Backend = "local",
) -> LongContextGPTModel:
    """This rank's part of a model of any family: its pipeline stage, tensor-parallel shard and context-parallel rank.

    Call `init_process_groups` first, and stay inside `device_context` (opened here too) for everything that follows.

    Args:
        shape: sizes of the model.
        rope: its rope; `head_dim` must be the shape's `kv_channels`.
        parallel: the layout.
        precision: of parameters and activations.
        seq_length: tokens of a whole sample.
        phase_dtype: see `LongContextRotary`.
        seed: of the initial weights, which are the same for every layout. None: all weights are NaN until they are loaded, which
            is faster for a large model and cannot be mistaken for training from random weights.
        activations: what is kept for the backward pass, and how much is computed at once; None: the defaults of a recipe.
        backend: `local`, or `te` for Megatron's TransformerEngine layers (`mcore_longctx.model.te`).

    Raises:
        LayoutError: heads, layers, sequence length or vocabulary do not divide by the layout.
        ConfigError: a rope of another head dimension, or one that cannot be trained with; `te` without TransformerEngine.
    """
    check_backend(backend)
    activations = activations or Activations()
    _check_layout(shape, parallel, seq_length, backend)
    if rope.head_dim != shape.kv_channels:
        raise ConfigError(f"rope is for heads of {rope.head_dim}, the model's heads have {shape.kv_channels} (kv_channels)")
    with device_context():
        te_fields = te_config_fields(activations) if backend == "te" else {}
        config = transformer_config(shape, rope, parallel, precision=precision, **te_fields)
        model = LongContextGPTModel(
            config, shape, rope, seq_length=seq_length, phase_dtype=phase_dtype, activations=activations, backend=backend
        )
        if seed is None:
            fill_with_nan(model)
        else:
            set_initial_weights(model, shape.vocab_size, seed)
        if torch.cuda.is_available():
            model.cuda()
    return model


def transformer_config(
    shape: ModelShape, rope: RopeScaling, parallel: Parallel, *, precision: Precision, **overrides: Any
) -> TransformerConfig:
    """Megatron's config of a dense decoder without TransformerEngine or apex; `overrides` are further TransformerConfig fields.

    Losses are summed per token and divided once by the number of tokens of all ranks (`calculate_per_token_loss`), so that uneven
    loss masks are right under data and context parallelism. The attention factor a of the rope goes into the softmax scale.
    """
    _, attention_factor = rope.frequencies()
    dtype, sizes = _DTYPES[precision], parallel.hierarchical_context_parallel_sizes
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "softmax_scale": attention_factor**2 * float(shape.kv_channels) ** -0.5,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "cp_comm_type": parallel.cp_comm_type if isinstance(parallel.cp_comm_type, str) else of_layers(parallel.cp_comm_type),
        "hierarchical_context_parallel_sizes": None if sizes is None else list(sizes),
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # Weights are set by set_initial_weights or loaded; Megatron's own draw depends on the layout. `perform_initialization` must
        # stay on: without it the weights are not marked as tensor parallel, and gradient norms come out wrong.
        "init_method": _leave_unset,
        "output_layer_init_method": _leave_unset,
        "embedding_init_method": _leave_unset,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # each of these needs apex, TransformerEngine or a compiled kernel
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        # on gloo an asynchronous send may read a stage's output after it has been freed
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
        **NO_CUDA_GRAPHS,
    }
    return TransformerConfig(**(fields | overrides))


def gpt_model_of_spec(config: TransformerConfig, spec: Any, *, vocab_size: int, seq_length: int, rope: RopeScaling) -> GPTModel:
    """Megatron's own model of a layer or block spec, in one pipeline stage, with our rotary embedding."""
    model = GPTModel(config, spec, vocab_size, seq_length, parallel_output=True, position_embedding_type="rope")
    model.rotary_pos_emb = LongContextRotary(rope, model.pg_collection.cp)
    return model


class LongContextGPTModel(GPTModel):
    """GPTModel with explicit positions, a vocabulary whose padding is outside the softmax, and logits of chosen rows only.

    On the last pipeline stage `forward(input_ids, position_ids, ...)` gives

        labels and loss_weights [b, s/c]    the weighted sum of the losses, a scalar; its gradient is made on the way (training)
        labels                              per-token losses [b, s/c]
        neither                             logits [b, s/c, v/tp] with -inf in the padding

    and only the last of them ever holds logits of all tokens. Other stages give hidden states. All ids are [b, s/c]: the zigzag slice
    of this context-parallel rank (`mcore_longctx.layout.zigzag_positions`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        rope: RopeScaling,
        *,
        seq_length: int,
        phase_dtype: PhaseDtype,
        activations: Activations,
        backend: Backend = "local",
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=te_layer_spec(qk_layernorm=shape.qk_layernorm)
            if backend == "te"
            else _block_spec(config, activations),
            vocab_size=shape.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
        )
        self.real_vocab_size, self.loss_chunk = shape.vocab_size, activations.loss_chunk
        # GPTModel takes no rotary module: its own table, made for the whole sequence and blind to position ids, is replaced
        self.rotary_pos_emb = LongContextRotary(rope, self.pg_collection.cp, phase_dtype)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: None = None,
        *,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """See the class. Positions are needed on every pipeline stage: each makes its own angles."""
        if input_ids is not None and input_ids.shape != position_ids.shape:
            raise LayoutError(
                f"position_ids are {list(position_ids.shape)}, input_ids {list(input_ids.shape)}: every token has one"
            )
        self.rotary_pos_emb.set_positions(position_ids)
        self._loss_weights = loss_weights
        try:
            return super().forward(input_ids, position_ids, attention_mask, labels=labels, **options)
        finally:
            self.rotary_pos_emb.set_positions(None)
            self._loss_weights = None

    def logits_at(self, input_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        """Logits over the whole real vocabulary at some rows, float32 [len(rows), vocab_size], on every tensor-parallel rank.

        No other row's logits are ever made. Every rank of the model must call it; ranks of one tensor-parallel group with the same
        rows, context-parallel ranks each with rows of their own (none is fine).

        Args:
            input_ids: [b, s/c].
            position_ids: [b, s/c].
            rows: int64, indices into the flattened [b * s/c] local tokens.

        Raises:
            LayoutError: the model is split over pipeline stages.
        """
        if not (self.pre_process and self.post_process):
            raise LayoutError(
                "logits of chosen rows need a model without pipeline stages", fix="use pipeline_model_parallel_size 1"
            )
        with torch.no_grad(), device_context():
            self._rows_wanted = rows
            try:
                return self(input_ids, position_ids)
            finally:
                self._rows_wanted = None

    # GPTModel.forward has no place for them
    _rows_wanted: Tensor | None = None
    _loss_weights: Tensor | None = None

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Hidden states [s/c (/tp with sequence parallel), b, h] -> losses, logits, or themselves on an inner stage."""
        if not self.post_process:
            return hidden_states
        if self._rows_wanted is not None:
            return self._logits_of_rows(hidden_states, self._rows_wanted)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is not None:
            return self._loss(hidden_states, labels, weight)
        logits, _ = self.output_layer(hidden_states, weight=weight)  # [s/c, b, v/tp]
        return self._without_padding(logits).transpose(0, 1).contiguous()

    def _loss(self, hidden_states: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"weight": weight, "real_vocab_size": self.real_vocab_size, "chunk": self.loss_chunk}
        if self._loss_weights is None:
            return chunked_loss_head(self.output_layer, hidden_states, labels, **options)
        loss_sum, _ = chunked_loss_head(self.output_layer, hidden_states, labels, loss_weights=self._loss_weights, **options)
        return loss_sum

    def _without_padding(self, logits: Tensor) -> Tensor:
        """Set the columns that stand for no token to -inf, in place: they take no part in the softmax.

        Autograd is not told: the gradient of a softmax is exactly 0 where the logit is -inf, and a copy of all logits is saved.
        """
        width = logits.size(-1)
        real = self.real_vocab_size - self.pg_collection.tp.rank() * width
        if real < width:
            logits.detach()[..., max(real, 0) :] = float("-inf")
        return logits

    def _logits_of_rows(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        group = self.pg_collection.tp
        length = hidden_states.size(0)
        split = group.size() if self.config.sequence_parallel else 1
        sample, position = rows // (length * split), rows % (length * split)
        first = length * group.rank() if split > 1 else 0
        mine = (position >= first) & (position < first + length)
        hidden = hidden_states[(position - first).clamp(0, length - 1), sample]  # [rows, h]
        if split > 1:  # each row lies on one rank of the group: exchange these rows, not the sequence
            hidden = hidden * mine.unsqueeze(-1)
            dist.all_reduce(hidden, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # a few rows: in float32 (float64 for float64), so that bf16 ties do not decide the most probable token
        dtype = accumulator_dtype(hidden.dtype)
        wide = hidden.to(dtype)
        logits = torch.cat([F.linear(wide, part.to(dtype)) for part in weight.split(_WORDS_AT_ONCE)], dim=-1)  # [rows, v/tp]
        return all_gather(logits, group).permute(1, 0, 2).flatten(1)[:, : self.real_vocab_size]


def _block_spec(config: TransformerConfig, activations: Activations) -> TransformerBlockSubmodules:
    return longctx_block_spec(
        config,
        recompute=activations.recompute,
        mlp_tile=activations.mlp_tile,
        offload_fraction=activations.offload_fraction,
    )


def _leave_unset(weight: Tensor) -> None:
    """An initialisation that draws nothing."""


def _check_layout(shape: ModelShape, parallel: Parallel, seq_length: int, backend: Backend) -> None:
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    shape.check_layout(tp, parallel.pipeline_model_parallel_size)
    parallel.check_attention(shape.num_layers, shape.num_attention_heads, shape.num_query_groups, backend=backend)
    check_seq_length(seq_length, cp)
    if parallel.sequence_parallel and seq_length // cp % tp:
        raise LayoutError(
            f"seq_length / context_parallel_size ({seq_length // cp:,}) is not a multiple of tensor_model_parallel_size {tp}",
            fix="sequence parallelism splits these tokens over the tensor-parallel group",
        )
