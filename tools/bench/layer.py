"""B3: what a training step costs under each recompute policy, beside stock Megatron-Core and beside what the kernel allows.

python tools/bench/layer.py

CPU: a tiny Llama with its loss head, forward and backward over one sequence. (a) stock layers with Megatron's DotProductAttention,
its full recompute and its logits; (b) the same with our attention kernel, the honest baseline; (c) ours under none, full and
attention_kept with chunked loss and tiled MLP. All have the same weights and must give the same loss and gradients.

CUDA: one Llama-8B layer in bf16, 32K to 512K tokens, with and without offload, for each attention kernel that runs here; the kernel
is measured alone in the same run, and the layer is held against what that rate allows.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from formulas import GEMM_SHARE, MFU_FORMULA, KernelRate, attended_seconds, kept_bytes, step_flops
from harness import (
    Case,
    Result,
    available_bytes,
    command_line,
    compare,
    lengths,
    machine,
    measure,
    print_table,
    ratio,
    short,
    table,
)
from models import LLAMA_8B, TINY, AttentionCalls, ForwardOnly, LayersStep, TrainingStep, our_model, stock_model, with_layers
from rates import kernel_rate, peak_flops, usable_kernels

from mcore_longctx.recipe.schema import Activations, TokenCount

STOCK, STOCK_FLASH = "stock, s x s scores", "stock, our kernel"
POLICIES = ("none", "full", "attention_kept")
LOSS_CHUNK, MLP_TILE = 1024, 1024
SCORE_COPIES = 6
"""s x s matrices that Megatron's DotProductAttention has at its largest: counted 5.2 at 8K tokens."""
SAME_LOSS, SAME_NORM = 1e-5, 1e-4  # relative, fp32
TARGET = "targets at 16K, attention_kept over stock full recompute: at most 0.50 of its peak bytes and 0.85 of its CPU-seconds"


def contender(name: str, tokens: int) -> TrainingStep:
    """The step of one contender."""
    if name in (STOCK, STOCK_FLASH):
        flash = name == STOCK_FLASH
        return TrainingStep(stock_model(TINY, tokens, flash=flash), TINY, tokens, is_stock=True, with_mask=not flash)
    return TrainingStep(our_model(TINY, tokens, activations(name)), TINY, tokens)


def activations(policy: str, *, offload: bool = False, chunk: int = LOSS_CHUNK, tile: int = MLP_TILE) -> Activations:
    """A recompute policy with chunked loss and tiled MLP."""
    return Activations(
        recompute=policy,  # type: ignore[arg-type]
        offload_fraction=1.0 if offload else 0.0,
        mlp_tile=TokenCount(tile),
        loss_chunk=TokenCount(chunk),
    )


def too_large(tokens: int) -> str | None:
    """Why stock attention is left out at this length, or None."""
    needed = TINY.num_attention_heads * tokens**2 * 4 * SCORE_COPIES
    there = available_bytes()
    if needed < 0.7 * there:
        return None
    return f"left out: {SCORE_COPIES} copies of s x s scores take {needed / 2**30:.0f} GiB, {there / 2**30:.0f} are free"


def training_steps(tokens: int, rounds: int) -> dict[str, Result]:
    """All contenders at one length; raises if they do not compute the same."""
    names = [STOCK, STOCK_FLASH, *POLICIES]
    left_out = too_large(tokens)
    cases = {name: Case(contender, (name, tokens)) for name in names if name != STOCK or left_out is None}
    results = compare(cases, rounds=rounds)
    reference = results[STOCK_FLASH]
    for name, result in results.items():
        if result.error is None and reference.error is None:
            _check_same(name, result.facts, reference.facts)
    return {STOCK: Result(error=left_out), **results} if left_out else results


def _check_same(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for what, tolerance in (("loss", SAME_LOSS), ("grad_norm", SAME_NORM)):
        if abs(found[what] - wanted[what]) > tolerance * abs(wanted[what]):
            sys.exit(f"{name}: {what} is {found[what]:.8g}, of {STOCK_FLASH} {wanted[what]:.8g}: not the same computation")


def training_rows(tokens: int, results: dict[str, Result], peak: float) -> list[tuple[Any, ...]]:
    """(tokens, contender, KB per token counted and resident, ratios of bytes, CPU-s, ratios, attention calls, GFLOP/s, MFU)."""
    flops = step_flops(TINY, tokens).total
    rows: list[tuple[Any, ...]] = []
    for name, result in results.items():
        if result.error is not None:
            rows.append((short(tokens), name, result.error, *["-"] * 8))
            continue
        assert result.spread is not None
        assert result.peak_bytes is not None
        assert result.resident_bytes is not None
        calls: AttentionCalls = result.facts["attention"]
        seconds = result.spread.median
        rows.append(
            (
                short(tokens),
                name,
                f"{result.peak_bytes / tokens / 1024:.1f}",
                f"{result.resident_bytes / tokens / 1024:.1f}",
                _two(results, lambda one: one.peak_bytes, name),
                str(result.spread),
                _two(results, lambda one: one.spread.median if one.spread else None, name),
                "in two products" if calls.forward == 0 else f"{calls.forward:g} + {calls.backward:g}",
                f"{flops / seconds / 1e9:.1f}",
                f"{flops / seconds / peak:.0%}",
            )
        )
    return rows


def _two(results: dict[str, Result], value: Any, name: str) -> str:
    """Ratios to both baselines."""
    return " / ".join(ratio(value(results[name]), value(results[base])) or "-" for base in (STOCK, STOCK_FLASH))


# ------------------------------------------------------------------------------------------------------------------ bytes kept


def kept_rows() -> list[tuple[Any, ...]]:
    """(policy, counted bytes per token and layer, formula, difference): one more layer, at the end of the forward pass."""
    rows: list[tuple[Any, ...]] = []
    for policy in POLICIES:
        results = [measure(Case(_bytes_after_forward, (policy, layers)), count_bytes=False) for layers in (1, 2)]
        one, two = (result.facts.get("bytes") for result in results)
        if one is None or two is None:
            rows.append((policy, results[0].error or results[1].error, "-", "-"))
            continue
        counted = (two - one) / KEPT_TOKENS
        formula = kept_bytes(TINY, policy, 4)
        rows.append(
            (policy, f"{counted:,.10g}", f"{formula:,}", "exact" if counted == formula else f"{counted / formula - 1:+.1%}")
        )
    return rows


KEPT_TOKENS = 1024


def _bytes_after_forward(policy: str, layers: int) -> ForwardOnly:
    shape = with_layers(TINY, layers)
    return ForwardOnly(our_model(shape, KEPT_TOKENS, activations(policy, chunk=256, tile=512)), shape, KEPT_TOKENS)


# ------------------------------------------------------------------------------------------------------------------ CUDA


def layer_cases(tokens: int, kernel: str) -> dict[str, Case]:
    """One Llama-8B layer under each policy; what keeps little also with all of it on the host."""
    shape, tile = with_layers(LLAMA_8B, 1), 8192

    def case(policy: str, *, offload: bool = False) -> Case:
        return Case(LayersStep, (shape, tokens, activations(policy, offload=offload, tile=tile), "bf16", kernel))

    cases = {policy: case(policy) for policy in POLICIES}
    return cases | {f"{policy}, offload": case(policy, offload=True) for policy in ("full", "attention_kept")}


def check_layers(results: dict[str, Result]) -> None:
    """End with a message if policies do not agree in the norms of their gradients (bf16, attention's backward with atomics)."""
    told = {name: result.facts for name, result in results.items() if result.error is None}
    for name, facts in told.items():
        for what, wanted in told.get("full", facts).items():
            if abs(facts[what] - wanted) > 0.01 * wanted:
                sys.exit(f"{name}: {what} is {facts[what]:.6g}, under full {wanted:.6g}: not the same computation")


def layer_rows(tokens: int, results: dict[str, Result], kernel: KernelRate, peak: float) -> list[tuple[Any, ...]]:
    """(tokens, policy, ms, over full, GiB allocated and reserved, MFU, MFU that the kernel's rate allows, share, clocks)."""
    shape = with_layers(LLAMA_8B, 1)
    flops = step_flops(shape, tokens, head=False).total
    full = results["full"].spread
    rows: list[tuple[Any, ...]] = []
    for name, result in results.items():
        if result.error is not None or result.spread is None:
            rows.append((short(tokens), name, result.error, *["-"] * 7))
            continue
        seconds = result.spread.median
        allowed = attended_seconds(shape, tokens, name.partition(",")[0], kernel, GEMM_SHARE * peak)
        clocks = " ".join(f"{max(one[i] for one in result.clocks):.0f}" for i in (0, 1)) if result.clocks else "-"
        rows.append(
            (
                short(tokens),
                name,
                f"{1e3 * seconds:.1f} ({1e3 * result.spread.low:.1f} to {1e3 * result.spread.high:.1f})",
                ratio(full.median if full else None, seconds),
                f"{(result.peak_bytes or 0) / 2**30:.1f}",
                f"{(result.resident_bytes or 0) / 2**30:.1f}",
                f"{flops / seconds / peak:.1%}",
                f"{flops / allowed / peak:.1%}",
                f"{allowed / seconds:.0%}",
                clocks,
            )
        )
    return rows


def cpu_tables(sizes: list[int], rounds: list[int]) -> None:
    """Print what can be measured without CUDA."""
    peak, what = peak_flops()
    print("### A training step of a tiny Llama\n")
    print(
        f"fp32, one core; {TINY.num_layers} layers, h {TINY.hidden_size}, {TINY.num_attention_heads}/{TINY.num_query_groups} heads of "
        f"{TINY.kv_channels}, f {TINY.ffn_hidden_size}, vocabulary {TINY.vocab_size:,}; ours with chunks of {LOSS_CHUNK:,} tokens in the "
        f"loss and {MLP_TILE:,} in the MLP. KiB per token are the most above weights, gradients and tokens: live tensors, and beside it "
        f"the growth of resident memory. Ratios: to stock with s x s scores / to stock with our kernel. {MFU_FORMULA}; peak: {what}.\n"
    )
    headers = ("tokens", "step", "KiB/token", "resident", "ratio of bytes", "CPU-s", "ratio", "attention calls per layer, forward + backward",
               "GFLOP/s", "MFU")  # fmt: skip
    found: dict[int, dict[str, Result]] = {}

    def batches() -> Iterator[list[tuple[Any, ...]]]:
        for tokens, count in zip(sizes, rounds, strict=True):
            found[tokens] = training_steps(tokens, count)
            yield training_rows(tokens, found[tokens], peak)

    print_table(headers, batches())
    print(f"\n{TARGET}.\n")
    print("### Bytes kept of a token and layer until its backward\n")
    print(f"Counted at the end of the forward pass, fp32, {KEPT_TOKENS:,} tokens:\n")
    print(table(("policy", "counted", "formula", ""), kept_rows()))
    print("\n### What the kernel allows\n")
    print("One layer's kernel alone in the same run; `allowed` has linear layers and loss head at 60 % of the peak:\n")
    headers = ("tokens", "policy", "kernel GFLOP/s, forward / backward", "CPU-s allowed", "CPU-s", "share")
    print(table(headers, allowed_rows(found, peak)))
    print("\n### One Llama-8B layer on a GPU, 32K to 512K tokens\n\nnot measured: no CUDA device. Targets: attention_kept at least 1.18 times "
          "as fast as full at 128K and 1.23 times at 512K, at least 95 % of what its kernel's rate allows.")  # fmt: skip


def allowed_rows(found: dict[int, dict[str, Result]], peak: float) -> list[tuple[Any, ...]]:
    """(tokens, policy, kernel's rates, seconds that they allow, seconds, share)."""
    rows: list[tuple[Any, ...]] = []
    for tokens, results in found.items():
        rate = kernel_rate(TINY, tokens, torch.float32)
        for policy in POLICIES:
            spread = results[policy].spread
            if isinstance(rate, str) or spread is None:
                rows.append((short(tokens), policy, rate if isinstance(rate, str) else results[policy].error, "-", "-", "-"))
                continue
            allowed = attended_seconds(TINY, tokens, policy, rate, GEMM_SHARE * peak, head=True)
            rates = f"{rate.forward / 1e9:.0f} / {rate.backward / 1e9:.0f}"
            rows.append(
                (short(tokens), policy, rates, f"{allowed:.3g}", f"{spread.median:.3g}", f"{allowed / spread.median:.0%}")
            )
    return rows


def cuda_tables(sizes: list[int], rounds: int, wanted: list[str]) -> None:
    """Print what needs a GPU."""
    peak, what = peak_flops()
    usable = usable_kernels(torch.bfloat16, LLAMA_8B.kv_channels)
    kernels = {name: reason for name, reason in usable.items() if not wanted or name in wanted}
    print(f"One Llama-8B layer, bf16, MLP in tiles of 8,192 tokens. {MFU_FORMULA}; peak: {what}.")
    print(
        "GiB are above weights, gradients and input. Allowed: attention at the rate of its kernel alone, linear layers at 60 % of the peak.\n"
    )
    rates: dict[tuple[str, int], KernelRate | str] = {}

    def alone() -> Iterator[list[tuple[Any, ...]]]:
        for kernel, tokens in itertools.product(kernels, sizes):
            rate = rates[kernel, tokens] = kernel_rate(LLAMA_8B, tokens, torch.bfloat16, kernel)
            numbers = (
                (rate,) if isinstance(rate, str) else tuple(f"{n / 1e12:.0f}" for n in (rate.forward, rate.backward, rate.both))
            )
            yield [(kernel, short(tokens), *numbers)]

    def layers(kernel: str) -> Iterator[list[tuple[Any, ...]]]:
        for tokens in sizes:
            rate = rates[kernel, tokens]
            if isinstance(rate, str):
                yield [(short(tokens), kernel, rate)]
                continue
            results = compare(layer_cases(tokens, kernel), rounds=rounds, warmup=3 if tokens <= 2**17 else 1, calls=3)
            check_layers(results)
            yield layer_rows(tokens, results, rate, peak)

    print_table(("kernel alone", "tokens", "TFLOP/s, forward", "backward", "both"), alone())
    headers = (
        "tokens",
        "policy",
        "ms",
        "full / this",
        "GiB allocated",
        "reserved",
        "MFU",
        "allowed",
        "share",
        "SM MHz and W at most",
    )
    for kernel, reason in kernels.items():
        print(f"\n{reason}:\n")
        print_table(headers, layers(kernel))
    print("\nTargets: attention_kept at least 1.18 times as fast as full at 128K and 1.23 times at 512K, share at least 95 %, offload at most 1.02 "
          "times as long.")  # fmt: skip


def main() -> None:
    """Print the tables of this machine."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lengths, default=lengths("32K,64K,128K,256K,512K" if on_cuda else "4K,8K,16K,32K,64K"))
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=[], help="CUDA: only these")
    parser.add_argument("--rounds", type=int, help="of each length; CPU default: 5 to 8K, 3 at 16K, 2 at 32K, 1 above. CUDA: 4")
    given = parser.parse_args()
    print(f"## B3 A layer under each recompute policy\n\n`{command_line()}`\n\n{machine()}\n")
    if on_cuda:
        cuda_tables(given.tokens, given.rounds or 4, given.kernels)
    else:
        usual = [5 if tokens <= 2**13 else 3 if tokens <= 2**14 else 2 if tokens <= 2**15 else 1 for tokens in given.tokens]
        cpu_tables(given.tokens, [given.rounds] * len(usual) if given.rounds else usual)


if __name__ == "__main__":
    main()
