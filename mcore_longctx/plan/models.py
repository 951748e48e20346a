"""Published model sizes by name, for plans without a checkpoint at hand, and the counts that follow from sizes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from mcore_longctx.errors import ConfigError
from mcore_longctx.families import ModelShape
from mcore_longctx.recipe.load import read_typed

__all__ = ["find_model", "known_models", "model_names", "parameters", "parameters_per_layer", "stage_parameters", "step_flops"]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    family: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _File:
    models: dict[str, _Entry]


def known_models() -> dict[str, ModelShape]:
    """`llama-3.1-8b`, `llama-3.1-70b`, ... (`models.yaml`), and the short names of the validation file (`llama8b`)."""
    return dict(_table())


def model_names() -> list[str]:
    """The names of `models.yaml` without the short ones, for messages."""
    return list(_file().models)


def find_model(name: str) -> ModelShape:
    """One model by any of its names.

    Raises:
        ConfigError: no such model; the nearest name is in the message.
    """
    table = _table()
    if name.lower() in table:
        return table[name.lower()]
    near = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no model {name!r} is known", fix=f"{hint}known: {', '.join(model_names())}")


def parameters(shape: ModelShape) -> int:
    """All parameters: P of the formulas."""
    return stage_parameters(shape, 1, first=True, last=True)


def parameters_per_layer(shape: ModelShape) -> int:
    """Weights of the linear layers of one layer: P_layer of the formulas."""
    attention = shape.hidden_size * shape.kv_channels * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def stage_parameters(shape: ModelShape, pipeline: int, *, first: bool, last: bool) -> int:
    """Parameters of one pipeline stage: its layers, the embedding on the first one, the final norm and the head on the last.

    Layers that do not divide evenly, as in some published runs, count for the largest stage. A tied head is one matrix with the embedding
    where both are on one stage, and a copy of it where they are not.
    """
    h, d, q, kv = shape.hidden_size, shape.kv_channels, shape.num_attention_heads, shape.num_query_groups
    layer = parameters_per_layer(shape) + 2 * h
    if shape.qk_layernorm:
        layer += 2 * d
    if shape.add_qkv_bias or shape.add_bias_linear:
        layer += d * (q + 2 * kv)
    if shape.add_bias_linear:
        layer += 2 * h + 2 * shape.ffn_hidden_size
    matrices = 1 if first and last and shape.tie_word_embeddings else int(first) + int(last)
    return -(-shape.num_layers // pipeline) * layer + matrices * shape.vocab_size * h + (h if last else 0)


def step_flops(shape: ModelShape, seq_length: int) -> tuple[float, float, float]:
    """FLOPs of training on one sequence without recompute: (linear layers, head, causal attention)."""
    linear = 6.0 * shape.num_layers * parameters_per_layer(shape) * seq_length
    head = 6.0 * shape.vocab_size * shape.hidden_size * seq_length
    attention = 6.0 * float(seq_length) ** 2 * shape.num_attention_heads * shape.kv_channels * shape.num_layers
    return linear, head, attention


@cache
def _file() -> _File:
    text = (resources.files("mcore_longctx.plan") / "models.yaml").read_text(encoding="utf-8")
    return read_typed(_File, text, "models.yaml")[0]


@cache
def _table() -> MappingProxyType[str, ModelShape]:
    table: dict[str, ModelShape] = {}
    for name, entry in _file().models.items():
        shape = ModelShape(
            num_layers=entry.layers,
            hidden_size=entry.hidden,
            ffn_hidden_size=entry.ffn,
            num_attention_heads=entry.heads,
            num_query_groups=entry.kv_heads,
            kv_channels=entry.head_dim,
            vocab_size=entry.vocabulary,
            tie_word_embeddings=entry.tied,
            family=entry.family,
            add_qkv_bias=entry.qkv_bias,
            qk_layernorm=entry.qk_norm,
        )
        table |= dict.fromkeys((name, *entry.aliases), shape)
    return MappingProxyType(table)
