"""Positions with jumps: a sample of n tokens trains positions up to a target beyond n.

    pose      two stretches with one jump between them, at a random place (PoSE, arXiv 2309.10400 section 3)
    rpes      n of the target's positions, drawn without replacement, ascending (randomised positions, arXiv 2305.16843 section 3)
    segments  a random jump before every sentence, none inside (LongRecipe, arXiv 2409.00509 section 4.2)

Positions rise strictly, so "not later" means the same by position and by place: the causal mask stays what it is. They are a pure
function of (seed, sample, pass): another layout or a stop changes nothing, and each pass draws anew. The released code of LongRecipe
draws the cut of PoSE in 0..target - n, which is beyond the sample most of the time and leaves plain positions; here it is inside.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.tokenizers import Tokenizer
from mcore_longctx.recipe.stage import PositionsSection

__all__ = ["jumping_positions", "segment_lengths", "sentence_end_ids"]

IntArray = npt.NDArray[np.int64]

_SALT = 20  # apart from the order of samples, which is drawn from (seed, pass)
_ENDS = (".", "?", "!", "\n")


def jumping_positions(
    how: PositionsSection, count: int, *, seed: int, sample: int, number: int, segments: IntArray | None = None
) -> IntArray:
    """Positions of the tokens of one sample, int64 [count]: strictly rising, from 0 or above, below `how.target`.

    Args:
        how: type and target; a target of `count` leaves the plain positions.
        count: tokens of the sample, at most the target.
        seed: of the run.
        sample: its id in the data set.
        number: of the pass over the data.
        segments: tokens of each sentence, which add up to `count` (`segment_lengths`); type segments only.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, _SALT, number, sample]))
    free, places = int(how.target) - count, np.arange(count, dtype=np.int64)
    if how.type == "rpes":
        drawn = bits.random_raw(int(how.target))
        return np.flatnonzero(drawn <= np.partition(drawn, count - 1)[count - 1])[:count].astype(np.int64)
    if how.type == "pose":
        cut = 1 + int(_below(bits, 1, count - 1)[0]) if count > 1 else 1
        return places + np.where(places < cut, 0, _below(bits, 1, free + 1)[0])
    assert segments is not None
    jumps = np.sort(_below(bits, len(segments), free + 1))
    jumps[:1] = 0
    return places + np.repeat(jumps, segments)


def _below(bits: np.random.Philox, count: int, bound: int) -> IntArray:
    """Whole numbers from 0 to bound - 1, [count]. Raw bits are the same in every numpy, `Generator.integers` promises no such thing."""
    raw = bits.random_raw(count) >> np.uint64(11)
    return np.floor(raw.astype(np.float64) * 2.0**-53 * bound).astype(np.int64)


def segment_lengths(tokens: npt.NDArray[np.integer], end_ids: IntArray) -> IntArray:
    """Tokens of each sentence of a sample, int64, in order: a sentence goes up to its last end token.

    >>> segment_lengths(np.array([5, 1, 1, 7, 8, 1, 9]), np.array([1])).tolist()
    [3, 3, 1]
    """
    is_end = np.isin(tokens, end_ids)
    starts = np.flatnonzero(is_end[:-1] & ~is_end[1:]) + 1  # full stops and line breaks in a row end one sentence
    return np.diff(np.concatenate([[0], starts, [len(tokens)]])).astype(np.int64)


def sentence_end_ids(tokenizer: Tokenizer) -> IntArray:
    """Ids whose text ends in a full stop, a question mark, an exclamation mark or a line break, ascending."""
    found = [number for number in range(tokenizer.vocab_size) if tokenizer.decode([number]).rstrip(" ").endswith(_ENDS)]
    return np.array(found, np.int64)
