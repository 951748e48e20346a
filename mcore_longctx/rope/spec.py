"""A rope asked for in one line (`--rope llama3:128`), and the rules that every rope which is asked for must keep.

keep                        the model's own
none                        the model's own base, no scaling
llama3:128                  TYPE:FACTOR; base and original length are the model's own
yarn:32,original=8192       and settings: key=value, lengths also as 8K or 1M
abf,theta=5e6,max=1M        a type without a factor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, get_args

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope.hf_config import write_hf_rope
from mcore_longctx.rope.scaling import RopeScaling, RopeType, used_fields
from mcore_longctx.units import parse_count

__all__ = ["MissingField", "parse_rope_spec", "usable_rope"]

_WITH_LISTS = ("bands", "longrope")
_TYPES: tuple[RopeType, ...] = tuple(known for known in get_args(RopeType) if known not in _WITH_LISTS)
_EXAMPLE = "write TYPE:FACTOR,key=value, for example llama3:128 or yarn:32,original=8192"


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is not true or false")
    return text == "true"


# key -> (field of RopeScaling, how its value is read); a field's full name is a key, too
_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "factor": ("factor", float),
    "theta": ("rope_theta", float),
    "original": ("original_max_position_embeddings", parse_count),
    "max": ("max_position_embeddings", parse_count),
    "low": ("low_freq_factor", float),
    "high": ("high_freq_factor", float),
    "ramp": ("ramp", str),
    "beta_fast": ("beta_fast", float),
    "beta_slow": ("beta_slow", float),
    "alpha": ("alpha", float),
    "beta": ("beta", float),
    "truncate": ("truncate", _truth),
    "attention_factor": ("attention_factor", float),
    "mscale": ("mscale", float),
    "mscale_all_dim": ("mscale_all_dim", float),
}
_FULL_NAMES = {field: key for key, (field, _) in _KEYS.items()}


class MissingField(ConfigError):
    """A field that must be given, and does not follow from anything else."""

    def __init__(self, field: str, why: str, *, where: object = None) -> None:
        self.field = field
        super().__init__(f"missing; {why}", where=where)


def usable_rope(rope: RopeScaling, own: RopeScaling) -> RopeScaling:
    """`rope` for a model whose own rope is `own`: type `none` keeps the model's length; the rest is checked.

    Raises:
        MissingField: a length that does not follow from the type.
        ConfigError: what cannot be trained with (`dynamic`), or not written to a Hugging Face config.
    """
    if rope.type == "none" and rope.max_position_embeddings is None:
        rope = replace(rope, max_position_embeddings=own.resolved_max_position_embeddings)
    rope.check_trainable()
    if rope.resolved_max_position_embeddings is None:
        raise MissingField("max_position_embeddings", f"the length does not follow from rope type {rope.type}")
    write_hf_rope(rope)
    return rope


def parse_rope_spec(text: str, own: RopeScaling) -> RopeScaling:
    """The rope that `text` asks for, on a model whose own rope is `own`; see the module for the form.

    What is not given: the base is the model's own; the original length too (of llama3 and yarn their own, else the length that
    the model was trained at); `max_position_embeddings` follows from factor and original length, and is the model's own where the
    type has no factor; all else as in a recipe. The factor counts from the original length, not from the model's own context.

    >>> own = RopeScaling(type="none", head_dim=128, rope_theta=5e5, max_position_embeddings=8192)
    >>> parse_rope_spec("llama3:128", own).resolved_max_position_embeddings
    1048576

    Raises:
        ConfigError: an unknown type or key, a setting that the type does not use, a value that cannot be used, or a rope that
            cannot be trained with or written to a Hugging Face config.
    """
    where = f"--rope {text[:80]}"
    if text == "keep":
        return own
    head, *parts = text.split(",")
    name, colon, factor = head.partition(":")
    if name in _WITH_LISTS:
        raise ConfigError(
            f"rope type {name} has a list, which does not fit into one line",
            where=where,
            fix="write it into the rope section of a recipe",
        )
    rope_type = next((known for known in _TYPES if known == name), None)
    if rope_type is None:
        raise ConfigError(f"rope type {name[:40]!r} is unknown", where=where, fix=f"known are keep, {', '.join(_TYPES)}")
    settings = _settings([f"factor={factor}"] * bool(colon) + parts, rope_type, where)
    try:
        rope = RopeScaling(type=rope_type, head_dim=own.head_dim, **_defaults(rope_type, settings, own, where), **settings)
        return usable_rope(rope, own)
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None
    except MissingField as error:
        raise ConfigError(f"{_FULL_NAMES[error.field]} is {error.what}", where=where) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=where, fix=error.fix) from None


def _settings(parts: list[str], rope_type: RopeType, where: str) -> dict[str, Any]:
    """Field -> value of `key=value` parts."""
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        key = _FULL_NAMES.get(name, name)
        if not equals or not value:
            raise ConfigError(f"{part[:40]!r} is not key=value", where=where, fix=_EXAMPLE)
        if key not in _KEYS:
            _refuse_key(f"{name[:40]!r} is not a setting of rope type {rope_type}", rope_type, found, where)
        if key in found:
            raise ConfigError(f"{key} is given twice", where=where)
        found[key] = value
    allowed = used_fields(rope_type, _ramp(found, where))
    settings = {}
    for key, value in found.items():
        field, read = _KEYS[key]
        if field not in allowed:
            _refuse_key(f"{key} is not a setting of rope type {rope_type}", rope_type, found, where)
        try:
            settings[field] = read(value)
        except ValueError:
            raise ConfigError(f"{key} is {value[:40]!r}, expected {_expected(read)}", where=where) from None
    return settings


def _ramp(found: Mapping[str, str], where: str) -> str:
    ramp = found.get("ramp", "index")
    if ramp not in ("index", "rotations"):
        raise ConfigError(f"ramp is {ramp[:40]!r}, expected index or rotations", where=where)
    return ramp


def _refuse_key(what: str, rope_type: RopeType, found: Mapping[str, str], where: str) -> NoReturn:
    ramp = "rotations" if found.get("ramp") == "rotations" else "index"
    allowed = used_fields(rope_type, ramp)
    raise ConfigError(
        what, where=where, fix=f"known are {', '.join(key for key, (field, _) in _KEYS.items() if field in allowed)}"
    )


def _expected(read: Callable[[str], Any]) -> str:
    return {float: "a number", parse_count: "a number of tokens such as 8192 or 8K", _truth: "true or false"}[read]


def _defaults(rope_type: RopeType, settings: Mapping[str, Any], own: RopeScaling, where: str) -> dict[str, Any]:
    """Fields that are not given and follow from the model's own rope."""
    fields = used_fields(rope_type)
    if rope_type == "abf" and "rope_theta" not in settings:
        raise ConfigError("theta is missing; type abf is a changed base", where=where, fix="write abf,theta=5e6")
    if "factor" in fields and "factor" not in settings:
        raise ConfigError("factor is missing", where=where, fix=f"write {rope_type}:8")
    defaults: dict[str, Any] = {"rope_theta": own.rope_theta}
    if "original_max_position_embeddings" in fields:
        defaults["original_max_position_embeddings"] = _original_length(own)
    elif rope_type != "dynamic":
        defaults["max_position_embeddings"] = own.resolved_max_position_embeddings
    return {name: value for name, value in defaults.items() if name not in settings}


def _original_length(own: RopeScaling) -> int | None:
    """The length before the model's own scaling; without one, what the model was trained at."""
    if own.original_max_position_embeddings is not None:
        return own.original_max_position_embeddings
    return own.resolved_max_position_embeddings if own.type in ("none", "abf", "dynamic") else None
