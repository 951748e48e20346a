"""Llama 2, 3, 3.1 and 3.2 (`LlamaForCausalLM`), and the table that the other families build on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import read_sizes, refuse_unless
from mcore_longctx.families.shape import ModelShape
from mcore_longctx.families.table import Line

__all__ = ["DENSE_DECODER", "LLAMA"]

_LAYER, _HF = "decoder.layers.", "model.layers.{i}."
_QKV = tuple(f"{_HF}self_attn.{part}_proj" for part in "qkv")
_GATE_UP = (f"{_HF}mlp.gate_proj", f"{_HF}mlp.up_proj")


def _of(names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names)


# fmt: off
DENSE_DECODER = (
    Line("embedding.word_embeddings.weight",             ("model.embed_tokens.weight",),                ("vocab",),                  "hidden",  tp=0),
    Line(_LAYER + "self_attention.linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",),     ("hidden",),                 None),
    Line(_LAYER + "self_attention.linear_qkv.weight",    _of(_QKV, "weight"),                           ("queries", "keys", "keys"), "hidden",  tp=0),
    Line(_LAYER + "self_attention.linear_qkv.bias",      _of(_QKV, "bias"),                             ("queries", "keys", "keys"), None,      tp=0, when="qkv_bias"),
    Line(_LAYER + "self_attention.q_layernorm.weight",   (_HF + "self_attn.q_norm.weight",),            ("head",),                   None,      when="qk_layernorm"),
    Line(_LAYER + "self_attention.k_layernorm.weight",   (_HF + "self_attn.k_norm.weight",),            ("head",),                   None,      when="qk_layernorm"),
    Line(_LAYER + "self_attention.linear_proj.weight",   (_HF + "self_attn.o_proj.weight",),            ("hidden",),                 "queries", tp=1),
    Line(_LAYER + "self_attention.linear_proj.bias",     (_HF + "self_attn.o_proj.bias",),              ("hidden",),                 None,      when="linear_bias"),
    Line(_LAYER + "mlp.linear_fc1.layer_norm_weight",    (_HF + "post_attention_layernorm.weight",),    ("hidden",),                 None),
    Line(_LAYER + "mlp.linear_fc1.weight",               _of(_GATE_UP, "weight"),                       ("ffn", "ffn"),              "hidden",  tp=0),
    Line(_LAYER + "mlp.linear_fc1.bias",                 _of(_GATE_UP, "bias"),                         ("ffn", "ffn"),              None,      tp=0, when="linear_bias"),
    Line(_LAYER + "mlp.linear_fc2.weight",               (_HF + "mlp.down_proj.weight",),               ("hidden",),                 "ffn",     tp=1),
    Line(_LAYER + "mlp.linear_fc2.bias",                 (_HF + "mlp.down_proj.bias",),                 ("hidden",),                 None,      when="linear_bias"),
    Line("decoder.final_layernorm.weight",               ("model.norm.weight",),                        ("hidden",),                 None),
    Line("output_layer.weight",                          ("lm_head.weight",),                           ("vocab",),                  "hidden",  tp=0, when="untied"),
)
# fmt: on


def _read(config: Mapping[str, Any], where: object) -> ModelShape:
    attention, mlp = (bool(config.get(name, False)) for name in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise ConfigError(
            f"attention_bias is {attention} and mlp_bias is {mlp}: Megatron has a bias in all linear layers or in none",
            where=where,
            fix="see docs/convert.md, biases",
        )
    refuse_unless(config, where, hidden_act="silu")
    return read_sizes(config, where, add_bias_linear=attention)


LLAMA = Family("llama", ("LlamaForCausalLM",), DENSE_DECODER, _read)
