"""B2, the feed-forward of a recomputed layer: its first run, its second, and backward with all gradients, tiled and whole.

python tools/bench/tiled_mlp.py

On a GPU: h 4096, f 14336, 32K to 512K tokens, bf16, tiles of 4K to 32K. On a CPU the twin: h 256, f 896, 4K to 64K tokens, float32.
Every contender ends as it would under Megatron's DistributedDataParallel: weight gradients added to float32 `main_grad`s.

    ours, whole         first run without a tape; second run skipped; backward makes gate and up again, not the product with down
    ours, tiles of n    the same, n tokens at a time: this is what the target compares with `ours, whole`
    full recompute      plain torch, twice: what Megatron's full recompute does to its MLP
    tape                plain torch once, everything kept: no recompute
    floor               the products of `ours, whole` alone, nothing between them

Bytes are the most that are alive beyond x, weights, `main_grad`s, the upstream gradient, the result of the first run and the gradient of
x. Correctness is measured in the same processes: on 512 tokens against float64, error over the largest entry.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from formulas import PEAK_FLOPS
from harness import Case, Result, command_line, compare, lengths, machine, ratio, short, table
from models import LLAMA_8B, TINY
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mcore_longctx.kernels.matmul import matmul_into
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.parallel.tiled_mlp import tiled_swiglu

CHECKED = 512
GEMM_RATE = 0.65  # share of the peak that a GEMM of these sizes is expected to reach
PRODUCTS = 22  # x h f t FLOPs: 6 first run, 4 gate and up again, 12 gradients

Layer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [t, 1, h], gate_up [2 f, h], down [h, f]) -> (result of the first run, what backward starts from)."""


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Plain torch, as Megatron's MLP without fused kernels."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def ours(tile: int | None) -> Layer:
    """`TiledMLP` in a recomputed layer."""

    def layer(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = tiled_swiglu(x, gate_up, down, tile=tile)
        return out, tiled_swiglu(x, gate_up, down, tile=tile, skip_forward=True)

    return layer


def full_recompute(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's checkpoint, which runs all of it twice."""
    out = checkpoint(swiglu, x, gate_up, down, use_reentrant=True)
    return out.detach(), out


def tape(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing is recomputed."""
    out = swiglu(x, gate_up, down)
    return out.detach(), out


def in_second_run(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Layer:
    """A tiled MLP that does not know of recompute: it runs in the first run, and again in the second, and again in its backward."""

    def layer(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = forward(x, gate_up, down)
        return out, forward(x, gate_up, down)

    return layer


def deepspeed(tile: int) -> Layer:
    """DeepSpeed's TiledMLP (ALST)."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        batch_first = x.transpose(0, 1)  # it cuts dimension 1
        weights = SimpleNamespace(gate_up=gate_up, down=down)
        shards = math.ceil(x.size(0) / tile)
        out = TiledMLP.apply(lambda m, part: swiglu(part, m.gate_up, m.down), weights, batch_first, shards, [gate_up, down])
        return out.transpose(0, 1)

    return in_second_run(forward)


def liger(tile: int) -> Layer:
    """Liger's tiled SwiGLU."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.ops.tiled_mlp import apply_tiled_mlp

    def mlp(weights: Any, part: Tensor) -> Tensor:
        gate, up = F.linear(part, weights.gate_up).chunk(2, dim=-1)
        return F.linear(LigerSiLUMulFunction.apply(gate, up), weights.down)

    def forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights = SimpleNamespace(gate_up=gate_up, down=down)
        shards = math.ceil(x.size(0) / tile)
        return apply_tiled_mlp(mlp, weights, x.transpose(0, 1), shards, [gate_up, down]).transpose(0, 1)

    return in_second_run(forward)


def contender(name: str, tile: int | None) -> Layer:
    """By its name in the table."""
    if name.startswith("ours"):
        return ours(tile)
    if name.startswith("DeepSpeed"):
        assert tile is not None
        return deepspeed(tile)
    if name.startswith("Liger"):
        assert tile is not None
        return liger(tile)
    return full_recompute if name == "full recompute" else tape


def contenders(tiles: list[int], tokens: int) -> dict[str, int | None]:
    """Name and tile of what can run here."""
    named: dict[str, int | None] = {"ours, whole": None}
    smaller = [tile for tile in tiles if tile < tokens]
    named |= {f"ours, tiles of {short(tile)}": tile for tile in smaller}
    named |= {"full recompute": None, "tape": None}
    if torch.cuda.is_available() and smaller:
        for module, name in (("deepspeed", "DeepSpeed"), ("liger_kernel", "Liger")):
            if importlib.util.find_spec(module):
                named[f"{name}, tiles of {short(smaller[-1])}"] = smaller[-1]
    return named


class Step:
    """The two runs and the backward of one contender."""

    def __init__(self, name: str, tile: int | None, hidden_size: int, inner: int, tokens: int) -> None:
        device = training_device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Any:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(std)

        self.x, self.upstream = normal(tokens, 1, hidden_size).requires_grad_(), normal(tokens, 1, hidden_size)
        self.weights = [
            normal(2 * inner, hidden_size, std=hidden_size**-0.5).requires_grad_(),
            normal(hidden_size, inner, std=inner**-0.5).requires_grad_(),
        ]
        self.main_grads = [torch.zeros(weight.shape, device=device) for weight in self.weights]
        self.layer = contender(name, tile)
        self.out: Any = None

    def step(self) -> None:
        """One micro-batch as under Megatron's DistributedDataParallel."""
        self.x.grad = self.out = None
        self.out = self._backward(self.x, self.upstream, self.main_grads)

    def _backward(self, x: Tensor, upstream: Tensor, main_grads: list[Tensor]) -> Tensor:
        for weight, main_grad in zip(self.weights, main_grads, strict=True):
            weight.main_grad, weight.grad_added_to_main_grad = main_grad, False
        out, end = self.layer(x, *self.weights)
        end.backward(upstream)
        for weight, main_grad in zip(self.weights, main_grads, strict=True):
            if not weight.grad_added_to_main_grad:
                main_grad.add_(weight.grad)
            weight.grad = None
        return out

    def states(self) -> list[Tensor]:
        """Inputs and gradient buffers."""
        return [self.x, self.upstream, *self.weights, *self.main_grads]

    def facts(self) -> dict[str, Any]:
        """Errors on the first tokens."""
        x, upstream = self.x[:CHECKED].detach().clone().requires_grad_(), self.upstream[:CHECKED]
        main_grads = [torch.zeros_like(buffer) for buffer in self.main_grads]
        out = self._backward(x, upstream, main_grads)
        wide = [tensor.detach().double().requires_grad_() for tensor in (x, *self.weights)]
        expected = swiglu(*wide)
        expected.backward(upstream.double())
        pairs = {"out": (out, expected.detach()), "dX": (x.grad, wide[0].grad)}
        facts: dict[str, Any] = {what: _relative(*pair) for what, pair in pairs.items()}  # type: ignore[arg-type]
        facts["dW"] = max(_relative(found, leaf.grad) for found, leaf in zip(main_grads, wide[1:], strict=True))  # type: ignore[arg-type]
        return facts | {"bytes of result and gradient": 2 * self.x.nbytes}


class Floor(Step):
    """The products alone."""

    def __init__(self, hidden_size: int, inner: int, tokens: int, tile: int) -> None:
        super().__init__("tape", None, hidden_size, inner, tokens)
        self.tile = tile
        self.gate_up = self.x.new_empty(min(tile, tokens), 2 * inner)
        self.result = torch.empty_like(self.x)

    @torch.no_grad()
    def step(self) -> None:
        """Nothing but products."""
        gate_up_weight, down_weight = self.weights
        inner = down_weight.size(1)
        flat = [tensor.flatten(0, 1).split(self.tile) for tensor in (self.x, self.upstream, self.result)]
        for rows, upstream, result in zip(*flat, strict=True):
            gate_up = torch.mm(rows, gate_up_weight.t(), out=self.gate_up[: rows.size(0)])
            torch.mm(gate_up[:, :inner], down_weight.t(), out=result)
            torch.mm(rows, gate_up_weight.t(), out=gate_up)
            torch.mm(upstream, down_weight, out=gate_up[:, :inner])
            matmul_into(self.main_grads[1], upstream.t(), gate_up[:, :inner], add=True)
            torch.mm(gate_up, gate_up_weight, out=result)
            matmul_into(self.main_grads[0], gate_up.t(), rows, add=True)

    def states(self) -> list[Tensor]:
        """All of it."""
        return [*super().states(), self.gate_up, self.result]

    def facts(self) -> dict[str, Any]:
        """It computes no feed-forward."""
        return {}


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def rows(found: dict[str, Result], hidden_size: int, inner: int, tokens: int) -> list[tuple[Any, ...]]:
    """Of one length."""
    made: list[tuple[Any, ...]] = []
    medians = {name: result.spread.median if result.spread else None for name, result in found.items()}
    peak = next((flops for word, flops in PEAK_FLOPS.items() if word in _device_name()), None)
    for name, result in found.items():
        if result.error or result.spread is None:
            made.append((short(tokens), name, result.error))
            continue
        seconds = result.spread.median
        extra = None
        if name != "floor" and result.peak_bytes is not None:
            extra = result.peak_bytes - result.facts["bytes of result and gradient"]
        rate = PRODUCTS * hidden_size * inner * tokens / seconds
        made.append(
            (
                short(tokens),
                name,
                str(result.spread),
                *(ratio(seconds, medians[base]) for base in ("ours, whole", "full recompute", "floor")),
                "-" if extra is None else f"{extra / 2**20:,.1f}",
                *(f"{result.facts[what]:.1e}" if what in result.facts else "-" for what in ("out", "dX", "dW")),
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
    parser.add_argument("--tokens", type=lengths, default=lengths("32K,128K,512K" if on_gpu else "4K,16K,64K"))
    parser.add_argument("--tiles", type=lengths, default=lengths("4K,8K,32K" if on_gpu else "512,1K,4K"))
    parser.add_argument("--rounds", type=int, default=2 if on_gpu else 6, help="the first one counts bytes and is not timed")
    given = parser.parse_args()
    calls = {"warmup": 3, "calls": 10} if on_gpu else {}
    sizes = (shape.hidden_size, shape.ffn_hidden_size)
    made: list[tuple[Any, ...]] = []
    for tokens in given.tokens:
        cases = {"floor": Case(Floor, (*sizes, tokens, given.tiles[-1]))}
        cases |= {name: Case(Step, (name, tile, *sizes, tokens)) for name, tile in contenders(given.tiles, tokens).items()}
        made += rows(compare(cases, rounds=given.rounds, **calls), *sizes, tokens)
    seconds = "s" if on_gpu else "CPU-s"
    print(f"## Feed-forward of a recomputed layer\n\n`{command_line()}`\n\n{machine()}\n")
    print(f"h {sizes[0]:,}, f {sizes[1]:,}, {'bf16' if on_gpu else 'float32'};"
          f" TFLOP/s = {PRODUCTS} h f t / seconds, whatever a contender really does:\n")  # fmt: skip
    headers = ("tokens", "contender", f"{seconds}, both runs + backward", "over ours, whole", "over full recompute", "over the floor",
               "MiB beyond result and gradient", "error of the result", "of dX", "of dW", "TFLOP/s")  # fmt: skip
    print(table(headers, made))


if __name__ == "__main__":
    main()
