"""The chunked loss head inside Megatron's GPTModel, against Megatron's own output layer and vocabulary-parallel cross entropy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import init_process_groups, longctx_block_spec, transformer_config
from mcore_longctx.model.initial_weights import set_initial_weights
from mcore_longctx.model.loss_head import chunked_loss_head
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import PLAIN_ROPE, SHAPE
from tests.multiproc import run_processes

# float32 sums in another order, of the largest entry
TOLERANCE = 2e-6
SMALL = replace(SHAPE, num_layers=1)
BATCH, LENGTH, CHUNK = 2, 24, 7


class ChunkedGPT(GPTModel):
    """The example of `loss_head`'s docstring, with a chunk that divides nothing."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **options: Any) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **options)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return chunked_loss_head(self.output_layer, hidden_states, labels, weight=weight, chunk=CHUNK)


class ChunkedSumGPT(ChunkedGPT):
    """Gradients in forward; the loss mask comes as Megatron passes it."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Any = None, loss_mask: Any = None, **options: Any) -> Any:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return chunked_loss_head(
            self.output_layer, hidden_states, labels, weight=weight, loss_weights=loss_mask, chunk=CHUNK
        )


def build(cls: type[GPTModel], parallel: Parallel, tied: bool, **overrides: Any) -> Any:
    with device_context():
        config = transformer_config(SMALL, PLAIN_ROPE, parallel, precision="fp32", **overrides)
        model = cls(
            config=config,
            transformer_layer_spec=longctx_block_spec(config),
            vocab_size=SMALL.padded_vocab_size(parallel.tensor_model_parallel_size),
            max_sequence_length=LENGTH,
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
        )
        set_initial_weights(model, SMALL.vocab_size, seed=3)
    return model


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, labels and an uneven mask, [b, s]; where the mask is 0 some labels are no tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(SMALL.vocab_size, (2, BATCH, LENGTH), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < 0.7).float()
    mask[:, 9:15] = 0
    return tokens, torch.arange(LENGTH).expand(BATCH, -1), labels, mask


def train_step(model: Any, overlap: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of two micro-batches [2, b, s] times the mask, and every main gradient, through Megatron's DDP."""
    with device_context():
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
        wrapped = DistributedDataParallel(model.config, settings, model)
        wrapped.zero_grad_buffer()
        found = []
        for i in range(2):
            tokens, positions, labels, mask = batch(i)
            with wrapped.no_sync() if i == 0 else nullcontext():
                if isinstance(model, ChunkedSumGPT):
                    total, losses = wrapped(tokens, positions, None, labels=labels, loss_mask=mask)
                else:
                    losses = wrapped(tokens, positions, None, labels=labels)
                    total = (losses * mask).sum()
                assert total.dtype is losses.dtype is torch.float32
                (0.3 * total).backward()
            found.append(losses.detach() * mask)
        finalize_model_grads([wrapped])
        assert all(parameter.grad is None for parameter in model.parameters())
        return torch.stack(found), {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


def errors_in_models(layouts: list[tuple[int, bool]]) -> dict[str, float]:
    """Run in each rank: largest error over the largest entry of what stock GPTModel gives."""
    errors = {}
    for tp, sp in layouts:
        parallel = Parallel(tensor_model_parallel_size=tp, sequence_parallel=sp)
        init_process_groups(parallel, seed=1)
        for tied in (False, True):
            expected_losses, expected = train_step(build(GPTModel, parallel, tied), overlap=False)
            for cls in (ChunkedGPT, ChunkedSumGPT):
                for overlap in (False, True):
                    model = build(cls, parallel, tied)
                    losses, gradients = train_step(model, overlap)
                    label = f"{cls.__name__}, tp {tp}, sp {sp}, tied {tied}, overlap {overlap}"
                    errors[f"{label}: losses"] = relative(losses, expected_losses)
                    for name, gradient in gradients.items():
                        errors[f"{label}: {name}"] = relative(gradient, expected[name])
                    head = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
                    assert head.grad_added_to_main_grad, label
    return errors


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.multiproc
@pytest.mark.parametrize(("size", "layouts"), [(1, [(1, False)]), (2, [(2, False), (2, True)])], ids=["tp 1", "tp 2"])
def test_losses_and_main_gradients_equal_stock_gpt_model(size: int, layouts: list[tuple[int, bool]]) -> None:
    for rank, errors in enumerate(run_processes(errors_in_models, size, layouts)):
        assert errors
        wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"
