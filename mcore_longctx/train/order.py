"""The order of samples: a pure function of (seed, place), every sample once in each pass."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["SampleOrder"]

IntArray = npt.NDArray[np.int64]

_PASSES = 4  # whose order is kept: the end of one and the beginning of the next, for a step and the one that is read ahead
_WINDOW = 16  # steps whose samples are sorted together by what they cost


class SampleOrder:
    """Sample ids in the order of training, without end: pass after pass, each in an order of its own.

    With `costs`, samples that cost alike come in one step: 16 steps of the random order are sorted by cost and cut into steps again,
    and these steps are shuffled. Inside a step the costs fall, so that neighbours, which are computed side by side at whatever layout,
    are alike too. The idea is ProLong's (a window sorted by the sum of len^2, github.com/princeton-nlp/ProLong, training/dataset.py)
    and LongAlign's (sorted batching, arXiv 2401.18058 section 3.2).

    >>> order = SampleOrder(5, seed=1)
    >>> sorted(order[i] for i in range(5, 10))
    [0, 1, 2, 3, 4]

    Args:
        num_samples: of the data set.
        seed: of the order.
        costs: of each sample, float64 [num_samples]; None: the random order.
        step: samples of a step; with `costs` only.
    """

    def __init__(self, num_samples: int, *, seed: int, costs: npt.NDArray[np.float64] | None = None, step: int = 1) -> None:
        self.num_samples, self.seed, self.costs, self.step = num_samples, seed, costs, step
        # asked by the training loop and by the thread that reads ahead: safe in both, and a value is a pure function of its number
        self._order_of_pass = lru_cache(_PASSES)(self._permutation if costs is None else self._balanced)

    def __getitem__(self, index: int) -> int:
        """Id of the sample at a place (0 is the first of the first step)."""
        number, place = divmod(index, self.num_samples)
        return int(self._order_of_pass(number)[place])

    def pass_of(self, index: int) -> int:
        """Number of the pass that a place belongs to, from 0."""
        return index // self.num_samples

    def _permutation(self, number: int) -> IntArray:
        # raw Philox bits are the same in every numpy; Generator.permutation promises no such thing
        bits = np.random.Philox(np.random.SeedSequence([self.seed, number])).random_raw(self.num_samples)
        return np.argsort(bits, kind="stable").astype(np.int64)

    def _balanced(self, number: int) -> IntArray:
        drawn = self._permutation(number)
        # a step that the pass before has begun is filled first: from then on steps and blocks begin together
        lead = min(-number * self.num_samples % self.step, self.num_samples)
        blocks = [self._dearest_first(drawn[:lead])]
        window = _WINDOW * self.step
        for at in range(lead, self.num_samples, window):
            samples = self._dearest_first(drawn[at : at + window])
            whole = len(samples) // self.step
            bits = np.random.Philox(np.random.SeedSequence([self.seed, number, at])).random_raw(whole)
            blocks += [samples[i * self.step : (i + 1) * self.step] for i in np.argsort(bits, kind="stable").tolist()]
            blocks.append(samples[whole * self.step :])  # of the last window: the pass after this one fills it up
        return np.concatenate(blocks)

    def _dearest_first(self, samples: IntArray) -> IntArray:
        assert self.costs is not None
        return samples[np.argsort(-self.costs[samples], kind="stable")]
