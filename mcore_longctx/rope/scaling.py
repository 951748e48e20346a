"""`RopeScaling`: the rope of a model, as one checked value that travels with its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope import frequencies as formulas
from mcore_longctx.rope.bands import RopeBand, divisors_of_bands
from mcore_longctx.rope.frequencies import FloatArray
from mcore_longctx.rope.words import describe

__all__ = ["RopeScaling", "RopeType", "used_fields"]

RopeType = Literal["none", "linear", "ntk", "dynamic", "abf", "llama3", "yarn", "bands", "longrope"]

_COMMON = frozenset({"type", "head_dim", "rope_theta", "max_position_embeddings"})
_WITH_FACTOR = frozenset({"factor", "original_max_position_embeddings"})
_USES: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "abf": frozenset(),
    "dynamic": frozenset({"factor"}),
    "linear": _WITH_FACTOR,
    "ntk": _WITH_FACTOR,
    "llama3": _WITH_FACTOR | {"low_freq_factor", "high_freq_factor"},
    "bands": _WITH_FACTOR | {"bands"},
    "longrope": frozenset({"long_factor"}),
    "yarn index": _WITH_FACTOR | {"ramp", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"},
    "yarn rotations": _WITH_FACTOR | {"ramp", "alpha", "beta", "attention_factor"},
}
# Far beyond any use, so that a slip (a base of 10^400) ends in one line instead of an overflow.
_LARGEST: dict[str, float] = {
    "head_dim": 4096,
    "max_position_embeddings": 1 << 48,
    "original_max_position_embeddings": 1 << 48,
    "rope_theta": 1e30,
    "factor": 1e6,
    "low_freq_factor": 1e9,
    "high_freq_factor": 1e9,
    "beta_fast": 1e9,
    "beta_slow": 1e9,
    "alpha": 1e9,
    "beta": 1e9,
    "attention_factor": 1e6,
    "mscale": 1e6,
    "mscale_all_dim": 1e6,
}
_WHOLE = frozenset({"head_dim", "max_position_embeddings", "original_max_position_embeddings"})
_OPTIONAL = frozenset(
    {"max_position_embeddings", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}
)


def used_fields(rope_type: RopeType, ramp: str = "index") -> frozenset[str]:
    """The fields of `RopeScaling` that may be given for this type (and, for yarn, this ramp)."""
    return _COMMON | _USES[f"yarn {ramp}" if rope_type == "yarn" else rope_type]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary position embedding of one model: its base, its scaling, its length.

    Fields that `type` does not use must keep their defaults.

        type      uses                                                      formula (`mcore_longctx.rope.frequencies`)
        none      -                                                         w = b^(-2i/d)
        linear    factor, original_max_position_embeddings (optional)       w / s
        ntk       factor, original_max_position_embeddings (optional)       base b s^(d/(d-2))
        dynamic   factor, max_position_embeddings (the trained length)      a base that grows with the sequence: not for training
        abf       rope_theta is the changed base                            w of that base
        llama3    factor, original_..., low_freq_factor, high_freq_factor   ramp over rotations
        yarn      factor, original_..., attention_factor, and by `ramp`
          index       beta_fast, beta_slow, truncate, mscale pair           ramp over the pair index (what libraries call yarn)
          rotations   alpha, beta                                           ramp over rotations (YaRN as published)
        bands     factor, original_... (optional), bands                    each range of pairs as none, linear, ntk, or a mix
        longrope  long_factor, a number for each pair                       w / f

    `bands` is exported as `longrope`, and comes back as that. LongRoPE itself switches between two lists: here there is one.

    `max_position_embeddings` is the longest sequence that the model is made for. None: it follows from factor x
    original_max_position_embeddings, see `resolved_max_position_embeddings`. For `dynamic` it is the trained length and required.

    Raises:
        ValueError: a value out of range, a missing field, or a field that the type does not use.
    """

    type: RopeType
    head_dim: int
    rope_theta: float
    max_position_embeddings: int | None = None
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    ramp: Literal["index", "rotations"] = "index"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    alpha: float = 1.0
    beta: float = 32.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    bands: tuple[RopeBand, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.type not in get_args(RopeType):
            raise ValueError(f"rope type {self.type!r} is unknown; there are {', '.join(get_args(RopeType))}")
        if self.ramp not in ("index", "rotations"):
            raise ValueError(f"ramp is {self.ramp!r}, expected index or rotations")
        if type(self.truncate) is not bool:
            raise ValueError(f"truncate is {self.truncate!r}, expected true or false")
        for name in _LARGEST:
            self._check_number(name)
        self._check_used()
        self._check_lists()
        self._check_ranges()

    def _check_number(self, name: str) -> None:
        """Refuse what is not a positive number; whole numbers become plain int, others float (they are written as floats)."""
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        kind, text = (int, "whole number") if name in _WHOLE else (int | float, "number")
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= _LARGEST[name]:
            raise ValueError(f"{name} is {value!r}, expected a {text} above 0 and up to {_LARGEST[name]:,.15g}")
        object.__setattr__(self, name, int(value) if name in _WHOLE else float(value))

    @property
    def _kind(self) -> str:
        return f"yarn {self.ramp}" if self.type == "yarn" else self.type

    def _check_used(self) -> None:
        used = used_fields(self.type, self.ramp)
        for field in fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                kind = f"yarn with ramp {self.ramp}" if self.type == "yarn" else self.type
                raise ValueError(f"{field.name} is given, but rope type {kind} does not use it")
        if self.type in ("llama3", "yarn") and self.original_max_position_embeddings is None:
            raise ValueError(f"rope type {self.type} needs original_max_position_embeddings (8192 for Llama 3)")
        if self.type == "dynamic" and self.max_position_embeddings is None:
            raise ValueError("rope type dynamic needs max_position_embeddings, the trained length")

    def _check_lists(self) -> None:
        """Refuse lists that are not one entry for each pair, or a band for each; what fits becomes a tuple."""
        if self.type == "bands":
            if not isinstance(self.bands, list | tuple) or not all(isinstance(band, RopeBand) for band in self.bands):
                raise ValueError("rope type bands needs bands, a list of pairs and rule")
            object.__setattr__(self, "bands", tuple(self.bands))
        elif self.type == "longrope":
            if not isinstance(self.long_factor, list | tuple):
                raise ValueError("rope type longrope needs long_factor, a list of one number for each pair")
            for pair, value in enumerate(self.long_factor):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST["factor"]:
                    raise ValueError(
                        f"long_factor of pair {pair} is {value!r}, expected a number above 0 and up to {_LARGEST['factor']:,.15g}"
                    )
            object.__setattr__(self, "long_factor", tuple(float(value) for value in self.long_factor))

    def _check_ranges(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number (rope turns pairs)")
        if self.type in ("ntk", "dynamic", "bands") and self.head_dim < 4:
            raise ValueError(f"rope type {self.type} needs a head_dim of 4 or more")
        if self.rope_theta <= 1.0:
            raise ValueError(f"rope_theta is {self.rope_theta:g}, expected more than 1")
        if self.factor < 1.0:
            raise ValueError(f"factor is {self.factor:g}, expected 1 or more")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"), ("alpha", "beta")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low):g} and {high} {getattr(self, high):g}, expected {low} below {high}"
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("give both mscale and mscale_all_dim, or neither")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("give attention_factor or the pair mscale and mscale_all_dim, not both")
        if self._kind == "yarn index":
            self.share_kept()  # refuses a ramp that ends before it starts
        if self.type in ("bands", "longrope"):
            self.divisors()  # refuses lists that are too long or too short

    @property
    def original_length(self) -> int:
        """`original_max_position_embeddings` of a rope that has one.

        Raises:
            ValueError: this rope has none.
        """
        if self.original_max_position_embeddings is None:
            raise ValueError(f"this rope (type {self.type}) has no original_max_position_embeddings")
        return self.original_max_position_embeddings

    @property
    def resolved_max_position_embeddings(self) -> int | None:
        """Longest sequence that the model is made for: the field, else int(factor x original length), else None (not known).

        >>> RopeScaling(
        ...     type="llama3", head_dim=128, rope_theta=5e5, factor=128, original_max_position_embeddings=8192
        ... ).resolved_max_position_embeddings
        1048576
        """
        if self.max_position_embeddings is not None:
            return self.max_position_embeddings
        if self.original_max_position_embeddings is None:
            return None
        return int(self.factor * self.original_max_position_embeddings)

    def share_kept(self) -> FloatArray:
        """Share of its own frequency that each pair keeps under llama3 or yarn, float64 [d/2]: 1 untouched, 0 divided by factor.

        Raises:
            ValueError: another type.
        """
        if self._kind == "yarn index":
            return formulas.share_kept_by_index(
                self.head_dim,
                self.rope_theta,
                self.original_length,
                beta_fast=self.beta_fast,
                beta_slow=self.beta_slow,
                truncate=self.truncate,
            )
        inv_freq = formulas.plain_frequencies(self.head_dim, self.rope_theta)
        if self._kind == "yarn rotations":
            return formulas.share_kept_by_rotations(inv_freq, self.original_length, self.alpha, self.beta)
        if self.type == "llama3":
            return formulas.share_kept_by_rotations(inv_freq, self.original_length, self.low_freq_factor, self.high_freq_factor)
        raise ValueError(f"rope type {self.type} has no ramp")

    def divisors(self) -> tuple[float, ...]:
        """What each pair's frequency is divided by under bands or longrope, [d/2].

        Raises:
            ValueError: another type, or a list that is too long or too short.
        """
        if self.bands is not None:
            return divisors_of_bands(self.head_dim, self.factor, self.bands)
        if self.long_factor is None:
            raise ValueError(f"rope type {self.type} has no divisors")
        if len(self.long_factor) != self.head_dim // 2:
            raise ValueError(
                f"long_factor has {len(self.long_factor)} numbers, a head of {self.head_dim} has {self.head_dim // 2} pairs"
            )
        return self.long_factor

    def frequencies(self, seq_length: int | None = None) -> tuple[FloatArray, float]:
        """Inverse frequencies (float64 [d/2], radians per token) and the attention factor that multiplies cos and sin.

        `seq_length` matters for `dynamic` only, which has no fixed table.

        Raises:
            ConfigError: type `dynamic` without `seq_length`.
        """
        d, base, s, attention_factor = self.head_dim, self.rope_theta, self.factor, 1.0
        if self.type == "linear":
            inv_freq = formulas.linear_frequencies(d, base, s)
        elif self.type == "ntk":
            inv_freq = formulas.ntk_frequencies(d, base, s)
        elif self.type == "dynamic":
            if seq_length is None:
                raise self._not_trainable()
            assert self.max_position_embeddings is not None
            inv_freq = formulas.dynamic_frequencies(d, base, s, self.max_position_embeddings, seq_length)
        elif self.type in ("llama3", "yarn"):
            inv_freq = formulas.blend(formulas.plain_frequencies(d, base), s, self.share_kept())
            if self.type == "yarn":
                attention_factor = formulas.attention_factor_of_yarn(s, self.attention_factor, self.mscale, self.mscale_all_dim)
        elif self.type in ("bands", "longrope"):
            inv_freq = formulas.divided_frequencies(d, base, self.divisors())
        else:
            inv_freq = formulas.plain_frequencies(d, base)
        return inv_freq, attention_factor

    def check_trainable(self) -> None:
        """Raise ConfigError for `dynamic`, whose frequencies change with the sequence: there is no one table to train on."""
        if self.type == "dynamic":
            raise self._not_trainable()

    def _not_trainable(self) -> ConfigError:
        return ConfigError(
            "rope type dynamic changes its frequencies with the sequence length; a model cannot be trained or extended with it",
            fix=f"use type ntk with factor {self.factor:g} (the same formula at one length), or llama3 or yarn",
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the rope does: two ropes that turn queries and keys alike have the same one.

        Hashed, as float64 little endian: the d/2 inverse frequencies, the attention factor, the original length (for llama3 and
        yarn; 0 for types whose formula has none, so that `ntk` and the changed base that it is exported as are one rope). Each
        value is rounded to 12 significant digits first. The frequencies themselves are the same bits on every machine
        (`frequencies.py` says how), so a checkpoint keeps its fingerprint when it moves; the rounding lets another program that
        computes them with its own `pow` arrive at the same hash. For `dynamic`, the table at twice the trained length is hashed
        (it gives factor away), with the trained length as original length.
        """
        original = self.original_length if self.type in ("llama3", "yarn") else 0
        seq_length = None
        if self.type == "dynamic":
            assert self.max_position_embeddings is not None
            original, seq_length = self.max_position_embeddings, 2 * self.max_position_embeddings
        inv_freq, attention_factor = self.frequencies(seq_length)
        values = [float(f"{value:.11e}") for value in (*inv_freq.tolist(), attention_factor, float(original))]
        return hashlib.sha256(np.array(values, dtype="<f8").tobytes()).hexdigest()

    def describe(self) -> str:
        """The rope in words, one line.

        >>> RopeScaling(type="linear", head_dim=128, rope_theta=5e5, factor=8).describe()
        'linear factor 8, base 500,000: every pair divided by 8'
        """
        return describe(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form: the fields that this type uses."""
        used = used_fields(self.type, self.ramp)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name in used}
        if self.bands is not None:
            values["bands"] = [band.as_dict() for band in self.bands]
        if self.long_factor is not None:
            values["long_factor"] = list(self.long_factor)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """Inverse of `as_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value that cannot be used.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown rope field {unknown[0]!r}")
        if missing := sorted({"type", "head_dim", "rope_theta"} - set(values)):
            raise ValueError(f"rope has no {missing[0]}")
        if isinstance(values.get("bands"), list):
            values = {**values, "bands": tuple(RopeBand.from_dict(band) for band in values["bands"])}
        return cls(**values)
