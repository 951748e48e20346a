"""A Llama at a few positions of a very long sequence, in float64 and plain matrix products: the reference of the long steps.

Nothing of the package is used: no kernel of attention, no exchange, no recompute, no chunk of a loss. A query needs the keys and values
of all positions before it, so the inputs of a layer are needed everywhere and its outputs only at the chosen positions. The first layer's
inputs are embeddings. Those of later layers are given (what the model under test fed them), except at the chosen positions, where this
reference goes on with its own: each layer is checked from its inputs on, and the first one, or a model of one layer, from the tokens on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcore_longctx.families import ModelShape

ROWS_AT_ONCE = 2**18  # of keys and values while they are made: memory only


@dataclass(frozen=True)
class PlainLlama:
    """Weights under Megatron's names, one sequence, and the positions at which to compute.

    ids, labels: int64 [s]. inputs: hidden states [s, h] that entered layers 1, 2, ... (none for a model of one layer). at: positions,
    ascending.
    """

    weights: Mapping[str, Tensor]
    shape: ModelShape
    rotary_base: float
    ids: Tensor
    labels: Tensor
    inputs: Sequence[Tensor]
    at: Tensor

    def losses(self, embedded: Tensor | None = None) -> Tensor:
        """Cross entropy at the chosen positions, float64 [len(at)]. `embedded`: their embeddings, to differentiate by."""
        hidden = self.embed(self.ids[self.at]) if embedded is None else embedded
        for layer in range(self.shape.num_layers):
            hidden = self._layer(layer, hidden)
        logits = self._norm(hidden, "decoder.final_layernorm.weight") @ self._weight("output_layer.weight").t()
        logits = logits[:, : self.shape.vocab_size]
        return torch.nn.functional.cross_entropy(logits, self.labels[self.at], reduction="none")

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, float64 [len(ids), h]."""
        return self.weights["embedding.word_embeddings.weight"][ids].double()

    def _layer(self, layer: int, hidden: Tensor) -> Tensor:
        name, heads = f"decoder.layers.{layer}", self.shape.num_attention_heads
        query, own_key, own_value = self._qkv(layer, hidden, self.at)
        keys, values = self._everywhere(layer)
        groups = heads // self.shape.num_query_groups
        outputs = []
        for i, position in enumerate(self.at.tolist()):
            # the chosen positions are seen through this reference's own keys and values, which can be differentiated
            others, own = keys[:, :position], own_key[: i + 1].transpose(0, 1)
            q = query[i].unflatten(0, (-1, groups))  # [g, n/g, d]
            scores = torch.cat((q @ others.transpose(1, 2), q @ own.transpose(1, 2)), dim=-1) / self.shape.kv_channels**0.5
            before = self.at[:i]
            scores = scores.index_fill(-1, before, float("-inf"))
            probabilities = scores.softmax(-1)
            out = probabilities[..., :position] @ values[:, :position] + probabilities[..., position:] @ own_value[
                : i + 1
            ].transpose(0, 1)
            outputs.append(out.flatten())
        hidden = hidden + torch.stack(outputs) @ self._weight(f"{name}.self_attention.linear_proj.weight").t()
        gate_up = self._norm(hidden, f"{name}.pre_mlp_layernorm.weight") @ self._weight(f"{name}.mlp.linear_fc1.weight").t()
        gate, up = gate_up.chunk(2, dim=-1)
        return hidden + (torch.nn.functional.silu(gate) * up) @ self._weight(f"{name}.mlp.linear_fc2.weight").t()

    @torch.no_grad()
    def _everywhere(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, float64 [g, s, d] each."""
        length, shape = self.ids.numel(), self.shape
        keys, values = (
            torch.empty(shape.num_query_groups, length, shape.kv_channels, dtype=torch.float64, device=self.ids.device)
            for _ in "kv"
        )
        for start in range(0, length, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, length))
            hidden = self.embed(self.ids[rows]) if layer == 0 else self.inputs[layer - 1][rows].to(self.ids.device).double()
            positions = torch.arange(rows.start, rows.stop, device=self.ids.device)
            _, key, value = self._qkv(layer, hidden, positions)
            keys[:, rows], values[:, rows] = key.transpose(0, 1), value.transpose(0, 1)
        return keys, values

    def _qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [t, n, d] and keys [t, g, d], and values."""
        name, groups = f"decoder.layers.{layer}", self.shape.num_query_groups
        mixed = (
            self._norm(hidden, f"{name}.input_layernorm.weight") @ self._weight(f"{name}.self_attention.linear_qkv.weight").t()
        )
        mixed = mixed.unflatten(-1, (groups, -1, self.shape.kv_channels))  # a group: its queries, its key, its value
        query, key, value = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        return self._rotate(query, positions), self._rotate(key, positions), value

    def _rotate(self, tensor: Tensor, positions: Tensor) -> Tensor:
        width = self.shape.kv_channels
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles = (positions.double()[:, None] * self.rotary_base**-exponents)[:, None]  # [t, 1, d/2]
        first, second = tensor.chunk(2, dim=-1)
        return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = (hidden.square().mean(-1, keepdim=True) + self.shape.layernorm_epsilon).rsqrt()
        return hidden * scale * self._weight(name)

    def _weight(self, name: str) -> Tensor:
        return self.weights[name].double()
