"""How many tokens each group of documents gives: shares and budget in whole numbers, and what to say when a source is too small.

All arithmetic is exact (`fractions`): a share of 10^12 tokens holds to a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import DataSection

__all__ = ["Group", "apportion", "targets"]

IntArray = npt.NDArray[np.int64]


@dataclass(eq=False)
class Group:
    """What has a share of its own: a source, or the chunks of one length of a source."""

    name: str  # of the source
    source: int
    rows: slice  # of the table
    share: float | None
    chunk: int | None = None  # pieces of that many tokens; None: whole documents, which are packed
    longer: int | None = None  # documents of at least that many tokens belong to longer chunks
    is_class: bool = False  # one of the `chunks` of the recipe
    before: int = 0  # tokens before length sampling
    held: int = 0  # tokens after it, with separators; of pieces those that fill samples
    pieces: int = 0
    asked: Fraction | None = None  # share of the budget, None: all there is
    wanted: int | None = None  # tokens, with separators

    def pieces_of(self, length: IntArray) -> IntArray:
        """Pieces that documents of these lengths give, int64. The remainder of a document is dropped."""
        assert self.chunk is not None
        return np.where(length < self.longer, length // self.chunk, 0) if self.longer is not None else length // self.chunk

    def __str__(self) -> str:
        return f"source {self.name}" + (f", chunks of {self.chunk:,}" if self.is_class else "")


def targets(
    groups: Sequence[Group], section: DataSection, *, seq_length: int, between: int, budget: int | None
) -> list[int | None]:
    """Tokens that each group gives, separators included; None: all that it holds. Sets `asked` of the groups.

    Shares are those of the recipe. Without: in mode `fu` what each source holds before length sampling, else what it holds after.
    Pieces give whole samples, and all packed documents together give whole samples. Parts are rounded by largest remainders, so
    that they add up to the budget. Without a budget the total is what the scarcest group allows.

    Args:
        groups: with `before` and `held`.
        section: mode, shares, repeat_to_fill.
        seq_length: tokens of a sample.
        between: tokens of a separator that the last document of the packed stream does without.
        budget: tokens of the samples, or None.

    Raises:
        DataError: a group with a share holds nothing, or less than the budget asks of it and repeat_to_fill is off.
    """
    given = groups[0].share is not None
    if not given and section.mode != "fu" and budget is None:
        return [None] * len(groups)
    weights = [Fraction(group.share) if group.share is not None else Fraction(_own(group, section)) for group in groups]
    total = sum(weights)
    if not total:
        return [None] * len(groups)
    for group, weight in zip(groups, weights, strict=True):
        group.asked = weight / total
        if weight and not group.held:
            what = f"pieces of {group.chunk:,} tokens that fill a sample" if group.chunk is not None else "document"
            fix = "keep more short documents, or take the source out" if given else "change the length sampling"
            raise DataError(f"no {what} is left of this source after length sampling", where=group, fix=fix)
    if budget is None:
        scarcest = min(group.held / group.asked for group in groups if group.asked)
        return list(_split(groups, scarcest, seq_length, between, is_budget=False))
    wanted = _split(groups, Fraction(budget), seq_length, between, is_budget=True)
    scarce = [(Fraction(want, group.held), group, want) for group, want in zip(groups, wanted, strict=True) if want > group.held]
    if scarce and not section.repeat_to_fill:
        raise _too_small(groups, max(scarce, key=lambda row: row[0]), len(scarce), seq_length, between, given=given)
    return list(wanted)


def apportion(weights: Sequence[Fraction], total: int) -> list[int]:
    """`total` in whole parts that are proportional to the weights, largest remainders first."""
    exact = [weight * total / sum(weights) for weight in weights]
    parts = [math.floor(part) for part in exact]
    for index in sorted(range(len(parts)), key=lambda index: (parts[index] - exact[index], index))[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _own(group: Group, section: DataSection) -> int:
    return group.before if section.mode == "fu" else group.held


def _split(groups: Sequence[Group], total: Fraction, seq_length: int, between: int, *, is_budget: bool) -> list[int]:
    """`total` tokens by the shares. Without a budget everything is rounded down, so that no group gives more than it holds."""
    shares = [group.asked or Fraction(0) for group in groups]
    packed = [index for index, group in enumerate(groups) if group.chunk is None]
    cut = [index for index, group in enumerate(groups) if group.chunk is not None]
    parts = [0] * len(groups)
    together = sum((shares[index] for index in packed), Fraction(0))
    tokens = math.floor(total)
    if cut:
        weights = [shares[index] for index in cut] + [together]
        samples = math.floor(total / seq_length)
        counts = apportion(weights, samples) if is_budget else [math.floor(weight * total / seq_length) for weight in weights]
        for index, count in zip(cut, counts[:-1], strict=True):
            parts[index] = count * seq_length
        tokens = counts[-1] * seq_length
    if together:
        if is_budget:
            tokens += between
        for index, part in zip(packed, apportion([shares[index] for index in packed], tokens), strict=True):
            parts[index] = part
    return parts


def _too_small(
    groups: Sequence[Group], worst: tuple[Fraction, Group, int], count: int, seq_length: int, between: int, *, given: bool
) -> DataError:
    """What the scarcest group holds and lacks, in numbers, and the ways out."""
    times, group, want = worst
    assert group.asked is not None
    step = seq_length if any(group.chunk is not None for group in groups) else 1
    largest = math.floor(min(group.held / group.asked for group in groups if group.asked)) // step * step

    def is_enough(budget: int) -> bool:
        parts = _split(groups, Fraction(budget), seq_length, between, is_budget=True)
        return all(part <= group.held for part, group in zip(parts, groups, strict=True))

    while largest > 0 and not is_enough(largest):  # a few steps up or down: parts are rounded
        largest -= step
    while is_enough(largest + step):
        largest += step
    others = f" (and {count - 1} more would run short)" if count > 1 else ""
    share = f"its share {float(group.asked):.3g} of the token budget" if len(groups) > 1 else "the token budget"
    lower = "lower its share, " if given and len(groups) > 1 else ""
    return DataError(
        f"holds {group.held:,} tokens after length sampling, {share} asks for {want:,}: "
        f"they would be taken {float(times):.2f} times{others}",
        where=group,
        fix=f"set repeat_to_fill: true, {lower}or lower the budget to at most {max(0, largest):,} tokens",
    )


def shares_got(groups: Sequence[Group], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """For plan.json: what each group was asked for and what it gave. tokens: of each group in the samples."""
    total = sum(tokens)
    return [
        {
            "source": group.name,
            "chunk_length": group.chunk if group.is_class else None,
            "share_asked": None if group.asked is None else float(group.asked),
            "share_got": count / total if total else 0.0,
            "tokens_held": group.held,
            "tokens_asked": group.wanted,
            "tokens_got": count,
            "times_taken": round(group.wanted / group.held, 6) if group.wanted is not None and group.held else 1.0,
        }
        for group, count in zip(groups, tokens, strict=True)
    ]
