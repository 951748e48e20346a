"""How to serve a model at its length: how many GPUs one request needs, and the exact commands.

The sizes are derived, not measured, and the flags were read in the source of vLLM 0.33.0 and SGLang 0.5.23; no server was run.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from mcore_longctx.families import ModelShape
from mcore_longctx.manifest import readable_bytes

__all__ = ["GPU_BYTES", "Layout", "kv_bytes", "serve_commands", "smallest_layout"]

GPU_BYTES = {"H100": 80e9, "H200": 141e9, "B200": 180e9}
_USABLE = 0.92  # of a GPU's memory: vLLM's default share
_BESIDE = 5e9  # activations, rope table, block tables, CUDA graphs
_MAX_TP = 64
_ONE_MILLION = 1 << 20

KvType = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Layout:
    """GPUs of one request: tensor parallel size, and the decode context parallel size within it (1: none)."""

    tp: int
    dcp: int = 1


def kv_bytes(shape: ModelShape, length: int, kv: KvType) -> int:
    """Size of the keys and values of `length` tokens, over all layers."""
    return 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * length * (2 if kv == "bf16" else 1)


def smallest_layout(shape: ModelShape, length: int, *, weight_bytes: int, kv: KvType, gpu_bytes: float) -> Layout | None:
    """The smallest power of two of GPUs that holds the weights and one request of `length` tokens; None above 64.

    Rule: weights / TP + KV / shards + 5 GB <= 92 % of a GPU, shards = min(TP, key/value heads) x dcp. Beyond the number of
    key/value heads TP only copies them, so decode context parallelism splits them by position instead; vLLM allows it up to
    TP / key/value heads and where it divides the query heads of a key/value head.
    """
    groups, tp = shape.num_query_groups, 1
    while tp <= _MAX_TP:
        dcp = max(1, tp // groups)
        splits = shape.num_attention_heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
        divides = (shape.num_attention_heads // groups) % dcp == 0
        needed = weight_bytes / tp + kv_bytes(shape, length, kv) / (min(tp, groups) * dcp) + _BESIDE
        if splits and divides and needed <= _USABLE * gpu_bytes:
            return Layout(tp, dcp)
        tp *= 2
    return None


def serve_commands(shape: ModelShape, length: int, *, weight_bytes: int, path: str = "OUT") -> list[str]:
    """Lines for a shell: what one request needs as comments, then the commands for H100, with a bf16 and an fp8 KV cache.

    Args:
        shape: of the model.
        length: longest request, prompt and answer together.
        weight_bytes: of the weights as they lie in the folder (bf16 or fp8).
        path: the folder, as the commands name it.
    """
    path, sizes = shlex.quote(path), {kv: kv_bytes(shape, length, kv) for kv in _KV}
    lines = [
        "# flags read in source (vLLM 0.33.0, SGLang 0.5.23), none run; sizes derived",
        f"# one request of {length:,} tokens: weights {readable_bytes(weight_bytes)}, "
        f"KV cache {readable_bytes(sizes['bf16'])} in bf16, {readable_bytes(sizes['fp8'])} in fp8",
    ]
    layouts = {
        (gpu, kv): smallest_layout(shape, length, weight_bytes=weight_bytes, kv=kv, gpu_bytes=size)
        for gpu, size in GPU_BYTES.items()
        for kv in _KV
    }
    lines += [
        f"# smallest number of GPUs, KV {kv}: " + ", ".join(f"{gpu} {_gpus(layouts[gpu, kv])}" for gpu in GPU_BYTES) for kv in _KV
    ]
    lines += [_vllm(path, length, layout, kv) for kv in _KV if (layout := layouts["H100", kv]) is not None]
    if (layout := layouts["H100", "fp8"]) is not None and layout.dcp == 1:  # SGLang's dcp was not seen to work for Llama
        lines.append(
            f"python -m sglang.launch_server --model-path {path} --context-length {length} --tp-size {layout.tp}"
            f" --kv-cache-dtype fp8_e4m3 --chunked-prefill-size {_chunk(length)}"
        )
    return lines


_KV: tuple[KvType, ...] = ("bf16", "fp8")


def _gpus(layout: Layout | None) -> str:
    return f"more than {_MAX_TP}" if layout is None else str(layout.tp)


def _vllm(path: str, length: int, layout: Layout, kv: KvType) -> str:
    """Few sequences: the block table has length / 16 entries for each of them, and the default is 1,024."""
    parts = [f"vllm serve {path} --max-model-len {length} --tensor-parallel-size {layout.tp}"]
    parts += [f"--decode-context-parallel-size {layout.dcp}"] * (layout.dcp > 1)
    parts.append(f"--max-num-seqs {2 if length <= _ONE_MILLION else 1} --max-num-batched-tokens {_chunk(length)}")
    return " ".join([*parts, *(["--kv-cache-dtype fp8"] * (kv == "fp8"))])


def _chunk(length: int) -> int:
    """Tokens of one prefill step; the last one at 4M with 8,192 takes 6 to 28 seconds on 8 GPUs, and everybody waits for it."""
    return 16384 if length <= _ONE_MILLION else 8192
