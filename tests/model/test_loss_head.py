"""The chunked loss head inside Megatron's GPTModel, against Megatron's own output layer and vocabulary-parallel cross entropy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import destroy_process_groups, init_process_groups, longctx_block_spec, transformer_config
from mcore_longctx.model import loss_head as loss_head_module
from mcore_longctx.model.initial_weights import set_initial_weights
from mcore_longctx.model.loss_head import choose_loss_kernel, chunked_loss_head
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
        return chunked_loss_head(self.output_layer, hidden_states, labels, weight=weight, loss_weights=loss_mask, chunk=CHUNK)


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
    largest = expected.abs().max().item()  # 0 for a rank that holds padding only
    return (found - expected).abs().max().item() / (largest or 1.0)


@pytest.mark.multiproc
@pytest.mark.parametrize(("size", "layouts"), [(1, [(1, False)]), (2, [(2, False), (2, True)])], ids=["tp 1", "tp 2"])
def test_losses_and_main_gradients_equal_stock_gpt_model(size: int, layouts: list[tuple[int, bool]]) -> None:
    for rank, errors in enumerate(run_processes(errors_in_models, size, layouts)):
        assert errors
        wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"


def errors_with_padding(layouts: list[tuple[int, bool]]) -> dict[str, float]:
    """Run in each rank: the head alone, with the vocabulary's padding at -inf in Megatron's loss and left out in ours."""
    errors = {}
    for tp, sp in layouts:
        parallel = Parallel(tensor_model_parallel_size=tp, sequence_parallel=sp)
        init_process_groups(parallel, seed=1)
        layer = build(GPTModel, parallel, tied=False).output_layer
        weight = layer.weight
        _, _, labels, mask = batch(0)
        hidden = torch.randn(LENGTH, BATCH, SMALL.hidden_size, generator=torch.Generator().manual_seed(4))
        if sp:
            hidden = hidden.chunk(tp)[layer.tp_group.rank()].clone()
        hidden.requires_grad_()
        for real in (SMALL.vocab_size, 100):  # of 384 and 512 rows: at tp 2 the second rank holds padding only
            wanted = labels % real
            with device_context():
                logits, _ = layer(hidden)
                padding = max(real - layer.tp_group.rank() * logits.size(-1), 0)
                logits.detach()[..., padding:] = float("-inf")
                losses = vocab_parallel_cross_entropy(logits.float(), wanted.t().contiguous()).t()
                expected = (losses.detach(), *torch.autograd.grad((losses * mask).sum(), (hidden, weight)))
            options = {"real_vocab_size": real, "chunk": CHUNK}
            with device_context():
                losses = chunked_loss_head(layer, hidden, wanted, **options)
                per_token = (losses.detach(), *torch.autograd.grad((losses * mask).sum(), (hidden, weight)))
                total, losses = chunked_loss_head(layer, hidden, wanted, loss_weights=mask, **options)
                weighted = (losses, *torch.autograd.grad(total, (hidden, weight)))
            for what, a, b, c in zip(("losses", "hidden", "weight"), expected, per_token, weighted, strict=True):
                errors[f"tp {tp}, sp {sp}, {real} words: {what}"] = relative(b, a)
                errors[f"tp {tp}, sp {sp}, {real} words, weighted: {what}"] = relative(c, a * mask if what == "losses" else a)
    return errors


@pytest.mark.multiproc
@pytest.mark.parametrize(("size", "layouts"), [(1, [(1, False)]), (2, [(2, False), (2, True)])], ids=["tp 1", "tp 2"])
def test_padding_left_out_equals_padding_at_minus_infinity(size: int, layouts: list[tuple[int, bool]]) -> None:
    for rank, errors in enumerate(run_processes(errors_with_padding, size, layouts)):
        assert errors
        wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    init_process_groups(Parallel(), seed=1)
    yield build(ChunkedGPT, Parallel(), tied=False)
    destroy_process_groups()


@pytest.fixture
def hidden() -> Tensor:
    return torch.zeros(LENGTH, BATCH, SMALL.hidden_size)


def test_weights_that_are_still_on_their_way_are_waited_for(model: Any, hidden: Tensor) -> None:
    seen = []
    handles = [
        model.output_layer.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs))),
        model.output_layer.register_forward_pre_hook(
            lambda module, inputs, options: seen.append((module, inputs)), with_kwargs=True
        ),
    ]
    chunked_loss_head(model.output_layer, hidden, batch(0)[2])
    for handle in handles:
        handle.remove()
    assert [(module is model.output_layer, inputs[0] is hidden) for module, inputs in seen] == [(True, True)] * 2


def test_the_kernel_and_the_chunk_are_said_once(model: Any, hidden: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    loss_head_module._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="mcore_longctx.model.loss_head"):
        for _ in range(2):
            chunked_loss_head(model.output_layer, hidden, batch(0)[2], chunk=5)
    assert [record.message for record in caplog.records] == [
        "loss: chunked (own), at most 5 rows of 384 logits at a time on a rank; " + choose_loss_kernel().reason
    ]


def test_liger_is_not_used_before_it_has_been_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, said in ((None, "not installed"), (object(), "not been measured faster")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        kernel = choose_loss_kernel()
        assert kernel.name == "chunked (own)"
        assert said in kernel.reason


def test_what_is_not_computed_is_refused_in_one_line(model: Any, hidden: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, labels = model.output_layer, batch(0)[2]
    with pytest.raises(ConfigError, match=r"needs Megatron's ColumnParallelLinear as output layer, not Linear$"):
        chunked_loss_head(torch.nn.Linear(2, 2), hidden, labels)
    with pytest.raises(LayoutError, match=r"labels are \[2, 23\], hidden states \[24, 2, 64\]"):
        chunked_loss_head(layer, hidden, labels[:, 1:])
    with pytest.raises(LayoutError, match=r"loss_weights are \[1, 24\], labels \[2, 24\]"):
        chunked_loss_head(layer, hidden, labels, loss_weights=torch.ones(1, LENGTH))
    for field, value in (("defer_embedding_wgrad_compute", True), ("mtp_num_layers", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(layer.config, field, value)
            with pytest.raises(ConfigError, match=f"{field} is set, which the chunked loss does not do"):
                chunked_loss_head(layer, hidden, labels)
    tied = build(ChunkedGPT, Parallel(), tied=True)
    with pytest.raises(ConfigError, match=r"no weight of its own.*shared_embedding_or_output_weight"):
        chunked_loss_head(tied.output_layer, hidden, labels)
    monkeypatch.setattr(layer, "bias", torch.nn.Parameter(torch.zeros(384)))
    with pytest.raises(ConfigError, match="has a bias"):
        chunked_loss_head(layer, hidden, labels)
