"""B10, one prompt and what follows it: the prefill, a question of 32 tokens on its cache, and one token of greedy decoding.

python tools/bench/decode.py

On a GPU: a Llama of 1.2 billion parameters in bf16, 16K to 512K tokens. On a CPU the twin in float32, 4K to 32K tokens, one thread.

A token cannot be decoded faster than the weights (without the embedding's table) and the cache are read once: `limit` is their bytes over
the bandwidth of a copy, measured in the same process (what is read and what is written both count). `bytes` is the most that was alive in
a token's step beside weights and cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, command_line, lengths, machine, measure, print_table, short
from models import TINY, our_model, random_tokens
from torch import Tensor

from mcore_longctx.evaluate.cached import greedy, prefill, score_suffix
from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import training_device
from mcore_longctx.model.kv_cache import Branch, extend
from mcore_longctx.recipe.schema import Activations

LLAMA_1B = ModelShape(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=128256,
)
QUESTION, CALLS = 32, 10
COPIED = 2**30 if torch.cuda.is_available() else 2**28
HEADERS = (
    "prompt",
    "prefill s",
    f"question of {QUESTION} s",
    "prefill / question",
    "token ms",
    "limit ms",
    "limit / token",
    "bytes",
)


class Decoding:
    """A prompt that is there; a step decodes one token after a question."""

    def __init__(self, shape: ModelShape, tokens: int, precision: str) -> None:
        self.model = our_model(shape, tokens, Activations(), precision=precision).eval()
        ids = random_tokens(shape, tokens + QUESTION)[0][0].cpu().numpy()
        self.prompt, self.question = ids[:tokens], ids[tokens:]
        prefill(self.model, self.prompt[:1024])  # what is made once
        self.prefill_seconds = seconds(lambda: setattr(self, "cache", prefill(self.model, self.prompt)))
        self.branch = Branch(self.cache)
        extend(self.model, self.branch, torch.from_numpy(self.question).to(training_device()), self.row(0))
        self.token = torch.zeros(1, dtype=torch.int64, device=training_device())

    def row(self, index: int) -> Tensor:
        """One row of logits."""
        return torch.tensor([index], device=training_device())

    def states(self) -> Iterator[Tensor]:
        """Weights and cache."""
        yield from self.model.parameters()
        yield from (rows for layers in (self.cache.layers, self.branch.layers) for layer in layers for rows in layer)
        yield self.cache.next_logits
        yield self.token

    def step(self) -> None:
        """What `greedy` does for a token."""
        extend(self.model, self.branch.fork(), self.token, self.row(0)).argmax(-1).item()

    def facts(self) -> dict[str, float]:
        """Seconds of the rest, bytes that a token must read, bytes a second of a copy."""
        asked = [seconds(lambda: score_suffix(self.model, self.cache, self.question, QUESTION // 2)) for _ in range(3)]
        said = greedy(self.model, self.cache, self.question, max_new_tokens=4)
        assert len(said) == 4
        embedding = self.model.embedding.word_embeddings.weight
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters() if p is not embedding)
        return {
            "prefill": self.prefill_seconds,
            "question": statistics.median(asked),
            "read": weights + self.cache.bytes,
            "bandwidth": copy_rate(),
        }


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call: of this process's CPU, which other work on the machine does not lengthen, or until a GPU is done."""
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    began = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=training_device())
    target = torch.zeros_like(source)
    return 2 * COPIED / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def row(shape: ModelShape, tokens: int, precision: str) -> tuple[object, ...]:
    """One length."""
    case = Case(Decoding, (shape, tokens, precision))
    timed = measure(case, count_bytes=False, warmup=2, calls=CALLS)
    if timed.error is not None or timed.spread is None:
        return (short(tokens), timed.error)
    facts, token = timed.facts, timed.spread.median
    limit = facts["read"] / facts["bandwidth"]
    counted = measure(case, count_bytes=True)
    return (
        short(tokens),
        f"{facts['prefill']:.2f}",
        f"{facts['question']:.3f}",
        f"{facts['prefill'] / facts['question']:.0f}",
        f"{token * 1e3:.2f}",
        f"{limit * 1e3:.2f}",
        f"{limit / token:.2f}",
        counted.error or f"{counted.peak_bytes:,}",
    )


def main() -> None:
    """Measure and print."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lengths, default=lengths("16K,64K,128K,512K" if on_gpu else "4K,16K,32K"))
    given = parser.parse_args()
    shape, precision = (LLAMA_1B, "bf16") if on_gpu else (TINY, "fp32")
    print(f"`{command_line()}` on {machine()}\n")
    print_table(HEADERS, ([row(shape, tokens, precision)] for tokens in given.lengths))


if __name__ == "__main__":
    main()
