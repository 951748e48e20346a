"""Llama checkpoints of any size, in seconds: random bf16 numbers, or holes. numpy alone.

    python tools/bench/random_llama.py 1.5b OUT            3.07 GB in two files, numbers of ordinary size
    python tools/bench/random_llama.py 70b OUT --sparse    headers and sizes of Llama-3.1-70B; its numbers are holes that read as zero

The files are those of the safetensors format; the names and sizes are those of transformers' LlamaForCausalLM.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["SIZES", "config_of", "tensor_bytes", "tensors_of", "write_model"]

# layers, hidden, ffn, heads, groups, vocabulary; heads of 128. 8b, 70b and 405b: Llama-3.1
SIZES = {
    "tiny": (2, 256, 512, 8, 4, 512),
    "1.5b": (22, 2048, 8192, 16, 4, 48000),
    "8b": (32, 4096, 14336, 32, 8, 128256),
    "70b": (80, 8192, 28672, 64, 8, 128256),
    "405b": (126, 16384, 53248, 128, 8, 128256),
}
HEAD_DIM = 128
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
SHARD_BYTES = {"tiny": 1_000_000, "1.5b": 1_600_000_000}
BAND = 4 << 20  # numbers made at once


def config_of(size: str) -> dict[str, Any]:
    """config.json of a Llama with the rope of Llama-3.1."""
    layers, hidden, ffn, heads, groups, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def tensors_of(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    layers, hidden, ffn, heads, groups, vocabulary = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        of_layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (heads * HEAD_DIM, hidden),
            "self_attn.k_proj": (groups * HEAD_DIM, hidden),
            "self_attn.v_proj": (groups * HEAD_DIM, hidden),
            "self_attn.o_proj": (hidden, heads * HEAD_DIM),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def tensor_bytes(size: str) -> int:
    """Of all tensors, two bytes a number."""
    return 2 * sum(math.prod(shape) for shape in tensors_of(size).values())


def write_model(folder: Path, size: str, *, sparse: bool = False, seed: int = 0) -> Path:
    """Write config, index and shards into the new folder `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(size), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_length": 131072}))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}')
    shapes = tensors_of(size)
    shards = list(_shards(shapes, SHARD_BYTES.get(size, 4_900_000_000)))
    rng = np.random.Generator(np.random.SFC64(seed))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        with (folder / file_name).open("wb") as file:
            count = sum(math.prod(shapes[name]) for name in names)
            file.write(_header({name: shapes[name] for name in names}))
            if sparse:
                file.truncate(file.tell() + 2 * count)
            else:
                _write_numbers(file, count, rng)
    index = {"metadata": {"total_size": tensor_bytes(size)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _shards(shapes: dict[str, tuple[int, ...]], largest: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if names and filled + size > largest:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_numbers(file: BinaryIO, count: int, rng: np.random.Generator) -> None:
    """Both signs, magnitudes from 2^-7 to 2^-5: any sign and mantissa, two exponents."""
    while count:
        some = min(count, BAND)
        bits = rng.integers(0, 2**64, -(-some // 4), np.uint64).view(np.uint16)[:some]
        bits &= 0x80FF
        bits |= 0x3C00
        file.write(bits)
        count -= some


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparse", action="store_true", help="holes in place of numbers")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_model(given.out, given.size, sparse=given.sparse, seed=given.seed)
    print(f"{given.out}: {tensor_bytes(given.size) // 2:,} numbers, {tensor_bytes(given.size):,} bytes")


if __name__ == "__main__":
    main()
