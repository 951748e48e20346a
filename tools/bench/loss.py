"""B1, the loss of a language model's head: forward and backward with both gradients, ours beside torch, Megatron-Core, Liger and CCE.

python tools/bench/loss.py

On a GPU: h 4096, 128,256 words and an eighth of them, 8K to 256K tokens, bf16. On a CPU the twin: h 256, 8,192 words, 2K to 16K tokens,
float32. Every contender ends as it would under Megatron's DistributedDataParallel: its weight gradient added to a float32 `main_grad`
(ours adds there itself; the others return it in the dtype of the weight, which is then added).

`floor` are the three matrix products that any of them must make (logits, gradient of hidden, gradient of the weight: 6 V h t FLOPs), of
one chunk after the other, and nothing else. Bytes are the most that are alive beyond inputs, `main_grad` and the gradient of hidden.
Correctness is measured in the same processes: on 512 tokens against float64, error over the largest entry.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from formulas import PEAK_FLOPS
from harness import Case, Result, command_line, compare, lengths, machine, ratio, short, table
from models import LLAMA_8B, TINY, rope, start_groups
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.kernels.matmul import matmul_into
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import transformer_config
from mcore_longctx.parallel.chunked_loss import chunked_linear_cross_entropy, default_chunk

CHECKED = 512
CPU_CHUNK = 1024  # of the twin: 32 MiB of logits; the default, made for a GPU's vocabulary, would hold all of them
GEMM_RATE = 0.65  # share of the peak that a GEMM of these sizes is expected to reach

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [t, h], weight [v, h], labels [t]) -> sum of the losses."""


def ours_weighted(chunk: int) -> Loss:
    """Gradients made in forward: the way of our trainer."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ones = torch.ones(labels.size(0), device=labels.device)
        return chunked_linear_cross_entropy(hidden, weight, labels, loss_weights=ones, chunk=chunk)[0]

    return loss


def ours_per_token(chunk: int) -> Loss:
    """Losses first, logits again in backward."""
    return lambda hidden, weight, labels: chunked_linear_cross_entropy(hidden, weight, labels, chunk=chunk).sum()


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whole logits, widened to float32 as transformers does."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def megatron_loss(fused: bool) -> Loss:
    """Megatron's output layer and its cross entropy, as GPTModel calls them."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy

    from mcore_longctx.recipe.schema import Parallel

    start_groups()
    with device_context():
        config = transformer_config(TINY, rope(TINY), Parallel(), precision="fp32")
        layer = ColumnParallelLinear(
            8, 8, config=config, init_method=lambda _: None, bias=False, skip_weight_param_allocation=True
        )  # its sizes are those of the weight that it is given

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        layer.output_size_per_partition, layer.input_size = weight.shape
        with device_context():
            logits, _ = layer(hidden.unsqueeze(1), weight=weight)  # [t, 1, v]
            if fused:
                return fused_vocab_parallel_cross_entropy(logits, labels.unsqueeze(1), get_tensor_model_parallel_group()).sum()
            return vocab_parallel_cross_entropy(logits.float(), labels.unsqueeze(1)).sum()

    return loss


def liger_loss(accumulate: torch.dtype | None) -> Loss:
    """Liger's fused linear cross entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = {"reduction": "sum", "accum_dtype": accumulate}
    names = ("bias", "ce_weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap",
             "return_z_loss", "accum_dtype")  # fmt: skip
    defaults = {"ignore_index": -100, "lse_square_scale": 0.0, "label_smoothing": 0.0, "return_z_loss": False}
    arguments = [(defaults | options).get(name) for name in names]

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        result: Any = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *arguments)
        return result[0] if isinstance(result, tuple) else result

    return loss


def cce_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's Cut Cross Entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, reduction="sum")


def contender(name: str, chunk: int) -> Loss:
    """By its name in the table."""
    if name == "ours":
        return ours_weighted(chunk)
    if name == "ours, per token":
        return ours_per_token(chunk)
    if name == "torch":
        return torch_loss
    if name.startswith("megatron-core"):
        return megatron_loss("fused" in name)
    if name.startswith("Liger"):
        return liger_loss(torch.float32 if "float32" in name else None)
    return cce_loss


def contenders() -> list[str]:
    """What can run here."""
    names = ["ours", "ours, per token", "torch", "megatron-core"]
    if torch.cuda.is_available():  # these three compile kernels of Triton
        names.append("megatron-core, fused")
        if importlib.util.find_spec("liger_kernel"):
            names += ["Liger", "Liger, dW in float32"]
        if importlib.util.find_spec("cut_cross_entropy"):
            names.append("CCE")
    return names


class Step:
    """Forward and backward of one contender."""

    def __init__(self, name: str, hidden_size: int, words: int, tokens: int, chunk: int) -> None:
        device = training_device()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(tokens, hidden_size, generator=generator, device=device, dtype=self.dtype).requires_grad_()
        self.weight: Any = torch.randn(words, hidden_size, generator=generator, device=device, dtype=self.dtype)
        self.weight = self.weight.mul_(hidden_size**-0.5).requires_grad_()
        self.labels = torch.randint(words, (tokens,), generator=generator, device=device)
        self.main_grad = torch.zeros(words, hidden_size, device=device)
        self.loss = contender(name, chunk)
        self.facts_of_step = {"gradient bytes": self.hidden.nbytes}

    def step(self) -> None:
        """One micro-batch as under Megatron's DistributedDataParallel."""
        self.hidden.grad = None
        self._backward(self.hidden, self.labels, self.main_grad)

    def _backward(self, hidden: Tensor, labels: Tensor, main_grad: Tensor) -> Tensor:
        self.weight.main_grad, self.weight.grad_added_to_main_grad = main_grad, False
        loss = self.loss(hidden, self.weight, labels)
        loss.backward()
        if not self.weight.grad_added_to_main_grad:
            main_grad.add_(self.weight.grad)
        self.weight.grad = None
        return loss.detach()

    def states(self) -> list[Tensor]:
        """Inputs and the gradient buffer."""
        return [self.hidden, self.weight, self.labels, self.main_grad]

    def facts(self) -> dict[str, Any]:
        """Errors on the first tokens."""
        hidden = self.hidden[:CHECKED].detach().clone().requires_grad_()
        labels, main_grad = self.labels[:CHECKED], torch.zeros_like(self.main_grad)
        loss = self._backward(hidden, labels, main_grad)
        wide, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, self.weight))
        expected = F.cross_entropy(F.linear(wide, weight), labels, reduction="sum")
        expected.backward()
        pairs = {"loss": (loss, expected.detach()), "dX": (hidden.grad, wide.grad), "dW": (main_grad, weight.grad)}
        return self.facts_of_step | {what: _relative(*pair) for what, pair in pairs.items()}  # type: ignore[arg-type]


class Floor(Step):
    """The three products alone, chunk by chunk."""

    def __init__(self, hidden_size: int, words: int, tokens: int, chunk: int) -> None:
        super().__init__("torch", hidden_size, words, tokens, chunk)
        self.chunk = chunk
        self.gradient = torch.empty_like(self.hidden)
        self.logits = self.hidden.new_empty(min(chunk, tokens), words)

    @torch.no_grad()
    def step(self) -> None:
        """Nothing but products."""
        for rows, gradient in zip(self.hidden.split(self.chunk), self.gradient.split(self.chunk), strict=True):
            logits = torch.mm(rows, self.weight.t(), out=self.logits[: rows.size(0)])
            torch.mm(logits, self.weight, out=gradient)
            matmul_into(self.main_grad, logits.t(), rows, add=True)

    def states(self) -> list[Tensor]:
        """All of it."""
        return [*super().states(), self.gradient, self.logits]

    def facts(self) -> dict[str, Any]:
        """It computes no loss."""
        return {}


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def measure_size(hidden_size: int, words: int, tokens: int, chunk: int, rounds: int, **calls: int) -> dict[str, Result]:
    """All contenders at one size."""
    cases = {"floor": Case(Floor, (hidden_size, words, tokens, chunk))}
    cases |= {name: Case(Step, (name, hidden_size, words, tokens, chunk)) for name in contenders()}
    return compare(cases, rounds=rounds, **calls)


def rows(found: dict[str, Result], hidden_size: int, words: int, tokens: int) -> list[tuple[Any, ...]]:
    """Of one size: words, tokens, contender, seconds, over torch, over the floor, MiB, errors, TFLOP/s."""
    made: list[tuple[Any, ...]] = []
    medians = {name: result.spread.median if result.spread else None for name, result in found.items()}
    for name, result in found.items():
        head = (f"{words:,}", short(tokens), name)
        if result.error or result.spread is None:
            made.append((*head, result.error))
            continue
        seconds = result.spread.median
        extra = None if name == "floor" or result.peak_bytes is None else result.peak_bytes - result.facts["gradient bytes"]
        rate = 6 * words * hidden_size * tokens / seconds
        peak = next((flops for word, flops in PEAK_FLOPS.items() if word in _device_name()), None)
        made.append(
            (
                *head,
                str(result.spread),
                ratio(seconds, medians["torch"]) or "-",
                ratio(seconds, medians["floor"]),
                "-" if extra is None else f"{extra / 2**20:,.1f}",
                *(f"{result.facts[what]:.1e}" if what in result.facts else "-" for what in ("loss", "dX", "dW")),
                f"{rate / 1e12:,.3g}" + (f" ({rate / (GEMM_RATE * peak):.2f} of {GEMM_RATE:.0%} of the peak)" if peak else ""),
            )
        )
    return made


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main() -> None:
    """Print one table."""
    on_gpu = torch.cuda.is_available()
    shape = LLAMA_8B if on_gpu else TINY
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lengths, default=lengths("8K,32K,128K,256K" if on_gpu else "2K,4K,8K,16K"))
    parser.add_argument(
        "--words", type=int, nargs="+", default=[shape.vocab_size, shape.vocab_size // 8] if on_gpu else [shape.vocab_size]
    )
    parser.add_argument("--chunk", type=int, help="rows of logits at once (default: 256 MiB of them; on a CPU 1,024 rows)")
    parser.add_argument("--rounds", type=int, default=2 if on_gpu else 6, help="the first one counts bytes and is not timed")
    given = parser.parse_args()
    calls = {"warmup": 3, "calls": 10} if on_gpu else {}
    made: list[tuple[Any, ...]] = []
    for words in given.words:
        for tokens in given.tokens:
            chunk = given.chunk or (default_chunk(words, torch.bfloat16) if on_gpu else CPU_CHUNK)
            found = measure_size(shape.hidden_size, words, tokens, chunk, given.rounds, **calls)
            made += rows(found, shape.hidden_size, words, tokens)
    seconds = "s" if on_gpu else "CPU-s"
    print(f"## Loss of the head\n\n`{command_line()}`\n\n{machine()}\n")
    print(
        f"h {shape.hidden_size:,}, {'bf16' if on_gpu else 'float32'}; TFLOP/s = 6 V h t / seconds, whatever a contender really does:\n"
    )
    headers = ("words", "tokens", "contender", f"{seconds}, forward + backward", "over torch", "over the floor", "MiB beyond gradients",
               "error of loss", "of dX", "of dW", "TFLOP/s")  # fmt: skip
    print(table(headers, made))


if __name__ == "__main__":
    main()
