"""The rope in a Hugging Face `config.json`: both spellings read strictly, both written.

transformers 4.x spells it `rope_theta` + `rope_scaling`, transformers 5.x `rope_parameters`. A file in which the two disagree, or
that programs are known to read differently, is refused instead of guessed at (`docs/rope.md` has the table).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope.frequencies import ntk_base, temperature
from mcore_longctx.rope.scaling import RopeScaling

__all__ = ["merge_hf_rope", "read_hf_rope", "write_hf_rope"]

_DEFAULT_BASE = 10_000.0  # transformers' LlamaConfig, where no base is given (Llama 1 and 2)
# Settings of each rope type: those that must be there, and the others. "default" is Hugging Face's word for no scaling.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("original_max_position_embeddings",),
    "dynamic": ("original_max_position_embeddings",),
    "llama3": (),
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "original_max_position_embeddings", "short_mscale", "long_mscale"),
}
# Temperatures of longrope: transformers reads the first, servers the others.
_NO_TEMPERATURE = ("attention_factor", "short_mscale", "long_mscale")


def read_hf_rope(config: Mapping[str, Any], *, where: object = "config.json") -> RopeScaling:
    """The rope of a Hugging Face config (the parsed `config.json` of a Llama-family model).

    A plain rope is read as `none`, whatever its base: the file does not say whether the base was ever changed. So `abf` and `ntk`
    come back as `none` with the changed base, and the same fingerprint; `bands` as `longrope`. `longrope` is read where its two lists
    are equal and its attention factor is 1.

    Raises:
        ConfigError: an unknown rope type, any other `longrope`, spellings that disagree, a key that is missing, unknown or of the wrong type,
            settings per layer, or partly rotated heads.
    """
    sections = {name: _section(config, name, where) for name in ("rope_scaling", "rope_parameters")}
    base = _base(config, sections, where)
    settings = _agreed({name: _settings(section, name, where) for name, section in sections.items() if section}, where)
    _check_top_level(config, settings, where)
    return _scaling(config, settings, base, where)


def write_hf_rope(scaling: RopeScaling) -> dict[str, Any]:
    """The rope as keys of a `config.json`: `rope_theta`, `rope_scaling`, `rope_parameters`, `max_position_embeddings`.

    Both spellings say the same, floats are floats. `ntk` and `abf` are written as a plain rope with the changed base, yarn over
    rotations without a temperature as the llama3 that it is. For `linear`, `max_position_embeddings` is the unscaled length, which
    vLLM and SGLang multiply by the factor. `bands` and `longrope` are written as a longrope with two equal lists, whose original
    length is the whole length and whose factor is 1: the length at which other programs change lists makes no difference, and no
    temperature follows from the two lengths (vLLM and SGLang take theirs from these, not from attention_factor).

    Raises:
        ConfigError: a rope that a Hugging Face config cannot hold (`dynamic`; yarn over rotations with a temperature; yarn with a
            length beyond factor x original), or whose length is not known.
    """
    base, length = scaling.rope_theta, scaling.resolved_max_position_embeddings
    settings: dict[str, Any] = {"rope_type": "default"}
    if scaling.type == "dynamic":
        _refuse("rope type dynamic is not exported: what is trained here has one fixed table", fix="use ntk, abf, llama3 or yarn")
    elif scaling.type == "ntk":
        base = ntk_base(scaling.head_dim, scaling.rope_theta, scaling.factor)
    elif scaling.type == "linear":
        settings = {"rope_type": "linear", "factor": scaling.factor}
        length = _unscaled_length(scaling)
    elif scaling.type == "llama3":
        settings = _llama3_settings(scaling, scaling.low_freq_factor, scaling.high_freq_factor)
    elif scaling.type == "yarn":
        settings = _rotations_settings(scaling) if scaling.ramp == "rotations" else _yarn_settings(scaling)
    if length is None:
        _refuse(
            f"rope type {scaling.type}: the model's length is not known", fix="set max_position_embeddings beside the rope type"
        )
    if scaling.type in ("bands", "longrope"):
        settings = _longrope_settings(scaling, length)
    return {
        "rope_theta": base,
        "rope_scaling": None if settings["rope_type"] == "default" else settings,
        "rope_parameters": {**settings, "rope_theta": base},
        "max_position_embeddings": length,
    }


def merge_hf_rope(config: Mapping[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    """`config` with its rope replaced by `scaling` (`write_hf_rope`).

    A top-level `original_max_position_embeddings` goes: transformers 5 would let it override the one in the rope settings.

    Raises:
        ConfigError: as `write_hf_rope`.
    """
    kept = {key: value for key, value in config.items() if key != "original_max_position_embeddings"}
    return {**kept, **write_hf_rope(scaling)}


def _refuse(what: str, where: object = None, fix: str = "") -> NoReturn:
    raise ConfigError(what, where=where, fix=fix)


def _section(config: Mapping[str, Any], name: str, where: object) -> Mapping[str, Any]:
    """One spelling as it stands in the file, empty where it is missing or null."""
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        _refuse(f"{name} is {section!r}, expected an object", where)
    for key, value in section.items():
        if isinstance(value, Mapping):
            _refuse(f"{name}.{key} holds rope settings for one kind of layer; one rope for all layers is supported", where)
    return section


def _base(config: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]], where: object) -> float:
    """`rope_theta`, from wherever it stands; refused where it stands twice with two values."""
    places = {"rope_theta": config} | {f"{name}.rope_theta": section for name, section in sections.items()}
    found = [(name, _float(place["rope_theta"], name, where)) for name, place in places.items() if "rope_theta" in place]
    for name, value in found[1:]:
        if value != found[0][1]:
            _refuse(
                f"{found[0][0]} is {found[0][1]:,.15g} and {name} is {value:,.15g}",
                where,
                "other programs pick one silently: make them equal",
            )
    return found[0][1] if found else _DEFAULT_BASE


def _agreed(spellings: Mapping[str, dict[str, Any]], where: object) -> dict[str, Any]:
    """The settings that the spellings in the file agree on."""
    both = list(spellings.values())
    if len(both) == 2:
        old, new = both
        for key in (*old, *new):
            if old.get(key) != new.get(key):
                _refuse(
                    f"rope_scaling and rope_parameters disagree: {key} is {_shown(old.get(key))} and {_shown(new.get(key))}",
                    where,
                    "other programs pick one silently: make them equal or remove one",
                )
    return both[0] if both else {"rope_type": "default"}


def _settings(section: Mapping[str, Any], name: str, where: object) -> dict[str, Any]:
    """One spelling, checked: rope_type and its settings, numbers as float or int."""
    rope_type = _rope_type(section, name, where)
    if section.get("partial_rotary_factor") not in (None, 1):
        _refuse(f"{name}.partial_rotary_factor is not 1; partly rotated heads are not supported", where)
    settings: dict[str, Any] = {"rope_type": rope_type}
    for key, value in section.items():
        # null means "not given" to other programs too, except for truncate: there transformers takes it for false
        if key in ("rope_type", "type", "rope_theta", "partial_rotary_factor") or (value is None and key != "truncate"):
            continue
        if key not in _REQUIRED[rope_type] + _OPTIONAL[rope_type]:
            _refuse(f"{name}.{key} is not a setting of rope type {rope_type}", where, "remove it: other programs ignore it")
        settings[key] = _value(key, value, f"{name}.{key}", where)
    for key in _REQUIRED[rope_type]:
        if key not in settings:
            _refuse(f"{name}.{key} is missing (rope type {rope_type})", where, "write it down: other programs guess it or stop")
    if rope_type == "longrope":
        _check_one_table(settings, name, where)
    return settings


def _check_one_table(settings: Mapping[str, Any], name: str, where: object) -> None:
    """Refuse a longrope that is more than one divisor for each pair."""
    if settings["short_factor"] != settings["long_factor"]:
        _refuse_two_tables("longrope", name, where)
    for key in _NO_TEMPERATURE:
        if settings.get(key, 1.0) != 1.0:
            what = f"{name}.{key} is {settings[key]:.6g}: a longrope that multiplies cos and sin is not supported"
            _refuse(what, where, "start from a model with plain, linear, llama3 or yarn rope")


def _refuse_two_tables(rope_type: str, name: str, where: object) -> NoReturn:
    _refuse(
        f"{name}: rope type {rope_type} switches between two frequency tables by sequence length; no one table can be trained",
        where,
        "start from a model with plain, linear, llama3 or yarn rope",
    )


def _rope_type(section: Mapping[str, Any], name: str, where: object) -> str:
    types = [section[key] for key in ("rope_type", "type") if section.get(key) is not None]
    if len(types) == 2 and types[0] != types[1]:
        _refuse(f"{name}.rope_type is {types[0]!r} and {name}.type is {types[1]!r}", where, "make them equal or remove type")
    if not types:
        if any(value is not None for key, value in section.items() if key not in ("rope_theta", "partial_rotary_factor")):
            _refuse(f"{name}.rope_type is missing", where, f"known are {', '.join(_REQUIRED)}")
        return "default"
    rope_type = types[0]
    if rope_type == "su":
        _refuse_two_tables(rope_type, name, where)
    if not isinstance(rope_type, str) or rope_type not in _REQUIRED:
        _refuse(f"{name}: rope type {rope_type!r} is unknown", where, f"known are {', '.join(_REQUIRED)}")
    return rope_type


def _value(key: str, value: object, name: str, where: object) -> bool | int | float | tuple[float, ...]:
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple):
            _refuse(f"{name} is {reprlib.repr(value)}, expected a list of numbers", where)
        return tuple(_float(entry, f"{name}[{pair}]", where) for pair, entry in enumerate(value))
    if key == "truncate":
        if not isinstance(value, bool):
            _refuse(f"{name} is {value!r}, expected true or false", where)
        return value
    return _whole(value, name, where) if key == "original_max_position_embeddings" else _float(value, name, where)


def _shown(value: object) -> str:
    return reprlib.repr(value) if isinstance(value, tuple) else repr(value)


def _float(value: object, name: str, where: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e100:  # false for NaN
        return float(value)
    return _refuse(f"{name} is {value!r}, expected a number", where)


def _whole(value: object, name: str, where: object) -> int:
    number = _float(value, name, where)
    if number < 1 or not number.is_integer():
        _refuse(f"{name} is {value!r}, expected a positive whole number", where)
    return int(number)


def _check_top_level(config: Mapping[str, Any], settings: Mapping[str, Any], where: object) -> None:
    """Refuse top-level keys that change the meaning of the rope settings in some programs."""
    if config.get("partial_rotary_factor") not in (None, 1):
        _refuse("partial_rotary_factor is not 1; partly rotated heads are not supported", where)
    outer, inner = config.get("original_max_position_embeddings"), settings.get("original_max_position_embeddings")
    if "original_max_position_embeddings" in config and settings["rope_type"] in ("llama3", "yarn") and outer != inner:
        _refuse(
            f"original_max_position_embeddings is {outer!r} at the top level and {inner!r} in the rope settings",
            where,
            "transformers 4 and 5 pick different ones: remove the one at the top level",
        )


def _scaling(config: Mapping[str, Any], settings: Mapping[str, Any], base: float, where: object) -> RopeScaling:
    values: dict[str, Any] = {**settings, "head_dim": _head_dim(config, where), "rope_theta": base}
    rope_type = values.pop("rope_type")
    length = None
    if "max_position_embeddings" in config:
        length = _whole(config["max_position_embeddings"], "max_position_embeddings", where)
    if rope_type == "linear":
        # The file holds the unscaled length (vLLM and SGLang multiply it), RopeScaling the longest sequence of the model.
        original = values.setdefault("original_max_position_embeddings", length)
        if length is not None and length == original:
            length = int(length * values["factor"])
    elif rope_type == "dynamic" and values.pop("original_max_position_embeddings", length) != length:
        _refuse(
            "rope type dynamic: original_max_position_embeddings differs from max_position_embeddings, the trained length", where
        )
    elif rope_type == "yarn":
        _settle_attention_factor(values, where)
    elif rope_type == "longrope":
        for key in ("short_factor", "factor", "original_max_position_embeddings", *_NO_TEMPERATURE):
            values.pop(key, None)  # with equal lists and a temperature of 1 they decide nothing
    try:
        return RopeScaling(type="none" if rope_type == "default" else rope_type, max_position_embeddings=length, **values)
    except ValueError as error:
        raise ConfigError(f"rope: {error}", where=where) from None


def _settle_attention_factor(values: dict[str, Any], where: object) -> None:
    """Drop an mscale pair that has no effect; refuse one that programs read differently."""
    factor, given = values["factor"], values.get("attention_factor")
    mscale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if mscale is None and all_dim is None:
        return
    if min(mscale or 0.0, all_dim or 0.0) < 0.0:
        _refuse(f"yarn with mscale {mscale}, mscale_all_dim {all_dim}: expected 0 or more", where)
    # transformers: the pair counts if both are not 0; Megatron and SGLang: if both are there
    transformers = temperature(factor, mscale) / temperature(factor, all_dim) if mscale and all_dim else temperature(factor)
    megatron = transformers if mscale is None or all_dim is None else temperature(factor, mscale) / temperature(factor, all_dim)
    readings = [transformers, megatron] if given is None else [given, megatron]
    if not math.isclose(*readings, rel_tol=1e-9):
        _refuse(
            f"yarn with mscale {mscale}, mscale_all_dim {all_dim}, attention_factor {given}: transformers multiplies cos and sin by"
            f" {readings[0]:.6g}, Megatron by {readings[1]:.6g}",
            where,
            "give attention_factor alone, or an mscale pair above 0 alone",
        )
    if given is not None or not (mscale and all_dim):
        values.pop("mscale", None)
        values.pop("mscale_all_dim", None)


def _head_dim(config: Mapping[str, Any], where: object) -> int:
    if config.get("head_dim") is not None:
        return _whole(config["head_dim"], "head_dim", where)
    for key in ("hidden_size", "num_attention_heads"):
        if config.get(key) is None:
            _refuse(f"{key} is missing, and there is no head_dim", where)
    hidden, heads = (_whole(config[key], key, where) for key in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        _refuse(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim", where)
    return hidden // heads


def _llama3_settings(scaling: RopeScaling, low: float, high: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _rotations_settings(scaling: RopeScaling) -> dict[str, Any]:
    attention_factor = scaling.frequencies()[1]
    if attention_factor != 1.0:
        _refuse(
            f"yarn with ramp rotations and attention factor {attention_factor:.6g} has no name in a Hugging Face config",
            fix="train with type llama3 (the same frequencies, no temperature), or with ramp index",
        )
    return _llama3_settings(scaling, scaling.alpha, scaling.beta)


def _yarn_settings(scaling: RopeScaling) -> dict[str, Any]:
    """Betas and truncate are always written: Megatron-Bridge takes a missing one for None."""
    table, length = math.ceil(scaling.factor * scaling.original_length), scaling.resolved_max_position_embeddings
    if length is not None and length > table:
        _refuse(
            f"yarn: max_position_embeddings {length:,} is more than factor x original_max_position_embeddings ({table:,}),"
            " where the tables of other programs end",
            fix="raise factor, or lower max_position_embeddings",
        )
    settings = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "attention_factor": scaling.attention_factor,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }
    return {key: value for key, value in settings.items() if value is not None}


def _longrope_settings(scaling: RopeScaling, length: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": length,
        "attention_factor": 1.0,
        "short_factor": list(scaling.divisors()),
        "long_factor": list(scaling.divisors()),
    }


def _unscaled_length(scaling: RopeScaling) -> int | None:
    """The length that other programs multiply by `factor`."""
    original, length = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    if original is None and length is not None:
        original = round(length / scaling.factor)
    if original is not None and length is not None and int(original * scaling.factor) != length:
        _refuse(
            f"rope type linear: max_position_embeddings {length:,} is not factor x original_max_position_embeddings"
            f" ({scaling.factor:g} x {original:,})",
            fix="other programs compute it so: set original_max_position_embeddings, and leave max_position_embeddings out",
        )
    return original
