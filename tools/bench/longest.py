"""B4: the longest sequence that fits one device, what each layer adds, and how well the bytes are known beforehand.

python tools/bench/longest.py

CPU: bytes counted at three lengths against the formula (`formulas.peak_bytes`: bytes kept by all layers, and the working set of one).

CUDA: 4 and 8 layers as wide as Llama-8B with its vocabulary, bf16, AdamW and fp32 gradients and main weights on the device; chunked loss,
tiled MLP, attention_kept, with and without offload. The bytes at three lengths give a line, the line a longest length, and that length
is then run in steps of 16K: it must run, and the next must not. The slopes of 4 and 8 layers give the bytes of a layer and token.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from formulas import MFU_FORMULA, kept_bytes, peak_bytes, step_flops, working_elements
from harness import Case, Result, command_line, lengths, machine, measure, print_table, short, table
from models import LLAMA_8B, TINY, TrainingStep, our_model, with_layers
from rates import peak_flops

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_longctx.errors import ConfigError
from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.recipe.schema import Activations, OptimizerSection, TokenCount
from mcore_longctx.train.optimizer import build_optimizer, prepare_optimizer_state, wrap_model

STEP = 16 * 2**10
LADDER = "ALST on one GPU, full recompute, Llama-8B with all 32 layers: 500K tokens on 80 GB, 1.2M on 141 GB"


class OptimizedStep(TrainingStep):
    """A whole training step of the product: Megatron's gradient buffers, schedule and DistributedOptimizer."""

    def __init__(self, shape: ModelShape, tokens: int, activations: Activations, precision: str) -> None:
        super().__init__(our_model(shape, tokens, activations, precision=precision), shape, tokens)
        for parameter in self.model.parameters():
            parameter.grad = None
        with device_context():
            self.wrapped = wrap_model(self.model)
            section = OptimizerSection(lr=1e-5)
            self.optimizer = build_optimizer(self.wrapped, SimpleNamespace(optimizer=section, precision=precision))  # type: ignore[arg-type]
            with contextlib.suppress(ConfigError):  # a fused Adam makes its state when it is built
                prepare_optimizer_state(self.optimizer)
        self.tokens = tokens

    def states(self) -> Iterator[Any]:
        """Weights and the batch."""
        yield from self.model.parameters()
        yield from self.batch

    def step(self) -> None:
        """Forward, backward, update."""
        with device_context():
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter([None]),
                model=[self.wrapped],
                num_microbatches=1,
                seq_length=self.tokens,
                micro_batch_size=1,
                forward_only=False,
            )
            self.optimizer.step()

    def _forward_step(self, batches: Iterator[None], model: Any) -> tuple[torch.Tensor, Any]:
        ids, positions, labels = self.batch
        weights = torch.ones(labels.shape, device=labels.device)

        def loss_function(loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            self.loss = loss_sum.item() / labels.numel()
            return loss_sum, weights.sum().to(torch.int), {}

        return model(ids, positions, None, labels=labels, loss_weights=weights), loss_function

    def facts(self) -> dict[str, Any]:
        """Loss, and all that was allocated on the device at the largest, states included."""
        return {"loss": self.loss, "allocated": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


# ------------------------------------------------------------------------------------------------------------------ CPU


def counted_rows(sizes: list[int], layer_counts: list[int]) -> list[tuple[Any, ...]]:
    """(policy, layers, tokens, MiB counted, MiB predicted, difference)."""
    rows: list[tuple[Any, ...]] = []
    for policy, layers, tokens in itertools.product(("full", "attention_kept"), layer_counts, sizes):
        shape = with_layers(TINY, layers)
        result = measure(Case(_counted_step, (shape, tokens, policy)), count_bytes=True)
        predicted = peak_bytes(shape, tokens, policy, 4)
        if result.peak_bytes is None:
            rows.append((policy, layers, short(tokens), result.error, f"{predicted / 2**20:,.1f}", "-"))
            continue
        difference = predicted / result.peak_bytes - 1
        rows.append(
            (
                policy,
                layers,
                short(tokens),
                f"{result.peak_bytes / 2**20:,.1f}",
                f"{predicted / 2**20:,.1f}",
                f"{difference:+.2%}",
            )
        )
    return rows


def _counted_step(shape: ModelShape, tokens: int, policy: str) -> TrainingStep:
    tiles = Activations(recompute=policy, mlp_tile=TokenCount(128), loss_chunk=TokenCount(64))  # type: ignore[arg-type]
    return TrainingStep(our_model(shape, tokens, tiles), shape, tokens)


def derived_rows() -> list[tuple[Any, ...]]:
    """(policy, bytes kept per token and layer, working set per token, 4 layers on 80 GB): Llama-8B's sizes, bf16, by the formula."""
    rows: list[tuple[Any, ...]] = []
    for policy in ("full", "attention_kept"):
        kept, working = kept_bytes(LLAMA_8B, policy, 2), 2 * working_elements(LLAMA_8B, policy)
        rows.append((policy, f"{kept:,}", f"{working:,}", f"{working + 4 * kept:,}", f"{working + 32 * kept:,}"))
    return rows


# ------------------------------------------------------------------------------------------------------------------ CUDA


def longest_rows(layer_counts: list[int], sizes: list[int], trials: int) -> Iterator[list[tuple[Any, ...]]]:
    """Batches of (layers, offload, bytes per token, states GiB, predicted, longest that ran, s/step, MFU, first that did not)."""
    slopes: dict[tuple[int, float], float] = {}
    peak, _ = peak_flops()
    room = torch.cuda.get_device_properties(0).total_memory
    for layers, offload in itertools.product(layer_counts, (0.0, 1.0)):
        shape = with_layers(LLAMA_8B, layers)
        found = {tokens: _run(shape, tokens, offload) for tokens in sizes}
        fitted = {tokens: result.facts["allocated"] for tokens, result in found.items() if result.error is None}
        name = (layers, "all layers" if offload else "none")
        if len(fitted) < 2:
            yield [(*name, next(result.error for result in found.values() if result.error))]
            continue
        slope, states = np.polyfit(list(fitted), list(fitted.values()), 1)
        slopes[layers, offload] = slope
        predicted = int((0.97 * room - states) / slope) // STEP * STEP
        longest, result, failed = _boundary(shape, predicted, offload, trials)
        seconds = result.spread.median if result is not None and result.spread else None
        mfu = f"{step_flops(shape, longest).total / seconds / peak:.1%}" if seconds else None
        yield [
            (*name, f"{slope:,.0f}", f"{states / 2**30:.1f}", short(predicted), short(longest) if longest else None,
             f"{seconds:.1f}" if seconds else None, mfu, short(failed) if failed else None)
        ]  # fmt: skip
    for offload in (0.0, 1.0):
        if all((layers, offload) in slopes for layers in layer_counts) and len(layer_counts) > 1:
            few, many = min(layer_counts), max(layer_counts)
            each = (slopes[many, offload] - slopes[few, offload]) / (many - few)
            yield [(f"slope of a layer, {'offloaded' if offload else 'kept'}", "-", f"{each:,.0f}", *["-"] * 6)]


def _run(shape: ModelShape, tokens: int, offload: float) -> Result:
    activations = Activations(recompute="attention_kept", offload_fraction=offload)
    return measure(Case(OptimizedStep, (shape, tokens, activations, "bf16")), count_bytes=True)


def _boundary(shape: ModelShape, start: int, offload: float, trials: int) -> tuple[int, Result | None, int]:
    """(longest that ran, its result, shortest that did not), in steps of 16K from `start` on."""
    longest, best, failed, tokens = 0, None, 0, start
    for _ in range(trials):
        result = _run(shape, tokens, offload)
        if result.error is None:
            longest, best = tokens, result
            tokens += STEP
        else:
            failed = tokens
            tokens -= STEP
        if longest and failed:
            break
    return longest, best, failed


def main() -> None:
    """Print the tables of this machine."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lengths, default=lengths("32K,64K,128K" if on_cuda else "4K,8K,16K"))
    parser.add_argument("--layers", type=lengths, default=[4, 8] if on_cuda else [2, 4])
    parser.add_argument("--trials", type=int, default=6, help="CUDA: runs around the longest length")
    given = parser.parse_args()
    print(f"## B4 The longest sequence on one device\n\n`{command_line()}`\n\n{machine()}\n")
    if on_cuda:
        print(f"Llama-8B's width, vocabulary {LLAMA_8B.vocab_size:,}, bf16, AdamW on the device. {MFU_FORMULA}.\n")
        headers = ("layers", "offload", "bytes per token", "states GiB", "predicted", "longest", "s/step", "MFU", "did not fit")
        print_table(headers, longest_rows(given.layers, given.tokens, given.trials))
        print(f"\n{LADDER}; target: 1.3 times these, by slope where host memory ends.")
        return
    print(
        "Training step of the tiny Llama, fp32, tiles of 128 tokens in the MLP and 64 in the loss, bytes beyond weights and gradients:\n"
    )
    print(
        table(
            ("policy", "layers", "tokens", "MiB counted", "MiB by formula", "difference"),
            counted_rows(given.tokens, given.layers),
        )
    )
    print(
        "\nThe same formula for Llama-8B's sizes in bf16, bytes per token (derived; on a GPU kernels may add to it: not measured):\n"
    )
    print(table(("policy", "kept per layer", "working set", "4 layers", "32 layers"), derived_rows()))
    print(f"\n### Longest sequence on one GPU\n\nnot measured: no CUDA device. {LADDER}; target: 1.3 times these.")


if __name__ == "__main__":
    main()
