"""RoPE at length: how wrong the angles are and how many bytes they take, ours beside Megatron-Core's class and transformers.

python tools/bench/rope.py

The reference is position x inverse frequency in 80-bit arithmetic, reduced modulo 2 pi there. An angle's error is its distance on the
circle, the largest over all frequencies and the last 4,096 positions below the length; of a cos and sin table, that of the angle that they
stand for. Bytes are counted (`live_bytes`) for one rank alone and for one of 16 context-parallel ranks: the most while the table is made,
and what stays. Megatron-Core's class makes the table of the whole sequence before it cuts out a rank's part, and keeps what it made.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import Case, command_line, compare, lengths, machine, short, table
from models import LLAMA_8B, ROTARY_BASE, rope, start_groups
from torch import Tensor

from mcore_longctx.layout import zigzag_positions
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import LongContextRotary

HEAD_DIM = LLAMA_8B.kv_channels
CP_SIZE = 16
CHECKED = 4096
MAKERS = ("ours, float64", "ours, float32", "megatron-core", "transformers")


def reference(positions: np.ndarray) -> np.ndarray:
    """Angles [len(positions), d/2] in [0, 2 pi), float64 after the reduction."""
    exponents = np.arange(0, HEAD_DIM, 2, dtype=np.longdouble) / HEAD_DIM
    frequencies = np.longdouble(ROTARY_BASE) ** -exponents
    two_pi = 8 * np.arctan(np.longdouble(1))
    return np.remainder(positions.astype(np.longdouble)[:, None] * frequencies, two_pi).astype(np.float64)


class Table:
    """Makes the angles (ours, Megatron) or the cos and sin tables (transformers) of one rank."""

    def __init__(self, maker: str, tokens: int, cp_size: int) -> None:
        self.maker, self.tokens, self.cp_size = maker, tokens, cp_size
        self.made: Any = None
        group = SimpleNamespace(size=lambda: cp_size, rank=lambda: 0)
        self.positions = zigzag_positions(tokens, cp_size, 0)
        if maker.startswith("ours"):
            self.module: Any = LongContextRotary(rope(LLAMA_8B), group, maker.split()[1])  # type: ignore[arg-type]
        elif maker == "megatron-core":
            self.module = _megatron_rotary(group)
        else:
            self.module = _transformers_rotary(tokens)

    def step(self) -> None:
        """Make the table."""
        self.made = None
        if self.maker == "transformers":
            positions = torch.from_numpy(self.positions)[None]
            self.made = self.module(torch.empty(0, device=positions.device), positions)
        else:
            with device_context():
                self.made = self.module(self.tokens)

    def facts(self) -> dict[str, Any]:
        """Largest error in radians at the end of the sequence (one rank alone), and the bytes of what is returned."""
        held = self.made if isinstance(self.made, tuple) else (self.made,)
        facts = {"bytes": sum(tensor.numel() * tensor.element_size() for tensor in held)}
        if self.cp_size == 1:
            rows = slice(self.tokens - CHECKED, None)
            difference = self._angles(rows) - reference(self.positions[rows])
            facts["error"] = float(np.abs(np.remainder(difference + np.pi, 2 * np.pi) - np.pi).max())
        return facts

    def _angles(self, rows: slice) -> np.ndarray:
        if isinstance(self.made, tuple):
            cos, sin = (_half(tensor[0, rows]) for tensor in self.made)
            return np.arctan2(sin, cos)
        return _half(self.made[rows, 0, 0])


def _half(tensor: Tensor) -> np.ndarray:
    """[rows, d] -> float64 [rows, d/2]: both halves are alike."""
    return tensor[:, : HEAD_DIM // 2].double().cpu().numpy()


def _megatron_rotary(group: Any) -> Any:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    start_groups()
    with device_context():
        return RotaryEmbedding(
            HEAD_DIM, rotary_percent=1.0, rotary_base=int(ROTARY_BASE), use_cpu_initialization=True, cp_group=group
        )


def _transformers_rotary(tokens: int) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    config = LlamaConfig(
        hidden_size=LLAMA_8B.hidden_size,
        num_attention_heads=LLAMA_8B.num_attention_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=tokens,
        rope_theta=ROTARY_BASE,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config=config)


def rows(sizes: list[int], rounds: int) -> list[tuple[Any, ...]]:
    """(length, maker, error, MiB at most and kept: alone, one of 16; CPU-seconds alone)."""
    made: list[tuple[Any, ...]] = []
    for tokens in sizes:
        cases = {(maker, cp_size): Case(Table, (maker, tokens, cp_size)) for maker in MAKERS for cp_size in (1, CP_SIZE)}
        found = compare({f"{maker}, {cp_size}": case for (maker, cp_size), case in cases.items()}, rounds=rounds)
        for maker in MAKERS:
            alone, one_of_16 = (found[f"{maker}, {cp_size}"] for cp_size in (1, CP_SIZE))
            if alone.error or one_of_16.error:
                made.append((short(tokens), maker, alone.error or one_of_16.error))
                continue
            assert alone.peak_bytes is not None
            assert one_of_16.peak_bytes is not None
            made.append(
                (
                    short(tokens),
                    maker,
                    f"{alone.facts['error']:.2g}",
                    f"{alone.peak_bytes / 2**20:,.0f}",
                    f"{one_of_16.peak_bytes / 2**20:,.0f}",
                    f"{one_of_16.facts['bytes'] / 2**20:,.0f}",
                    str(alone.spread),
                )
            )
    return made


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lengths, default=lengths("128K,1M,4M"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"## RoPE at length\n\n`{command_line()}`\n\n{machine()}\n")
    print(f"Plain RoPE, base {ROTARY_BASE:,.0f}, head dimension {HEAD_DIM}:\n")
    headers = ("length", "table of", "largest error, rad", "MiB at most, alone", f"MiB at most, one of {CP_SIZE} ranks",
               "of these returned", "s, alone")  # fmt: skip
    print(table(headers, rows(given.tokens, given.rounds)))


if __name__ == "__main__":
    main()
