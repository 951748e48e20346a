"""B10, one prompt and what follows it: the prefill, a question of 32 tokens on its cache, and one token of greedy decoding.

python tools/bench/decode.py

On a GPU: a Llama of 1.2 billion parameters in bf16, 16K to 512K tokens. On a CPU the twin in float32, 4K to 32K tokens, one thread.

A token cannot be decoded faster than the weights (without the embedding's table) and the cache are read once: `limit` is their bytes over
the bandwidth of a copy, measured in the same process (what is read and what is written both count). `bytes` is the most that was alive in
a token's step beside weights and cache.

The peer is transformers' LlamaForCausalLM with the same weights and its DynamicCache, sdpa, logits of the last token alone. A prompt that
is to be used again is copied for each question there (`copy.deepcopy`, as its documentation says); ours is left as it is. The logits of
the question's last token must agree, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from harness import Case, Result, command_line, lengths, machine, measure, print_table, ratio, short
from models import ROTARY_BASE, TINY, our_model, random_tokens
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
AGREEING = {"fp32": 1e-4, "bf16": 5e-2}  # of the largest logit
HEADERS = (
    "prompt",
    "contender",
    "prefill s",
    f"question of {QUESTION} s",
    "prefill / question",
    "token ms",
    "over transformers",
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
        asked = torch.from_numpy(self.question).to(training_device())
        self.last_logits = extend(self.model, self.branch, asked, self.row(QUESTION - 1)).flatten()
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

    def facts(self) -> dict[str, Any]:
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
            "logits": self.last_logits.float().cpu().numpy(),
        }


class TransformersDecoding:
    """The same in transformers: a prompt that is there, and a token after a question."""

    def __init__(self, shape: ModelShape, tokens: int, precision: str) -> None:
        from transformers import DynamicCache

        self.model = transformers_model(shape, tokens, precision)
        ids = random_tokens(shape, tokens + QUESTION)[0]
        self.prompt, self.question = ids[:, :tokens], ids[:, tokens:]
        self.forward(self.prompt[:, :1024], DynamicCache())
        self.cache = DynamicCache()
        self.prefill_seconds = seconds(lambda: self.forward(self.prompt, self.cache))
        self.branch = copy.deepcopy(self.cache)
        self.last_logits = self.forward(self.question, self.branch)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=training_device())

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits of the last token; keys and values go into the cache."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.flatten()

    def states(self) -> Iterator[Tensor]:
        """Weights and caches."""
        yield from self.model.parameters()
        yield from (rows for cache in (self.cache, self.branch) for layer in cache.layers for rows in (layer.keys, layer.values))
        yield self.token

    def step(self) -> None:
        """A token; then the cache is cut back, which copies nothing."""
        self.forward(self.token, self.branch).argmax(-1).item()
        self.branch.crop(-1)

    def facts(self) -> dict[str, Any]:
        """As `Decoding.facts`, without what is the machine's."""
        asked = [seconds(lambda: self.forward(self.question, copy.deepcopy(self.cache))) for _ in range(3)]
        facts = {"prefill": self.prefill_seconds, "question": statistics.median(asked)}
        return facts | {"logits": self.last_logits.float().cpu().numpy()}


def transformers_model(shape: ModelShape, tokens: int, precision: str) -> Any:
    """LlamaForCausalLM with the weights of `our_model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.layernorm_epsilon,
        max_position_embeddings=tokens + 2 * QUESTION,
        rope_theta=ROTARY_BASE,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    weights = transformers_weights(our_model(shape, tokens, Activations(), precision=precision), shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=training_device()).to(next(iter(weights.values())).dtype)
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are in no checkpoint
    model.model.rotary_emb = rotary.to(training_device())
    model.load_state_dict(weights)
    return model.eval()


def transformers_weights(model: Any, shape: ModelShape) -> dict[str, Tensor]:
    """The weights of a Megatron model under the names of transformers: queries, keys and values of a group lie together there."""
    found = {
        "model.embed_tokens.weight": model.embedding.word_embeddings.weight,
        "model.norm.weight": model.decoder.final_layernorm.weight,
        "lm_head.weight": model.output_layer.weight,
    }
    per_group = shape.num_attention_heads // shape.num_query_groups
    for number, layer in enumerate(model.decoder.layers):
        name, attention = f"model.layers.{number}", layer.self_attention
        groups = attention.linear_qkv.weight.view(shape.num_query_groups, per_group + 2, shape.kv_channels, shape.hidden_size)
        query, key, value = groups.split([per_group, 1, 1], dim=1)
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        found |= {
            f"{name}.input_layernorm.weight": layer.input_layernorm.weight,
            f"{name}.post_attention_layernorm.weight": layer.pre_mlp_layernorm.weight,
            f"{name}.self_attn.q_proj.weight": query.reshape(-1, shape.hidden_size),
            f"{name}.self_attn.k_proj.weight": key.reshape(-1, shape.hidden_size),
            f"{name}.self_attn.v_proj.weight": value.reshape(-1, shape.hidden_size),
            f"{name}.self_attn.o_proj.weight": attention.linear_proj.weight,
            f"{name}.mlp.gate_proj.weight": gate,
            f"{name}.mlp.up_proj.weight": up,
            f"{name}.mlp.down_proj.weight": layer.mlp.linear_fc2.weight,
        }
    return {name: weight.detach() for name, weight in found.items()}


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


def rows(shape: ModelShape, tokens: int, precision: str) -> list[tuple[object, ...]]:
    """One length: ours, and transformers where it is installed."""
    contenders: dict[str, Callable[..., object]] = {"ours": Decoding}
    if find_spec("transformers") is not None:
        contenders["transformers"] = TransformersDecoding
    cases = {name: Case(setup, (shape, tokens, precision)) for name, setup in contenders.items()}
    timed = {name: measure(case, count_bytes=False, warmup=2, calls=CALLS) for name, case in cases.items()}
    check_logits(timed, tokens, AGREEING[precision])
    peer = timed.get("transformers", Result()).spread
    table: list[tuple[object, ...]] = []
    for name, result in timed.items():
        if result.error is not None or result.spread is None:
            table.append((short(tokens), name, result.error))
            continue
        facts, token = result.facts, result.spread.median
        limit = timed["ours"].facts["read"] / timed["ours"].facts["bandwidth"] if timed["ours"].facts else None
        counted = measure(cases[name], count_bytes=True)
        table.append(
            (
                short(tokens),
                name,
                f"{facts['prefill']:.2f}",
                f"{facts['question']:.3f}",
                f"{facts['prefill'] / facts['question']:.0f}",
                f"{token * 1e3:.2f} ({result.spread.low * 1e3:.2f} to {result.spread.high * 1e3:.2f})",
                ratio(token, peer.median if peer is not None else None),
                None if limit is None else f"{limit * 1e3:.2f}",
                ratio(limit, token),
                counted.error or f"{counted.peak_bytes:,}",
            )
        )
    return table


def check_logits(timed: dict[str, Result], tokens: int, bound: float) -> None:
    """Stop where contenders do not compute the same."""
    ours, *others = (result.facts["logits"] for result in timed.values() if result.facts)
    for other in others:
        far = float(np.abs(ours - other).max() / np.abs(ours).max())
        if not far < bound:
            raise SystemExit(
                f"{short(tokens)} tokens: the contenders' logits differ by {far:.3g} of the largest one, bound {bound}"
            )


def main() -> None:
    """Measure and print."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lengths, default=lengths("16K,64K,128K,512K" if on_gpu else "4K,16K,32K"))
    given = parser.parse_args()
    shape, precision = (LLAMA_1B, "bf16") if on_gpu else (TINY, "fp32")
    print(f"`{command_line()}` on {machine()}\n")
    print_table(HEADERS, (rows(shape, tokens, precision) for tokens in given.lengths))


if __name__ == "__main__":
    main()
