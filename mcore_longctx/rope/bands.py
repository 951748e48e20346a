"""A rope in bands: the pairs of a head from the fastest to the slowest, cut into ranges, each scaled by a rule of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mcore_longctx.rope.frequencies import band_divisor

__all__ = ["BandRule", "RopeBand", "divisors_of_bands"]

BandRule = Literal["none", "linear", "ntk", "mix"]
_NTK_SHARE = {"linear": 0.0, "ntk": 1.0}


@dataclass(frozen=True, kw_only=True)
class RopeBand:
    """Consecutive pairs of a head with one rule.

        rule      divisor of pair i, of a rope with factor s and head dimension d
        none      1
        linear    s
        ntk       s^(2i/(d-2)), i counted over the whole head
        mix       of the frequencies: (1 - ntk_share) linear + ntk_share ntk

    Raises:
        ValueError: no pairs, an unknown rule, a mix without its share or a share without a mix.
    """

    pairs: int
    rule: BandRule
    ntk_share: float | None = None

    def __post_init__(self) -> None:
        if type(self.pairs) is not int or not 1 <= self.pairs <= 2048:
            raise ValueError(f"pairs is {self.pairs!r}, expected a whole number from 1 to 2,048")
        if self.rule not in get_args(BandRule):
            raise ValueError(f"rule is {self.rule!r}, expected one of {', '.join(get_args(BandRule))}")
        if self.rule != "mix" and self.ntk_share is not None:
            raise ValueError(f"ntk_share is given, but rule {self.rule} does not use it")
        if self.rule == "mix":
            if isinstance(self.ntk_share, bool) or not isinstance(self.ntk_share, int | float) or not 0 <= self.ntk_share <= 1:
                raise ValueError(f"ntk_share is {self.ntk_share!r}, rule mix needs a number from 0 (linear) to 1 (ntk)")
            object.__setattr__(self, "ntk_share", float(self.ntk_share))

    def divisor(self, head_dim: int, pair: int, factor: float) -> float:
        """What the frequency of pair `pair` of the head is divided by; 1 or more, at most `factor`."""
        if self.rule == "none":
            return 1.0
        share = _NTK_SHARE[self.rule] if self.ntk_share is None else self.ntk_share
        return band_divisor(head_dim, pair, factor, share)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {"pairs": self.pairs, "rule": self.rule} | ({} if self.ntk_share is None else {"ntk_share": self.ntk_share})

    @classmethod
    def from_dict(cls, values: object) -> RopeBand:
        """Inverse of `as_dict`.

        Raises:
            ValueError: no mapping, an unknown or missing field, or a value that cannot be used.
        """
        if not isinstance(values, Mapping) or not {"pairs", "rule"} <= set(values) <= {"pairs", "rule", "ntk_share"}:
            raise ValueError(f"a band is {values!r}, expected pairs, rule and, for mix, ntk_share")
        return cls(**values)


def divisors_of_bands(head_dim: int, factor: float, bands: Sequence[RopeBand]) -> tuple[float, ...]:
    """The divisor of each of the d/2 pairs.

    >>> divisors_of_bands(8, 8.0, [RopeBand(pairs=2, rule="none"), RopeBand(pairs=1, rule="ntk"), RopeBand(pairs=1, rule="linear")])
    (1.0, 1.0, 4.0, 8.0)

    Raises:
        ValueError: the bands do not have d/2 pairs together.
    """
    rules = [band for band in bands for _ in range(band.pairs)]
    if len(rules) != head_dim // 2:
        raise ValueError(f"the bands have {len(rules)} pairs, a head of {head_dim} has {head_dim // 2}")
    return tuple(band.divisor(head_dim, pair, factor) for pair, band in enumerate(rules))
