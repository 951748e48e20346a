"""Sizes out of a config.json, checked; what a dense decoder of Megatron cannot express is refused by name.

A key that changes what a model computes and that nobody here looks at would give a checkpoint that loads and talks nonsense. So known
keys of that kind are listed, whichever model brought them in; keys that no list names are carried along untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.shape import ModelShape

__all__ = ["check_architecture", "flag", "read_sizes", "refuse_if", "refuse_sliding_window"]

# no model is larger; a damaged number must cost neither time nor memory
_LARGEST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
}

# key -> the values that mean nothing; null means nothing everywhere. After each group: whose keys they are.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "key_multiplier": (1,),
    "attention_in_multiplier": (1,),
    "attention_out_multiplier": (1,),
    "logits_scaling": (1,),  # Granite, Falcon-H1
    "logit_scale": (1,),  # Cohere, MPT
    "scale_emb": (1,),
    "scale_depth": (),
    "use_mup": (False,),  # MiniCPM
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attn_logit_softcap": (0,),
    "final_logit_softcap": (0,),  # Gemma and its kin
    "clip_qkv": (0,),  # OLMo, DBRX
    "alibi": (False,),
    "use_alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "parallel_residual": (False,),  # Falcon, GPT-NeoX
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),  # Cohere, Llama 4, StableLM: other norms, or in other places, than Qwen3's
    "no_rope_layers": (0, []),
    "no_rope_layer_interval": (0,),  # SmolLM3, Llama 4
    "attention_chunk_size": (0,),  # Llama 4
    "rope_interleaved": (False,),
    "rope_interleave": (False,),
    "rotary_interleaved": (False,),  # other pairs of each head are turned
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "partial_rotary_factor": (1,),
    "mla": (False,),
    "kv_lora_rank": (0,),
    "q_lora_rank": (0,),  # DeepSeek: latent attention
    # keys that transformers itself heeds in whatever model has them (4.57 and 5.23; `modeling_utils`, `masking_utils`, `cache_utils`)
    "is_causal": (True,),  # false: every token sees those after it
    "per_layer_config": ({}, []),  # sizes of single layers
    "pruned_heads": ({},),
    "num_kv_shared_layers": (0,),
    "kv_sharing_modes": ([],),
    "transformers_weights": (),  # another file than the one that is read here
}
_MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_")
_OTHER_MODELS = {
    "is_encoder_decoder": "an encoder beside the decoder",
    "add_cross_attention": "cross attention",
    "vision_config": "a vision model",
    "audio_config": "an audio model",
    "text_config": "a text model inside another",
    "encoder_config": "an encoder",
}


def read_sizes(
    config: Mapping[str, Any],
    where: object,
    *,
    family: str,
    add_qkv_bias: bool = False,
    add_bias_linear: bool = False,
    qk_layernorm: bool = False,
) -> ModelShape:
    """The sizes that all families spell alike.

    Raises:
        ConfigError: a missing or impossible size, or a feature that a dense decoder of Megatron cannot express.
    """
    _refuse_other_mathematics(config, where)
    heads, hidden = _size(config, where, "num_attention_heads"), _size(config, where, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden:,} is not a multiple of num_attention_heads {heads}, and head_dim is missing", where=where
        )
    groups = _size(config, where, "num_key_value_heads", heads)
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}", where=where)
    shape = ModelShape(
        family=family,
        num_layers=_size(config, where, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, where, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=_size(config, where, "head_dim", hidden // heads),
        vocab_size=_size(config, where, "vocab_size"),
        tie_word_embeddings=flag(config, where, "tie_word_embeddings"),
        layernorm_epsilon=_epsilon(config, where),
        add_qkv_bias=add_qkv_bias,
        add_bias_linear=add_bias_linear,
        qk_layernorm=qk_layernorm,
    )
    _refuse_scaled_attention(config, where, shape)
    return shape


def check_architecture(config: Mapping[str, Any], where: object, known: tuple[str, ...]) -> None:
    """Raise ConfigError where `architectures` names a class that is none of `known`: another head, or a model around this one."""
    named = config.get("architectures")
    if named is None:
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"architectures is {_short(named)}, expected a list of names", where=where)
    for name in named:
        if name not in known:
            raise ConfigError(
                f"architectures names {_short(name)}; only a language model, {known[0]}, can be converted",
                where=where,
                fix="use the model with its language-model head",
            )


def refuse_sliding_window(config: Mapping[str, Any], where: object, *, default: int | None = None) -> None:
    """Raise ConfigError for a sliding window that is on. `default`: what transformers takes where config.json does not say."""
    if default is not None and "sliding_window" not in config:
        raise ConfigError(
            f"sliding_window is missing, and transformers then takes {default:,}",
            where=where,
            fix="set it to null if the model has no window",
        )
    if config.get("sliding_window") is not None:
        raise ConfigError(
            f"sliding_window is {_short(config['sliding_window'])}, and attention here sees every token before it: another model",
            where=where,
            fix="set sliding_window to null to train this model without its window, or start from one that has none",
        )


def refuse_if(config: Mapping[str, Any], where: object, key: str, why: str, fix: str = "") -> None:
    """Raise ConfigError where the flag `key` is true."""
    if flag(config, where, key):
        raise ConfigError(f"{key} is true: {why}", where=where, fix=fix)


def flag(config: Mapping[str, Any], where: object, key: str) -> bool:
    """A flag; missing or null is False. Raises ConfigError for anything but true and false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} is {_short(value)}, expected true or false", where=where)
    return bool(value)


def _size(config: Mapping[str, Any], where: object, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{key} is {_short(value)}, expected a positive whole number", where=where)
    if value > _LARGEST[key]:
        raise ConfigError(f"{key} is {_short(value)}, no model has more than {_LARGEST[key]:,}", where=where)
    return value


def _epsilon(config: Mapping[str, Any], where: object) -> float:
    value = config.get("rms_norm_eps", 1e-6)  # transformers' default in all families
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value <= 1:  # NaN is not
        raise ConfigError(f"rms_norm_eps is {_short(value)}, expected a small number", where=where)
    return float(value)


def _why_not_quantised(settings: object) -> str:
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method == "modelopt":  # measured with 4.57 and 5: one warning, and 448 times too large weights
        return "quantization_config of modelopt: transformers would take the raw fp8 numbers for weights, without an error"
    return "quantization_config: quantised weights cannot be converted"


def _refuse_other_mathematics(config: Mapping[str, Any], where: object) -> None:
    for key, value in config.items():
        if value is None:
            continue
        if key in _OTHER_MODELS and value is not False:
            raise ConfigError(f"{key} is set: {_OTHER_MODELS[key]}; only a decoder of text is supported", where=where)
        if key.startswith(_MIXTURE) and value not in (0, False, []):
            raise ConfigError(f"{key} is {_short(value)}: mixtures of experts (MoE) are not supported", where=where)
        if key == "quantization_config" and value != {}:
            raise ConfigError(_why_not_quantised(value), where=where, fix="use the bf16 model")
        if key in ("hidden_act", "hidden_activation") and value not in ("silu", "swish"):
            raise ConfigError(f"{key} is {_short(value)}, only 'silu' is supported", where=where)
        if key == "partial_rotary_factor" and value != 1:
            raise ConfigError("partial_rotary_factor is not 1; partly rotated heads are not supported", where=where)
        if key == "layer_types" and not (isinstance(value, list) and all(kind == "full_attention" for kind in value)):
            raise ConfigError(
                f"layer_types is {_short(value)}: layers that do not attend to every token before them are not supported",
                where=where,
            )
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise ConfigError(f"{key} is {_short(value)}: it changes what the model computes, and is not supported", where=where)


# In place of 1/sqrt(head_dim): harmless where they say the same (Granite: the factor itself; Gemma: what the root is drawn of)
_SCALES_OF_ATTENTION = ("attention_multiplier", "query_pre_attn_scalar")


def _refuse_scaled_attention(config: Mapping[str, Any], where: object, shape: ModelShape) -> None:
    for key, usual in zip(_SCALES_OF_ATTENTION, (shape.kv_channels**-0.5, shape.kv_channels), strict=True):
        if config.get(key) is not None and config[key] != usual:
            raise ConfigError(
                f"{key} is {_short(config[key])}: attention is scaled by 1/sqrt(head_dim) here, and by nothing else", where=where
            )


def _short(value: object) -> str:
    """A value for a line of text: the number or word in the file, cut."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
