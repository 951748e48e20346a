"""One training step at full length, held against a reference that shares nothing with it: the same code on a CPU and on a GPU.

The step is the product's own: model, recompute policy, loss head, tiled MLP, offload, Megatron's schedule, gradient buffers and optimizer.
Two things of it are compared with `plain_llama`, computed in float64 at a few positions:

- the losses of tokens at the edges of tiles and chunks, at random positions, and at the end;
- what the optimizer did to some rows of the embedding. The last tokens of the sequence occur nowhere else, and under a causal mask such
  a token reaches the losses of the last positions only: the gradient of its row over the whole sequence is the gradient of a few losses,
  which the reference differentiates through every layer. A large Adam epsilon makes the update show the gradient's size, not only its
  sign: u = g / (|g| + epsilon).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import build_gpt_model, builder, init_process_groups
from mcore_longctx.model.loss_head import chunked_loss_head
from mcore_longctx.recipe.schema import Activations, OptimizerSection, Parallel
from mcore_longctx.rope import RopeScaling
from mcore_longctx.train.optimizer import build_optimizer, wrap_model
from tests.gpu.plain_llama import PlainLlama

ROTARY_BASE = 500_000.0
LR, WEIGHT_DECAY = 0.02, 0.1
SHARP = 4.0
"""Factor on the initial weights: attention that looks at few keys, so that a wrong one is seen."""


@dataclass(frozen=True, kw_only=True)
class LongStep:
    """What is trained for one step. `last` tokens at the end are unique; `random_positions` are sampled before them."""

    shape: ModelShape
    seq_length: int
    precision: str
    activations: Activations
    last: int = 16
    random_positions: int = 24
    seed: int = 1

    @property
    def optimizer(self) -> OptimizerSection:
        """Epsilon is about as large as the gradient of a mean loss by one token's embedding."""
        return OptimizerSection(lr=LR, weight_decay=WEIGHT_DECAY, adam_eps=0.5 / self.seq_length, clip_grad=1.0)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """ids and labels [s]: the unique ids are the highest of the vocabulary."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(self.shape.vocab_size - self.last, (self.seq_length,), generator=generator)
        ids[-self.last :] = torch.arange(self.shape.vocab_size - self.last, self.shape.vocab_size)
        return ids, ids.roll(-1)

    def positions(self) -> Tensor:
        """Where losses are compared, ascending: both ends, the edges of tiles and chunks, random ones, the unique tokens."""
        length = self.seq_length
        generator = torch.Generator().manual_seed(self.seed + 1)
        chosen = set(torch.randint(length, (self.random_positions,), generator=generator).tolist())
        chosen |= {0, 1, length // 2 - 1, length // 2, *range(length - self.last, length)}
        for size in (self.activations.mlp_tile, self.activations.loss_chunk):
            if size is not None:
                chosen |= {min(int(size) * i + j, length - 1) for i in (1, 3) for j in (-1, 0)}
        return torch.tensor(sorted(chosen))


@dataclass
class Outcome:
    """What a step did, and what it took."""

    losses: Tensor  # [s] float32, on the CPU
    before: dict[str, Tensor]  # weights
    moved: Tensor  # rows of the embedding after the step, of the unique tokens
    inputs: list[Tensor]  # what entered layers 1, 2, ...: [s, h]
    grad_norm: float
    attention_forwards: float  # computed, of a layer
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def run_step(job: LongStep) -> Outcome:
    """Forward, backward and optimizer step over one sequence."""
    device = training_device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    init_process_groups(Parallel(), seed=job.seed)
    ids, labels = (tensor.to(device)[None] for tensor in job.tokens())
    positions = torch.arange(job.seq_length, device=device)[None]
    rope = RopeScaling(type="none", head_dim=job.shape.kv_channels, rope_theta=ROTARY_BASE)
    with device_context():
        model = build_gpt_model(
            job.shape,
            rope,
            Parallel(),
            precision=job.precision,  # type: ignore[arg-type]
            seq_length=job.seq_length,
            phase_dtype="float64",
            seed=job.seed,
            activations=job.activations,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(SHARP)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        inputs = _record_inputs(model)
        wrapped = wrap_model(model)
        optimizer = build_optimizer(wrapped, SimpleNamespace(optimizer=job.optimizer, precision=job.precision))  # type: ignore[arg-type]
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = {"forward and backward": -time.perf_counter()}
        losses = _forward_backward(wrapped, job, ids, positions, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds["forward and backward"] += now
        _, grad_norm, _ = optimizer.step()
        seconds["optimizer"] = time.perf_counter() - now
        unique = ids[0, -job.last :]
        return Outcome(
            losses=losses[0].float().cpu(),
            before=before,
            moved=model.embedding.word_embeddings.weight[unique].detach().clone(),
            inputs=[tensor[:, 0] for tensor in inputs],
            grad_norm=float(grad_norm),
            attention_forwards=_attention_forwards(model) / job.shape.num_layers,
            seconds=seconds,
            peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        )


def _forward_backward(wrapped: Any, job: LongStep, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Gradients in the main gradient buffers, as `train.loop` makes them. Returns the losses that the loss head computed on the way."""
    kept: list[Tensor] = []
    weights = torch.ones(labels.shape, device=labels.device)

    def loss_head(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        loss_sum, losses = chunked_loss_head(*args, **options)
        kept.append(losses)
        return loss_sum, losses

    def forward_step(batches: Iterator[None], model: Any) -> tuple[Tensor, Any]:
        output = model(ids, positions, None, labels=labels, loss_weights=weights)

        def loss_function(loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return loss_sum, weights.sum().to(torch.int), {}

        return output, loss_function

    with mock.patch.object(builder, "chunked_loss_head", loss_head):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([None]),
            model=[wrapped],
            num_microbatches=1,
            seq_length=job.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
    return kept[0]


def _attention_forwards(model: Any) -> int:
    return sum(layer.self_attention.core_attention.forward_calls for layer in model.decoder.layers)


def _record_inputs(model: Any) -> list[Tensor]:
    """Copies of what enters the second and later layers, in host memory."""
    recorded: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        recorded.append(hidden.detach().to("cpu", copy=True))

    for layer in model.decoder.layers[1:]:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    return recorded


@dataclass(frozen=True)
class Comparison:
    """Largest differences from the reference: of losses (absolute), and of the rows' updates (of their largest entry)."""

    loss_error: float
    update_error: float
    worst_position: int
    positions: int
    smallest_update: float  # mean of |u| of the row that moved least: far from 0 and 1 it shows the gradient's size
    largest_update: float
    grad_norm: float  # below 1, or gradients were clipped and updates cannot be compared
    attention_forwards: float
    step_seconds: dict[str, float]
    reference_seconds: float
    peak_bytes: int


def compare_with_reference(job: LongStep, outcome: Outcome) -> Comparison:
    """Losses and updates of `outcome` beside those of plain matrix products in float64."""
    began = time.perf_counter()
    device = training_device()
    ids, labels = (tensor.to(device) for tensor in job.tokens())
    at = job.positions().to(device)
    plain = PlainLlama(outcome.before, job.shape, ROTARY_BASE, ids, labels, outcome.inputs, at)
    embedded = plain.embed(ids[at]).requires_grad_()
    losses = plain.losses(embedded)
    # the last token has a label too: its loss and those before it are all that the unique tokens reach
    losses[-job.last :].sum().div(job.seq_length).backward()
    assert embedded.grad is not None
    errors = (outcome.losses[at.cpu()].double() - losses.detach().cpu()).abs()
    update = _update(plain.embed(ids[-job.last :]), outcome.moved.double())
    gradient = embedded.grad[-job.last :]
    expected = gradient / (gradient.abs() + job.optimizer.adam_eps)
    sizes = expected.abs().mean(-1)
    return Comparison(
        loss_error=errors.max().item(),
        update_error=((update - expected).abs().max() / expected.abs().max()).item(),
        worst_position=int(at[errors.argmax()]),
        positions=at.numel(),
        smallest_update=sizes.min().item(),
        largest_update=sizes.max().item(),
        grad_norm=outcome.grad_norm,
        attention_forwards=outcome.attention_forwards,
        step_seconds=outcome.seconds,
        reference_seconds=time.perf_counter() - began,
        peak_bytes=outcome.peak_bytes,
    )


def _update(old: Tensor, new: Tensor) -> Tensor:
    """u of the first step of AdamW: new = old (1 - lr wd) - lr u."""
    return (old * (1 - LR * WEIGHT_DECAY) - new) / LR
