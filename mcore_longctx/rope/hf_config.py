"""The rope in a Hugging Face `config.json`: both spellings read strictly, both written.

transformers 4.x spells it `rope_theta` + `rope_scaling`, transformers 5.x `rope_parameters`. A file in which the two disagree, or
that programs are known to read differently, is refused instead of guessed at (`docs/rope.md` has the table).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope.frequencies import ntk_base, temperature
from mcore_longctx.rope.scaling import RopeScaling

__all__ = ["read_hf_rope", "write_hf_rope"]

_DEFAULT_BASE = 10_000.0  # transformers' LlamaConfig, where no base is given (Llama 1 and 2)
_FLOATS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def read_hf_rope(config: Mapping[str, Any], *, where: object = "config.json") -> RopeScaling:
    """The rope of a Hugging Face config (the parsed `config.json` of a Llama-family model).

    A plain rope is read as `none`, whatever its base: the file does not say whether the base was ever changed (`abf` and `ntk`
    come back as `none` with the changed base, and the same fingerprint).

    Raises:
        ConfigError: an unknown rope type, `longrope`, spellings that disagree, a key that is missing, unknown or of the wrong type,
            settings per layer, or partly rotated heads.
    """
    old = _section(config, "rope_scaling", where)
    new = _section(config, "rope_parameters", where)
    bases = [
        (name, _number(section, "rope_theta", name, where))
        for name, section in (
            ("rope_theta", config),
            ("rope_scaling.rope_theta", old or {}),
            ("rope_parameters.rope_theta", new or {}),
        )
        if section.get("rope_theta") is not None
    ]
    for name, value in bases[1:]:
        if value != bases[0][1]:
            _refuse(
                f"{bases[0][0]} is {bases[0][1]:,g} and {name} is {value:,g}",
                where,
                "programs pick one silently: make them equal",
            )
    sections = [_settings(section, name, where) for name, section in (("rope_scaling", old), ("rope_parameters", new)) if section]
    if len(sections) == 2 and sections[0] != sections[1]:
        key = next(key for key in (*sections[0], *sections[1]) if sections[0].get(key) != sections[1].get(key))
        _refuse(
            f"rope_scaling and rope_parameters disagree: {key} is {sections[0].get(key)!r} and {sections[1].get(key)!r}",
            where,
            "programs pick one silently: make them equal or remove one",
        )
    settings = sections[0] if sections else {"rope_type": "default"}
    _check_top_level(config, settings, where)
    try:
        return _scaling(config, settings, bases[0][1] if bases else _DEFAULT_BASE, where)
    except ValueError as error:
        raise ConfigError(f"rope: {error}", where=where) from None


def _refuse(what: str, where: object, fix: str = "") -> NoReturn:
    raise ConfigError(what, where=where, fix=fix)


def _section(config: Mapping[str, Any], name: str, where: object) -> Mapping[str, Any] | None:
    section = config.get(name)
    if section is None or section == {}:
        return None
    if not isinstance(section, Mapping):
        _refuse(f"{name} is {section!r}, expected an object", where)
    for key, value in section.items():
        if isinstance(value, Mapping):
            _refuse(f"{name}.{key} holds rope settings for one kind of layer; one rope for all layers is supported", where)
    return section


def _number(section: Mapping[str, Any], key: str, name: str, where: object) -> float:
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(f"{name} is {value!r}, expected a number", where)
    return float(value)


def _whole(section: Mapping[str, Any], key: str, name: str, where: object) -> int:
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        _refuse(f"{name} is {value!r}, expected a positive whole number", where)
    return int(value)


def _settings(section: Mapping[str, Any], name: str, where: object) -> dict[str, Any]:
    """One spelling, checked: rope_type and its keys, numbers as float or int, nulls left out."""
    given = {key: value for key, value in section.items() if value is not None and key != "rope_theta"}
    rope_type, legacy = given.pop("rope_type", None), given.pop("type", None)
    if rope_type is not None and legacy is not None and rope_type != legacy:
        _refuse(f"{name}.rope_type is {rope_type!r} and {name}.type is {legacy!r}", where, "make them equal or remove type")
    rope_type = rope_type if rope_type is not None else legacy
    if rope_type is None:
        if given:
            _refuse(f"{name} has no rope_type", where)
        rope_type = "default"
    if rope_type in ("longrope", "su"):
        _refuse(
            f"{name}: rope type {rope_type} switches between two frequency tables by sequence length; it cannot be trained or converted here",
            where,
            "start from a model with plain, linear, llama3 or yarn rope",
        )
    if rope_type not in _KEYS:
        _refuse(f"{name}: rope type {rope_type!r} is unknown", where, f"known are {', '.join(_KEYS)}")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        _refuse(f"{name}.partial_rotary_factor is not 1; partly rotated heads are not supported", where)
    for key in given:
        if key not in _KEYS[rope_type]:
            _refuse(f"{name}.{key} is not a setting of rope type {rope_type}", where, "remove it (other programs ignore it)")
    for key in _REQUIRED[rope_type]:
        if key not in given:
            _refuse(f"{name}.{key} is missing (rope type {rope_type})", where, "other programs guess it: write it down")
    settings: dict[str, Any] = {"rope_type": rope_type}
    for key in given:
        if key == "truncate":
            if not isinstance(given[key], bool):
                _refuse(f"{name}.truncate is {given[key]!r}, expected true or false", where)
            settings[key] = given[key]
        elif key in _FLOATS:
            settings[key] = _number(given, key, f"{name}.{key}", where)
        else:
            settings[key] = _whole(given, key, f"{name}.{key}", where)
    return settings


def _check_top_level(config: Mapping[str, Any], settings: Mapping[str, Any], where: object) -> None:
    if config.get("partial_rotary_factor") not in (None, 1.0):
        _refuse("partial_rotary_factor is not 1; partly rotated heads are not supported", where)
    original = config.get("original_max_position_embeddings")
    if (
        original is not None
        and settings["rope_type"] != "default"
        and original != settings.get("original_max_position_embeddings")
    ):
        _refuse(
            f"original_max_position_embeddings is {original!r} at the top level and"
            f" {settings.get('original_max_position_embeddings')!r} in the rope settings",
            where,
            "transformers 4 and 5 pick different ones: keep the one in the rope settings",
        )


def _scaling(config: Mapping[str, Any], settings: Mapping[str, Any], base: float, where: object) -> RopeScaling:
    values: dict[str, Any] = {key: value for key, value in settings.items() if key != "rope_type"}
    rope_type = "none" if settings["rope_type"] == "default" else settings["rope_type"]
    length = (
        _whole(config, "max_position_embeddings", "max_position_embeddings", where)
        if "max_position_embeddings" in config
        else None
    )
    if rope_type == "linear":
        # vLLM and SGLang multiply the length by the factor, so the file holds the unscaled one (ours: the longest sequence)
        original = values.setdefault("original_max_position_embeddings", length)
        if length is not None and length == original:
            length = int(length * settings["factor"])
    if rope_type == "dynamic" and values.pop("original_max_position_embeddings", length) != length:
        _refuse("rope type dynamic: original_max_position_embeddings differs from max_position_embeddings", where)
    if rope_type == "yarn":
        _settle_attention_factor(values, where)
    return RopeScaling(
        type=rope_type, head_dim=_head_dim(config, where), rope_theta=base, max_position_embeddings=length, **values
    )


def _settle_attention_factor(values: dict[str, Any], where: object) -> None:
    """Drop an mscale pair that has no effect; refuse one that programs read differently."""
    mscale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if mscale is None and all_dim is None:
        return
    factor = values["factor"]
    transformers = temperature(factor, mscale) / temperature(factor, all_dim) if mscale and all_dim else temperature(factor)
    megatron = transformers if mscale is None or all_dim is None else temperature(factor, mscale) / temperature(factor, all_dim)
    given = values.get("attention_factor")
    readings = {transformers, megatron} if given is None else {given, transformers, megatron}
    if max(readings) - min(readings) > 1e-9:
        _refuse(
            f"yarn mscale {mscale}, mscale_all_dim {all_dim}, attention_factor {given}: transformers multiplies cos and sin by"
            f" {transformers if given is None else given:.6g}, Megatron by {megatron:.6g}",
            where,
            "give only attention_factor, or an mscale pair above 0",
        )
    if given is not None or not (mscale and all_dim):
        values.pop("mscale", None)
        values.pop("mscale_all_dim", None)


def _head_dim(config: Mapping[str, Any], where: object) -> int:
    if config.get("head_dim") is not None:
        return _whole(config, "head_dim", "head_dim", where)
    for key in ("hidden_size", "num_attention_heads"):
        if config.get(key) is None:
            _refuse(f"{key} is missing (there is no head_dim either)", where)
    hidden, heads = (_whole(config, key, key, where) for key in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        _refuse(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim", where)
    return hidden // heads


def write_hf_rope(scaling: RopeScaling) -> dict[str, Any]:
    """The keys to merge into a `config.json`: `rope_theta`, `rope_scaling`, `rope_parameters`, `max_position_embeddings`.

    Both spellings say the same, floats are floats. `ntk` and `abf` are written as a plain rope with the changed base. For `linear`,
    `max_position_embeddings` is the unscaled length, which vLLM and SGLang multiply by the factor. Remove a top-level
    `original_max_position_embeddings` from the config that these keys are merged into: transformers 5 lets it override.

    Raises:
        ConfigError: a rope that a Hugging Face config cannot hold (`dynamic`; yarn over rotations with a temperature), or whose
            length is not known.
    """
    if scaling.type == "dynamic":
        _refuse(
            "rope type dynamic is not exported: a model trained here has one fixed table", None, "use ntk, abf, llama3 or yarn"
        )
    base = scaling.rope_theta
    settings: dict[str, Any] = {"rope_type": "default"}
    length = scaling.resolved_max_position_embeddings
    if scaling.type == "ntk":
        base = ntk_base(scaling.head_dim, scaling.rope_theta, scaling.factor)
    elif scaling.type == "linear":
        settings = {"rope_type": "linear", "factor": scaling.factor}
        length = _unscaled_length(scaling)
    elif scaling.type == "llama3":
        settings = _llama3_settings(scaling, scaling.low_freq_factor, scaling.high_freq_factor)
    elif scaling.type == "yarn" and scaling.ramp == "rotations":
        attention_factor = scaling.frequencies()[1]
        if attention_factor != 1.0:
            _refuse(
                f"YaRN with ramp: rotations and attention factor {attention_factor:.6g} has no name in a Hugging Face config",
                None,
                "train with `type: llama3` (the same frequencies without the temperature), `attention_factor: 1`, or `ramp: index`",
            )
        settings = _llama3_settings(scaling, scaling.alpha, scaling.beta)
    elif scaling.type == "yarn":
        settings = _yarn_settings(scaling)
    if length is None:
        _refuse(
            f"rope type {scaling.type}: the length of the model is not known",
            None,
            "set max_position_embeddings beside the rope type",
        )
    return {
        "rope_theta": base,
        "rope_scaling": None if settings["rope_type"] == "default" else settings,
        "rope_parameters": {**settings, "rope_theta": base},
        "max_position_embeddings": length,
    }


def _llama3_settings(scaling: RopeScaling, low: float, high: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _yarn_settings(scaling: RopeScaling) -> dict[str, Any]:
    """All keys spelled out: Megatron-Bridge takes a missing beta or truncate for None."""
    table = math.ceil(scaling.factor * scaling.original_length)
    length = scaling.resolved_max_position_embeddings
    if length is not None and length > table:
        _refuse(
            f"max_position_embeddings {length:,} is more than factor x original_max_position_embeddings ({table:,}), where vLLM's yarn"
            " table ends",
            None,
            "raise factor instead",
        )
    settings: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if getattr(scaling, key) is not None:
            settings[key] = getattr(scaling, key)
    return settings


def _unscaled_length(scaling: RopeScaling) -> int | None:
    if scaling.original_max_position_embeddings is not None:
        return scaling.original_max_position_embeddings
    if scaling.max_position_embeddings is None:
        return None
    return int(scaling.max_position_embeddings / scaling.factor)
