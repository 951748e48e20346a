"""The tensors of a dense decoder as transformers names them: the table of all families here.

    model.embed_tokens -> n layers of [norm -> q, k, v (norms of q and k) -> o -> norm -> gate, up -> down] -> model.norm -> lm_head

Parts, so that a family with other names or fewer tensors is composed of what it shares and lines of its own.
"""

from __future__ import annotations

from mcore_longctx.families.table import Line

__all__ = ["ATTENTION", "ATTENTION_BIASES", "DENSE_DECODER", "EMBEDDING", "HEAD_NORMS", "MLP", "MLP_BIASES", "OUTPUT"]

_LAYER, _HF = "decoder.layers.", "model.layers.{i}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF + "self_attn."
_QKV = tuple(f"{_HF_ATTENTION}{part}_proj" for part in "qkv")
_GATE_UP = (f"{_HF}mlp.gate_proj", f"{_HF}mlp.up_proj")


def _of(names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names)


# fmt: off
EMBEDDING = (
    Line("embedding.word_embeddings.weight",         ("model.embed_tokens.weight",),             ("vocab",),                  "hidden",  tp=0),
)
ATTENTION = (
    Line(_ATTENTION + "linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",),         ("hidden",),                 None),
    Line(_ATTENTION + "linear_qkv.weight",           _of(_QKV, "weight"),                        ("queries", "keys", "keys"), "hidden",  tp=0),
    Line(_ATTENTION + "linear_proj.weight",          (_HF_ATTENTION + "o_proj.weight",),         ("hidden",),                 "queries", tp=1),
)
ATTENTION_BIASES = (
    Line(_ATTENTION + "linear_qkv.bias",             _of(_QKV, "bias"),                          ("queries", "keys", "keys"), None,      tp=0, when="qkv_bias"),
    Line(_ATTENTION + "linear_proj.bias",            (_HF_ATTENTION + "o_proj.bias",),           ("hidden",),                 None,      when="linear_bias"),
)
HEAD_NORMS = (
    Line(_ATTENTION + "q_layernorm.weight",          (_HF_ATTENTION + "q_norm.weight",),         ("head",),                   None,      when="qk_layernorm"),
    Line(_ATTENTION + "k_layernorm.weight",          (_HF_ATTENTION + "k_norm.weight",),         ("head",),                   None,      when="qk_layernorm"),
)
MLP = (
    Line(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), ("hidden",),                None),
    Line(_LAYER + "mlp.linear_fc1.weight",           _of(_GATE_UP, "weight"),                    ("ffn", "ffn"),              "hidden",  tp=0),
    Line(_LAYER + "mlp.linear_fc2.weight",           (_HF + "mlp.down_proj.weight",),            ("hidden",),                 "ffn",     tp=1),
)
MLP_BIASES = (
    Line(_LAYER + "mlp.linear_fc1.bias",             _of(_GATE_UP, "bias"),                      ("ffn", "ffn"),              None,      tp=0, when="linear_bias"),
    Line(_LAYER + "mlp.linear_fc2.bias",             (_HF + "mlp.down_proj.bias",),              ("hidden",),                 None,      when="linear_bias"),
)
OUTPUT = (
    Line("decoder.final_layernorm.weight",           ("model.norm.weight",),                     ("hidden",),                 None),
    Line("output_layer.weight",                      ("lm_head.weight",),                        ("vocab",),                  "hidden",  tp=0, when="untied"),
)
# fmt: on

DENSE_DECODER = EMBEDDING + ATTENTION + ATTENTION_BIASES + HEAD_NORMS + MLP + MLP_BIASES + OUTPUT
